"""A value head for each component: their weighted sum is the baseline, and each learns the returns of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.config import load
from core.faults import UserError
from core.metrics import lookup
from core.schema import KL_HEAD, Config, ModelConfig
from ppo_cases import close, f64, mask_of
from rollout.engines.transformers_engine import TransformersEngine
from trainer import ppo
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import TrainState, credit
from trainer.model import PolicyWithValueHead

N = 6
TWO_COMPONENTS = {
    "model.value_heads": "components",
    "rewards": {"a": {"fn": "r.py:f", "weight": 2.0}, "b": {"fn": "r.py:g", "weight": 0.5}},
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configured(**of_ppo: object) -> Config:
    least = {"model.path": "m", "data.path": "p.jsonl", **TWO_COMPONENTS}
    return load(None, least | {f"ppo.{key}": value for key, value in of_ppo.items()}, folder=Path("/nowhere"))


def batch_of(rewards: dict[str, list], says: dict[str, list], mask: list, *, weights: dict, cut=None) -> TrainBatch:
    """`rewards` of components, and under KL_HEAD the KL of each token; `says`: what each head predicts."""
    mask = mask_of(mask)
    n, width = mask.shape
    zeros = torch.zeros(n, width, dtype=torch.float64)
    parts = {name: f64(r) for name, r in rewards.items() if name != KL_HEAD}
    after = (
        {name: torch.zeros(n, dtype=torch.float64) for name in says}
        if cut is None
        else {k: f64(v) for k, v in cut.items()}
    )
    return TrainBatch(
        order=np.array([(i, 0) for i in range(n)], dtype=np.int64),
        input_ids=torch.zeros(n, width + 1, dtype=torch.int64),
        prompt_lengths=torch.ones(n, dtype=torch.int64),
        response_lengths=mask.sum(dim=1),
        response_mask=mask,
        cut=torch.zeros(n, dtype=torch.bool),
        rollout_logprobs=zeros,
        policy_version=torch.zeros(n, width, dtype=torch.int64),
        component_rewards={},
        component_mask={},
        normalized_rewards=parts,
        token_rewards=sum(weights[name] * r for name, r in parts.items()),
        old_logprobs=f64(rewards[KL_HEAD]) if KL_HEAD in rewards else zeros,
        ref_logprobs=zeros,
        head_values={name: f64(v) for name, v in says.items()},
        head_bootstraps=after,
    )


def credited(cfg: Config, batch: TrainBatch, kl_coef: float, weights: dict, **kept) -> TrainBatch:
    return credit(cfg, batch, kl_coef, lambda sums: sums, weights=weights, **kept)


REWARDS = {"a": [[1.0, 2.0]], "b": [[0.0, 4.0]], KL_HEAD: [[0.5, 0.25]]}
SAYS = {"a": [[1.0, 1.0]], "b": [[2.0, 0.0]], KL_HEAD: [[0.0, -1.0]]}
WEIGHTS = {"a": 2.0, "b": 0.5}


def test_two_tokens_by_hand():
    """V = 2 V_a + 0.5 V_b + 0.1 V_kl = 3, 1.9; r = 1.95, 5.975; with lambda 1 what follows is 7.925, 5.975."""
    cfg, report = configured(gae_lambda=1, whiten_advantages=False), {}
    out = credited(cfg, batch_of(REWARDS, SAYS, [[1, 1]], weights=WEIGHTS), 0.1, WEIGHTS, report=report)
    close(out.values, [[3.0, 1.9]])
    close(out.advantages, [[4.925, 4.075]])
    close(out.head_returns["a"], [[3.0, 2.0]])
    close(out.head_returns["b"], [[4.0, 4.0]])
    close(out.head_returns[KL_HEAD], [[-0.75, -0.25]])
    # Of `a`: errors 2 and 1 over returns 3 and 2, the same spread; of `b`, whose returns do not vary, 0 by convention.
    assert report["reward/a/explained_variance"] == pytest.approx(0)
    assert report["reward/b/explained_variance"] == 0
    assert all(lookup(name).name == name or "<component>" in lookup(name).name for name in report)


@pytest.mark.parametrize("scale_rewards", ["none", "batch"])
@pytest.mark.parametrize("options", [{}, {"gamma": 0.9, "gae_lambda": 0.7, "value_lambda": 0.5}, {"lambda_alpha": 0.4}])
def test_advantages_are_the_weighted_sum_of_those_of_each(options, scale_rewards):
    """GAE is linear, cut responses and holes in the mask included."""
    cfg = configured(whiten_advantages=False, scale_rewards=scale_rewards, **options)
    g = torch.Generator().manual_seed(3)

    def some(*shape: int) -> list:
        return torch.randn(*shape, generator=g, dtype=torch.float64).tolist()

    mask = [[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    names = ["a", "b", KL_HEAD]
    rewards, says, cut = {n: some(3, 4) for n in names}, {n: some(3, 4) for n in names}, {n: some(3) for n in names}
    batch = batch_of(rewards, says, mask, weights=WEIGHTS, cut=cut)
    report: dict[str, float] = {}
    out = credited(cfg, batch, 0.3, WEIGHTS, report=report)
    scale = report.get("credit/reward_scale", 1.0)
    assert (scale != 1.0) == (scale_rewards == "batch")

    p, want, valid = cfg.ppo, 0.0, mask_of(mask)
    lam = p.gae_lambda if p.lambda_alpha is None else ppo.adaptive_lambda(valid, p.lambda_alpha)
    for name, weight in {"a": 2.0 / scale, "b": 0.5 / scale, KL_HEAD: 0.3}.items():
        r = f64(rewards[name]) * (-1 if name == KL_HEAD else 1)
        call = {"gamma": p.gamma, "bootstrap_values": f64(cut[name])}
        want = want + weight * ppo.compute_gae(r, f64(says[name]), valid, gae_lambda=lam, **call)[0]
        learnt = p.gae_lambda if p.value_lambda is None else p.value_lambda
        _, returns = ppo.compute_gae(r, f64(says[name]), valid, gae_lambda=learnt, **call)
        close(out.head_returns[name], returns)
    close(out.advantages, want, 1e-9)


def test_a_weight_moves_the_baseline_and_nothing_that_a_head_learns():
    cfg = configured(whiten_advantages=False)
    other = {"a": 0.0, "b": 7.0}
    one, two = (
        credited(cfg, batch_of(REWARDS, SAYS, [[1, 1]], weights=w), kl, w) for w, kl in ((WEIGHTS, 0.1), (other, 2.0))
    )
    for name in SAYS:
        assert torch.equal(one.head_returns[name], two.head_returns[name])
    close(two.values, [[14.0, -2.0]])


def test_each_head_has_a_unit_of_its_own():
    """Returns of `a` are 3, 2 and of `b` 400, 400: with scaled values both heads learn numbers of root mean square 1,
    and the next step reads them in those units, after a restart as well."""
    cfg = configured(gae_lambda=1, whiten_advantages=False, scale_values="running", kl_coef=0)
    zeros = {"a": [[0.0, 0.0]], "b": [[0.0, 0.0]]}
    rewards = {"a": [[1.0, 2.0]], "b": [[0.0, 400.0]]}
    state = TrainState.fresh(cfg)
    one = credited(cfg, batch_of(rewards, zeros, [[1, 1]], weights=WEIGHTS), 0, WEIGHTS, running=state.running)
    unit = {"a": 6.5**0.5, "b": 400.0}
    close(one.head_returns["a"], [[3 / unit["a"], 2 / unit["a"]]])
    close(one.head_returns["b"], [[1.0, 1.0]])
    again = TrainState.fresh(cfg)
    again.restore(state.to_json())
    ones = {"a": [[1.0, 1.0]], "b": [[1.0, 1.0]]}
    two = credited(cfg, batch_of(rewards, ones, [[1, 1]], weights=WEIGHTS), 0, WEIGHTS, running=again.running)
    close(two.values, [[2 * unit["a"] + 200.0] * 2])
    assert two.head_values["a"].tolist() == [[1.0, 1.0]]  # what the head says: clip and loss are in its unit


def learner(**settings: object) -> tuple[Learner, TrainBatch]:
    sizes = {"rollout.batch_size": N, "ppo.mini_batch_size": N, "ppo.micro_batch_size": 4, "ppo.ppo_epochs": 1}
    cfg = load(None, tiny_models.LEARNER_SETTINGS | sizes | {"optim.lr": 1e-3} | settings, folder=Path("/nowhere"))
    engine = TransformersEngine(tiny_models.make_model("llama-tied"), tuple(range(30)), max_new_tokens=8, temperature=1)
    models = (tiny_models.make_model("llama-tied") for _ in range(2))
    it = Learner(cfg, Accelerator(cpu=True), *models)
    batch = TrainBatch.collate(tiny_models.roll_out(engine, N))
    return it, batch


def learnt(it: Learner, batch: TrainBatch, rewards: dict[str, torch.Tensor], kl_coef: float, weights: dict) -> dict:
    batch, _ = it.annotate(batch)
    total = sum(weights[name] * r for name, r in rewards.items()).float()
    batch = batch.fill(token_rewards=total, normalized_rewards=rewards)
    return it.update(credit(it.cfg, batch, kl_coef, it.ranks.sum, weights=weights))


def test_one_component_without_kl_trains_as_one_head_does():
    after = []
    for heads in ("one", "components"):
        it, batch = learner(**{"model.value_heads": heads, "ppo.kl_coef": 0.0})
        means = learnt(it, batch, {"a": batch.component_rewards["a"].float()}, 0.0, {"a": 1.0})
        after.append((dict(it.policy.state_dict()), means))
        AcceleratorState._reset_state(reset_partial_state=True)
    (one, of_one), (each, of_each) = after
    assert one["value_head.weight"].count_nonzero() and one.keys() == each.keys()
    for name, x in one.items():
        torch.testing.assert_close(each[name], x, atol=1e-7, rtol=0)
    for name, value in of_one.items():
        assert of_each[name] == pytest.approx(value, abs=1e-6)


def test_every_head_learns_its_own_returns():
    """From 0, the loss is the mean over heads of half the mean square of their returns, and AdamW's first step moves
    each bias by the rate towards the mean of its returns."""
    it, batch = learner(**TWO_COMPONENTS, **{"ppo.gae_lambda": 1.0, "ppo.kl_coef": 0.02})
    assert it.policy.value_head.weight.shape[0] == 3
    a = torch.where(batch.response_mask, 1.0, 0.0)
    means = learnt(it, batch, {"a": a, "b": -3 * a}, 0.02, WEIGHTS)
    to_go = a.flip(1).cumsum(1).flip(1)[batch.response_mask]
    squares = [0.5 * float(to_go.square().mean()), 0.5 * float((3 * to_go).square().mean()), 0.0]
    assert means["loss/value"] == pytest.approx(sum(squares) / 3, rel=1e-5)
    bias = it.policy.value_head.bias.tolist()
    assert bias[0] == pytest.approx(1e-3, rel=1e-2) and bias[1] == pytest.approx(-1e-3, rel=1e-2)


def test_the_score_of_a_reward_model_is_no_head_of_a_component():
    """It predicts the whole reward; [1, H] would be copied into all of them without a word."""
    config = ModelConfig(path="m", dtype="float32", value_heads="components")
    policy = PolicyWithValueHead(tiny_models.make_model("llama-tied"), config, head=torch.ones(1, 32), n_heads=3)
    assert policy.value_head.weight.shape[0] == 3 and not policy.value_head.weight.any()


def test_rows_of_a_batch_keep_what_each_head_says():
    """Also for components that are called like fields of the batch."""
    it, batch = learner(**{"model.value_heads": "components"})
    named = {name: torch.arange(batch.response_mask.numel()).view(batch.response_mask.shape) for name in ("order", "a")}
    after = {name: torch.arange(len(batch)) for name in named}
    batch = replace(batch, head_values=named, head_bootstraps=after)
    rows = batch.rows(np.array([4, 1]))
    width = rows.response_mask.shape[1]
    for name in named:
        assert torch.equal(rows.head_values[name], named[name][[4, 1], :width])
        assert rows.head_bootstraps[name].tolist() == [4, 1]
    assert batch.idle().head_values["order"].shape == (1, 1)


def test_which_heads_there_are():
    plain = {"model.path": "m", "data.path": "p.jsonl", **TWO_COMPONENTS}
    metric = {"rewards.c.fn": "r.py:h", "rewards.c.weight": 0.0}
    assert load(None, plain | metric, folder=Path("/nowhere")).value_heads == ["a", "b", KL_HEAD]
    assert load(None, plain | {"ppo.kl_coef": 0.0}, folder=Path("/nowhere")).value_heads == ["a", "b"]
    assert load(None, plain | {"model.value_heads": "one"}, folder=Path("/nowhere")).value_heads == []
    with pytest.raises(UserError, match=r"model\.value_heads = components: wants a critic"):
        load(None, plain | {"ppo.estimator": "reinforce_pp"}, folder=Path("/nowhere"))
