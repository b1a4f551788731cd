"""Our side of ppo_vs_trl.py and learner_memory.py: an iteration of a run without Ray, in one process.

Engine, scorer, learner and `credit` are those of a run; only who calls them differs. The engine has weights of its own,
as a rollout worker has, and gets those of the learner after each update (phase `sync`).

Lengths. A token is a function of a number that comes from `uniforms`. The plan of lengths is put there: the number
that draws the last id, which is eos, where a response is to end, and numbers that do not draw it before. So ids and
log-probs are what the engine makes of a draw that happened to fall so; nothing of it is replaced.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peer_cases import Case, Size
from peer_child import answer, memory, requests, reset_peak
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.combine import combine
from core.config import load
from core.pretrained import load_causal_lm
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory, sample_uid
from core.weights import named_tensors
from reward_server.components import ScoreRequest
from reward_server.scorer import Scorer
from rollout.engines import responses
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit


def even(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[float(i % 2 == 0) / len(ids) for i in ids] for ids in completion_ids]


def thirds(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[float(i % 3 == 0) / len(ids) for i in ids] for ids in completion_ids]


COMPONENTS = {"even": even, "thirds": thirds}


def make_model(folder: Path, size: Size, *, seed: int = 0) -> None:
    """A random Llama and a tokenizer with an eos and a padding id, for both sides."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.inner,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=size.vocabulary - 1,
        pad_token_id=size.vocabulary - 2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(size.vocabulary - 2)}
    words |= {"<pad>": size.vocabulary - 2, "<eos>": size.vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(folder)


def settings(case: Case, model: str, more: dict[str, Any] | None = None) -> Config:
    """The configuration of a case; `more` are keys that win."""
    names = list(COMPONENTS)[: case.components]
    mini = case.batch // case.minis
    wanted = {
        "model.path": model,
        "model.dtype": "bfloat16" if case.bf16 else "float32",
        "model.value": case.critic,
        "data.path": "prompts.jsonl",
        "rollout.batch_size": case.batch,
        "rollout.n_samples_per_prompt": case.per_prompt,
        "rollout.max_new_tokens": case.response,
        "ppo.ppo_epochs": case.epochs,
        "ppo.mini_batch_size": mini,
        "ppo.micro_batch_size": mini,
        "ppo.micro_batch_tokens": mini * (case.prompt + case.response),
        "ppo.kl_coef": case.kl_coef,
        "ppo.vf_coef": case.vf_coef,
        "ppo.cliprange": case.cliprange,
        "ppo.gae_lambda": case.gae_lambda,
        "optim.lr": case.lr,
        "optim.schedule": "constant",
        "optim.betas": [0.9, 0.999],
        "optim.max_grad_norm": 1e9,  # TRL clips no gradient
        **{f"rewards.{name}.fn": f"{Path(__file__)}:{name}" for name in names},
    }
    return load(None, wanted | (more or {}), folder=Path.cwd())


class PlannedUniforms:
    """Stands in for `uniforms` of the engine: lengths as planned, all other tokens as they come."""

    def __init__(self, case: Case) -> None:
        self._real = responses.uniforms
        self._case = case

    def __call__(self, request: PromptRequest, n: int) -> np.ndarray:
        size = self._case.size
        # The last ids are the last part of the cumulative distribution, of about 1 / V each, and never drawn by chance.
        numbers = self._real(request, n) * (1 - 8 / size.vocabulary)
        if self._case.lognormal:
            row = request.columns["row"]
            numbers[self._case.lengths[row] - 1] = 1 - 1e-12
        return numbers


class Side:
    def __init__(self, request: dict[str, Any]) -> None:
        case = self.case = Case.from_json(request["case"])
        fake = request.get("fake_rollout", False)
        # Made-up responses have no log-probs of a worker to be compared with.
        self.cfg = cfg = settings(case, request["model"], {"run.checks": False} if fake else None)
        torch.manual_seed(0)
        lm, ref = (load_causal_lm(request["model"], torch.float32) for _ in range(2))
        self.accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.learner = Learner(cfg, self.accelerator, lm.eval(), ref.eval())
        self.engine = None
        if not fake:
            responses.uniforms = PlannedUniforms(case)
            dtype = torch.bfloat16 if case.bf16 else torch.float32
            self.engine = TransformersEngine(
                load_causal_lm(request["model"], dtype),
                (case.size.vocabulary - 1,),
                temperature=1.0,
                max_new_tokens=case.response,
            )
        self.scorer = Scorer(cfg.rewards, {n: COMPONENTS[n] for n in cfg.rewards})
        self.prompts = [np.array(p, dtype=np.int64) for p in request["prompts"]]
        self.iteration = 0
        self.lm = lm

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "ok": True,
            "parameters": sum(p.numel() for p in self.learner.policy.parameters()),
            "value": self.cfg.model.value,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def requests(self) -> list[PromptRequest]:
        n = self.case.per_prompt
        start = self.iteration * len(self.prompts)
        return [
            PromptRequest(
                ordinal=start + i,
                k=k,
                sample_uid=sample_uid("bench", start + i, k),
                prompt_ids=prompt,
                columns={"prompt": "", "row": i * n + k},
                seed=0,
            )
            for i, prompt in enumerate(self.prompts)
            for k in range(n)
        ]

    def rollout(self) -> list[Trajectory]:
        asked = self.requests()
        out = []
        for request, g in zip(asked, self.engine.generate(asked), strict=True):
            t = len(g.response_ids)
            out.append(
                Trajectory(
                    request=request,
                    response_ids=g.response_ids,
                    rollout_logprobs=g.logprobs,
                    action_mask=np.ones(t, dtype=bool),
                    token_offsets=np.stack([np.arange(t), np.arange(1, t + 1)], axis=1),
                    policy_version=np.full(t, self.iteration, dtype=np.int64),
                    finish_reason=g.finish_reason,
                    finished_at=time.time(),
                )
            )
        return out

    def score(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        placed = self.scorer.score(
            ScoreRequest(
                prompts=[""] * len(trajectories),
                completions=["x" * len(t) for t in trajectories],
                prompt_ids=[t.request.prompt_ids for t in trajectories],
                completion_ids=[t.response_ids for t in trajectories],
                offsets=[t.token_offsets for t in trajectories],
                finish_reasons=[t.finish_reason for t in trajectories],
                uids=[t.request.sample_uid for t in trajectories],
                columns={},
            )
        )
        return [
            t.scored(
                {n: answers[i][0] for n, answers in placed.items()},
                {n: answers[i][1] for n, answers in placed.items()},
                scored_at=time.time(),
            )
            for i, t in enumerate(trajectories)
        ]

    def made_up(self) -> list[Trajectory]:
        """Random responses, for the memory of the learner alone."""
        rng, out = np.random.default_rng(self.iteration), []
        for request in self.requests():
            t = self.case.lengths[request.columns["row"]]
            out.append(_trajectory(request, rng.integers(1, self.case.size.vocabulary - 2, t), list(self.cfg.rewards)))
        return out

    def iterate(self) -> dict[str, Any]:
        marks = [time.perf_counter()]
        trajectories = self.rollout() if self.engine else self.made_up()
        marks.append(time.perf_counter())
        if self.engine:
            trajectories = self.score(trajectories)
        marks.append(time.perf_counter())
        batch = TrainBatch.collate(trajectories, self.cfg.rewards)
        batch, means = self.learner.annotate(batch)
        combined = combine(
            batch.component_rewards, batch.component_mask, batch.response_mask, self.cfg.rewards, running={}
        )
        batch = credit(self.cfg, batch.fill(token_rewards=combined.token_rewards), self.cfg.ppo.kl_coef, lambda x: x)
        marks.append(time.perf_counter())
        held = {}
        if not self.engine:
            reset_peak()
            held["before_update"] = memory()[0]
        means |= self.learner.update(batch)
        marks.append(time.perf_counter())
        if self.engine:
            self.sync()
            marks.append(time.perf_counter())
        self.iteration += 1
        spent = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        lengths = [len(t) for t in trajectories]
        return {
            "seconds": marks[-1] - marks[0],
            "phases": dict(zip(("rollout", "reward", "annotate", "update", "sync"), spent, strict=False)),
            "samples": len(trajectories),
            "tokens": sum(lengths),
            "lengths": sorted(lengths),
            "width": max(lengths),
            "losses": [means["loss/policy"], means["loss/value"]],
            "memory": held | {"peak_bytes": memory()[1]},
        }

    @torch.no_grad()
    def sync(self) -> None:
        live = self.engine.live_tensors()
        for name, tensor in named_tensors(self.lm).items():
            live[name].copy_(tensor)
        self.engine.use_weights()


def _trajectory(request: PromptRequest, ids: np.ndarray, rewards: list[str]) -> Trajectory:
    t = len(ids)
    return Trajectory(
        request=request,
        response_ids=ids.astype(np.int64),
        rollout_logprobs=np.zeros(t, dtype=np.float32),
        action_mask=np.ones(t, dtype=bool),
        token_offsets=np.zeros((t, 2), dtype=np.int64),
        policy_version=np.zeros(t, dtype=np.int64),
        finish_reason="length",
        finished_at=0.0,
        component_rewards={n: np.zeros(t) for n in rewards},
        component_mask={n: np.ones(t, dtype=bool) for n in rewards},
    )


# --- the test of equality on a batch that TRL's loop had


def _critic(policy: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """TRL's names of the critic's parameters -> our parameters: a trunk of its own, and the value head's weight."""
    own = {n: p for n, p in policy.named_parameters() if not n.startswith("lm.")}
    found = {}
    for name, weight in theirs.items():
        ending = "weight" if name == "score.weight" else name.removeprefix("model.")
        fits = [n for n, p in own.items() if f".{n}".endswith(f".{ending}") and p.shape == weight.shape]
        if name == "score.weight":
            fits = [n for n in fits if "head" in n]
        (only,) = fits
        found[name] = own[only]
    return found


def compare(case: Case, model: str, stored: dict[str, torch.Tensor]) -> dict[str, float | str]:
    """Greatest differences between TRL's numbers on `stored` and ours; gradients by tensor, relative to its norm."""
    case = replace(case, epochs=1, minis=1)
    theirs = {
        side: {n.removeprefix(f"{side}.weight."): w for n, w in stored.items() if n.startswith(f"{side}.weight.")}
        for side in ("policy", "critic")
    }
    cfg = settings(case, model, {"run.checks": False})  # ratios are off 1 on purpose
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    learner = Learner(cfg, accelerator, *(load_causal_lm(model, torch.float32).eval() for _ in range(2)))
    lm = dict(learner.policy.lm.named_parameters())
    critic = _critic(learner.policy, theirs["critic"])
    with torch.no_grad():
        for name, weight in theirs["policy"].items():
            assert torch.equal(lm[name], weight), f"{name} is not what both sides loaded"
        for name, p in critic.items():
            p.copy_(theirs["critic"][name])

    start, ids = int(stored["context_length"]), stored["query_responses"]
    lengths = (~stored["padding_mask"]).sum(1)
    trajectories = []
    for row, n in enumerate(lengths.tolist()):
        request = PromptRequest(
            ordinal=row,
            k=0,
            sample_uid=sample_uid("bench", row, 0),
            prompt_ids=ids[row, :start].numpy(),
            columns={},
            seed=0,
        )
        trajectories.append(_trajectory(request, ids[row, start : start + n].numpy(), list(cfg.rewards)))
    batch, _ = learner.annotate(TrainBatch.collate(trajectories, cfg.rewards))
    mask = batch.response_mask
    equal_lengths = bool(mask.all())

    def most(ours: torch.Tensor, name: str) -> float:
        return float(torch.where(mask, ours - stored[name], 0.0).abs().max())

    found: dict[str, float | str] = {
        "old log-probs": most(batch.old_logprobs, "logprobs"),
        "reference log-probs": most(batch.ref_logprobs, "ref_logprobs"),
        "values": most(batch.values, "values"),
    }
    if equal_lengths:  # TRL's own score on the last token, its log-probs and values: our reward shaping, GAE, whitening
        rewards = torch.zeros(mask.shape)
        rewards[:, -1] = stored["scores"]
        given = replace(
            batch,
            old_logprobs=stored["logprobs"],
            ref_logprobs=stored["ref_logprobs"],
            values=stored["values"],
            token_rewards=rewards,
        )
        given = credit(cfg, given, cfg.ppo.kl_coef, lambda x: x)
        found["advantages"] = most(given.advantages, "advantages")
        found["returns"] = most(given.returns, "returns")

    gradients: dict[str, torch.Tensor] = {}

    def recorded(parameters: Any, limit: float) -> torch.Tensor:
        gradients.update({n: p.grad.clone() for n, p in learner.policy.named_parameters() if p.grad is not None})
        return torch.zeros(())

    accelerator.clip_grad_norm_ = recorded
    given = replace(
        batch,
        old_logprobs=torch.where(mask, stored["moved_logprobs"], 0.0),
        values=torch.where(mask, stored["moved_values"], 0.0),
        advantages=stored["advantages"],
        returns=torch.where(mask, stored["returns"], 0.0),
        rewards=torch.zeros(mask.shape),
    )
    names = {id(p): n for n, p in learner.policy.named_parameters()}
    means = learner.update(given)
    found["policy loss"] = abs(means["loss/policy"] - float(stored["pg_loss"]))

    def worst(side: str, parameters: dict[str, torch.nn.Parameter]) -> float:
        errors = []
        for name in theirs[side]:
            want = stored[f"{side}.grad.{name}"]
            got = gradients.get(names[id(parameters[name])], torch.zeros_like(want))
            errors.append(float((got - want).norm() / want.norm().clamp(min=1e-12)))
        return max(errors)

    found["policy gradients"] = worst("policy", lm)
    if not equal_lengths:
        found["value loss"] = "differs by design: TRL trains the value of one position after the last token as well"
    else:
        found["value loss"] = abs(means["loss/value"] - float(stored["vf_loss"]))
        found["critic gradients"] = worst("critic", critic)
    found["clipped ratios"] = f"{float(means['ppo/pg_clipfrac']):.0%}"
    return found


def main() -> None:
    side = None
    for request in requests():
        if request["do"] == "make":
            make_model(Path(request["model"]), Size(**request["size"]))
            answer(ok=True)
        elif request["do"] == "setup":
            side = Side(request)
            answer(**side.describe())
        elif request["do"] == "iterate":
            answer(**side.iterate())
        elif request["do"] == "compare":
            stored = torch.load(request["from"], weights_only=True)
            answer(found=compare(Case.from_json(request["case"]), request["model"], stored))


if __name__ == "__main__":
    main()
