"""Reward functions that were written for other frameworks, called as they are called there.

`fn: verl:my_rewards.py:compute_score` and `fn: openrlhf:my_rewards.py:reward_func`. Both know sequences only: their
number goes to the last token.
"""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from core.faults import RewardFault
from reward_server.texts import Messages, text_of


def adapted(adapter: str, fn: Callable) -> type:
    """A component class around `fn`; its options are further arguments of each call, as `fn`'s own configuration."""
    return type(f"{adapter}_{getattr(fn, '__name__', 'reward')}", (_CLASSES[adapter],), {"fn": staticmethod(fn)})


class VerlFunction:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info, **options)`, one sample a call.

    It gets the columns `data_source` and `extra_info` of the row, and as ground truth `reward_model["ground_truth"]`,
    as verl's data has it, or the column `ground_truth`. It answers a number, or a dict with its number under `score`.
    """

    fn: ClassVar[Callable]

    def __init__(self, **options: Any) -> None:
        self._options = options

    def __call__(
        self,
        completions: list[str | Messages],
        data_source: list[Any] | None = None,
        reward_model: list[Any] | None = None,
        ground_truth: list[Any] | None = None,
        extra_info: list[Any] | None = None,
    ) -> Any:
        if reward_model is None and ground_truth is None:
            raise RewardFault("compute_score wants a column `reward_model` (with a ground_truth) or `ground_truth`")
        truths = ground_truth or [row["ground_truth"] for row in reward_model or []]
        none = [None] * len(completions)
        rows = zip(map(text_of, completions), data_source or none, truths, extra_info or none, strict=True)
        answers = [
            self.fn(data_source=source, solution_str=text, ground_truth=truth, extra_info=extra, **self._options)
            for text, source, truth, extra in rows
        ]
        if any(inspect.isawaitable(answer) for answer in answers):
            return _scores(answers)
        return [_score(answer) for answer in answers]


class OpenRLHFFunction:
    """OpenRLHF's `reward_func(queries, prompts, labels, **options)`; `queries` are prompt and response in one text.

    Labels are the column `label` (option `label_column`), None where there is none. It answers a list or tensor of one
    number per sample, or a dict that has that under `rewards`.
    """

    fn: ClassVar[Callable]

    def __init__(self, label_column: str = "label", **options: Any) -> None:
        self._label_column, self._options = label_column, options

    def __call__(self, prompts: list[str | Messages], completions: list[str | Messages], **columns: Any) -> list[float]:
        given = [text_of(prompt) for prompt in prompts]
        queries = [prompt + text_of(completion) for prompt, completion in zip(given, completions, strict=True)]
        labels = columns.get(self._label_column) or [None] * len(given)
        return rewards_of(self.fn(queries=queries, prompts=given, labels=labels, **self._options))


def rewards_of(answer: Any) -> Any:
    """The list in an answer of OpenRLHF's form: a list or tensor of numbers [B] or [B, 1], or a dict with `rewards`.

    What is neither is passed on as it is, to be refused by its name.
    """
    rewards = answer.get("rewards", answer) if isinstance(answer, dict) else answer
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if isinstance(rewards, list):
        return [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in rewards]
    return rewards


async def _scores(answers: list[Any]) -> list[Any]:
    return [_score(answer) for answer in await asyncio.gather(*answers)]


def _score(answer: Any) -> Any:
    return answer["score"] if isinstance(answer, dict) and "score" in answer else answer


_CLASSES = {"verl": VerlFunction, "openrlhf": OpenRLHFFunction}
