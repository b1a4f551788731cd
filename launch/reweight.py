"""`tokenppo reweight RUN --rewards.quality.weight 2`: a step that was taken, with other weights.

The ledger has what every token of a step got from every component, before any weight. So the way from there to the
advantages is walked again, by the code of training (core/combine.py, trainer/loop.py: credit), under another
configuration, and compared with the same way under the run's own: which tokens would have been praised or blamed
instead, and where the policy gradient would have pointed.

Directions are compared by cosines, over tokens (as if every token had a parameter of its own), or with --gradient over
the parameters of the model, as sums over tokens of advantage times gradient of log-prob. `alone` is the direction that
one component would have given by itself; a step along a direction improves a component as its cosine with that.

What stays as it was: the responses, which the policy of then wrote, and the values of a critic that had learnt the old
rewards. It says where the next step would have gone, not where a training would have ended: `tokenppo sweep` does.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console
from torch import Tensor

from core import ledger_table, trajectory_table
from core.combine import RunningMoments, combine, weights_at
from core.config import load
from core.faults import UserError
from core.schema import Config
from launch import run_folder
from trainer import estimators
from trainer.batch import TrainBatch
from trainer.credit import padded
from trainer.loop import credit
from trainer.model import PolicyWithValueHead, inputs_of, load_causal_lm

OF_PPO = ("gamma", "gae_lambda", "lambda_alpha", "kl_coef", "scale_rewards", "whiten_advantages")
OF_REWARDS = ("weight", "normalize", "clip")
LARGEST = 8  # tokens that are shown
SAME = 1e-3  # between advantages of the ledger, deviation 1, and the same made again; with value heads they are not
ROWS = 8  # responses of one forward


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a configuration makes of a step. R responses, T tokens, of which N are the policy's."""

    weights: dict[str, float]
    shares: dict[str, float]  # of each component in the absolute rewards of tokens
    advantages: Tensor  # [R, T] float64, as the losses would read them


@dataclass(frozen=True)
class Step:
    """What was recorded of a step."""

    number: int
    rows: pa.Table
    said: dict[str, Any]
    batch: TrainBatch  # R rows, annotated and without rewards

    @classmethod
    def read(cls, run: Path, number: int | None, cfg: Config) -> "Step":
        """`number`: the last that was recorded if None. Raises UserError where there is none."""
        if number is None:
            kept = ledger_table.files(run)
            if not kept:
                raise UserError(f"{run / ledger_table.FOLDER}: is empty; log.ledger is the share of prompts it keeps")
            number = ledger_table.step_of(kept[-1])
        rows, said = ledger_table.read(run, number)
        plain = rows.select(trajectory_table.SCHEMA.names)
        batch = TrainBatch.collate(trajectory_table.from_table(plain), cfg.rewards)
        names = ("old_logprobs", "values", *(["ref_logprobs"] if batch.ref_logprobs is None else []))
        columns = {name: padded(rows, name).float() for name in names}
        bootstrap = torch.tensor(rows["bootstrap_value"].to_pylist(), dtype=torch.float32)
        return cls(number, rows, said[0], batch.fill(**columns, bootstrap_values=bootstrap))

    def under(self, cfg: Config, overrides: Iterable[str] = ()) -> Outcome:
        """Its advantages under a configuration. `overrides`: keys whose value the configuration has, whatever the run
        had made of them by then (multipliers, an adaptive kl_coef)."""
        before, batch = self.said["before"], self.batch
        moved = {n: x for n, x in before["multipliers"].items() if f"rewards.{n}.weight" not in overrides}
        weights = weights_at(self.number, cfg.rewards, moved)
        running = {name: RunningMoments(**x) for name, x in before["running"].items()}
        raw, applies, mask = batch.component_rewards, batch.component_mask, batch.response_mask
        combined = combine(raw, applies, mask, cfg.rewards, running, weights=weights)
        filled = batch.fill(token_rewards=combined.token_rewards, normalized_rewards=combined.normalized)
        kl_coef = cfg.ppo.kl_coef if "ppo.kl_coef" in overrides else before["kl_coef"]
        advantages = credit(cfg, filled, kl_coef, lambda sums: sums, weights=weights, running=running).advantages
        paid = {name: float(x.abs().sum()) for name, x in combined.weighted.items()}
        whole = sum(paid.values())
        return Outcome(
            weights=weights,
            shares={name: x / whole if whole else 0.0 for name, x in paid.items()},
            advantages=advantages.double(),
        )

    def alone(self, cfg: Config) -> dict[str, Tensor]:
        """Name -> [R, T] float64: the advantages that each component would give by itself, without critic and KL."""
        before, batch, mask = self.said["before"], self.batch, self.batch.response_mask
        running = {name: RunningMoments(**x) for name, x in before["running"].items()}
        normalized = combine(batch.component_rewards, batch.component_mask, mask, cfg.rewards, running).normalized
        groups, out = torch.from_numpy(batch.order[:, 0]), {}
        for name, rewards in normalized.items():
            rewards = rewards.double()
            found = estimators.estimate(cfg.ppo, rewards, torch.zeros_like(rewards), mask, groups=groups)
            advantages = found.advantages
            if cfg.ppo.whitens:
                advantages = torch.where(mask, advantages - advantages[mask].mean(), 0.0)
            out[name] = advantages
        return out


