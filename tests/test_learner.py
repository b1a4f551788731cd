"""The learner on one stored batch: one denominator whatever the micro-batches, and the checks that stop a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.config import load
from core.faults import InvariantFault
from core.schema import Config
from core.weights import Probe, WeightStream
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit
from weight_delivery import receiver_of, send

N = 12


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configured(**overrides: object) -> Config:
    return load(
        None,
        {
            **tiny_models.LEARNER_SETTINGS,
            "rollout.batch_size": N,
            "ppo.mini_batch_size": N,
            "ppo.micro_batch_size": 4,
            "ppo.ppo_epochs": 1,
            "optim.lr": 1e-3,
            **overrides,
        },
        folder=Path("/nowhere"),
    )


def rolled(name: str = "llama-tied", temperature: float = 1.0) -> TrainBatch:
    stop = tuple(range(30))  # many, so that lengths differ
    engine = TransformersEngine(tiny_models.make_model(name), stop, temperature=temperature, max_new_tokens=16)
    return TrainBatch.collate(tiny_models.roll_out(engine, N))


def learner(cfg: Config, name: str = "llama-tied", ref_seed: int = 0) -> Learner:
    return Learner(
        cfg, Accelerator(cpu=True), tiny_models.make_model(name), tiny_models.make_model(name, seed=ref_seed)
    )


def updated(cfg: Config, name: str = "llama-tied") -> tuple[Learner, dict[str, float], TrainBatch]:
    """A learner after one update on the stored batch."""
    it = learner(cfg, name)
    batch, _ = it.annotate(rolled(name, cfg.rollout.temperature))
    batch = credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)
    return it, it.update(batch), batch


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("micro", [1, 5, 12])
def test_no_number_depends_on_the_micro_batch(name, micro):
    """Losses within 1e-6, the gradient (through one AdamW step of small lr) within 1e-5: token counts differ by row."""
    (a, stats_a, batch), (b, stats_b, _) = (
        updated(configured(**{"ppo.micro_batch_size": m}), name) for m in (4, micro)
    )
    assert batch.response_lengths.unique().numel() > 2
    for key in ("loss/policy", "loss/value", "optim/grad_norm", "ppo/approx_kl"):
        assert stats_a[key] == pytest.approx(stats_b[key], rel=1e-4, abs=1e-6), key


def test_the_loss_is_the_one_of_the_formula_over_the_whole_batch():
    """At ratio 1 the policy loss is -mean(A) over all valid tokens, the value loss half the mean squared return."""
    _, stats, batch = updated(configured())
    mask = batch.response_mask
    assert stats["loss/policy"] == pytest.approx(float(-batch.advantages[mask].mean()), abs=1e-5)
    assert stats["loss/value"] == pytest.approx(float(0.5 * batch.returns[mask].square().mean()), rel=1e-4)
    assert stats["ppo/ratio_mean"] == pytest.approx(1, abs=1e-5) and stats["ppo/pg_clipfrac"] == 0


@pytest.mark.parametrize("name", tiny_models.configs())
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_first_ratio_is_1_and_kl_to_the_reference_is_0(name, temperature):
    """The checks that raise are on: dropout, temperature or a shift in one of the passes would stop here."""
    cfg = configured(**{"rollout.temperature": temperature})
    it = learner(cfg, name)
    batch, means = it.annotate(rolled(name, temperature))
    assert means["objective/kl"] == pytest.approx(0, abs=1e-4) and means["logprob_diff/max"] < 1e-4
    batch = credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)
    stats = it.update(batch)  # one mini-batch, so these are the numbers before any step
    assert stats["ppo/ratio_mean"] == pytest.approx(1, abs=1e-4) and abs(stats["ppo/approx_kl"]) < 1e-4


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_what_is_recorded_as_new_are_the_log_probs_of_the_last_pass(name):
    """After two passes of one mini-batch each: those of the policy after the first. In the columns of the batch, though
    rows went through the model in other orders and widths."""
    same = {"optim.schedule": "constant", "log.ledger": 1.0, "run.checks": False, "ppo.micro_batch_size": 5}
    once, _, batch = updated(configured(**same), name)
    twice, _, _ = updated(configured(**same, **{"ppo.ppo_epochs": 2}), name)
    mask, after_once = batch.response_mask, once.annotate(rolled(name))[0].old_logprobs
    assert torch.allclose(once.new_logprobs[mask], batch.old_logprobs[mask], atol=1e-5)
    assert torch.allclose(twice.new_logprobs[mask], after_once[mask], atol=1e-5)
    assert (after_once - batch.old_logprobs)[mask].abs().max() > 1e-3
    assert updated(configured(**{"log.ledger": 0}), name)[0].new_logprobs is not None  # trackers show ratios
    assert updated(configured(**{"log.ledger": 0, "log.samples_every": 0}), name)[0].new_logprobs is None


def test_another_temperature_in_the_rollout_stops_the_run():
    with pytest.raises(InvariantFault, match="rollout workers and learner differ"):
        learner(configured(**{"rollout.temperature": 1.0})).annotate(rolled(temperature=1.1))


def test_another_reference_stops_the_run_before_the_first_update():
    with pytest.raises(InvariantFault, match="policy and reference differ"):
        learner(configured(), ref_seed=1).annotate(rolled())


def test_old_logprobs_of_another_policy_stop_the_first_mini_batch():
    cfg = configured()
    it = learner(cfg)
    batch, _ = it.annotate(rolled())
    batch = credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)
    with torch.no_grad():
        it.policy.lm.get_output_embeddings().weight.mul_(1.1)
    with pytest.raises(InvariantFault, match="ratio of the first mini-batch is off 1"):
        it.update(batch)


@pytest.mark.parametrize("stream", ["advantages", "returns"])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(stream):
    cfg = configured()
    it = learner(cfg)
    batch, _ = it.annotate(rolled())
    batch = credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum)
    getattr(batch, stream)[0, 0] = torch.nan
    before = {n: x.clone() for n, x in it.export_weights().items()}
    with pytest.raises(InvariantFault, match="loss is nan"):
        it.update(batch)
    assert all(torch.equal(x, before[n]) for n, x in it.export_weights().items())


def test_checks_can_be_turned_off():
    cfg = configured(**{"run.checks": False})
    _, means = learner(cfg, ref_seed=1).annotate(rolled(temperature=1.3))
    assert means["logprob_diff/max"] > 1e-2 and means["objective/kl"] != 0


def test_a_cut_response_is_bootstrapped_with_the_value_after_its_last_token():
    """V(s_(n+1)) is a forward of its own: the value of a state that no token of the response belongs to."""
    for bootstrap in (True, False):
        cfg = configured(**{"ppo.bootstrap_cut": bootstrap})
        it = learner(cfg)
        torch.nn.init.normal_(it.policy.value_head.weight)
        batch, _ = it.annotate(rolled())
        assert 0 < batch.cut.sum() < N
        i = int(batch.cut.nonzero()[0])
        ids = batch.rows(np.array([i])).input_ids
        with torch.no_grad():
            hidden = tiny_models.make_model("llama-tied")(input_ids=ids, output_hidden_states=True).hidden_states[-1][
                0, -1
            ]
            want = float(it.policy.value_head(hidden))
        assert abs(want) > 1e-3
        assert float(batch.bootstrap_values[i]) == pytest.approx(want if bootstrap else 0.0, abs=1e-4)
        assert (batch.bootstrap_values[~batch.cut] == 0).all()


def test_the_learning_rate_falls_to_0_over_the_optimizer_steps_of_the_run():
    cfg = configured(**{"run.steps": 4, "ppo.ppo_epochs": 2, "optim.lr": 1.0})
    it = learner(cfg)
    assert cfg.optimizer_steps == 8
    assert [it._lr_factor(s) for s in (0, 4, 8)] == [1.0, 0.5, 0.0]
    warm = learner(configured(**{"run.steps": 10, "optim.warmup_frac": 0.5, "optim.schedule": "constant"}))
    assert [warm._lr_factor(s) for s in (0, 2, 5, 9)] == [pytest.approx(x) for x in (1 / 6, 3 / 6, 1.0, 1.0)]


def test_the_optimizer_steps_with_that_rate():
    """Accelerate puts new groups into the optimizer: a rate that is written into the old ones moves nothing."""
    moved = []
    for warmup in (0.0, 0.99):
        cfg = configured(**{"run.steps": 100, "optim.warmup_frac": warmup, "optim.schedule": "constant"})
        it = learner(cfg)
        before = {n: x.clone() for n, x in it.export_weights().items()}
        batch, _ = it.annotate(rolled())
        it.update(credit(cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.02, it.ranks.sum))
        moved.append(max(float((x - before[n]).abs().max()) for n, x in it.export_weights().items()))
    assert moved[1] == pytest.approx(moved[0] / 100, rel=0.02)  # AdamW's first step is as long as the rate


def test_reference_never_moves():
    it, _, batch = updated(configured(**{"run.checks": False}))
    again, _ = it.annotate(rolled())
    assert torch.equal(again.ref_logprobs, batch.ref_logprobs)
    assert not torch.equal(again.old_logprobs, batch.old_logprobs)


@pytest.mark.parametrize("name", tiny_models.configs())
def test_bfloat16_workers_get_what_the_learner_computes_with(name, tmp_path):
    """The default dtype: parameters travel in bf16, tied ones once, buffers as they are; then both sides agree."""
    folder = tiny_models.save_model(tmp_path / "m", name)
    worker = TransformersEngine.load(
        str(folder), (0, 7), dtype="bfloat16", device="cpu", temperature=1.0, max_new_tokens=16
    )
    cfg = configured(**{"model.dtype": "bfloat16"})
    it = Learner(
        cfg,
        Accelerator(cpu=True, mixed_precision="bf16"),
        tiny_models.make_model(name, seed=3),
        tiny_models.make_model(name, seed=3),
    )
    tensors, live = it.export_weights(), worker.live_tensors()
    assert {n: (x.dtype, x.shape) for n, x in tensors.items()} == {n: (x.dtype, x.shape) for n, x in live.items()}
    assert torch.bfloat16 in {x.dtype for x in tensors.values()}
    aliases = [s for s in it.stream_weights().specs if s.alias_of]
    assert it.stream_weights().specs == WeightStream.of(tensors).specs  # told beforehand as it is in the end
    assert len(aliases) == (0 if name.endswith("untied") else 1)
    before = worker.logprobs(np.array([[1, 2, 3]]), np.array([[4, 5, 6]]))
    send(receiver_of(live), tensors, 1)
    probe = Probe(prompt_ids=np.array([[1, 2, 3]]), response_ids=np.array([[4, 5, 6]]))
    after, wanted = worker.logprobs(probe.prompt_ids, probe.response_ids), it.probe_logprobs(probe)
    assert np.abs(after - wanted).max() < 0.3 < np.abs(before - wanted).max()
    assert all(p.dtype == torch.float32 for p in it.policy.parameters())  # the masters
