"""Reward components: how they are named, called, and how their answers become one number per token.

A component is a function or a class. For a batch of completions it answers with one entry each:

    0.5                           a float goes to the last token
    [0.0, 0.1, -1.0]              a list of T floats, one per token
    [Span(0, 4, 1.0)]             scores for ranges of characters; [] is no range at all: zero everywhere
    None                          does not apply: masked, which is not zero

TRL's reward functions run unmodified: `f(prompts, completions, completion_ids, **columns)`. Ours may also take
`offsets`, `finish_reasons` and `action_masks`. A function gets those of these arguments that its signature names,
plain or `async`. A class gets its options once and is called like a function, or has `score(batch: ScoreRequest)`, and
may have `setup(device)`, where it loads what it needs, and `close()`.

Whatever goes wrong in a component becomes a RewardFault, never a number.

Legend: B samples, T response tokens (differs from sample to sample).
"""

import asyncio
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from core.faults import Fault, RewardFault, UserError
from core.reward_name import RewardName
from core.trajectory import FinishReason, Trajectory
from reward_server.adapters import adapted
from reward_server.placing import Observations, Span, Spans, place, shown
from reward_server.texts import Messages

Run = Callable[[Coroutine[Any, Any, Any]], Any]  # sees a coroutine to its end, as asyncio.run does
Placed = tuple[np.ndarray, np.ndarray]  # [T] float64 rewards, [T] bool mask
# What every component gets that wants it.
PASSED = ("prompts", "completions", "completion_ids", "offsets", "finish_reasons", "action_masks")


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What the components of one batch get to see. All lists have B entries, in the order of the answers.

    Example, one sample:

        prompt_ids      [array([17, 10, 17, 28])]  what the policy was given, chat template included
        prompts         ["2+2="]            or [[{"role": "user", "content": "2+2="}]]
        completions     ["4."]              then [[{"role": "assistant", "content": "4."}]]
        completion_ids  [array([19, 13, 0])]
        offsets         [array([[0, 1], [1, 2], [2, 2]])]
        finish_reasons  ["stop"]
        action_masks    [array([1, 1, 1])]  0 where an environment wrote: such tokens earn nothing
        uids            ["5b2f..."]
        columns         {"answer": ["4"]}   None in rows of the dataset that have no such column
    """

    prompts: list[str | Messages]
    completions: list[str | Messages]
    prompt_ids: list[np.ndarray]  # B x [P] int64
    completion_ids: list[np.ndarray]  # B x [T] int64; functions get lists
    offsets: list[np.ndarray]  # B x [T, 2] int64 code points of the completion's text
    finish_reasons: list[FinishReason]
    uids: list[str]
    columns: dict[str, list[Any]]
    action_masks: list[np.ndarray] = field(default_factory=list)  # B x [T] bool; all the policy's if none are given

    def __post_init__(self) -> None:
        """Raises UserError for a column with the name of an argument, ValueError for lists of unequal length."""
        for name in ("prompt_ids", "completion_ids", "offsets"):
            object.__setattr__(self, name, [_read_only(values) for values in getattr(self, name)])
        masks = self.action_masks or [np.ones(len(ids), dtype=bool) for ids in self.completion_ids]
        object.__setattr__(self, "action_masks", [_read_only(mask, np.bool_) for mask in masks])
        for name in self.columns:
            if name in PASSED or name == "prompt":
                raise UserError(
                    f"data column `{name}`: reward components get an argument of this name from tokenppo; "
                    f"rename the column (taken: prompt, {', '.join(PASSED)})"
                )
        named = {name: getattr(self, name) for name in (*PASSED, "prompt_ids")} | self.columns
        for name, values in named.items():
            if len(values) != len(self):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(self)} samples")

    def __len__(self) -> int:
        """Number of samples B."""
        return len(self.uids)

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> "ScoreRequest":
        """The request for finished responses; `texts[i]` is the text that the offsets of `trajectories[i]` count in."""
        rows = [trajectory.request.columns for trajectory in trajectories]
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        return cls(
            prompts=[row["prompt"] for row in rows],
            completions=[
                text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
                for row, text in zip(rows, texts, strict=True)
            ],
            prompt_ids=[trajectory.request.prompt_ids for trajectory in trajectories],
            completion_ids=[trajectory.response_ids for trajectory in trajectories],
            offsets=[trajectory.token_offsets for trajectory in trajectories],
            finish_reasons=[trajectory.finish_reason for trajectory in trajectories],
            action_masks=[trajectory.action_mask for trajectory in trajectories],
            uids=[trajectory.request.sample_uid for trajectory in trajectories],
            columns={name: [row.get(name) for row in rows] for name in names},
        )


class NotPerCompletion(RewardFault):
    """The answer has not one entry for each completion: it says nothing of any, and asked about one it might fit."""


def missing_arguments(fn: Callable, given: Iterable[str]) -> list[str]:
    """Names without a default that a reward function asks for and that neither we nor `given` have."""
    if inspect.isclass(fn):
        return []
    known = {*PASSED, *given}
    return [
        name
        for name, parameter in _parameters(fn).items()
        if parameter.default is parameter.empty and parameter.kind in _BY_NAME and name not in known
    ]


def check_options(component: str, fn: Callable, options: Iterable[str]) -> None:
    """Raise UserError for an option that the function, or the constructor of the class, does not take."""
    taken = () if inspect.isclass(fn) else PASSED
    parameters = _parameters(fn)
    names = [name for name, parameter in parameters.items() if parameter.kind in _BY_NAME and name not in taken]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option in taken or (option not in names and not takes_any):
            raise UserError(f"rewards.{component}: {_label(fn)} has no option `{option}`{_nearest(option, names)}")


class Component:
    """One named reward: a function that gets `options` with each call, or an object of a class that gets them once.

    Raises UserError at birth where the options do not fit.
    """

    def __init__(
        self,
        name: str,
        fn: Callable,
        options: dict[str, Any] | None = None,
        *,
        spans: Spans = "spread",
        observations: Observations = "refuse",
    ) -> None:
        self.name, self._placing = name, {"component": name, "spans": spans, "observations": observations}
        self._options = dict(options or {})
        check_options(name, fn, self._options)
        if inspect.isclass(fn):
            if getattr(fn, "wants_component_name", False):
                self._options.setdefault("component", name)
            try:
                fn = fn(**self._options)
            except Exception as error:
                raise UserError(f"rewards.{name}: {_label(fn)}(**options) {_raised(error, _file_of(fn))}") from None
            self._options = {}
        takes_batch = not inspect.isroutine(fn) and callable(getattr(fn, "score", None))
        if not takes_batch and not callable(fn):
            raise UserError(
                f"rewards.{name}: a {type(fn).__name__} cannot be called; give its class a __call__ or a score(batch)"
            )
        self._fn, self._takes_batch = fn, takes_batch

    @property
    def fn(self) -> Callable:
        """The function, or the object of the class."""
        return self._fn

    def setup(self, device: str) -> None:
        """Let it load what it needs, once, before the first batch. Raises UserError where it cannot."""
        setup = getattr(self._fn, "setup", None)
        if callable(setup):
            try:
                setup(device)
            except Fault:
                raise
            except Exception as error:
                said = _raised(error, _file_of(self._fn))
                raise UserError(f"rewards.{self.name}: {_label(self._fn)}.setup({device!r}) {said}") from None

    def close(self, run: Run = asyncio.run) -> None:
        """Let it go of what it holds. `run` sees an `async` close to its end."""
        close = getattr(self._fn, "close", None)
        ending = close() if callable(close) else None
        if inspect.iscoroutine(ending):
            run(ending)

    def begin(self, batch: ScoreRequest) -> Any:
        """Call it: its answer, or the awaitable of an `async` one. Raises RewardFault where it raises."""
        arguments = {} if self._takes_batch else self._arguments(batch)
        try:
            return self._fn.score(batch) if self._takes_batch else self._fn(**arguments)
        except Exception as error:  # not SystemExit: that is how a worker is told to end
            raise self.raised(error) from None

    def raised(self, error: BaseException) -> RewardFault:
        """The fault for what calling or awaiting it raised."""
        if isinstance(error, RewardFault):
            return self._fault(str(error))
        return self._fault(f"{_label(self._fn)} {_raised(error, _file_of(self._fn))}")

    def entries(self, answer: Any, batch: ScoreRequest) -> list[Any]:
        """The B entries of an answer, as they are. Raises NotPerCompletion where it has not B."""
        is_list = isinstance(answer, (list, tuple)) and not isinstance(answer, Span)
        if not is_list and not (hasattr(answer, "tolist") and getattr(answer, "ndim", 0) > 0):
            got = shown(answer)
            raise NotPerCompletion(
                f"component {self.name!r}: answered {got}; wanted is a list, one entry per completion"
            )
        if len(answer) != len(batch):
            got = f"{len(answer)} entries for {len(batch)} completions"
            raise NotPerCompletion(f"component {self.name!r}: answered {got}; one for each is wanted")
        return list(answer)

    def place(self, answer: Any, batch: ScoreRequest) -> list[Placed | RewardFault]:
        """What it answered, token by token, or the fault of a sample in its place; never raises for what it did."""
        try:
            entries = self.entries(answer, batch)
        except RewardFault as fault:
            return of_each(fault, batch)
        placed: list[Placed | RewardFault] = []
        for entry, offsets, uid, mask in zip(entries, batch.offsets, batch.uids, batch.action_masks, strict=True):
            try:
                placed.append(place(entry, offsets, uid=uid, action_mask=mask, **self._placing))
            except RewardFault as fault:
                placed.append(fault)
        return placed

    def _arguments(self, batch: ScoreRequest) -> dict[str, Any]:
        """Keyword arguments of one call, cut to the signature; copies, so that no component writes into another's."""
        for name in batch.columns:
            if name in self._options:
                raise self._fault(f"`{name}` is both an option of it and a column of the data; rename one")
        offered: dict[str, Any] = {name: getattr(batch, name) for name in PASSED} | batch.columns
        parameters = _parameters(self._fn)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            offered = {name: values for name, values in offered.items() if name in parameters}
        for name, parameter in parameters.items():
            required = parameter.default is parameter.empty and parameter.kind in _BY_NAME
            if required and name not in offered and name not in self._options:
                raise self._fault(
                    f"{_label(self._fn)} wants `{name}`, which is no column of the data and no option"
                    f"{_nearest(name, [*batch.columns, *PASSED])}"
                )
        return {name: _copied(name, values) for name, values in offered.items()} | self._options

    def _fault(self, reason: str) -> RewardFault:
        return RewardFault(f"component {self.name!r}: {reason}")