def cosine(a: Tensor, b: Tensor) -> float:
    """nan where one of them is nothing."""
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size else math.nan


def gradients(step: Step, cfg: Config, path: str, directions: list[Tensor]) -> list[Tensor]:
    """sum_t direction_t * gradient of log-prob_t, for each [R, T] of `directions`: flat, over all parameters."""
    model_config = cfg.model.model_copy(update={"value": "shared", "value_path": None, "lora_rank": 0})
    model = PolicyWithValueHead(load_causal_lm(path, "cpu"), model_config)
    parameters = [p for p in model.lm.parameters() if p.requires_grad]
    sums = [torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64) for _ in directions]
    for first in range(0, len(step.batch), ROWS):
        index = torch.arange(first, min(first + ROWS, len(step.batch)))
        some = step.batch.rows(index.numpy())
        inputs, width = inputs_of(some, torch.device("cpu"), packed=model.reader.packed), some.response_mask.shape[1]
        for total, direction in zip(sums, directions, strict=True):
            of_tokens = direction[index, :width][some.response_mask]  # [M]

            def loss(logprobs: Tensor, entropy: Tensor | None, at: slice, of_tokens: Tensor = of_tokens):
                return (of_tokens[at].to(logprobs.dtype) * logprobs).sum(), {}

            of_loss = torch.autograd.grad(
                model(inputs, cfg.rollout.temperature, loss)[0], parameters, allow_unused=True
            )
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, of_loss, strict=True)]
            total += torch.cat([g.flatten() for g in found]).double()
    return sums


