"""The class of `rollout.environment`: found before anything is started, made in the environment's own process."""

import inspect
from typing import Any

from core.faults import UserError
from core.reward_name import RewardName
from core.schema import Config


def refuse_missing(cfg: Config) -> None:
    """Raise UserError for a name that is none, or a file that is not there. Imports nothing of the user's."""
    given = cfg.rollout.environment
    if given is None:
        return
    try:
        name = RewardName.parse(given)
    except ValueError:
        name = None
    if name is None or name.is_url or name.adapter:
        raise UserError(f"rollout.environment = {given}: must be `path/file.py:Class` or `pkg.mod:Class`")
    if name.file is not None and not name.file.is_file():
        raise UserError(f"rollout.environment = {given}: there is no file {name.file}")


def check(cfg: Config) -> None:
    """Raise UserError where the class does not load, has no `step`, or does not take its options. Makes no object."""
    if cfg.rollout.environment is not None:
        _class_of(cfg.rollout.environment, cfg.rollout.environment_options)


def load(name: str, options: dict[str, Any]) -> Any:
    """The environment. Raises UserError as `check`, and what its constructor raises."""
    return _class_of(name, options)(**options)


def _class_of(name: str, options: dict[str, Any]) -> type:
    from reward_server.components import load_component

    try:
        found = load_component(name)
    except UserError as error:
        raise UserError(f"rollout.environment: {str(error).removeprefix('component ')}") from None
    if not inspect.isclass(found) or not callable(getattr(found, "step", None)):
        raise UserError(f"rollout.environment = {name}: must be a class with a method step(self, turns, columns)")
    try:
        inspect.signature(found).bind(**options)
        inspect.signature(found.step).bind(None, [], {})
    except TypeError as error:
        raise UserError(
            f"rollout.environment = {name}: {error}; the class takes rollout.environment_options, its step takes"
            " (turns, columns)"
        ) from None
    return found
