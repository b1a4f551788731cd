"""The reference in the reward server: its log-probs against the model itself; one forward for it and a component."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny_models
from core.config import load
from core.faults import RewardFault, UserError
from core.schema import RewardConfig
from core.trajectory import Trajectory
from reward_server.reference import ReferenceSpec
from reward_server.server import RewardServer
from rollout.engines.sampling import Filters
from rollout.engines.transformers_engine import TransformersEngine
from rollout.offsets import OffsetMapper
from trainer.batch import TrainBatch
from trainer.learner import Learner


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("reference") / "m", "llama-tied")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def written(n: int = 6, filters: Filters | None = None) -> list[Trajectory]:
    """Unscored responses of the model, with the offsets that a worker gives."""
    model = tiny_models.make_model("llama-tied")
    engine = TransformersEngine(model, tuple(range(30)), temperature=0.8, max_new_tokens=9, filters=filters)
    mapper = OffsetMapper(tiny_models.make_tokenizer())
    rows = tiny_models.roll_out(engine, n)
    return [
        dataclasses.replace(
            t, component_rewards={}, component_mask={}, token_offsets=mapper(t.response_ids.tolist())[1]
        )
        for t in rows
    ]


def server(folder: Path, components: dict[str, RewardConfig], **spec: object) -> RewardServer:
    given = {"model": str(folder), "dtype": "float32", "temperature": 0.8, "batch_size": 4} | spec
    return RewardServer(components, tiny_models.make_tokenizer, reference=ReferenceSpec(**given))


def fluency(folder: Path) -> dict[str, RewardConfig]:
    options = {"model": str(folder), "center": 0.0, "batch_size": 4}
    return {"fluent": RewardConfig(fn="reward_server.library.models:Fluency", options=options)}


def length() -> dict[str, RewardConfig]:
    return {"brief": RewardConfig(fn="reward_server.library.cost:token_cost")}


def by_hand(t: Trajectory, temperature: float) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([t.request.prompt_ids, t.response_ids]))
    p = len(t.request.prompt_ids)
    with torch.no_grad():
        logits = tiny_models.make_model("llama-tied")(input_ids=ids[None]).logits[0, p - 1 : -1]
    if t.kept is not None and temperature != 1.0:
        logits = logits.masked_fill(~torch.from_numpy(t.kept.dense(logits.shape[-1])), -torch.inf)
    return (logits / temperature).log_softmax(-1)[torch.arange(len(t)), ids[p:]]


@pytest.mark.parametrize("filters", [None, Filters(top_p=0.8)])
@pytest.mark.parametrize("shared", [True, False])
def test_its_log_probs_are_the_models_after_temperature_and_filters(folder, shared, filters):
    it = server(folder, fluency(folder) if shared else length())
    it.score(written(2, Filters(top_k=2)))  # what these were drawn from is forgotten
    scored, failures = it.score(written(filters=filters))
    assert not failures and len(scored) == 6
    for t in scored:
        assert (t.kept is None) == (filters is None)
        assert t.ref_logprobs.dtype == np.float32
        np.testing.assert_allclose(t.ref_logprobs, by_hand(t, 0.8), atol=1e-5)
        if shared:  # the component's own numbers stay at temperature 1
            np.testing.assert_allclose(t.component_rewards["fluent"], by_hand(t, 1.0), atol=1e-5)


def test_a_component_that_reads_the_same_model_shares_its_forward(folder):
    """Six responses in batches of four are two forwards; with another dtype the reference has a model of its own."""
    for spec, forwards, of_its_own in (({}, 2, False), ({"dtype": "bfloat16"}, 2, True)):
        it = server(folder, fluency(folder), **spec)
        it.hello()
        part, calls = it._scorer.parts[0], []
        part._loaded.net.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        it.score(written())
        assert len(calls) == forwards and (it._reference._own is not None) == of_its_own


def test_a_sample_that_the_reference_cannot_read_is_a_failure_and_no_number(folder):
    it, rows = server(folder, length()), written(3)
    rows[1] = dataclasses.replace(rows[1], response_ids=np.full_like(rows[1].response_ids, 10**6))
    it._tokenizer.decode = lambda *_, **__: ""  # the text of that id is nobody's business here
    scored, failures = it.score(rows)
    assert len(failures) + len(scored) == 3 and rows[1].request.sample_uid in {
        f.trajectory.request.sample_uid for f in failures
    }
    assert any(f.component == "reference" and "not in the vocabulary" in f.reason for f in failures)
    assert not any(isinstance(t.ref_logprobs, RewardFault) for t in scored)


def test_a_reference_that_does_not_load_is_one_line(tmp_path):
    with pytest.raises(UserError, match="model.reference = reward_server"):
        server(tmp_path, length()).hello()


@pytest.mark.parametrize("filters", [None, Filters(top_p=0.8)])
def test_the_learner_takes_what_came_with_the_rewards(folder, filters):
    """The same KL as with a copy of its own; a learner of that kind holds no reference, and misses one at once."""
    scored, _ = server(folder, length()).score(written(filters=filters))
    results = {}
    for kind in ("copy", "reward_server"):
        settings = {
            "model.reference": kind,
            "rollout.temperature": 0.8,
            "rollout.batch_size": 6,
            "ppo.mini_batch_size": 6,
            "ppo.micro_batch_size": 4,
            "rollout.top_p": 1.0 if filters is None else filters.top_p,
        }
        cfg = load(None, tiny_models.LEARNER_SETTINGS | settings, folder=Path("/nowhere"))
        ref = tiny_models.make_model("llama-tied") if kind == "copy" else None
        it = Learner(cfg, Accelerator(cpu=True), tiny_models.make_model("llama-tied"), ref)
        rows = scored if kind == "reward_server" else written(filters=filters)
        batch, means = it.annotate(TrainBatch.collate(rows, []))
        results[kind] = batch.ref_logprobs, means["objective/kl"]
    torch.testing.assert_close(results["reward_server"][0], results["copy"][0], atol=1e-5, rtol=0, check_dtype=False)
    assert results["reward_server"][1] == pytest.approx(results["copy"][1], abs=1e-4)
    with pytest.raises(AssertionError, match="no reference came with the rewards"):
        it.annotate(TrainBatch.collate(written(filters=filters), []))
