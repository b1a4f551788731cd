"""Learner: the policy under Accelerate. Annotates a batch, updates on it, hands out its weights.

    annotate   old_logprobs, values: policy, no gradient      ref_logprobs: frozen reference
               (with `rollout.emit_values` the workers' own, which the first mini-batch of the update is held against)
    update     ppo_epochs x mini-batches x micro-batches; one optimizer step per mini-batch

The denominator of both losses is the number of valid tokens of the whole optimizer step, over all micro-batches and
ranks; DDP and DeepSpeed average gradients over ranks, so each micro-loss is multiplied by the number of ranks.

A forward or backward of a wrapped engine may be a collective. So all ranks run as many micro-batches as the one with
the most, which is counted before the first; a rank that has none left passes one row of weight zero.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.faults import InvariantFault, UserError
from core.metrics import Sums
from core.schema import Config
from core.weights import Probe, WeightStream
from trainer import engine_weights, ppo
from trainer.batch import TrainBatch
from trainer.engine_weights import PolicyWeights
from trainer.model import Inputs, PolicyWithValueHead, Reference, inputs_of, inputs_of_texts
from trainer.objective import (
    LARGEST,
    LOGPROB_ERROR,
    RATIO_ERROR,
    VALUE_ERROR,
    TokenFields,
    add_up,
    policy_objective,
)
from trainer.packing import pack
from trainer.ranks import Ranks

# Limits of numbers that must be equal, by the dtype of the forward passes. fp32: the difference of rollout and learner
# reached 1.7e-5 in healthy runs, a broken sync shows 0.2 and more. bf16: eight bits of mantissa.
TOLERANCES = {
    "float32": {"ratio": 1e-4, "logprob_mean": 1e-5, "logprob_max": 1e-3, "probe": 3e-4},
    "bfloat16": {"ratio": 0.2, "logprob_mean": 0.02, "logprob_max": 1.0, "probe": 0.3},
}
# Of values that workers gave, as shares of the root mean square of the learner's: whatever unit rewards have.
VALUE_TOLERANCES = {
    "float32": {"value_mean": 1e-3, "value_max": 1e-2},
    "bfloat16": {"value_mean": 0.05, "value_max": 0.5},
}


_LOSS = "the loss itself"  # among the sums of a micro-batch: looked at, not logged
# Likewise, sums where workers emit values: distances of log-probs and of values from theirs, squares of the learner's
# values, and the number of states that have one. The largest distances are LOGPROB_ERROR and VALUE_ERROR.
_LOGPROBS_APART, _VALUES_APART, _VALUES_SQUARED, _STATES = "|log-probs|", "|values|", "values^2", "states"
_UNLOGGED = (*LARGEST, _LOSS, _LOGPROBS_APART, _VALUES_APART, _VALUES_SQUARED, _STATES)


@dataclass(frozen=True)
class _MiniBatch:
    """What one optimizer step of this rank consists of."""

    pieces: list[np.ndarray]  # rows of each micro-batch; may be fewer than `n_micro`
    n_micro: int  # micro-batches of the rank that has the most
    n_valid: float  # valid tokens over all ranks


class Learner:
    def __init__(
        self,
        cfg: Config,
        accelerator: Accelerator,
        lm: PreTrainedModel,
        ref_lm: PreTrainedModel | None,
        ranks: Ranks | None = None,
        *,
        critic: tuple[nn.Module, Tensor | None] | None = None,
        texts: list[np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            lm: is trained.
            ref_lm: the same weights, frozen; None where the reference is the policy without its adapter, or elsewhere.
            ranks: the processes of the job; None for one.
            critic: of `model.value_path`: a trunk and the [1, H] head to start from, if it has one.
            texts: of `data.ptx_path`: ids of each text, at least two.

        Raises UserError for a launch in which the gradients of several processes would not be reduced.
        """
        self.cfg, self._accelerator, self.ranks = cfg, accelerator, ranks or Ranks()
        self.device = accelerator.device
        self._limits, self._off_policy = TOLERANCES[cfg.model.dtype], cfg.rollout.off_policy
        trunk, head = critic or (None, None)
        # eval for good: dropout would move the ratios off 1
        n_heads = len(cfg.value_heads)
        self.policy = PolicyWithValueHead(lm, cfg.model, critic=trunk, head=head, n_heads=n_heads).eval()
        self._sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self._sharded:
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings.update(
                train_micro_batch_size_per_gpu=cfg.ppo.micro_batch_size,
                train_batch_size=cfg.ppo.micro_batch_size * self.ranks.size,
                gradient_clipping=cfg.optim.max_grad_norm,
            )
            # It allocates a whole bucket for each micro-batch, by default of 2 GB and, where torch is deterministic,
            # filled each time: never more than all gradients take.
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

            zero = settings.setdefault("zero_optimization", {})
            if (bucket := zero.get("reduce_bucket_size", DeepSpeedZeroConfig().reduce_bucket_size)) != "auto":
                trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
                zero["reduce_bucket_size"] = min(int(float(bucket)), trained)
        tied = engine_weights.is_tied(lm)
        self._engine, self._optimizer = accelerator.prepare(self.policy, self._adamw())
        if engine_weights.is_tied(lm) != tied:
            raise InvariantFault(
                f"{accelerator.distributed_type.value} parted the output layer from the embedding that it is tied to,"
                " and would leave one of them as it is; take one of the files in launch/accelerate/"
            )
        self._ref: Reference | None = None  # log-probs of it come with the rewards
        if cfg.reference != "reward_server":
            own = ref_lm if cfg.reference != "adapter" else None
            self._ref = Reference(cfg.model, self.policy, self._engine, own)
        if self.ranks.size > 1 and self._engine is self.policy and not engine_weights.is_sharded(self.policy):
            raise UserError(
                f"{self.ranks.size} learner processes were launched as {accelerator.distributed_type.value}: each would"
                " train on its own and never reduce gradients; use launch/accelerate/ddp.yaml or zero2.yaml"
            )
        self._engine.eval()
        if cfg.model.compile:
            self.policy.compile_layers()
        if cfg.model.gradient_checkpointing:
            self.policy.checkpoint_activations()
        self._last_lr = 0.0
        # Of the last update, by the rows of its batch; None unless they are to be recorded.
        self.new_logprobs: Tensor | None = None  # [B, T] float32, on the device
        self._first: dict[str, float] = {}  # metrics of the first mini-batch of the step under way, of all ranks
        self._ranks_agree = self.ranks.size == 1  # equal parameters after a first step of this process were seen
        self._texts = texts or []
        self.step = 0  # PPO updates that are done
        self._optimizer_steps = 0  # place in the schedule: of the next one; an early exit from the epochs skips some

    def _adamw(self) -> torch.optim.AdamW:
        optim = self.cfg.optim
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        groups = [{"params": trained, "peak_lr": optim.lr}]
        if optim.value_lr is not None or self.cfg.ppo.value_warmup_steps:
            of_value = {id(p) for p in self.policy.value_parameters()}
            rest = [p for p in trained if id(p) not in of_value]
            alone = [p for p in trained if id(p) in of_value]
            value_lr = optim.lr if optim.value_lr is None else optim.value_lr
            groups = [{"params": rest, "peak_lr": optim.lr}, {"params": alone, "peak_lr": value_lr}]
        return torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    @property
    def _warming(self) -> bool:
        """Whether the value function alone is trained in this step."""
        return self.step < self.cfg.ppo.value_warmup_steps

    def _lr_factor(self, optimizer_step: int) -> float:
        total, optim = self.cfg.optimizer_steps, self.cfg.optim
        warmup = optim.warmup_frac * total
        if optimizer_step < warmup:
            return (optimizer_step + 1) / (warmup + 1)
        progress = min(1.0, (optimizer_step - warmup) / max(1.0, total - warmup))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
            optim.schedule
        ]

    def _pieces(self, batch: TrainBatch, index: np.ndarray) -> list[np.ndarray]:
        cfg, packed = self.cfg.ppo, self.policy.reader.packed
        return batch.pieces(index, cfg.micro_batch_size, tokens=cfg.micro_batch_tokens, packed=packed)

    @torch.no_grad()
    def annotate(self, batch: TrainBatch, *, own: bool = False) -> tuple[TrainBatch, dict[str, float]]:
        """Fill old_logprobs, ref_logprobs, values and bootstrap_values ([B, T], [B, T], [B, T], [B]).

        Of several value heads, head_values and head_bootstraps: what they say together depends on weights of the step.
        With `rollout.emit_values` the workers' values and log-probs are taken, with no forward of the policy, unless it
        is to be its `own`. objective/entropy is then the mean of -log p over what was drawn, which is an estimate, and
        what workers and learner compute is compared by `update`.

        Returns the batch and sums over valid tokens as means: objective/kl (nats per response), objective/entropy,
        logprob_diff/{mean,max}. Raises InvariantFault (with `run.checks`) if workers and learner disagree on the
        log-probs, or policy and reference before the first update; UserError if workers filtered what they sampled
        from and do not say how.
        """
        self._refuse_untold_filters(batch)
        emitted = self.cfg.rollout.emit_values and not own
        mask, dtype = batch.response_mask, self.policy.value_head.weight.dtype
        heads = self.cfg.value_heads
        old, ref, entropy = (torch.zeros(mask.shape, dtype=dtype) for _ in range(3))
        values = torch.zeros(*mask.shape, max(1, len(heads)), dtype=dtype)
        after = torch.zeros(len(batch), max(1, len(heads)), dtype=dtype)
        with nullcontext() if self._ref is None else self._ref.on(self.device):
            for rows, micro, inputs in () if emitted and self._ref is None else self._equal_pieces(batch):
                if not emitted:
                    of_tokens, of_states, of_entropy, _ = self._engine(inputs, self.cfg.rollout.temperature)
                of_ref = self._reference_of(micro, inputs)
                if rows is None:
                    continue
                row, column = micro.response_mask.nonzero(as_tuple=True)
                at = torch.from_numpy(rows)[row], column
                ref[at] = of_ref.to("cpu", dtype)
                if emitted:
                    continue
                m = len(row)
                old[at] = of_tokens.to("cpu", dtype)
                of_states = of_states.view(-1, values.shape[-1])  # one head or several
                values[at], entropy[at] = of_states[:m].to("cpu", dtype), of_entropy.to("cpu", dtype)
                after[torch.from_numpy(rows)] = of_states[m:].to("cpu", dtype)
        if emitted and len(batch):
            assert batch.rollout_values is not None, "workers that are to emit values gave none"
            assert self._ref is not None or batch.ref_logprobs is not None, "no reference came with the rewards"
            old = torch.where(mask, batch.rollout_logprobs, 0.0).to(dtype)
            values[..., 0], after[:, 0], entropy = batch.rollout_values, batch.rollout_bootstraps, -old
        bootstrapped = batch.cut & self.cfg.ppo.bootstrap_cut
        after = torch.where(bootstrapped[:, None], after, 0.0)
        filled = batch.fill(old_logprobs=old, **({} if batch.ref_logprobs is not None else {"ref_logprobs": ref}))
        if heads:
            of_head = dict(zip(heads, values.unbind(-1), strict=True))
            filled = filled.fill(head_values=of_head, head_bootstraps=dict(zip(heads, after.unbind(-1), strict=True)))
        else:
            filled = filled.fill(values=values.squeeze(-1), bootstrap_values=after.squeeze(-1))
        return filled, self._compare(filled, entropy, emitted)

    def _refuse_untold_filters(self, batch: TrainBatch) -> None:
        untold = self.cfg.rollout.untold_filter
        if untold is not None and self.ranks.max(float(len(batch) > 0 and batch.kept is None)):
            key, value, remedy = untold
            raise UserError(f"{key} = {value}: {remedy}")

    def _reference_of(self, micro: TrainBatch, inputs: Inputs) -> Tensor:
        """[M] log-probs under the reference: computed here, or those that came with the rewards."""
        if self._ref is None:
            assert micro.ref_logprobs is not None or not micro.response_mask.any(), "no reference came with the rewards"
            given = micro.ref_logprobs
            return torch.zeros(0) if given is None else given[micro.response_mask]
        if self._ref.packed != (inputs.packed is not None):
            inputs = inputs_of(micro, self.device, packed=self._ref.packed)
        return self._ref.score(inputs, self.cfg.rollout.temperature)

    def _equal_pieces(self, batch: TrainBatch) -> Iterator[tuple[np.ndarray | None, TrainBatch, Inputs]]:
        """Micro-batches of all rows, as many on every rank."""
        pieces = self._pieces(batch, np.arange(len(batch)))
        most = int(self.ranks.max(len(pieces)))  # before the first forward: nobody may wait here while another forwards
        for rows in [*pieces, *[None] * (most - len(pieces))]:
            micro = batch.idle() if rows is None else batch.rows(rows)
            yield rows, micro, inputs_of(micro, self.device, packed=self.policy.reader.packed)

    def _compare(self, batch: TrainBatch, entropy: Tensor, emitted: bool) -> dict[str, float]:
        mask, sums = batch.response_mask, Sums()
        n_tokens = float(mask.sum())
        kl = ppo.kl_estimate(batch.writers_logprobs(self._off_policy), batch.ref_logprobs, "k1")
        kl = torch.where(mask, kl, 0.0)
        # What an older policy wrote is no test of who computes what: the ratio of the two is importance sampling's.
        fresh = mask & (batch.policy_version == self.step) if self._off_policy else mask & (not emitted)
        difference = torch.where(fresh, batch.old_logprobs - batch.rollout_logprobs, 0.0).abs()
        sums.add("objective/kl", float(kl.sum()), len(batch))
        sums.add("objective/entropy", float(entropy.sum()), n_tokens)
        sums.add("logprob_diff/mean", float(difference.sum()), float(fresh.sum()))
        means = sums.merge(self.ranks.sum_list).means()
        means["logprob_diff/max"] = self.ranks.max(_largest(difference))
        compared = ["mean", "max"]
        if math.isnan(means["logprob_diff/mean"]) and means["logprob_diff/max"] == 0:  # of no token, on any rank
            compared = []
            del means["logprob_diff/mean"], means["logprob_diff/max"]
        if self.cfg.run.checks:
            for name in compared:
                value, limit = means[f"logprob_diff/{name}"], self._limits[f"logprob_{name}"]
                if not value <= limit:
                    raise self._differs("log-probs", value, f"{name} over tokens", limit)
            if self.step == 0:
                apart = torch.where(mask, batch.old_logprobs - batch.ref_logprobs, 0.0)
                worst = self.ranks.max(_largest(apart.abs()))
                # Another process computes as a worker does: then the limit is that of workers.
                limit = self._limits["logprob_max" if self._ref is None or emitted else "ratio"]
                if not worst <= limit:
                    raise InvariantFault(
                        f"before the first update policy and reference differ by {worst:.2g} nats on a token"
                        f" (limit {limit:.2g}): they are not the same model"
                    )
        return means

    def _differs(self, what: str, by: float, over: str, limit: float) -> InvariantFault:
        return InvariantFault(
            f"step {self.step + 1}: {what} of rollout workers and learner differ by {by:.2g} ({over}, limit"
            f" {limit:.2g}): the workers sample from other weights or another distribution than the one that is trained"
        )

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """ppo_epochs passes over the batch, one optimizer step per mini-batch.

        Returns means over the valid tokens of all mini-batches: loss/policy, loss/value, ppo/*; and optim/*.
        Raises InvariantFault on a non-finite loss or gradient, and (with `run.checks`) if the ratios of the first
        mini-batch are not 1, where they are against the policy before the step.
        """
        cfg, sums, norms = self.cfg.ppo, Sums(), []
        # Against the engine's log-probs a ratio is off 1 by what `annotate` has held to limits of its own.
        starts_at_1 = not self._off_policy or cfg.importance_cap is not None
        self._optimizer_steps = self._schedule_at(self.step)
        self._first, self.new_logprobs = {}, None
        if self.cfg.log.ledger or self.cfg.log.looks:
            self.new_logprobs = torch.zeros(batch.response_mask.shape, device=self.device)
        for epoch in range(cfg.ppo_epochs):
            of_epoch: list[dict[str, Tensor]] = []
            for index, mini in enumerate(self._mini_batches(batch, epoch)):
                norm, totals = self._optimizer_step(batch, mini, first=starts_at_1 and epoch == index == 0)
                norms += [] if norm is None else [norm]
                of_epoch.append(totals)
            kl = self._add(sums, add_up(of_epoch))
            if cfg.stop_kl is not None and kl > cfg.stop_kl:
                break
        if self.cfg.run.checks and not self._ranks_agree:
            self._compare_ranks()
        self.step += 1
        means = sums.merge(self.ranks.sum_list).means()
        means |= {"optim/lr": self._last_lr, "ppo/epochs": epoch + 1}
        means |= self._first
        if norms:  # ZeRO-0 clips, and does not tell by how much
            means["optim/grad_norm"] = sum(norms) / len(norms)
        if cfg.has_critic and cfg.scale_values == "none":  # else `credit` tells it, which has both in one unit
            means["value/explained_variance"] = ppo.explained_variance(
                batch.values, batch.returns, batch.response_mask, all_reduce=self.ranks.sum
            )
        return means

    def _add(self, sums: Sums, totals: dict[str, Tensor]) -> float:
        """Add what one epoch says to `sums`; its mean approx_kl over the tokens of all ranks."""
        n, n_text = float(totals.pop("tokens")), float(totals.pop("text tokens", 0.0))
        for name, total in totals.items():
            if name not in _UNLOGGED:
                sums.add(name, float(total), n_text if name == "loss/ptx" else n)
        kl, n = self.ranks.sum_list([float(totals["ppo/approx_kl"]), n])
        return kl / max(n, 1.0)

    def _mini_batches(self, batch: TrainBatch, epoch: int) -> list[_MiniBatch]:
        """The optimizer steps of one epoch, counted over all ranks before the first of them."""
        minis = batch.mini_batches(
            self.cfg.rollout.batch_size // self.cfg.ppo.mini_batch_size,
            seed=self.cfg.run.seed,
            step=self.step + 1,
            epoch=epoch,
            orders=self.ranks.gather(batch.order),
            rank=self.ranks.index,
        )
        rows_of = list(minis)
        pieces = [self._pieces(batch, rows) for rows in rows_of]
        tokens = [int(batch.response_mask[torch.from_numpy(rows)].sum()) for rows in rows_of]
        counts = self.ranks.gather([(len(p), n) for p, n in zip(pieces, tokens, strict=True)])
        return [
            _MiniBatch(mine, max(1, *(n for n, _ in of_ranks)), max(1.0, float(sum(n for _, n in of_ranks))))
            for mine, *of_ranks in zip(pieces, *counts, strict=True)
        ]

    def _optimizer_step(
        self, batch: TrainBatch, mini: _MiniBatch, *, first: bool
    ) -> tuple[float | None, dict[str, Tensor]]:
        """One optimizer step on this rank's rows: the gradient norm before clipping, and what is logged, as sums."""
        factor = self._lr_factor(self._optimizer_steps)
        self._last_lr = self.cfg.optim.lr * factor
        for i, group in enumerate(self._optimizer.param_groups):
            # Gradients of zero are not enough: weight decay would shrink what shall stay.
            group["lr"] = 0.0 if i == 0 and self._warming else group["peak_lr"] * factor
        parts = [{"tokens": torch.zeros((), dtype=torch.float64, device=self.device)}]
        if self._texts:
            parts.append(self._backward_texts())
        for i, rows in enumerate([*mini.pieces, *[None] * (mini.n_micro - len(mini.pieces))]):
            micro = batch.idle() if rows is None else batch.rows(rows)
            last = i == mini.n_micro - 1
            self._accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self._accelerator.no_sync(self._engine):
                loss, sums = self._micro_loss(micro, mini.n_valid, rows)
                n = torch.full_like(parts[0]["tokens"], float(micro.response_mask.sum()))
                parts.append({**sums, "tokens": n, _LOSS: loss.detach().double()})
                if last:  # DeepSpeed takes its step inside the last backward
                    self._check_losses(parts, first)
                self._accelerator.backward(loss * self.ranks.size)
        norm = self._accelerator.clip_grad_norm_(self._engine.parameters(), self.cfg.optim.max_grad_norm)
        if norm is not None and not 0 <= norm < math.inf:  # DeepSpeed says -1 where it met a NaN
            taken = "the step was taken: go on from a checkpoint" if self._sharded else "no step was taken"
            raise InvariantFault(f"step {self.step + 1}: the gradient norm is {float(norm)}; {taken}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._optimizer_steps += 1
        return None if norm is None else float(norm), add_up(parts)

    def _backward_texts(self) -> dict[str, Tensor]:
        """Gradients of the mixed-in texts, in micro-batches as large as those of the responses."""
        rows, n_tokens = self._texts_of_step()
        size, parts = self.cfg.ppo.micro_batch_size, []
        for start in range(0, len(rows), size):
            self._accelerator.gradient_state._set_sync_gradients(False)
            with self._accelerator.no_sync(self._engine):
                loss, total = self._text_loss(rows[start : start + size], n_tokens)
                parts.append({"loss/ptx": total})
                self._accelerator.backward(loss * self.ranks.size)
        n = sum(len(self._texts[i]) - 1 for i in rows)
        return add_up([*parts, {"text tokens": torch.full_like(total, float(n))}])

    def _check_losses(self, parts: list[dict[str, Tensor]], first: bool) -> None:
        """Raise InvariantFault, on all ranks at once, for a loss that is no number or a first ratio off 1."""
        losses = torch.stack([p[_LOSS].abs() for p in parts if _LOSS in p]).max()
        errors = torch.stack([p[RATIO_ERROR] for p in parts if RATIO_ERROR in p]).max()
        loss, ratio_error = self.ranks.gather_max([float(losses), float(errors)])
        if not math.isfinite(loss):
            raise InvariantFault(f"step {self.step + 1}: the loss is {loss}; the weights are as before it")
        if not first:
            return
        self._first = {"ppo/first_ratio_error": ratio_error}
        if self.cfg.rollout.emit_values:
            self._compare_emitted(add_up(parts))
        elif self.cfg.run.checks and not ratio_error <= self._limits["ratio"]:
            raise InvariantFault(
                f"step {self.step + 1}: a ratio of the first mini-batch is off 1 by {ratio_error:.2g}"
                f" (limit {self._limits['ratio']:.2g}): old and new log-probs are not computed alike"
            )

    def _compare_emitted(self, totals: dict[str, Tensor]) -> None:
        """Raise InvariantFault, on all ranks at once, where the first forward of a step finds other log-probs or values
        than the workers gave. `totals`: of the first mini-batch of this rank."""
        names = (_LOGPROBS_APART, "tokens", _VALUES_APART, _VALUES_SQUARED, _STATES)
        apart, n, off, squared, states = self.ranks.sum_list([float(totals.get(name, 0.0)) for name in names])
        names = (LOGPROB_ERROR, VALUE_ERROR)
        worst, worst_off = self.ranks.gather_max([float(totals.get(name, 0.0)) for name in names])
        if not n:
            return
        rms = max(math.sqrt(squared / states), 1e-30)  # with a head that is zero yet both are, and nothing differs
        found = {
            "logprob_diff/mean": apart / n,
            "logprob_diff/max": worst,
            "value/diff_mean": off / states / rms,
            "value/diff_max": worst_off / rms,
        }
        self._first |= found
        if not self.cfg.run.checks:
            return
        limits = self._limits | VALUE_TOLERANCES[self.cfg.model.dtype]
        for name, value in found.items():
            kind, what = name.split("_diff/" if name.startswith("logprob") else "/diff_")
            limit, of_first = limits[f"{kind}_{what}"], f"{what} over the first mini-batch"
            if not value <= limit:
                over = of_first if kind == "logprob" else f"{of_first}, of the learner's root mean square"
                raise self._differs("log-probs" if kind == "logprob" else "values", value, over, limit)

    def _compare_ranks(self) -> None:
        """Raise InvariantFault if ranks hold other parameters than this one after their first step together."""
        h = hashlib.blake2b(digest_size=16)
        for name, x in engine_weights.whole_parameters(self.policy):
            h.update(name.encode())
            h.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digests = self.ranks.gather(h.hexdigest())
        if len(set(digests)) > 1:
            raise InvariantFault(
                f"step {self.step + 1}: after one step the learner ranks hold different parameters (digests"
                f" {', '.join(d[:8] for d in digests)}): gradients are not reduced in this launch"
            )
        self._ranks_agree = True

    def _micro_loss(
        self, micro: TrainBatch, n_valid: float, rows: np.ndarray | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of one micro-batch, `rows` of the batch, in the loss of its optimizer step, and as sums what is
        logged of it."""
        cfg, mask = self.cfg.ppo, micro.response_mask
        warming = self._warming

        def flat(x: Tensor) -> Tensor:
            return x[mask].to(self.device)

        every = torch.ones(int(mask.sum()), dtype=torch.bool, device=self.device)
        known = TokenFields(
            mask=every,
            # Plain PPO stays near the policy that wrote, decoupled PPO (arXiv 2110.00641) near the one before the step.
            old_logprobs=flat(micro.old_logprobs if cfg.importance_cap else micro.writers_logprobs(self._off_policy)),
            ref_logprobs=flat(micro.ref_logprobs),
            rollout_logprobs=flat(micro.rollout_logprobs),
            advantages=flat(micro.advantages),
        )

        seen = torch.zeros(len(every), device=self.device) if self.new_logprobs is not None else None

        def token_loss(logprobs: Tensor, entropy: Tensor | None, at: slice) -> tuple[Tensor, dict[str, Tensor]]:
            if seen is not None:
                seen[at] = logprobs.detach().float()
            loss, sums = policy_objective(logprobs, entropy, known[at], cfg, n_valid)
            if self.cfg.rollout.emit_values and logprobs.numel():
                apart = (logprobs.detach() - known.rollout_logprobs[at]).abs().double()
                sums |= {_LOGPROBS_APART: apart.sum(), LOGPROB_ERROR: apart.max()}
            return loss * 0.0 if warming else loss, sums

        inputs = inputs_of(micro, self.device, packed=self.policy.reader.packed)
        pg_loss, values, _, sums = self._engine(
            inputs,
            self.cfg.rollout.temperature,
            token_loss,
            with_entropy=cfg.entropy_coef > 0,
            value_only=warming,
        )
        if seen is not None and rows is not None:
            of_rows = torch.zeros(mask.shape, device=self.device)
            of_rows[mask.to(self.device)] = seen
            self.new_logprobs[torch.from_numpy(rows).to(self.device), : mask.shape[1]] = of_rows
        known_values, returns, valid, n_heads = micro.values, micro.returns, every, 1
        if heads := self.cfg.value_heads:  # their mean, so that vf_coef means the same for any number of them
            n_heads, valid = len(heads), every[:, None].expand(-1, len(heads))
            known_values, returns = (
                torch.stack([of[name] for name in heads], dim=-1) for of in (micro.head_values, micro.head_returns)
            )
        if self.cfg.rollout.emit_values and len(every):
            sums |= self._off_workers(micro, values.detach())
        vf_loss, vf_stats = ppo.value_loss(
            values[: len(every)],
            flat(known_values),
            flat(returns),
            valid,
            cliprange_value=cfg.cliprange_value,
            normalizer=n_valid * n_heads,
        )
        # Without a critic times 0, not left out: DDP wants a gradient for every parameter.
        loss = pg_loss + (cfg.vf_coef if cfg.has_critic else 0.0) * vf_loss
        if cfg.has_critic:
            sums["loss/value"] = vf_loss.detach().double() * n_valid
            sums["ppo/vf_clipfrac"] = vf_stats["vf_clipfrac"].double() * len(every)
        return loss, sums

    def _off_workers(self, micro: TrainBatch, values: Tensor) -> dict[str, Tensor]:
        """How far the learner's values ([M + S], S states behind responses) are from those of the workers, the values
        behind responses that were cut among them."""
        m, cut = int(micro.response_mask.sum()), micro.cut.to(self.device)
        given = torch.cat([micro.rollout_values[micro.response_mask], micro.rollout_bootstraps[micro.cut]])
        own = torch.cat([values[:m], values[m:][cut]]).double()
        off = (own - given.to(self.device).double()).abs()
        return {
            VALUE_ERROR: off.max(),
            _VALUES_APART: off.sum(),
            _VALUES_SQUARED: own.square().sum(),
            _STATES: torch.full_like(off.sum(), float(len(own))),
        }

    def _text_loss(self, rows: np.ndarray, n_tokens: int) -> tuple[Tensor, Tensor]:
        """ptx_coef times the share of some texts in the LM loss of an optimizer step, and the sum of their losses."""

        def token_loss(logprobs: Tensor, entropy: Tensor | None, at: slice) -> tuple[Tensor, dict[str, Tensor]]:
            total = -logprobs.sum()
            coef = 0.0 if self._warming else self.cfg.ppo.ptx_coef
            return coef * total / n_tokens, {"loss/ptx": total.detach().double()}

        inputs = inputs_of_texts([self._texts[i] for i in rows], self.device, packed=self.policy.reader.packed)
        loss, values, _, sums = self._engine(inputs, 1.0, token_loss)
        return loss + 0.0 * values.sum(), sums["loss/ptx"]

    def _texts_of_step(self) -> tuple[np.ndarray, int]:
        """Which texts this rank mixes into the next optimizer step, and the tokens of those of all ranks.

        As many as the step has responses, so every rank has the same number, drawn by (seed, optimizer step) alone.
        """
        rng = np.random.default_rng([self.cfg.run.seed, self._optimizer_steps])
        of_each = max(1, self.cfg.ppo.mini_batch_size // self.ranks.size)
        chosen = rng.integers(len(self._texts), size=of_each * self.ranks.size)
        return chosen[self.ranks.index :: self.ranks.size], sum(len(self._texts[i]) - 1 for i in chosen)

    @property
    def probe_tolerance(self) -> float:
        return self._limits["probe"] if self.cfg.run.checks else math.inf

    def stream_weights(self) -> WeightStream:
        """What the workers need, tensor by tensor: the causal LM by its names in transformers, in their dtype; of a
        policy that is an adapter on weights that they have, the adapter. The value head with `rollout.emit_values`
        alone. All ranks call it and take all.
        """
        if self.cfg.model.lora_rank:
            return WeightStream.of(engine_weights.export_adapter(self.policy.lm, self._emitting_head))
        return engine_weights.stream(self.policy.lm, getattr(torch, self.cfg.model.dtype), self._emitting_head)

    def export_weights(self) -> dict[str, Tensor]:
        """The same, all at once and by name. All ranks call it, and each holds the whole."""
        if self.cfg.model.lora_rank:
            return engine_weights.export_adapter(self.policy.lm, self._emitting_head)
        return engine_weights.export(self.policy.lm, getattr(torch, self.cfg.model.dtype), self._emitting_head)

    @property
    def _emitting_head(self) -> nn.Module | None:
        return self.policy.value_head if self.cfg.rollout.emit_values else None

    def whole_policy(self) -> PolicyWeights:
        """The policy as it goes to disk, in float32. All ranks call it: shards are gathered."""
        return engine_weights.whole_policy(self.policy)

    @torch.no_grad()
    def probe_logprobs(self, probe: Probe) -> np.ndarray:
        """[1, T] float32 log-probs of the fixed response under the policy, as a worker must compute them."""
        logprobs, *_ = self._engine(self._probe_input(probe, self.policy.reader.packed), self.cfg.rollout.temperature)
        return logprobs[None].float().cpu().numpy()

    @torch.no_grad()
    def reference_logprobs(self, probe: Probe) -> np.ndarray:
        """[1, T] float32, the same under the frozen reference: which model it is, at the cost of one forward.

        Where the reward servers have it, the policy's own, which are the same as long as nothing was trained or loaded.
        """
        if self._ref is None:
            return self.probe_logprobs(probe)
        with self._ref.on(self.device):
            logprobs = self._ref.score(self._probe_input(probe, self._ref.packed), self.cfg.rollout.temperature)
        return logprobs[None].float().cpu().numpy()

    def _probe_input(self, probe: Probe, packed: bool) -> Inputs:
        ids = torch.from_numpy(np.concatenate([probe.prompt_ids, probe.response_ids], axis=1))
        lengths = [torch.tensor([x.shape[1]]) for x in (probe.prompt_ids, probe.response_ids)]
        mask = torch.ones(1, probe.response_ids.shape[1], dtype=torch.bool)
        return Inputs(
            packed=pack(ids, *lengths, mask, self.device) if packed else None,
            input_ids=ids.to(self.device),
            prompt_lengths=lengths[0].to(self.device),
            response_lengths=lengths[1].to(self.device),
            mask=mask.to(self.device),
        )

    def save_state(self, folder: Path) -> None:
        """What the next step depends on here: trained parameters, AdamW, RNG. All ranks call it; each writes its own.

        The learning rate is a function of the number of steps, which `load_state` is told.
        """
        engine_weights.save_state(self._accelerator, self.policy, folder)

    def load_state(self, folder: Path, *, step: int) -> None:
        """Put back what `save_state` wrote after `step` updates. All ranks call it."""
        engine_weights.load_state(self._accelerator, self.policy, folder)
        self.step = step

    def _schedule_at(self, step: int) -> int:
        """The place in the schedule with which the update after `step` updates begins: a function of it alone, so that
        a run that goes on from a checkpoint, or left its epochs early, has the rate that any other has."""
        return step * self.cfg.optimizer_steps // self.cfg.run.steps


def _largest(x: Tensor) -> float:
    """The largest element; 0 where there is none."""
    return float(x.max()) if x.numel() else 0.0
