"""TRL's side of ppo_vs_trl.py and learner_memory.py: runs in TRL's own environment and imports nothing of tokenppo.

TRL's PPOTrainer.train is one loop over all updates. It runs here as it is, and stops for orders where it calls others:

    on_train_begin, on_step_end   callbacks of the trainer: an iteration is over, wait for the next order
    batch_generation, get_reward  wrapped, to tell its phases apart
    np.random.permutation         called where the epochs begin
    accelerator.backward          called with the loss; its caller's variables are the batch

Its choices are read out of its own frame, never written down again here.

Lengths. TRL draws with torch.multinomial inside generate. While an iteration runs, the draw is steered: the eos id is
put where the plan of the row ends and replaced by another id before that. Nothing else changes: log-probs are those
of the distribution that was drawn from, generate stops by its own rule, and what follows an eos is padding. So nothing
of TRL's algorithm is skipped or added; steering costs three operations on 32 numbers at each step.
"""

import os
import sys
import time
from types import FrameType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peer_cases import Case
from peer_child import answer, memory, requests, reset_peak
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Stop(Exception):
    """Leaves train."""


class Ids(torch.nn.Module):
    """A reward model that is a rule on ids: its last hidden state is the ids, and `score` reads them.

    TRL asks a model for rewards. Ours get theirs from functions, so that rewards cost neither side a forward pass.
    """

    base_model_prefix = "backbone"

    def __init__(self, components: int) -> None:
        super().__init__()
        self.components = components
        self.backbone = self._read
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def _read(self, input_ids: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(hidden_states=(input_ids.unsqueeze(-1).float(),))

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T, 1] ids -> [B, T, 1]: the sum so far of what each token earns. TRL reads it at the last token."""
        rules = [(ids % 2 == 0), (ids % 3 == 0)][: self.components]
        return sum(rule.float() for rule in rules).cumsum(1) / ids.shape[1]


class Side(TrainerCallback):
    def __init__(self) -> None:
        self.case: Case | None = None
        self.capture_to: str | None = None
        self.fake_rollout = False
        self._step = -1  # of generation; below 0 nothing is steered
        self._marks: dict[str, float] = {}
        self._reward_s = 0.0
        self._optimizer_steps = 0
        self._memory: dict[str, int] = {}
        self._orders = requests()
        self._captured: dict[str, torch.Tensor] | None = None
        self._losses: list[float] = []
        self._width = 0
        self._lengths: list[int] = []
        self._real = {
            "multinomial": torch.multinomial,
            "batch_generation": ppo_trainer.batch_generation,
            "get_reward": ppo_trainer.get_reward,
            "permutation": np.random.permutation,
        }
        torch.multinomial = self._multinomial
        ppo_trainer.batch_generation = self._batch_generation
        ppo_trainer.get_reward = self._get_reward
        np.random.permutation = self._permutation

    # --- what TRL calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        answer(
            ok=True,
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            mixed_precision=trainer.accelerator.mixed_precision,
            attention=trainer.policy_model.config._attn_implementation,
            threads=torch.get_num_threads(),
            versions={name: _version(name) for name in ("trl", "torch", "transformers")},
        )
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        end = time.perf_counter()
        marks = self._marks
        phases = {
            "rollout": marks["generated"] - marks["start"],
            "reward": self._reward_s,
            "annotate": marks["epochs"] - marks["generated"] - self._reward_s,
            "update": end - marks["epochs"],
        }
        answer(
            seconds=end - marks["start"],
            phases=phases,
            samples=self.case.batch,
            tokens=sum(self._lengths),
            lengths=sorted(self._lengths),
            width=self._width,
            optimizer_steps=self._optimizer_steps,
            losses=self._losses,
            memory=self._memory | {"peak_bytes": memory()[1]},
        )
        self._wait()

    def _wait(self) -> None:
        request = next(self._orders, None)
        if request is None:
            raise Stop
        assert request["do"] in ("iterate", "capture"), request
        self.capture_to = request.get("to")
        self._optimizer_steps, self._reward_s, self._losses, self._memory = 0, 0.0, [], {}
        self._marks = {"start": time.perf_counter()}

    def _batch_generation(self, model: Any, queries: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        if self.fake_rollout:  # only the memory of the learner is asked for: no logits of a rollout are held
            ids = torch.randint(1, case.size.vocabulary - 2, (len(queries), case.response))
            out = torch.cat([queries, ids], 1), torch.zeros(1).expand(len(queries), case.response, case.size.vocabulary)
        else:
            self._plan = torch.tensor(case.lengths)
            self._step = 0
            out = self._real["batch_generation"](model, queries, *args)
            self._step = -1
        responses = out[0][:, queries.shape[1] :]
        self._width = responses.shape[1]
        self._lengths = (responses != case.size.vocabulary - 2).sum(1).tolist()
        self._marks["generated"] = time.perf_counter()
        return out

    def _multinomial(self, probs: torch.Tensor, num_samples: int, **more: Any) -> torch.Tensor:
        drawn = self._real["multinomial"](probs, num_samples=num_samples, **more)
        if self._step >= 0:
            self._step += 1
            eos = self.case.size.vocabulary - 1  # the padding id is the one before
            drawn = torch.where(drawn >= eos - 1, drawn - 2, drawn)
            if self.case.lognormal:
                drawn = torch.where((self._plan == self._step)[:, None], eos, drawn)
        return drawn

    def _get_reward(self, model: Any, *args: Any) -> Any:
        started = time.perf_counter()
        out = self._real["get_reward"](model, *args)
        if isinstance(model, Ids):
            self._reward_s += time.perf_counter() - started
        return out

    def _permutation(self, n: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code is PPOTrainer.train.__code__ and "epochs" not in self._marks:
            self._marks["epochs"] = time.perf_counter()
            if self.capture_to:
                self._capture_batch(caller)
            if self.fake_rollout:
                reset_peak()
                self._memory["before_update"] = memory()[0]
        return self._real["permutation"](n)

    def _backward(self, loss: torch.Tensor, **more: Any) -> None:
        self._real_backward(loss, **more)
        self._losses.append(loss.item())
        self._optimizer_steps += int(self.trainer.accelerator.sync_gradients)
        if self.capture_to and "loss" not in self._captured:
            self._capture_gradients(sys._getframe(1))

    # --- a stored batch for the test of equality

    def _capture_batch(self, caller: FrameType) -> None:
        """The loop's variables as the epochs begin. Then old log-probs and values are moved, so that clips bite."""
        found = caller.f_locals
        names = ("query_responses", "logprobs", "ref_logprobs", "values", "scores", "advantages", "returns")
        names += ("padding_mask", "padding_mask_p1")
        self._captured = {name: found[name].clone() for name in names}
        self._captured["context_length"] = torch.tensor(found["context_length"])
        noise = torch.Generator().manual_seed(1)
        valid = ~found["padding_mask"]
        for name in ("logprobs", "values"):
            x = found[name]
            x.add_(torch.where(valid, 0.3 * torch.randn(x.shape, generator=noise), 0.0))
            self._captured[f"moved_{name}"] = x.clone()

    def _capture_gradients(self, caller: FrameType) -> None:
        found = caller.f_locals
        for name in ("loss", "pg_loss", "vf_loss", "pg_clipfrac", "vf_clipfrac"):
            if name in found:
                self._captured[name] = found[name].detach().clone()
        self._captured["rows"] = torch.as_tensor(found["micro_batch_inds"].copy())
        model = self.trainer.model
        for side, module in (("policy", model.policy), ("critic", model.value_model)):
            for name, p in module.named_parameters():
                self._captured[f"{side}.weight.{name}"] = p.detach().clone()
                self._captured[f"{side}.grad.{name}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        torch.save(self._captured, self.capture_to)

    # --- setting it up

    def setup(self, request: dict[str, Any]) -> None:
        case = self.case = Case.from_json(request["case"])
        self.fake_rollout = request.get("fake_rollout", False)
        folder = request["model"]
        torch.manual_seed(0)
        dtype = torch.bfloat16 if request.get("bf16") else torch.float32
        # An environment variable because PPOTrainer makes an Accelerator of its own without telling it of args.bf16.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if request.get("bf16") else "no"
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ref = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        critic = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        policy.generation_config.pad_token_id = case.size.vocabulary - 2
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        args = PPOConfig(
            output_dir=request["scratch"],
            # All rows in one "device batch" without accumulation: under accumulation over k batches TRL takes one
            # optimizer step for k mini-batches, whatever num_mini_batches says.
            per_device_train_batch_size=case.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=case.minis,
            num_ppo_epochs=case.epochs,
            total_episodes=case.batch * 10**6,
            local_rollout_forward_batch_size=case.batch,
            response_length=case.response,
            stop_token="eos" if case.lognormal else None,
            temperature=1.0,
            learning_rate=case.lr,
            lr_scheduler_type="constant",
            vf_coef=case.vf_coef,
            kl_coef=case.kl_coef,
            cliprange=case.cliprange,
            lam=case.gae_lambda,
            bf16=bool(request.get("bf16")),
            gradient_checkpointing=False,
            num_sample_generations=0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        # The whole data set is one batch: each iteration has the same prompts, as ours has.
        prompts = [p for p in request["prompts"] for _ in range(case.per_prompt)]
        self.trainer = PPOTrainer(
            args,
            tokenizer,
            policy,
            ref,
            Ids(case.components),
            Dataset.from_dict({"input_ids": prompts}),
            critic,
            eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)
        self._real_backward = self.trainer.accelerator.backward
        self.trainer.accelerator.backward = self._backward

    def main(self) -> None:
        request = next(self._orders)
        assert request["do"] == "setup", request
        self.setup(request)
        try:
            self.trainer.train()
        except Stop:
            return


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


if __name__ == "__main__":
    Side().main()
