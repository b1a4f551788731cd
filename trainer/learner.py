"""Learner: the policy under Accelerate. Annotates a batch, updates on it, hands out its weights.

    annotate   old_logprobs, values: policy, no gradient      ref_logprobs: frozen reference
    update     ppo_epochs x mini-batches x micro-batches; one optimizer step per mini-batch

The denominator of both losses is the number of valid tokens of the whole optimizer step, over all micro-batches and
ranks; DDP and DeepSpeed average gradients over ranks, so each micro-loss is multiplied by the number of ranks.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from core.config import Config
from core.faults import InvariantFault
from core.logprobs import logprobs_from_logits
from core.metrics import Sums
from core.weights import Probe, named_tensors
from trainer import ppo
from trainer.batch import TrainBatch
from trainer.model import CausalForward, PolicyWithValueHead, run_policy

# Limits of numbers that must be equal, by the dtype of the forward passes. fp32: the difference of rollout and learner
# reached 1.7e-5 in healthy runs, a broken sync shows 0.2 and more. bf16: eight bits of mantissa.
TOLERANCES = {
    "float32": {"ratio": 1e-4, "logprob_mean": 1e-5, "logprob_max": 1e-3, "probe": 3e-4},
    "bfloat16": {"ratio": 0.2, "logprob_mean": 0.02, "logprob_max": 1.0, "probe": 0.3},
}


class Learner:
    def __init__(self, cfg: Config, accelerator: Accelerator, lm: PreTrainedModel, ref_lm: PreTrainedModel) -> None:
        """`lm` is trained, `ref_lm` (the same weights) is frozen."""
        self.cfg, self._accelerator = cfg, accelerator
        self.device = accelerator.device
        self._limits = TOLERANCES[cfg.model.dtype]
        self.policy = PolicyWithValueHead(lm).eval()  # eval for good: dropout would move the ratios off 1
        self._ref = CausalForward(ref_lm.to(self.device).eval().requires_grad_(False))
        optim = cfg.optim
        self._optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        self._engine, self._optimizer = accelerator.prepare(self.policy, self._optimizer)
        self._engine.eval()
        # Not prepared: Accelerate would step it once per rank.
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer.optimizer, self._lr_factor)
        self._last_lr = 0.0
        self.step = 0  # PPO updates that are done

    def _lr_factor(self, optimizer_step: int) -> float:
        total, optim = self.cfg.optimizer_steps, self.cfg.optim
        warmup = optim.warmup_frac * total
        if optimizer_step < warmup:
            return (optimizer_step + 1) / (warmup + 1)
        progress = min(1.0, (optimizer_step - warmup) / max(1.0, total - warmup))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
            optim.schedule
        ]

    def all_reduce(self, sums: Tensor) -> Tensor:
        """Sum a vector over all ranks."""
        return self._accelerator.reduce(sums.to(self.device), reduction="sum").to(sums.device)

    def _gather_orders(self, order: np.ndarray) -> np.ndarray:
        return np.array(gather_object(order.tolist()), dtype=np.int64)

    @torch.no_grad()
    def annotate(self, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
        """Fill old_logprobs, ref_logprobs, values and bootstrap_values ([B, T], [B, T], [B, T], [B]).

        Returns the batch and sums over valid tokens as means: objective/kl (nats per response), objective/entropy,
        logprob_diff/{mean,max}. Raises InvariantFault (with `run.checks`) if workers and learner disagree on the
        log-probs, or policy and reference before the first update.
        """
        shape = batch.response_mask.shape
        old, ref, values = (torch.zeros(shape) for _ in range(3))
        entropy, after = torch.zeros(shape), torch.zeros(shape[0])
        for rows in self._pieces(batch):
            micro = batch.rows(rows).to(self.device)
            t = micro.response_mask.shape[1]
            out = run_policy(self._engine, micro, self.cfg.rollout.temperature, with_entropy=True)
            with self._accelerator.autocast():
                logits, _ = self._ref(micro.input_ids, micro.prompt_lengths, micro.response_lengths, t)
                ref_logprobs = logprobs_from_logits(logits, micro.input_ids[:, -t:], self.cfg.rollout.temperature)
            at = torch.from_numpy(rows)
            old[at, :t], ref[at, :t] = out.logprobs.float().cpu(), ref_logprobs.float().cpu()
            values[at, :t], entropy[at, :t] = out.values[:, :-1].float().cpu(), out.entropy.float().cpu()
            after[at] = out.values.gather(1, micro.response_lengths[:, None]).squeeze(1).float().cpu()
        mask = batch.response_mask
        old, ref, values, entropy = (torch.where(mask, x, 0.0) for x in (old, ref, values, entropy))
        bootstrap = torch.where(batch.cut, after, 0.0) if self.cfg.ppo.bootstrap_cut else torch.zeros_like(after)
        filled = batch.fill(old_logprobs=old, ref_logprobs=ref, values=values, bootstrap_values=bootstrap)
        return filled, self._compare(filled, entropy)

    def _pieces(self, batch: TrainBatch) -> Iterator[np.ndarray]:
        lengths = (batch.prompt_lengths + batch.response_lengths).numpy()
        by_length = np.argsort(-lengths, kind="stable")
        size = self.cfg.ppo.micro_batch_size
        return (by_length[start : start + size] for start in range(0, len(by_length), size))

    def _compare(self, batch: TrainBatch, entropy: Tensor) -> dict[str, float]:
        mask, sums = batch.response_mask, Sums()
        n_tokens = float(mask.sum())
        kl = ppo.kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1")
        difference = torch.where(mask, batch.old_logprobs - batch.rollout_logprobs, 0.0).abs()
        sums.add("objective/kl", float(kl.sum()), len(batch))
        sums.add("objective/entropy", float(entropy.sum()), n_tokens)
        sums.add("logprob_diff/mean", float(difference.sum()), n_tokens)
        means = sums.merge(self.reduce_list).means()
        means["logprob_diff/max"] = self._max(float(difference.max()))
        if self.cfg.run.checks:
            for name in ("mean", "max"):
                value, limit = means[f"logprob_diff/{name}"], self._limits[f"logprob_{name}"]
                if not value <= limit:
                    raise InvariantFault(
                        f"step {self.step + 1}: log-probs of rollout workers and learner differ by {value:.2g} ({name}"
                        f" over tokens, limit {limit:.2g}): the workers sample from other weights or another"
                        " distribution than the one that is trained"
                    )
            if self.step == 0:
                worst = self._max(float(kl.abs().max()))
                if not worst <= self._limits["ratio"]:
                    raise InvariantFault(
                        f"before the first update policy and reference differ by {worst:.2g} nats on a token"
                        f" (limit {self._limits['ratio']:.2g}): they are not the same model"
                    )
        return means

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """ppo_epochs passes over the batch, one optimizer step per mini-batch.

        Returns means over the valid tokens of all mini-batches: loss/policy, loss/value, ppo/*; and optim/*.
        Raises InvariantFault on a non-finite loss or gradient, and (with `run.checks`) if the ratios of the first
        mini-batch are not 1.
        """
        cfg, sums, norms = self.cfg.ppo, Sums(), []
        n_mini = self.cfg.rollout.batch_size // cfg.mini_batch_size
        for epoch in range(cfg.ppo_epochs):
            minis = batch.mini_batches(
                n_mini, seed=self.cfg.run.seed, step=self.step + 1, epoch=epoch, gather=self._gather_orders
            )
            for index, rows in enumerate(minis):
                norms.append(self._optimizer_step(batch, rows, sums, first=epoch == index == 0))
        self.step += 1
        means = sums.merge(self.reduce_list).means()
        means |= {"optim/lr": self._last_lr, "optim/grad_norm": sum(norms) / len(norms)}
        ev = ppo.explained_variance(batch.values, batch.returns, batch.response_mask, all_reduce=self.all_reduce)
        return means | {"value/explained_variance": ev}

    def _optimizer_step(self, batch: TrainBatch, rows: np.ndarray, sums: Sums, *, first: bool) -> float:
        """One optimizer step; returns the norm of the gradient before clipping."""
        n_valid = self.all_reduce(batch.response_mask[torch.from_numpy(rows)].sum().double().reshape(1)).clamp(min=1)
        micros = list(batch.micro_batches(rows, self.cfg.ppo.micro_batch_size))
        worst_ratio = 0.0
        for i, micro in enumerate(micros):
            self._accelerator.gradient_state._set_sync_gradients(i == len(micros) - 1)
            loss, ratio_error = self._micro_loss(micro.to(self.device), float(n_valid), sums)
            worst_ratio = max(worst_ratio, ratio_error)
            if not torch.isfinite(loss):
                raise InvariantFault(f"step {self.step + 1}: the loss is {loss.item()}; the weights are as before it")
            self._accelerator.backward(loss * self._accelerator.num_processes)
        if first and self.cfg.run.checks and not self._max(worst_ratio) <= self._limits["ratio"]:
            raise InvariantFault(
                f"step {self.step + 1}: a ratio of the first mini-batch is off 1 by {worst_ratio:.2g}"
                f" (limit {self._limits['ratio']:.2g}): old and new log-probs are not computed alike"
            )
        norm = self._accelerator.clip_grad_norm_(self._engine.parameters(), self.cfg.optim.max_grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise InvariantFault(f"step {self.step + 1}: the gradient norm is {float(norm)}; no step was taken")
        self._last_lr = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return float(norm) if norm is not None else 0.0

    def _micro_loss(self, micro: TrainBatch, n_valid: float, sums: Sums) -> tuple[Tensor, float]:
        """The share of one micro-batch in the loss of its optimizer step, and max |ratio - 1| over its tokens."""
        cfg, mask = self.cfg.ppo, micro.response_mask
        out = run_policy(self._engine, micro, self.cfg.rollout.temperature, with_entropy=cfg.entropy_coef > 0)
        pg_loss, pg_stats = ppo.policy_loss(
            out.logprobs,
            micro.old_logprobs,
            micro.advantages,
            mask,
            cliprange=cfg.cliprange,
            cliprange_high=cfg.cliprange_high,
            dual_clip=cfg.dual_clip,
            normalizer=n_valid,
        )
        vf_loss, vf_stats = ppo.value_loss(
            out.values[:, :-1],
            micro.values,
            micro.returns,
            mask,
            cliprange_value=cfg.cliprange_value,
            normalizer=n_valid,
        )
        loss = pg_loss + cfg.vf_coef * vf_loss
        if out.entropy is not None:
            loss = loss - cfg.entropy_coef * torch.where(mask, out.entropy, 0.0).sum() / n_valid
        tokens = float(mask.sum())
        sums.add("loss/policy", pg_loss.item() * n_valid, tokens)
        sums.add("loss/value", vf_loss.item() * n_valid, tokens)
        for name in ("approx_kl", "pg_clipfrac", "ratio_mean"):
            sums.add(f"ppo/{name}", float(pg_stats[name]) * tokens, tokens)
        sums.add("ppo/vf_clipfrac", float(vf_stats["vf_clipfrac"]) * tokens, tokens)
        with torch.no_grad():
            ratio_error = torch.where(mask, out.logprobs - micro.old_logprobs, 0.0).exp().sub(1).abs().max().item()
        return loss, ratio_error

    def reduce_list(self, values: list[float]) -> list[float]:
        """`all_reduce` for plain numbers, in float64."""
        return self.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()

    def _max(self, value: float) -> float:
        return float(self._accelerator.gather(torch.tensor([value], device=self.device)).max())

    @property
    def probe_tolerance(self) -> float:
        return self._limits["probe"] if self.cfg.run.checks else math.inf

    def export_weights(self) -> dict[str, Tensor]:
        """Every tensor of the causal LM by its name in transformers, in the dtype of the workers; no value head."""
        dtype, parameters = getattr(torch, self.cfg.model.dtype), dict(self.policy.lm.named_parameters())
        cast: dict[int, Tensor] = {}  # one copy per storage, so that tied tensors stay tied
        tensors = named_tensors(self.policy.lm)
        storages = {tensor.data_ptr() for tensor in parameters.values()}
        return {
            # Buffers keep their dtype: from_pretrained casts parameters only, and rotary frequencies want float32.
            name: cast.setdefault(x.data_ptr(), x.to(dtype)) if x.data_ptr() in storages else x
            for name, x in tensors.items()
        }

    @torch.no_grad()
    def probe_logprobs(self, probe: Probe) -> np.ndarray:
        """[1, T] float32 log-probs of the fixed response under the policy, as a worker must compute them."""
        ids = torch.from_numpy(np.concatenate([probe.prompt_ids, probe.response_ids], axis=1)).to(self.device)
        n = probe.response_ids.shape[1]
        lengths = torch.tensor([probe.prompt_ids.shape[1]], device=self.device)
        out = self._engine(ids, lengths, torch.tensor([n], device=self.device), n, self.cfg.rollout.temperature)
        return out[0].float().cpu().numpy()
