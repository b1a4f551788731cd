"""Random batches for the PPO maths, and its masked functions called in one way.

B samples, T response tokens, V vocabulary. "Valid" tokens are those with mask 1.
"""

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st

from trainer import ppo

HOLE = -777.0  # stands at masked slots, where nothing may read it
LN2 = math.log(2)

few = settings(max_examples=60, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31)
unit = st.floats(0.0, 1.0)


def f64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def logs(probabilities) -> torch.Tensor:
    return f64(probabilities).log()


def close(got, want, tolerance=1e-12) -> None:
    """Equal within tolerance * max(1, |want|), shapes included."""
    got = got.detach().double() if isinstance(got, torch.Tensor) else torch.tensor(got, dtype=torch.float64)
    want = torch.as_tensor(want, dtype=torch.float64).detach()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    excess = (got - want).abs() - tolerance * want.abs().clamp(min=1.0)
    assert bool((excess <= 0).all()), f"got {got.tolist()}, want {want.tolist()} within {tolerance:g}"


def random_rows(shape, seed, *, grid=False) -> torch.Tensor:
    """[B, T] numbers; on a grid of quarters they meet zeros and ties."""
    generator = torch.Generator().manual_seed(seed)
    if grid:
        return torch.randint(-8, 9, shape, generator=generator).double() / 4
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# the masked functions, called in one way

# name -> (its float arguments; of these the ones whose gradient training uses)
MASKED = {
    "compute_gae": (("rewards", "values", "bootstrap_values"), ()),
    "whiten": (("x",), ()),
    "masked_mean": (("x",), ("x",)),
    "policy_loss": (("logprobs", "old_logprobs", "advantages"), ("logprobs",)),
    "value_loss": (("values", "old_values", "returns"), ("values",)),
    "shape_rewards": (("token_rewards", "old_logprobs", "ref_logprobs"), ()),
}
MASK_NAMES = {"whiten": "mask", "masked_mean": "mask"}
OPTIONS = {
    "compute_gae": {"gamma": 0.97, "gae_lambda": 0.9},
    "policy_loss": {"cliprange": 0.2, "cliprange_high": 0.3, "dual_clip": 2.0},
    "value_loss": {"cliprange_value": 0.2},
    "shape_rewards": {"kl_coef": 0.3, "estimator": "k3"},
}
OUTPUTS = {
    "compute_gae": ("advantages", "returns"),
    "whiten": ("whitened",),
    "masked_mean": ("mean",),
    "policy_loss": ("loss", "stats"),
    "value_loss": ("loss", "stats"),
    "shape_rewards": ("rewards",),
}


def inputs_of(name, shape, seed, *, grid=False) -> dict[str, torch.Tensor]:
    """Random arguments of a masked function: [B, T], and [B] for the bootstrap values."""
    return {
        argument: random_rows(shape[:1] if argument == "bootstrap_values" else shape, seed + 7919 * index, grid=grid)
        for index, argument in enumerate(MASKED[name][0])
    }


def evaluate(name, inputs, mask) -> dict[str, torch.Tensor]:
    """All that a masked function gives: its outputs, stats and gradients, by name.

    The gradient is that of the sum of cubes of the outputs (the sum and the sum of squares are fixed by whitening).
    """
    leaves = {argument: tensor.clone().requires_grad_(True) for argument, tensor in inputs.items()}
    answer = getattr(ppo, name)(**leaves, **{MASK_NAMES.get(name, "response_mask"): mask}, **OPTIONS.get(name, {}))
    answer = answer if isinstance(answer, tuple) else (answer,)
    found: dict[str, torch.Tensor] = {}
    objective = None
    for output_name, output in zip(OUTPUTS[name], answer, strict=True):
        if output_name == "stats":
            found |= {stat: torch.as_tensor(number).double().detach() for stat, number in output.items()}
            continue
        found[output_name] = output.detach()
        if output.requires_grad:
            objective = (output**3).sum() + (0 if objective is None else objective)
    must_have = MASKED[name][1]
    assert objective is not None or not must_have, f"{name} is not differentiable"
    if objective is not None:
        gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
        for argument, gradient in zip(leaves, gradients, strict=True):
            assert gradient is not None or argument not in must_have, f"{name} is not differentiable in {argument}"
            if gradient is not None:
                found[f"grad_{argument}"] = gradient
    return found


# layouts: the same tokens at other positions


@st.composite
def ragged(draw):
    """(lengths, slots, width): the number of valid tokens of each row, and the positions they take in a wider batch."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    width = max(1, *lengths) + draw(st.integers(0, 4))
    slots = [sorted(draw(st.permutations(range(width)))[:length]) for length in lengths]
    return lengths, slots, width


def at_start(lengths):
    return [list(range(length)) for length in lengths]


def at_end(lengths, width):
    return [list(range(width - length, width)) for length in lengths]


def mask_at(slots, width) -> torch.Tensor:
    mask = torch.zeros(len(slots), width, dtype=torch.bool)
    for row, positions in enumerate(slots):
        mask[row, positions] = True
    return mask


def move(tensor, old_slots, slots, width, *, filler=HOLE) -> torch.Tensor:
    """The same numbers per row at other positions; [B] tensors stay as they are."""
    if tensor.dim() == 1:
        return tensor
    moved = torch.full((len(slots), width), filler, dtype=tensor.dtype)
    for row, (old, new) in enumerate(zip(old_slots, slots, strict=True)):
        moved[row, new] = tensor[row, old]
    return moved


def assert_same_after_move(name, inputs, old_slots, old_width, slots, width):
    before = evaluate(name, inputs, mask_at(old_slots, old_width))
    moved = {argument: move(tensor, old_slots, slots, width) for argument, tensor in inputs.items()}
    after = evaluate(name, moved, mask_at(slots, width))
    assert before.keys() == after.keys()
    for output, want in before.items():
        if want.dim() == 2:
            want = move(want, old_slots, slots, width, filler=0.0)  # and zero on every masked slot
        close(after[output], want)


# right padding, left padding, holes, padding on both sides and a hole, no valid token, all valid
POISON_MASK = mask_of(
    [
        [1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [1, 0, 0, 1, 0, 1],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
)
