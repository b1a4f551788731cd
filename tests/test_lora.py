"""Low-rank adapters: what is trained, what the workers get, what goes to disk. Oracles are peft's own loading and
transformers' own forward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny_models
from core.config import load
from core.faults import InvariantFault, TransitFault, UserError
from core.logprobs import logprobs_from_logits
from core.schema import Config
from core.weights import LORA_A, LORA_B, Probe
from policy_reading import policy_of, read
from rollout.engines.transformers_engine import TransformersEngine
from rollout.weight_receiver import WeightReceiver
from trainer import adapters, checkpoint, engine_weights
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit
from weight_delivery import receiver_of, send

N = 8
MODELS = ["llama-tied", "llama-untied", "gpt2"]  # GPT-2's linear layers keep their weights transposed
RANK = 4
# alpha is not the rank, so that a scale that is forgotten or taken twice shows.
BASE = {"rollout.batch_size": N, "ppo.mini_batch_size": N, "ppo.micro_batch_size": 3, "ppo.ppo_epochs": 1}
BASE |= {"optim.lr": 3e-2, "model.lora_rank": RANK, "model.lora_alpha": 10.0, "run.checks": False}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configured(**overrides: object) -> Config:
    return load(None, {**tiny_models.LEARNER_SETTINGS, **BASE, **overrides}, folder=Path("/nowhere"))


def learner(name: str, **overrides: object) -> Learner:
    cfg = configured(**overrides)
    ref = None if cfg.reference == "adapter" else tiny_models.make_model(name)
    return Learner(cfg, Accelerator(cpu=True), tiny_models.make_model(name), ref)


_rolled: dict[str, list] = {}


def rolled(name: str) -> TrainBatch:
    if name not in _rolled:
        model = tiny_models.make_model(name)
        _rolled[name] = tiny_models.roll_out(
            TransformersEngine(model, tuple(range(30)), temperature=1.0, max_new_tokens=12), N
        )
    return TrainBatch.collate(_rolled[name])


def train(it: Learner, name: str, steps: int = 1) -> dict[str, float]:
    for _ in range(steps):
        batch, before = it.annotate(rolled(name))
        batch = credit(it.cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.0, it.ranks.sum)
        after = it.update(batch)
    return before | after


def numbers(it: Learner) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in it.policy.named_parameters()}


def logprobs_of(model: torch.nn.Module, name: str) -> Tensor:
    """[M] of a model of transformers, one plain forward for each row."""
    batch, out = rolled(name), []
    width = batch.input_ids.shape[1] - batch.response_mask.shape[1]
    for row in range(len(batch)):
        p, t = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
        ids = batch.input_ids[row, width - p : width + t][None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, p - 1 : p + t - 1]
        out.append(logprobs_from_logits(logits, ids[:, p:], 1.0)[0])
    return torch.cat(out)


def of_learner(it: Learner, name: str) -> Tensor:
    batch = rolled(name)
    return read(it.policy, batch, 1.0).logprobs[batch.response_mask]


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("way", ["packed", "padded", "own logits"])
@pytest.mark.parametrize("name", MODELS)
def test_at_first_nothing_changes(name, way):
    base = policy_of(tiny_models.make_model(name), way)
    adapted = policy_of(tiny_models.make_model(name), way, lora_rank=RANK)
    batch = rolled(name)
    assert torch.equal(read(base, batch, 1.0).logprobs, read(adapted, batch, 1.0).logprobs)


@pytest.mark.parametrize("value", ["shared", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_and_the_value_head_train(name, value):
    it = learner(name, **{"model.value": value})
    before = numbers(it)
    flags = {n: p.requires_grad for n, p in it.policy.named_parameters()}
    train(it, name, steps=3)  # head, then B, then A: each begins to move when the one before is no longer 0
    moved = {n for n, x in numbers(it).items() if not torch.equal(x, before[n])}
    assert moved == {n for n in before if ".lora_" in n or n.startswith("value_head.")}
    assert moved == {n for n, flag in flags.items() if flag} and len(moved) > 10
    assert flags == {n: p.requires_grad for n, p in it.policy.named_parameters()}
    assert not [n for n in moved if "lm_head" in n or "embed" in n or "wte" in n]


@pytest.mark.parametrize("value", ["shared", "lora"])
def test_switching_changes_names_only(value):
    """What engines read once at the start (requires_grad) stays; a block ends as it began, after a fault too."""
    lm = tiny_models.make_model("llama-tied")
    policy = policy_of(lm, lora_rank=RANK, value=value)
    layers = adapters.layers(lm)

    def state() -> tuple:
        names = tuple((tuple(x.active_adapters), x.disable_adapters) for x in layers.values())
        return names, tuple(p.requires_grad for p in policy.parameters())

    first = state()
    with adapters.active(lm, "policy"):
        assert {x.active_adapters[0] for x in layers.values()} == {"policy"} and state()[1] == first[1]
        with pytest.raises(ZeroDivisionError), adapters.active(lm, None):
            assert all(x.disable_adapters for x in layers.values()) and state()[1] == first[1]
            1 / 0  # noqa: B018
        assert {x.active_adapters[0] for x in layers.values()} == {"policy"}
        assert not any(x.disable_adapters for x in layers.values())
    assert state() == first


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_stays_the_base_bit_for_bit(name):
    it = learner(name)
    assert it._ref._own is False  # no second model is held
    first, _ = it.annotate(rolled(name))
    assert torch.equal(first.old_logprobs, first.ref_logprobs)
    train(it, name, steps=2)
    later, means = it.annotate(rolled(name))
    assert torch.equal(later.ref_logprobs, first.ref_logprobs)
    assert apart(later.old_logprobs, first.old_logprobs) > 1e-2 and means["objective/kl"] != 0
    assert apart(later.ref_logprobs[later.response_mask], logprobs_of(tiny_models.make_model(name), name)) < 1e-5


def test_a_reference_of_its_own_is_the_same_reference():
    numbers = []
    for kind in ("adapter", "copy", "offload"):
        it = learner("llama-untied", **{"model.reference": kind})
        train(it, "llama-untied")
        numbers.append(it.annotate(rolled("llama-untied"))[0])
        AcceleratorState._reset_state(reset_partial_state=True)
    for other in numbers[1:]:
        assert apart(numbers[0].ref_logprobs, other.ref_logprobs) < 1e-5
        assert apart(numbers[0].old_logprobs, other.old_logprobs) < 1e-5


class TestSync:
    """`export_weights` and the receiver of a worker, which loaded the base from disk."""

    @staticmethod
    def worker(name: str) -> TransformersEngine:
        return TransformersEngine(tiny_models.make_model(name), (0,), temperature=1.0, max_new_tokens=4)

    @pytest.mark.parametrize("name", MODELS)
    def test_two_factors_for_each_linear_layer_under_the_names_of_the_worker(self, name):
        it, live = learner(name), self.worker(name).live_tensors()
        sent = it.export_weights()
        layers = {n.removesuffix(LORA_A).removesuffix(LORA_B) for n in sent}
        linear = (torch.nn.Linear, type(tiny_models.make_model("gpt2").transformer.h[0].mlp.c_fc))
        model = tiny_models.make_model(name)
        wanted = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, linear) and n != "lm_head"}
        assert layers == wanted and sent.keys() == {n + x for n in wanted for x in (LORA_A, LORA_B)}
        for layer in layers:
            rows, columns = live[layer].shape
            assert (sent[layer + LORA_B].shape, sent[layer + LORA_A].shape) == ((rows, RANK), (RANK, columns))
            assert sent[layer + LORA_A].is_contiguous() and sent[layer + LORA_A].dtype == torch.float32

    @pytest.mark.parametrize("value", ["shared", "lora"])
    @pytest.mark.parametrize("name", MODELS)
    def test_the_worker_computes_what_the_learner_does_after_every_sync(self, name, value):
        """The third sync equals that of a fresh worker: what is added is never added to what was added before."""
        it, engine = learner(name, **{"model.value": value}), self.worker(name)
        receiver, base = receiver_of(engine.live_tensors()), logprobs_of(engine.model, name)
        for version in range(3):
            send(receiver, it.export_weights(), version)
            assert apart(logprobs_of(engine.model, name), of_learner(it, name)) <= 1e-5
            train(it, name)
        assert apart(of_learner(it, name), base) > 1e-2
        send(receiver, it.export_weights(), 3)
        send(receiver, it.export_weights(), 4)
        fresh = self.worker(name)
        send(receiver_of(fresh.live_tensors()), it.export_weights(), 4)
        for tensor, other in zip(engine.live_tensors().values(), fresh.live_tensors().values(), strict=True):
            assert torch.equal(tensor, other)
        assert receiver.version == 4

    def test_the_probe_of_worker_and_learner_agree(self):
        it, engine = learner("gpt2"), self.worker("gpt2")
        train(it, "gpt2")
        send(receiver_of(engine.live_tensors()), it.export_weights(), 1)
        probe = Probe(prompt_ids=np.arange(3, 9)[None], response_ids=np.arange(20, 29)[None])
        mine, theirs = it.probe_logprobs(probe), engine.logprobs(probe.prompt_ids, probe.response_ids)
        assert np.abs(mine - theirs).max() < 1e-5
        assert np.abs(mine - it.reference_logprobs(probe)).max() > 1e-3

    def broken(self, change) -> tuple[WeightReceiver, dict[str, Tensor], dict[str, Tensor]]:
        it, engine = learner("llama-untied"), self.worker("llama-untied")
        train(it, "llama-untied")
        live, sent = engine.live_tensors(), it.export_weights()
        change(sent, next(iter(sent)).removesuffix(LORA_A).removesuffix(LORA_B))
        return receiver_of(live), sent, {n: x.clone() for n, x in live.items()}

    @pytest.mark.parametrize(
        "change",
        [
            lambda sent, n: sent.update({n + LORA_A: torch.zeros(RANK + 1, sent[n + LORA_A].shape[1])}),
            lambda sent, n: sent.update({n + LORA_B: torch.zeros(7, RANK)}),
            lambda sent, n: sent.pop(n + LORA_A),
            lambda sent, n: sent.pop(n + LORA_B),
            lambda sent, n: sent.update({f"model.none.weight{x}": sent[n + x] for x in (LORA_A, LORA_B)}),
            lambda sent, n: sent.update({n: torch.zeros(32, 32)}),
        ],
        ids=["rank", "rows", "no A", "no B", "unknown layer", "a whole weight beside it"],
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(self, change):
        receiver, sent, before = self.broken(change)
        with pytest.raises(InvariantFault, match="do not fit this model"):
            send(receiver, sent, 1)
        assert all(torch.equal(x, before[n]) for n, x in receiver._live.items()) and receiver.version == -1

    def test_bytes_that_changed_on_the_way_are_refused_and_change_nothing(self):
        receiver, sent, before = self.broken(lambda *_: None)

        def flip(buckets):
            buckets[0][0][7] ^= 1

        with pytest.raises(TransitFault, match="arrived damaged"):
            send(receiver, sent, 1, spoil=flip)
        assert all(torch.equal(x, before[n]) for n, x in receiver._live.items()) and receiver.version == -1

    def test_a_layer_that_had_an_adapter_may_not_go_without(self):
        """It would keep the sum with the adapter of an older version."""
        receiver, sent, _ = self.broken(lambda *_: None)
        send(receiver, sent, 1)
        layer = next(iter(sent)).removesuffix(LORA_A).removesuffix(LORA_B)
        fewer = {n: x for n, x in sent.items() if not n.startswith(layer)}
        with pytest.raises(InvariantFault, match="do not fit this model"):
            send(receiver, fewer, 2)


class TestOnDisk:
    def saved(self, it: Learner, folder: Path, base: Path) -> Path:
        policy = it.policy
        policy.config = policy.config.model_copy(update={"path": str(base)})
        place = folder / "final"
        checkpoint.save_pretrained(policy, it.whole_policy(), tiny_models.make_tokenizer(), place, step=1)
        return place

    @pytest.mark.parametrize(
        ("name", "targets"), [*((name, []) for name in MODELS), ("gpt2", ["mlp.c_proj"]), ("llama-tied", ["q_proj"])]
    )
    def test_merged_folder_and_adapter_compute_what_the_learner_does(self, tmp_path, name, targets):
        from peft import PeftModel

        tiny_models.make_model(name).save_pretrained(tmp_path / "base")
        it = learner(name, **{"model.lora_targets": targets})
        train(it, name, steps=2)
        wanted = of_learner(it, name)
        place = self.saved(it, tmp_path, tmp_path / "base")
        merged = AutoModelForCausalLM.from_pretrained(place).eval()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert merged.state_dict().keys() == base.state_dict().keys()
        assert apart(logprobs_of(merged, name), wanted) < 1e-5
        assert apart(logprobs_of(base, name), wanted) > 1e-2
        peft = PeftModel.from_pretrained(base, place / "adapter").eval()
        assert apart(logprobs_of(peft, name), wanted) < 1e-5
        assert peft.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")

    def test_a_value_adapter_is_beside_the_value_head_and_not_in_the_policys(self, tmp_path):
        name = "llama-untied"
        tiny_models.make_model(name).save_pretrained(tmp_path / "base")
        it = learner(name, **{"model.value": "lora"})
        train(it, name, steps=2)
        place = self.saved(it, tmp_path, tmp_path / "base")
        value, adapter = (
            load_file(place / "value_head.safetensors"),
            load_file(place / "adapter/adapter_model.safetensors"),
        )
        assert {"weight", "bias"} < value.keys() and all(".critic." in n for n in value.keys() - {"weight", "bias"})
        assert len(value) - 2 == len(adapter) and not [n for n in adapter if "critic" in n]
        for n, x in value.items():
            at = f"value_head.{n}" if n in ("weight", "bias") else n.removeprefix("critic.")
            assert torch.equal(x, it.policy.get_parameter(at))

    @pytest.mark.parametrize("value", ["shared", "lora"])
    def test_a_checkpoint_holds_what_is_trained_and_puts_it_back_exactly(self, tmp_path, value):
        name = "llama-untied"
        it = learner(name, **{"model.value": value})
        train(it, name, steps=2)
        it.save_state(tmp_path)
        want, state = numbers(it), self.adamw(it)
        train(it, name)
        ahead = numbers(it)
        AcceleratorState._reset_state(reset_partial_state=True)

        again = learner(name, **{"model.value": value})
        again.load_state(tmp_path, step=2)
        got = numbers(again)
        assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
        restored = self.adamw(again)
        assert restored.keys() == state.keys() and len(state) > 20
        for n, moments in state.items():
            for key, x in moments.items():
                assert torch.equal(restored[n][key], x), (n, key)
        train(again, name)
        assert all(torch.equal(x, ahead[n]) for n, x in numbers(again).items())  # and it goes on bit for bit

        trained = {n for n, p in it.policy.named_parameters() if p.requires_grad}
        assert load_file(tmp_path / engine_weights.TRAINED_FILE).keys() == trained
        frozen = 4 * sum(p.numel() for p in it.policy.parameters() if not p.requires_grad)
        adapters_and_head = 4 * sum(p.numel() for p in it.policy.parameters() if p.requires_grad)
        assert (tmp_path / engine_weights.TRAINED_FILE).stat().st_size < adapters_and_head + 20_000
        assert all(f.stat().st_size < frozen for f in tmp_path.rglob("*") if f.is_file())
        assert not list(tmp_path.rglob("model*.safetensors"))

    @staticmethod
    def adamw(it: Learner) -> dict[str, dict[str, Tensor]]:
        state = it._optimizer.optimizer.state
        named = {n: p for n, p in it.policy.named_parameters() if p in state}
        return {n: {k: torch.as_tensor(x).clone() for k, x in state[p].items()} for n, p in named.items()}

    def test_a_checkpoint_of_another_rank_or_value_is_refused(self, tmp_path):
        it = learner("llama-untied")
        train(it, "llama-untied")
        it.save_state(tmp_path)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises((UserError, RuntimeError, ValueError, KeyError)):
            learner("llama-untied", **{"model.lora_rank": 8}).load_state(tmp_path, step=1)


def test_targets_that_are_not_there_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"model\.lora_targets") as error:
        learner("llama-untied", **{"model.lora_targets": ["no_such_layer"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_beside_a_table_is_refused(target):
    """Both are read past their adapters, which would train nothing and travel all the same."""
    with pytest.raises(UserError, match="model.lora_targets.*name linear layers only"):
        policy_of(tiny_models.make_model("llama-untied"), lora_rank=2, lora_targets=["q_proj", target])


def test_shards_without_elements_are_no_adapter():
    """As ZeRO-3 leaves them outside of a forward: their product would be a 0 that spreads over any shape."""
    policy = policy_of(tiny_models.make_model("llama-tied"), lora_rank=2)
    for layer in adapters.layers(policy.lm).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor["policy"].weight.data = torch.empty(0)
    with pytest.raises(AssertionError, match="an adapter of shapes"):
        engine_weights.export(policy.lm, torch.float32)
