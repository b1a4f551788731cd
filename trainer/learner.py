"""Learner: the policy under Accelerate. Annotates a batch, updates on it, hands out its weights.

    annotate   old_logprobs, values: policy, no gradient      ref_logprobs: frozen reference
    update     ppo_epochs x mini-batches x micro-batches; one optimizer step per mini-batch

The denominator of both losses is the number of valid tokens of the whole optimizer step, over all micro-batches and
ranks; DDP and DeepSpeed average gradients over ranks, so each micro-loss is multiplied by the number of ranks.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedModel

from core.faults import InvariantFault, UserError
from core.logprobs import logprobs_from_logits
from core.metrics import Sums
from core.schema import Config
from core.weights import Probe, named_tensors
from trainer import ppo
from trainer.batch import TrainBatch
from trainer.model import CausalForward, PolicyWithValueHead, run_policy
from trainer.objective import RATIO_ERROR, TokenFields, policy_objective
from trainer.ranks import Ranks

# Limits of numbers that must be equal, by the dtype of the forward passes. fp32: the difference of rollout and learner
# reached 1.7e-5 in healthy runs, a broken sync shows 0.2 and more. bf16: eight bits of mantissa.
TOLERANCES = {
    "float32": {"ratio": 1e-4, "logprob_mean": 1e-5, "logprob_max": 1e-3, "probe": 3e-4},
    "bfloat16": {"ratio": 0.2, "logprob_mean": 0.02, "logprob_max": 1.0, "probe": 0.3},
}


class Learner:
    def __init__(
        self,
        cfg: Config,
        accelerator: Accelerator,
        lm: PreTrainedModel,
        ref_lm: PreTrainedModel,
        ranks: Ranks | None = None,
    ) -> None:
        """`lm` is trained, `ref_lm` (the same weights) is frozen. `ranks`: the processes of the job; None for one.

        Raises UserError for a launch in which the gradients of several processes would not be reduced.
        """
        self.cfg, self._accelerator, self.ranks = cfg, accelerator, ranks or Ranks()
        self.device = accelerator.device
        self._limits = TOLERANCES[cfg.model.dtype]
        dtype = getattr(torch, cfg.model.dtype)
        self.policy = PolicyWithValueHead(lm, dtype).eval()  # eval for good: dropout would move the ratios off 1
        self._ref = CausalForward(ref_lm.to(self.device).eval().requires_grad_(False), dtype)
        optim = cfg.optim
        adamw = torch.optim.AdamW(
            self.policy.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        self._sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self._sharded:
            accelerator.state.deepspeed_plugin.deepspeed_config.update(
                train_micro_batch_size_per_gpu=cfg.ppo.micro_batch_size,
                train_batch_size=cfg.ppo.micro_batch_size * self.ranks.size,
                gradient_clipping=optim.max_grad_norm,
            )
        self._engine, self._optimizer = accelerator.prepare(self.policy, adamw)
        if self.ranks.size > 1 and self._engine is self.policy:
            raise UserError(
                f"{self.ranks.size} learner processes were launched as {accelerator.distributed_type.value}: each would"
                " train on its own and never reduce gradients; use launch/accelerate/ddp.yaml or zero2.yaml"
            )
        self._engine.eval()
        self._last_lr = 0.0
        self._ranks_agree = self.ranks.size == 1  # equal parameters after a first step of this process were seen
        self.step = 0  # PPO updates that are done
        self._optimizer_steps = 0  # that are done

    def _lr_factor(self, optimizer_step: int) -> float:
        total, optim = self.cfg.optimizer_steps, self.cfg.optim
        warmup = optim.warmup_frac * total
        if optimizer_step < warmup:
            return (optimizer_step + 1) / (warmup + 1)
        progress = min(1.0, (optimizer_step - warmup) / max(1.0, total - warmup))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
            optim.schedule
        ]

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
        for rows, micro in self._equal_pieces(batch):
            micro = micro.to(self.device)
            t = micro.response_mask.shape[1]
            out = run_policy(self._engine, micro, self.cfg.rollout.temperature, with_entropy=True)
            if rows is None:
                continue
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

    def _equal_pieces(self, batch: TrainBatch) -> Iterator[tuple[np.ndarray | None, TrainBatch]]:
        """Micro-batches of all rows, as many on every rank: a forward of a wrapped engine may be a collective."""
        size = self.cfg.ppo.micro_batch_size
        pieces = list(batch.pieces(np.arange(len(batch)), size))
        most = int(self.ranks.max(len(pieces)))  # before the first forward: nobody may wait here while another forwards
        for rows in pieces:
            yield rows, batch.rows(rows)
        for _ in range(most - len(pieces)):
            yield None, batch.idle()

    def _compare(self, batch: TrainBatch, entropy: Tensor) -> dict[str, float]:
        mask, sums = batch.response_mask, Sums()
        n_tokens = float(mask.sum())
        kl = ppo.kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1")
        difference = torch.where(mask, batch.old_logprobs - batch.rollout_logprobs, 0.0).abs()
        sums.add("objective/kl", float(kl.sum()), len(batch))
        sums.add("objective/entropy", float(entropy.sum()), n_tokens)
        sums.add("logprob_diff/mean", float(difference.sum()), n_tokens)
        means = sums.merge(self.ranks.sum_list).means()
        means["logprob_diff/max"] = self.ranks.max(_largest(difference))
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
                worst = self.ranks.max(_largest(kl.abs()))
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
        orders = self.ranks.gather(batch.order)
        for epoch in range(cfg.ppo_epochs):
            minis = batch.mini_batches(
                n_mini,
                seed=self.cfg.run.seed,
                step=self.step + 1,
                epoch=epoch,
                orders=orders,
                rank=self.ranks.index,
            )
            for index, (rows, most) in enumerate(minis):
                norms.append(self._optimizer_step(batch, rows, most, sums, first=epoch == index == 0))
        if self.cfg.run.checks and not self._ranks_agree:
            self._compare_ranks()
        self.step += 1
        means = sums.merge(self.ranks.sum_list).means()
        means |= {"optim/lr": self._last_lr, "optim/grad_norm": sum(norms) / len(norms)}
        ev = ppo.explained_variance(batch.values, batch.returns, batch.response_mask, all_reduce=self.ranks.sum)
        return means | {"value/explained_variance": ev}

    def _optimizer_step(self, batch: TrainBatch, rows: np.ndarray, most: int, sums: Sums, *, first: bool) -> float:
        """One optimizer step on this rank's `rows` (the fullest rank has `most`); the gradient norm before clipping."""
        n_valid = self.ranks.sum(batch.response_mask[torch.from_numpy(rows)].sum().double().reshape(1)).clamp(min=1)
        size = self.cfg.ppo.micro_batch_size
        micros = list(batch.micro_batches(rows, size, max(1, -(-most // size))))
        self._last_lr = self.cfg.optim.lr * self._lr_factor(self._optimizer_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._last_lr
        losses, ratio_errors = [], []
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            self._accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self._accelerator.no_sync(self._engine):
                loss, ratio_error = self._micro_loss(micro.to(self.device), float(n_valid), sums)
                losses.append(loss.item())
                ratio_errors.append(ratio_error)
                if last:  # DeepSpeed takes its step inside the last backward
                    self._check_losses(losses, ratio_errors, first)
                self._accelerator.backward(loss * self.ranks.size)
        norm = self._accelerator.clip_grad_norm_(self._engine.parameters(), self.cfg.optim.max_grad_norm)
        if norm is not None and not 0 <= norm < math.inf:  # DeepSpeed says -1 where it met a NaN
            taken = "the step was taken: go on from a checkpoint" if self._sharded else "no step was taken"
            raise InvariantFault(f"step {self.step + 1}: the gradient norm is {float(norm)}; {taken}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._optimizer_steps += 1
        return float(norm) if norm is not None else 0.0

    def _check_losses(self, losses: list[float], ratio_errors: list[float], first: bool) -> None:
        """Raise InvariantFault, on all ranks at once, for a loss that is no number or a first ratio off 1."""
        loss, ratio_error = (self.ranks.max(_largest(torch.tensor(x).abs())) for x in (losses, ratio_errors))
        if not math.isfinite(loss):
            raise InvariantFault(f"step {self.step + 1}: the loss is {loss}; the weights are as before it")
        if first and self.cfg.run.checks and not ratio_error <= self._limits["ratio"]:
            raise InvariantFault(
                f"step {self.step + 1}: a ratio of the first mini-batch is off 1 by {ratio_error:.2g}"
                f" (limit {self._limits['ratio']:.2g}): old and new log-probs are not computed alike"
            )

    def _compare_ranks(self) -> None:
        """Raise InvariantFault if ranks hold other parameters than this one after their first step together."""
        h = hashlib.blake2b(digest_size=16)
        for name, x in self.policy.named_parameters():
            h.update(name.encode())
            h.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digests = self.ranks.gather(h.hexdigest())
        if len(set(digests)) > 1:
            raise InvariantFault(
                f"step {self.step + 1}: after one step the learner ranks hold different parameters (digests"
                f" {', '.join(d[:8] for d in digests)}): gradients are not reduced in this launch"
            )
        self._ranks_agree = True

    def _micro_loss(self, micro: TrainBatch, n_valid: float, sums: Sums) -> tuple[Tensor, float]:
        """The share of one micro-batch in the loss of its optimizer step, and max |ratio - 1| over its tokens."""
        cfg, mask = self.cfg.ppo, micro.response_mask
        out = run_policy(self._engine, micro, self.cfg.rollout.temperature, with_entropy=cfg.entropy_coef > 0)
        known = TokenFields(
            mask=mask,
            old_logprobs=micro.old_logprobs,
            ref_logprobs=micro.ref_logprobs,
            rollout_logprobs=micro.rollout_logprobs,
            advantages=micro.advantages,
        )
        pg_loss, numbers = policy_objective(out.logprobs, out.entropy, known, cfg, n_valid)
        vf_loss, vf_stats = ppo.value_loss(
            out.values[:, :-1],
            micro.values,
            micro.returns,
            mask,
            cliprange_value=cfg.cliprange_value,
            normalizer=n_valid,
        )
        # Without a critic times 0, not left out: DDP wants a gradient for every parameter.
        loss = pg_loss + (cfg.vf_coef if cfg.has_critic else 0.0) * vf_loss
        tokens = float(mask.sum())
        ratio_error = float(numbers.pop(RATIO_ERROR))
        for name, total in numbers.items():
            sums.add(name, float(total), tokens)
        if cfg.has_critic:
            sums.add("loss/value", vf_loss.item() * n_valid, tokens)
            sums.add("ppo/vf_clipfrac", float(vf_stats["vf_clipfrac"]) * tokens, tokens)
        return loss, ratio_error

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
        ids, lengths, n = self._probe_input(probe)
        out = self._engine(ids, *lengths, n, self.cfg.rollout.temperature)
        return out[0].float().cpu().numpy()

    @torch.no_grad()
    def reference_logprobs(self, probe: Probe) -> np.ndarray:
        """[1, T] float32, the same under the frozen reference: which model it is, at the cost of one forward."""
        ids, lengths, n = self._probe_input(probe)
        logits, _ = self._ref(ids, *lengths, n)
        return logprobs_from_logits(logits, ids[:, -n:], self.cfg.rollout.temperature).float().cpu().numpy()

    def _probe_input(self, probe: Probe) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
        ids = torch.from_numpy(np.concatenate([probe.prompt_ids, probe.response_ids], axis=1)).to(self.device)
        n_prompt, n = probe.prompt_ids.shape[1], probe.response_ids.shape[1]
        return ids, tuple(torch.tensor([x], device=self.device) for x in (n_prompt, n)), n

    def save_state(self, folder: Path) -> None:
        """What the next step depends on here: parameters, AdamW, RNG. All ranks call it; each writes its own.

        The learning rate is a function of the number of steps, which `load_state` is told.
        """
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # a line for each tied tensor that is saved once
        self._accelerator.save_state(str(folder))

    def load_state(self, folder: Path, *, step: int) -> None:
        """Put back what `save_state` wrote after `step` updates. All ranks call it."""
        self._accelerator.load_state(str(folder))
        self.step = step
        self._optimizer_steps = step * self.cfg.optimizer_steps // self.cfg.run.steps


def _largest(x: Tensor) -> float:
    """The largest element; 0 where there is none."""
    return float(x.max()) if x.numel() else 0.0
