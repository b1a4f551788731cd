"""Code execution as a reward: the unit tests of the row, run on what the model wrote. Off unless it is asked for."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from core.faults import ProcessFault, RewardFault
from reward_server.components import ScoreRequest
from reward_server.placing import Span
from reward_server.sandbox import Level, Limits, Verdict, refuse_unavailable, run_tests
from reward_server.texts import text_of


class UnitTests:
    """The share of unit tests that the program passes, on the last line of its code; -`fine` on the line that raised.

    The program is the last ```python block of the response, or all of it where there is none. The tests are a column of
    the data: a list of statements such as "assert add(1, 2) == 3", or one text. A row without them is left out.

    Options: `allow_execution: true` says that programs of a model may run here at all. `level`: `strict` or `basic`
    (reward_server/sandbox.py tells what each prevents). `timeout_s` is for a program with all its tests, `memory_mb`
    for its process, `workers` is how many run at a time.
    """

    def __init__(
        self,
        allow_execution: bool = False,
        level: Level = "strict",
        tests_column: str = "tests",
        timeout_s: float = 5.0,
        memory_mb: int = 512,
        fine: float = 0.5,
        workers: int = 2,
    ) -> None:
        if allow_execution is not True:
            raise ValueError("it runs programs that a model wrote: say so with allow_execution: true")
        if level not in ("strict", "basic"):
            raise ValueError(f"level = {level!r}: strict or basic")
        if not 0 < timeout_s <= 600 or not 64 <= memory_mb or not 1 <= workers <= 64:
            raise ValueError("wants 0 < timeout_s <= 600, memory_mb of at least 64 and 1 to 64 workers")
        self._level, self._tests_column, self._fine, self._workers = level, tests_column, fine, workers
        self._limits = replace(Limits(), wall_s=timeout_s, cpu_s=int(timeout_s) + 1, memory_mb=memory_mb)

    def setup(self, device: str) -> None:
        """Makes one sandbox and looks at it. Raises UserError where this machine has none of the level."""
        refuse_unavailable(self._level)

    def score(self, batch: ScoreRequest) -> list[list[Span] | float | None | RewardFault]:
        tests = batch.columns.get(self._tests_column)
        if tests is None:
            raise RewardFault(f"the data has no column `{self._tests_column}` with unit tests (option tests_column)")
        texts = [text_of(completion) for completion in batch.completions]
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._one, texts, tests))

    def _one(self, text: str, tests: Any) -> list[Span] | float | None | RewardFault:
        if tests is None:
            return None
        tests = [tests] if isinstance(tests, str) else tests
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            return RewardFault(f"column `{self._tests_column}`: wants a list of statements, or one text, or null")
        start, program = program_in(text)
        try:
            verdict = run_tests(program, tests, self._limits, self._level)
        except ProcessFault as fault:  # of the sandbox: it says nothing about the program
            return RewardFault(str(fault))
        return self._reward(verdict, start, program, len(tests))

    def _reward(self, verdict: Verdict, start: int, program: str, n: int) -> list[Span] | float:
        lines = [m.span() for m in re.finditer(r"[^\n]+", program) if m[0].strip()]
        if not lines:
            return -self._fine
        spans = []
        if verdict.passed and any(verdict.passed):
            spans.append(Span(start + lines[-1][0], start + lines[-1][1], sum(verdict.passed) / n))
        if verdict.error:
            at = len(program[: lines[-1][1]].splitlines()) if verdict.line is None else verdict.line
            begin = sum(len(line) for line in program.splitlines(keepends=True)[: max(0, at - 1)])
            guilty = next((span for span in lines if span[0] >= begin), lines[-1])
            spans.append(Span(start + guilty[0], start + guilty[1], -self._fine))
        return spans


def program_in(text: str) -> tuple[int, str]:
    """(where it starts, the program): the last block of Python, else the whole text."""
    blocks = list(re.finditer(r"^```(?:python|py)[ \t]*\r?\n(.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE))
    return (blocks[-1].start(1), blocks[-1][1]) if blocks else (0, text)
