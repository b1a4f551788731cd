"""Golden vectors of the PPO maths: feed a stored case to the function under test and compare with the stored numbers.

The numbers in `golden/*.json` come from the published code of other PPO implementations run in float64, each recomputed
by an independent oracle; every file names its sources. The function is looked up in its module at each call, so a test
may replace it and watch the check fail.

B samples, T response tokens, V vocabulary. Scaled difference: |got - want| / max(1, |want|).
"""

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CASES_PER_FILE = {
    "compute_gae": 40,
    "compute_gae_bootstrap": 40,
    "whiten": 40,
    "masked_mean": 40,
    "policy_loss": 48,
    "value_loss": 40,
    "kl_estimate": 42,
    "shape_rewards": 40,
    "logprobs_from_logits": 40,
    "entropy_from_logits": 40,
}
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
MASKS = {"mask", "response_mask"}
OPTIONAL_STATS = {"vf_clipfrac"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One stored case. `record` holds args, kwargs, expected and, for some log-prob cases, grad_weights."""

    module: str
    function: str
    name: str
    record: dict[str, Any]


@functools.cache
def load(file: str) -> tuple[Case, ...]:
    """The cases of `golden/<file>.json`."""
    document = json.loads((Path(__file__).with_name("golden") / f"{file}.json").read_text(encoding="utf-8"))
    assert document["format"] == 1, f"{file}.json has format {document['format']}, this reader knows 1"
    return tuple(
        Case(module=document["module"], function=document["function"], name=record["name"], record=record)
        for record in document["cases"]
    )


def first_failure(file: str) -> str | None:
    """What the first failing case of a file says, in either dtype; None if all pass. A crash propagates."""
    for case in load(file):
        for dtype in LIMITS:
            try:
                check(case, dtype)
            except AssertionError as error:
                return str(error)
    return None


def check(case: Case, dtype: torch.dtype) -> None:
    """Raise AssertionError unless the function under test gives the stored numbers for this case in this dtype."""
    outputs, stats, tensors = call(case, dtype)
    mask = next((tensors[name] for name in MASKS if name in tensors), None)
    for name, want in case.record["expected"].items():
        if name == "stats":
            _check_stats(case, stats, want, LIMITS[dtype])
            continue
        got = outputs[name]
        assert got.dtype == dtype, f"{case.name} {name}: {dtype} in, {got.dtype} out"
        _check_numbers(f"{case.name} {name}", got, want, LIMITS[dtype])
        if mask is not None and got.shape == mask.shape:
            assert bool((got[~mask] == 0).all()), f"{case.name} {name}: a masked position is not exactly 0"


def call(case: Case, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """Call the function under test; returns (outputs by their name in `expected`, stats, input tensors)."""
    expected = case.record["expected"]
    tensors = {name: _tensor(name, rows, dtype) for name, rows in case.record["args"].items()}
    kwargs = dict(case.record["kwargs"])
    if kwargs.get("bootstrap_values") is not None:
        kwargs["bootstrap_values"] = torch.tensor(kwargs["bootstrap_values"], dtype=dtype)
    watched = [name.removeprefix("grad_") for name in expected if name.startswith("grad_")]
    for name in watched:
        tensors[name].requires_grad_(True)

    answer = getattr(importlib.import_module(case.module), case.function)(**tensors, **kwargs)

    stats: dict[str, Any] = {}
    names = [name for name in expected if name != "stats" and not name.startswith("grad_")]
    if "stats" in expected:
        loss, stats = answer
        answer = (loss,)
    elif len(names) == 1:
        answer = (answer,)
    outputs = dict(zip(names, answer, strict=True))
    for name in watched:
        weights = torch.tensor(case.record.get("grad_weights", 1.0), dtype=dtype)
        objective = (weights * outputs[names[0]]).sum()
        assert objective.requires_grad, f"{case.name}: {names[0]} is not differentiable in {name}"
        (outputs[f"grad_{name}"],) = torch.autograd.grad(objective, [tensors[name]])
    return outputs, stats, tensors


def _tensor(name: str, rows: list[Any], dtype: torch.dtype) -> torch.Tensor:
    if name in MASKS:
        return torch.tensor(rows, dtype=torch.bool)
    return torch.tensor(rows, dtype=torch.int64 if name == "ids" else dtype)


def _check_stats(case: Case, stats: dict[str, Any], want: dict[str, float], limit: float) -> None:
    for name, number in want.items():
        if name in OPTIONAL_STATS and name not in stats:
            continue
        assert name in stats, f"{case.name}: stats have {sorted(stats)}, not {name}"
        _check_numbers(f"{case.name} {name}", torch.as_tensor(stats[name]), number, limit)


def _check_numbers(what: str, got: torch.Tensor, want: Any, limit: float) -> None:
    wanted = torch.tensor(want, dtype=torch.float64)
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    got = got.detach().double()
    assert bool(torch.isfinite(got).all()), f"{what}: not finite: {got.tolist()}"
    worst = float(((got - wanted).abs() / wanted.abs().clamp(min=1.0)).max())
    assert worst <= limit, f"{what}: scaled difference {worst:.3g} is above {limit:g}"