def of_each(fault: RewardFault, batch: ScoreRequest) -> list[Placed | RewardFault]:
    """A fault of the whole call as that of every sample."""
    return [type(fault)(f"sample {uid}: {fault}") for uid in batch.uids]


def score_components(
    components: Iterable[Component], batch: ScoreRequest, run: Run = asyncio.run
) -> dict[str, list[Placed | RewardFault]]:
    """By component, for each of the B samples its rewards and mask ([T] float64, [T] bool), or its fault instead.

    Never raises for what a component does. A fault of the call (an exception, a wrong number of entries) is that of
    every sample; a fault in one entry is that of its sample alone. Each names the component and the sample. `async`
    components wait beside each other, on the event loop of `run`.
    """
    components, answers = list(components), {}
    for component in components:
        try:
            answers[component.name] = component.begin(batch)
        except RewardFault as fault:
            answers[component.name] = fault
    waiting = [component for component in components if inspect.isawaitable(answers[component.name])]
    if waiting:
        for component, answer in zip(waiting, run(_all([answers[c.name] for c in waiting])), strict=True):
            answers[component.name] = component.raised(answer) if isinstance(answer, BaseException) else answer
    return {
        component.name: of_each(answer, batch) if isinstance(answer, RewardFault) else component.place(answer, batch)
        for component, answer in ((c, answers[c.name]) for c in components)
    }


