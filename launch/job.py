"""Job: what every learner process of a run has once the launch and the input were found good."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from core.schema import Config
from rollout.prompts import PromptStream
from rollout.shares import Rollouts, Shares
from trainer.ranks import Ranks
from trainer.weight_sender import WeightTransport


@dataclass(frozen=True, kw_only=True)
class Inline:
    """Parts that a script hands over as objects, where a config file would name them."""

    functions: dict[str, Callable] | None = None  # component name -> reward function
    rows: list[dict[str, Any]] | None = None  # instead of what data.path holds; written there for the record
    eval_rows: list[dict[str, Any]] | None = None
    make_transport: Callable[[Rollouts, float], WeightTransport] | None = None  # instead of the object store


NOTHING = Inline()  # all is named in the configuration


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank has once the launch and the input were found good."""

    cfg: Config
    inline: Inline
    accelerator: Accelerator
    ranks: Ranks
    console: Console
    tokenizer: Any
    prompts: PromptStream
    held_out: PromptStream | None
    share: Shares

    @property
    def folder(self) -> Path:
        return self.cfg.run.folder