def pareto(points: list[list[float]]) -> list[bool]:
    """Whether no other point is as large in every coordinate and larger in one."""

    def beats(a: list[float], b: list[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    return [not any(beats(other, point) for other in points) for point in points]


def reweight(
    run: Path,
    overrides: dict[str, Any],
    *,
    step: int | None = None,
    grid: dict[str, list[float]] | None = None,
    weights: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The comparison as one JSON object; see `main` for what is in it.

    Args:
        overrides: dotted key -> value, of `rewards.NAME.{weight,normalize,clip}` and OF_PPO.
        grid: component -> weights that are tried, each with each; instead of or beside `overrides`.
        weights: base, best or final: of the model whose gradients are compared; over tokens if None.
    """
    cfg = run_folder.configuration(run)
    grid = grid or {}
    if not overrides and not grid:
        raise UserError("reweight: nothing to change; give --rewards.NAME.weight VALUE, or --grid NAME=0.5,1,2")
    for name in grid:
        if name not in cfg.rewards:
            raise UserError(f"--grid {name}: the run has no such component, it has {', '.join(cfg.rewards)}")
    for key in overrides:
        head, _, leaf = key.rpartition(".")
        if head.startswith("rewards.") and head.removeprefix("rewards.") not in cfg.rewards:
            raise UserError(f"--{key}: the run has no such component, it has {', '.join(cfg.rewards)}")
        if not (head.startswith("rewards.") and leaf in OF_REWARDS) and not (head == "ppo" and leaf in OF_PPO):
            raise UserError(
                f"--{key}: no part of the way from rewards to advantages; what can be changed is"
                f" rewards.NAME.{{{','.join(OF_REWARDS)}}} and ppo.{{{','.join(OF_PPO)}}}"
            )
    found = Step.read(run, step, cfg)
    settings = [
        overrides | {f"rewards.{name}.weight": x for name, x in zip(grid, values, strict=True)}
        for values in itertools.product(*grid.values())
    ]
    cfgs = [load(run / "config.yaml", each) for each in settings]
    as_trained = found.under(cfg)
    outcomes = [found.under(other, each) for other, each in zip(cfgs, settings, strict=True)]
    alone = found.alone(cfg)
    tokens = [as_trained.advantages, *(o.advantages for o in outcomes)]
    directions = [*tokens, *alone.values()]
    if weights is not None:
        path = cfg.model.path if weights == "base" else str(run / weights)
        if weights != "base" and not (run / weights).is_dir():
            raise UserError(f"--gradient {weights}: {run / weights} does not exist")
        note(f"gradients of {len(directions)} directions at the weights of {weights}")
        directions = gradients(found, cfg, path, directions)
    toward = {name: directions[len(tokens) + i] for i, name in enumerate(alone)}

    def told(i: int, outcome: Outcome, changed: dict[str, Any]) -> dict[str, Any]:
        return {
            "changed": changed,
            "weights": outcome.weights,
            "share_of_reward": outcome.shares,
            "cosine_of_advantages": cosine(tokens[0], tokens[i]),
            "cosine_of_gradient": cosine(directions[0], directions[i]) if weights is not None else None,
            "sign_changes": _sign_changes(tokens[0], tokens[i], found.batch.response_mask),
            "alone": {name: cosine(directions[i], x) for name, x in toward.items()},
        }

    new = [told(i + 1, o, c) for i, (o, c) in enumerate(zip(outcomes, settings, strict=True))]
    best = pareto([[x["alone"][name] for name in alone if cfg.rewards[name].paid] for x in new])
    for each, is_best in zip(new, best, strict=True):
        each["pareto"] = is_best
    return {
        "run": str(run),
        "step": found.number,
        "responses": len(found.batch),
        "tokens": int(found.batch.response_mask.sum()),
        "fraction": found.said["fraction"],
        "distance_to_ledger": float((as_trained.advantages - padded(found.rows, "advantages")).abs().max()),
        "directions": "tokens" if weights is None else f"gradient at {weights}",
        "as_trained": told(0, as_trained, {}),
        "changed": new,
        "tokens_changed_most": _most_changed(found, *tokens[:2]) if len(new) == 1 else [],
    }


def _sign_changes(before: Tensor, after: Tensor, mask: Tensor) -> float:
    """Share of the policy's tokens."""
    return float((before * after < 0)[mask].double().mean())


def _most_changed(step: Step, before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    change = (after - before).abs().flatten()
    places = change.topk(min(LARGEST, int((change > 0).sum()))).indices.tolist()
    texts, uids, width = step.rows["tokens"].to_pylist(), step.rows["sample_uid"].to_pylist(), before.shape[1]
    return [
        {
            "sample_uid": uids[row],
            "place": t,
            "token": texts[row][t],
            "before": float(before[row, t]),
            "after": float(after[row, t]),
        }
        for row, t in (divmod(place, width) for place in places)
    ]


def main(args: Any) -> int:
    """The verb, from its parsed arguments."""
    grid: dict[str, list[float]] = {}
    for given in args.grid or []:
        name, _, values = given.partition("=")
        try:
            grid[name] = [float(x) for x in values.split(",")]
        except ValueError:
            raise UserError(f"--grid {given}: write NAME=WEIGHT,WEIGHT,..., as in quality=0.5,1,2") from None
    console = Console()
    plain = {"markup": False, "highlight": False, "soft_wrap": True}

    def note(text: str) -> None:
        if not args.json:
            console.print(text, style="dim", **plain)

    told = reweight(args.run, args.overrides, step=args.step, grid=grid, weights=args.gradient, note=note)
    if args.out is not None:
        _plot(told, args.out)
    if args.json:
        print(json.dumps(told))
        return 0
    share = "all of the step" if told["fraction"] == 1 else f"{told['fraction']:.0%} of the prompts of the step"
    size = f"{told['responses']} responses, {told['tokens']} tokens ({share})"
    console.print(f"step {told['step']} of {told['run']}: {size}", **plain)
    if told["fraction"] == 1 and told["distance_to_ledger"] > SAME:
        far = f"{told['distance_to_ledger']:.3g}"
        text = f"warning: advantages as trained differ by {far} from those of the ledger"
        console.print(text, style="yellow", **plain)
    console.print(_table(told))
    for x in told["tokens_changed_most"]:
        token = x["token"].encode("unicode_escape").decode() or "(no character)"
        console.print(f"  {x['before']:+7.2f} -> {x['after']:+7.2f}  {token}  of {x['sample_uid'][:8]}", **plain)
    if args.out is not None:
        console.print(f"plot: {args.out}", **plain)
    return 0


def _table(told: dict[str, Any]) -> Any:
    from rich.table import Table

    directions = "advantages" if told["directions"] == "tokens" else told["directions"]
    title = f"cosine of {directions} with those as trained, and with what each component alone would give"
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    names = list(told["as_trained"]["alone"])
    for name in ("signs", "as trained", *names):
        table.add_column(name, justify="right", overflow="fold")
    for each in [told["as_trained"], *told["changed"]]:
        same = each["cosine_of_advantages" if each["cosine_of_gradient"] is None else "cosine_of_gradient"]
        star = " *" if len(told["changed"]) > 1 and each.get("pareto") else ""
        alone = [f"{each['alone'][name]:+.3f}" for name in names]
        table.add_row(_label(each["changed"]) + star, f"{each['sign_changes']:.1%}", f"{same:.3f}", *alone)
    table.caption, table.caption_justify = "signs: share of the tokens whose advantage changes its sign", "left"
    if len(told["changed"]) > 1:
        table.caption += "\n*: none of the others is better for every component that is paid"
    return table


def _label(changed: dict[str, Any]) -> str:
    if not changed:
        return "as trained"
    short = {key.removeprefix("rewards.").removesuffix(".weight"): value for key, value in changed.items()}
    return ", ".join(f"{name}={x:g}" if isinstance(x, float) else f"{name}={x}" for name, x in short.items())


def _plot(told: dict[str, Any], out: Path) -> None:
    """Cosines of every setting with the first two paid components, as one HTML file. Raises UserError."""
    import plotly.graph_objects as go

    weights = told["as_trained"]["weights"]
    names = [name for name in told["as_trained"]["alone"] if weights[name]]
    if len(names) < 2:
        raise UserError(
            f"-o {out}: a plot wants two components with a weight, the run has {', '.join(names) or 'none'}"
        )
    x, y = names[:2]
    figure = go.Figure()
    of_others = [each for each in told["changed"] if not each["pareto"]]
    for label, rows, symbol in (
        ("as trained", [told["as_trained"]], "diamond"),
        ("best for some balance", [each for each in told["changed"] if each["pareto"]], "circle"),
        ("worse for every component", of_others, "circle-open"),
    ):
        text = ["<br>".join(f"{n} {w:g}" for n, w in each["weights"].items()) for each in rows]
        at = {"x": [each["alone"][x] for each in rows], "y": [each["alone"][y] for each in rows]}
        figure.add_scatter(**at, mode="markers", name=label, text=text, marker={"symbol": symbol, "size": 10})
    title = f"step {told['step']}: how far a step serves each component ({told['directions']})"
    figure.update_layout(title=title, xaxis_title=f"cosine with {x} alone", yaxis_title=f"cosine with {y} alone")
    figure.write_html(out, include_plotlyjs=True)
