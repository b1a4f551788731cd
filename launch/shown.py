"""The settings of a run as other people may see them: in trackers, on a model card."""

import re
from typing import Any

from core.config import OPTION
from core.schema import Config
from core.secret_names import may_be_secret
from launch import run_folder

HIDDEN = "(hidden)"


def shown(cfg: Config) -> dict[str, Any]:
    """The flat configuration as trackers may see it: no option with a secret's name, no password in a URL.

    Options of rewards and of the environment are the only free names: `rewards.judge.options.api_key` and `apiKey` are
    secrets, a component that is called `key`, or `data.max_prompt_tokens`, is none.
    """
    return {key: _clean("".join(OPTION.split(key, 1)[1:]), value) for key, value in run_folder.flat(cfg).items()}


def _clean(key: str, value: Any) -> Any:
    if may_be_secret(key) and value is not None:
        return HIDDEN
    if isinstance(value, dict):
        return {name: _clean(str(name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean("", item) for item in value]
    return re.sub(r"://[^/@\s]+@", f"://{HIDDEN}@", value) if isinstance(value, str) else value