def load_component(spec: str) -> Callable:
    """The function or class that `pkg.mod:fn` or `path/file.py:fn` names.

    A file is loaded once per process under a module name of its own; `sys.path` stays as it is, so a file that
    imports its neighbour must be part of an installed package. Raises UserError, in one line, where there is no such
    file, module or name, where importing it raises, and where the name is nothing that can be called.
    """
    try:
        name = RewardName.parse(spec)
    except ValueError as error:
        raise UserError(f"component `{spec}`: {error}") from None
    if name.is_url:
        try:
            from reward_server.http_client import at
        except ImportError as error:  # an extra, for those who have a server
            raise UserError(
                f"component `{spec}`: wants {error.name}, which is not installed: pip install 'tokenppo[server]'"
            ) from None
        return at(name)
    target, attribute = name.target, name.attribute
    module = _module_of_file(spec, name.file) if name.file is not None else _module_by_name(spec, target)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"component `{spec}`: {target} has no `{attribute}`{_nearest(attribute, names)}")
    fn = getattr(module, attribute)
    if not callable(fn):
        raise UserError(f"component `{spec}`: `{attribute}` is a {type(fn).__name__}, not a function or class")
    return adapted(name.adapter, fn) if name.adapter else fn


def _module_of_file(spec: str, path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        neighbours = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"component `{spec}`: there is no file {path}{_nearest(path.name, neighbours)}")
    name = f"component_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    file_spec = importlib.util.spec_from_file_location(name, path)
    if file_spec is None or file_spec.loader is None:
        raise UserError(f"component `{spec}`: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        file_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"component `{spec}`: importing {path} {_raised(error, str(path))}") from None
    return module


def _module_by_name(spec: str, name: str) -> ModuleType:
    file = None
    try:
        found = importlib.util.find_spec(name)
        file = found.origin if found else None
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"component `{spec}`: no module named {error.name!r} is installed; a file is named `path/file.py:fn`"
            ) from None
        raise UserError(f"component `{spec}`: importing {name} {_raised(error, file)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"component `{spec}`: importing {name} {_raised(error, file)}") from None


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ANYTHING = {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _parameters(fn: Callable) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(fn).parameters)
    except (TypeError, ValueError):  # some functions written in C do not tell
        return _ANYTHING


def _copied(name: str, values: list[Any]) -> list[Any]:
    """Lists and dicts of an argument anew, arrays read-only, anything else as it is."""
    if name in ("offsets", "action_masks"):
        return list(values)
    if name == "completion_ids":
        return [ids.tolist() for ids in values]
    return _deep(values)


def _read_only(values: Any, dtype: type = np.int64) -> np.ndarray:
    """A view that no component can write into: all of them see the same."""
    array = np.asarray(values, dtype=dtype).view()
    array.flags.writeable = False
    return array


def _deep(value: Any) -> Any:
    if isinstance(value, list):
        return [_deep(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _deep(entry) for key, entry in value.items()}
    return value


async def _all(answers: Iterable[Awaitable[Any]]) -> list[Any]:
    """What each comes to, exceptions included."""
    return await asyncio.gather(*answers, return_exceptions=True)


def _nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about `name`: what may have been meant, else what there is."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; there is {', '.join(sorted(names)[:12])}" if names else ""


def _label(fn: Callable) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def _file_of(fn: Callable) -> str | None:
    """The source file of a function, class or callable object, as its frames name it."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = inspect.unwrap(fn)
    fn = fn.__init__ if inspect.isclass(fn) else fn
    code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)
    return code.co_filename if code else None


def _raised(error: BaseException, file: str | None) -> str:
    """`raised KeyError: 'answer' (rewards.py:12, in score)`: the innermost line in `file`, else their outermost."""
    message = " ".join(str(error).split())
    message = message if len(message) <= 300 else f"{message[:297]}..."
    text = f"raised {type(error).__name__}: {message}" if message else f"raised {type(error).__name__}"
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{text} ({error.filename}:{error.lineno})"
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [
        (code, line) for code, line in frames if code.co_filename not in _OURS and "<frozen" not in code.co_filename
    ]
    there = [(code, line) for code, line in theirs if code.co_filename == file][-1:] or theirs[:1]
    return f"{text} ({there[0][0].co_filename}:{there[0][1]}, in {there[0][0].co_name})" if there else text


_OURS = (_raised.__code__.co_filename, importlib.__file__)
