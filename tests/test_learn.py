"""Toys with a known optimum, trained in this process: engine, batch, learner, credit and weights, no Ray.

A vocabulary of eight tokens and responses of four to eight: what is best can be written down, and a reward that stands
one token off, a mask, a sign or weights that do not reach the engine make it unreachable.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import conformance
from core.config import load
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory, sample_uid
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit

VOCABULARY, BATCH = 8, 64
Component = Callable[[np.ndarray], np.ndarray]  # response ids [T] -> rewards [T]


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    conformance.fresh_accelerate()
    yield
    conformance.fresh_accelerate()


def small_model() -> LlamaForCausalLM:
    """Nearly uniform over its tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def configured(weights: dict[str, float], n_tokens: int, updates: int, **overrides: object) -> Config:
    settings = {
        "model.path": "m",
        "model.dtype": "float32",
        "data.path": "d.jsonl",
        "rollout.batch_size": BATCH,
        "rollout.max_new_tokens": n_tokens,
        "ppo.mini_batch_size": BATCH // 2,
        "ppo.micro_batch_size": BATCH // 2,
        "ppo.kl_coef": 0.0,
        "ppo.whiten_advantages": False,  # towards a policy that always does the same it blows up what little is left
        "optim.lr": 5e-3,
        "run.steps": updates,
    }
    for name, weight in weights.items():
        settings |= {f"rewards.{name}.fn": "r.py:f", f"rewards.{name}.weight": weight}
    return load(None, settings | overrides, folder=conformance.Path("/nowhere"))


def trained(cfg: Config, components: dict[str, Component]) -> list[np.ndarray]:
    """Train with these rewards; the responses of each update, [BATCH, T], those of the last policy at the end.

    Workers and learner have models of their own: what the workers sample from is what was exported to them.
    """
    it = Learner(cfg, Accelerator(cpu=True), small_model(), small_model())
    engine = TransformersEngine(
        small_model(), (10**6,), temperature=cfg.rollout.temperature, max_new_tokens=cfg.rollout.max_new_tokens
    )
    written = []
    for step in range(cfg.run.steps + 1):
        with torch.no_grad():
            exported = it.export_weights()
            for name, live in engine.live_tensors().items():
                live.copy_(exported[name])
        engine.use_weights()
        trajectories = write(engine, components, step)
        written.append(np.stack([t.response_ids for t in trajectories]))
        if step == cfg.run.steps:
            break
        batch, _ = it.annotate(TrainBatch.collate(trajectories, cfg.rewards))
        batch = batch.fill(token_rewards=conformance.combined(cfg, batch).token_rewards)
        it.update(credit(cfg, batch, cfg.ppo.kl_coef, lambda x: x))
    return written


def write(engine: TransformersEngine, components: dict[str, Component], step: int) -> list[Trajectory]:
    requests = [
        PromptRequest(
            ordinal=step * BATCH + i,
            k=0,
            sample_uid=sample_uid("toy", step * BATCH + i, 0),
            prompt_ids=np.array([1] * (1 + i % 3)),  # of three lengths: alignment must not hang on one
            columns={"prompt": ""},
            seed=0,
        )
        for i in range(BATCH)
    ]
    out = []
    for request, g in zip(requests, engine.generate(requests), strict=True):
        n = len(g.response_ids)
        out.append(
            Trajectory(
                request=request,
                response_ids=g.response_ids,
                rollout_logprobs=g.logprobs,
                action_mask=np.ones(n, dtype=bool),
                token_offsets=np.zeros((n, 2), dtype=np.int64),
                policy_version=np.full(n, step),
                finish_reason=g.finish_reason,
                finished_at=0.0,
                component_rewards={name: component(g.response_ids) for name, component in components.items()},
                component_mask={name: np.ones(n, dtype=bool) for name in components},
            )
        )
    return out


# ---------------------------------------------------------------- a token to hit at each position

TARGET = np.array([5, 2, 2, 7])


def hits(ids: np.ndarray) -> np.ndarray:
    return (ids == TARGET).astype(np.float64)


def hit_rate(responses: np.ndarray) -> float:
    return float((responses == TARGET).mean())


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_a_token_for_each_position_is_learnt(gamma):
    """One reward in eight at first; nothing but the reward says which, and positions 1 and 2 want the same token."""
    written = trained(configured({"hit": 1.0}, 4, 30, **{"ppo.gamma": gamma}), {"hit": hits})
    assert hit_rate(written[0]) < 0.25
    assert hit_rate(written[-1]) >= 0.95


@pytest.mark.parametrize("shift", [-1, 1], ids=["on the token before", "on the token after"])
def test_a_reward_one_token_off_teaches_nothing(shift):
    """The task above at gamma 0 and in as many updates, where each token is paid for itself, from the wrong place."""
    cfg = configured({"hit": 1.0}, 4, 30, **{"ppo.gamma": 0.0})
    assert hit_rate(trained(cfg, {"hit": lambda ids: np.roll(hits(ids), shift)})[-1]) < 0.5


# ---------------------------------------------------------------- two components that pull apart

LIKED = 3


def count(responses: np.ndarray) -> float:
    return float((responses == LIKED).sum(axis=1).mean())


def gain(ids: np.ndarray) -> np.ndarray:
    """1 for each liked token."""
    return (ids == LIKED).astype(np.float64)


def price(ids: np.ndarray) -> np.ndarray:
    """-k for the k-th liked token."""
    liked = ids == LIKED
    return -np.where(liked, np.cumsum(liked), 0).astype(np.float64)


@pytest.mark.slow
def test_the_weight_of_a_component_moves_the_optimum_to_where_it_must_be():
    """With weight w the k-th liked token is worth w - k: a best response has floor(w) of them, wherever they stand."""
    counts = [
        count(trained(configured({"gain": weight, "price": 1.0}, 6, 40), {"gain": gain, "price": price})[-1])
        for weight in (0.5, 2.5, 4.5)
    ]
    assert counts == pytest.approx([0, 2, 4], abs=0.4)


# ---------------------------------------------------------------- what dense rewards are for

LONG = np.array([5, 2, 2, 7, 1, 4, 6, 3])


@pytest.mark.slow
def test_dense_rewards_solve_in_a_few_updates_what_their_sum_on_the_last_token_does_not():
    """Eight tokens, eight choices each; both pay a response the same, each has the discount that suits it."""

    def dense(ids: np.ndarray) -> np.ndarray:
        return (ids == LONG).astype(np.float64)

    def terminal(ids: np.ndarray) -> np.ndarray:
        out = np.zeros(len(ids))
        out[-1] = dense(ids).sum()
        return out

    rates = {
        name: float((trained(configured({"hit": 1.0}, 8, 30, **{"ppo.gamma": gamma}), {"hit": fn})[-1] == LONG).mean())
        for name, fn, gamma in (("dense", dense, 0.0), ("terminal", terminal, 1.0))
    }
    assert rates["dense"] > 0.7 and rates["terminal"] < 0.5, rates
