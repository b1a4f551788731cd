"""Which settings are secrets, by their names: what a configuration holds is in run folder, checkpoints and logs.

`is_secret` decides what is refused, so it must be sure; `may_be_secret` what trackers and reports do not show.
"""

import re
from typing import Any

_SURE = {"apikey", "passwd", "password", "passphrase", "secret", "credential", "credentials", "authorization"}
# Before `key` or `token`: `api_key` is a secret, `stop_token` and `sort_key` are none.
_OF_SECRETS = {"access", "api", "auth", "bearer", "hf", "hub", "login", "private", "ray", "reward", "secret", "wandb"}
_MAYBE = _SURE | {"key", "token"}
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9_.+/=-]{20,}")  # nobody calls a column or a stop token so


def _words(name: str) -> list[str]:
    """`api_key`, `apiKey` and `API-KEY` are two words."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def is_secret(name: str, value: Any) -> bool:
    """Whether `value` is a secret by the last part of its dotted key. `token_file` names no secret but where one is."""
    if value is None or value == "" or isinstance(value, bool | dict | list):
        return False
    *before, last = _words(name) or [""]
    if last in _SURE or (last in ("key", "token") and before[-1:] and before[-1] in _OF_SECRETS):
        return True
    return last in ("key", "token") and isinstance(value, str) and _RANDOM.fullmatch(value) is not None


def may_be_secret(name: str) -> bool:
    """Whether a word of the name is one that secrets have."""
    return bool(_MAYBE & set(_words(name)))
