"""Where the value function lives (`model.value`): what it computes, what its loss trains, what it may start from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import tiny_models
from core.config import load
from core.faults import UserError
from core.schema import Config
from launch import build
from policy_reading import read
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.learner import Learner
from trainer.loop import credit

N = 8
# `run.checks` is off where a test moves the policy away from what wrote the batch.
BASE = {"rollout.batch_size": N, "ppo.mini_batch_size": N, "ppo.micro_batch_size": 3, "ppo.ppo_epochs": 1}
BASE |= {"optim.lr": 1e-3, "optim.max_grad_norm": 1e9, "ppo.cliprange_value": 1e6, "run.checks": False}
LORA = {"model.lora_rank": 4}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configured(**overrides: object) -> Config:
    return load(None, {**tiny_models.LEARNER_SETTINGS, **BASE, **overrides}, folder=Path("/nowhere"))


def learner(name: str = "llama-untied", **overrides: object) -> Learner:
    cfg = configured(**overrides)
    ref = None if cfg.reference == "adapter" else tiny_models.make_model(name)
    it = Learner(cfg, Accelerator(cpu=True), tiny_models.make_model(name), ref, critic=build.critic(cfg, "cpu"))
    return it


def stir(it: Learner) -> Learner:
    """Head and adapters away from the zeros that they start at, through which no gradient passes."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in it.policy.named_parameters():
            if name == "value_head.weight" or ".lora_B." in name:
                p.normal_(std=0.1)
    return it


_rolled: dict[str, list] = {}


def rolled(name: str = "llama-untied") -> TrainBatch:
    if name not in _rolled:
        engine = TransformersEngine(tiny_models.make_model(name), tuple(range(30)), temperature=1.0, max_new_tokens=12)
        _rolled[name] = tiny_models.roll_out(engine, N)
    return TrainBatch.collate(_rolled[name])


def credited(it: Learner, name: str = "llama-untied") -> TrainBatch:
    batch, _ = it.annotate(rolled(name))
    return credit(it.cfg, batch.fill(token_rewards=batch.component_rewards["a"].float()), 0.0, it.ranks.sum)


def gradients(it: Learner) -> dict[str, Tensor]:
    """Of a first step: AdamW's first moment is (1 - beta1) times it."""
    state = it._optimizer.optimizer.state
    beta = it.cfg.optim.betas[0]
    return {n: state[p]["exp_avg"] / (1 - beta) for n, p in it.policy.named_parameters() if p in state}


def parameters(it: Learner) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in it.policy.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {n for n in before if not torch.equal(before[n], after[n])}


@pytest.mark.parametrize(
    ("settings", "reached"),
    [
        ({"model.value": "shared"}, lambda n: n.startswith(("lm.model.", "value_head."))),
        ({"model.value": "shared_detached"}, lambda n: n.startswith("value_head.")),
        ({"model.value": "separate"}, lambda n: n.startswith(("critic.", "value_head."))),
        ({"model.value": "lora", **LORA}, lambda n: "_A.critic." in n or "_B.critic." in n or "value_head" in n),
        ({"model.value": "shared", **LORA}, lambda n: ".policy." in n or n.startswith("value_head.")),
        ({"model.value": "separate", **LORA}, lambda n: n.startswith(("critic.", "value_head."))),
    ],
    ids=["shared", "shared_detached", "separate", "lora", "shared on an adapter", "separate beside an adapter"],
)
def test_the_value_loss_trains_what_it_should_and_nothing_else(settings, reached):
    """All advantages 0 and no KL: what has a gradient, has it from the value loss."""
    it = stir(learner(**settings))
    batch = credited(it)
    batch.advantages.zero_()
    it.update(batch)
    got = {name for name, g in gradients(it).items() if g.abs().max() > 0}
    want = {name for name in parameters(it) if reached(name)}
    assert got == want and len(want) >= 2


@pytest.mark.parametrize("value", ["shared", "shared_detached", "lora", "separate"])
def test_the_policy_loss_never_reaches_what_only_the_value_trains(value):
    it = stir(learner(**{"model.value": value, "ppo.vf_coef": 0.0, **(LORA if value == "lora" else {})}))
    it.update(credited(it))
    got = {name for name, g in gradients(it).items() if g.abs().max() > 0}
    assert not {n for n in got if n.startswith(("critic.", "value_head.")) or ".critic." in n}
    assert got == {n for n in parameters(it) if (".policy." in n if value == "lora" else n.startswith("lm."))}


@pytest.mark.parametrize("value", ["shared", "shared_detached", "lora", "separate"])
def test_first_values_are_0(value):
    batch, _ = learner(**{"model.value": value, **(LORA if value == "lora" else {})}).annotate(rolled())
    assert batch.values.count_nonzero() == batch.bootstrap_values.count_nonzero() == 0


def prefixes(batch: TrainBatch) -> list[tuple[int, int, Tensor]]:
    """(row, t, ids before response token t), for every t up to the response's length, which is the state behind it."""
    width, out = batch.input_ids.shape[1] - batch.response_mask.shape[1], []
    for row in range(len(batch)):
        n, t = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
        out += [(row, i, batch.input_ids[row, width - n : width + i]) for i in range(t + 1)]
    return out


@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
@torch.no_grad()
def test_values_of_a_separate_trunk_are_those_of_a_forward_of_its_own(name):
    it = learner(name, **{"model.value": "separate"})
    other = tiny_models.make_model(name, seed=5).base_model
    it.policy.critic.load_state_dict(other.state_dict())
    it.policy.value_head.weight.normal_(std=0.1)
    it.policy.value_head.bias.fill_(0.25)
    batch = rolled(name)
    got = read(it.policy, batch, 1.0).values
    for row, t, ids in prefixes(batch):
        hidden = other(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1]
        want = hidden @ it.policy.value_head.weight[0] + 0.25
        assert got[row, t] == pytest.approx(float(want), abs=1e-4)


def test_values_of_an_adapter_move_with_it_and_not_with_the_policys():
    it = stir(learner(**{"model.value": "lora", **LORA}))
    first = read(it.policy, rolled(), 1.0)
    with torch.no_grad():
        for n, p in it.policy.named_parameters():
            if ".lora_B.policy." in n:
                p.add_(0.05)
    second = read(it.policy, rolled(), 1.0)
    assert torch.equal(first.values, second.values) and (first.logprobs - second.logprobs).abs().max() > 1e-3
    with torch.no_grad():
        for n, p in it.policy.named_parameters():
            if ".lora_B.critic." in n:
                p.add_(0.05)
    third = read(it.policy, rolled(), 1.0)
    assert torch.equal(second.logprobs, third.logprobs) and (second.values - third.values).abs().max() > 1e-3


class TestValuePath:
    @staticmethod
    def reward_model(folder: Path, name: str = "llama-untied", n_labels: int = 1) -> torch.nn.Module:
        config = tiny_models.configs()[name]
        config.num_labels = n_labels
        torch.manual_seed(4)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.mul_(3)
        model.save_pretrained(folder)
        return model

    @pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
    def test_first_values_are_the_scores_of_the_reward_model(self, tmp_path, name):
        """The policy is a Llama in both cases: a critic may have another shape than the policy."""
        model = self.reward_model(tmp_path / "rm", name)
        it = learner(**{"model.value": "separate", "model.value_path": str(tmp_path / "rm")})
        trunk = it.policy.critic.state_dict()
        wanted = model.base_model.state_dict()
        assert trunk.keys() == wanted.keys() and all(torch.equal(trunk[n], wanted[n]) for n in wanted)
        assert torch.equal(it.policy.value_head.weight, model.score.weight) and it.policy.value_head.bias == 0
        values, batch = read(it.policy, rolled(), 1.0).values, rolled()
        with torch.no_grad():
            scores = [float(model(input_ids=ids[None]).logits[0, 0]) for *_, ids in prefixes(batch)]
        assert np.std(scores) > 0.05
        for (row, t, _), want in zip(prefixes(batch), scores, strict=True):
            assert values[row, t] == pytest.approx(want, abs=1e-4)

    def test_a_causal_lm_gives_its_trunk_and_no_head(self, tmp_path):
        tiny_models.make_model("llama-untied", seed=6).save_pretrained(tmp_path / "lm")
        it = learner(**{"model.value": "separate", "model.value_path": str(tmp_path / "lm")})
        wanted = tiny_models.make_model("llama-untied", seed=6).base_model.state_dict()
        assert all(torch.equal(x, wanted[n]) for n, x in it.policy.critic.state_dict().items())
        assert it.policy.value_head.weight.count_nonzero() == 0

    def refused(self, folder: Path) -> str:
        with pytest.raises(UserError) as error:
            build.critic(configured(**{"model.value": "separate", "model.value_path": str(folder)}), "cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_two_labels_are_refused(self, tmp_path):
        self.reward_model(tmp_path / "rm", n_labels=2)
        assert f"model.value_path = {tmp_path}/rm: a reward model has one label" in self.refused(tmp_path / "rm")

    def test_a_head_that_is_no_score_is_refused(self, tmp_path):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertForSequenceClassification(BertConfig(vocab_size=320, num_labels=1, **sizes)).save_pretrained(tmp_path / "b")
        assert "a linear layer `score`" in self.refused(tmp_path / "b")

    def test_weights_without_the_score_are_refused(self, tmp_path):
        """transformers would fill them with random numbers and only warn."""
        self.reward_model(tmp_path / "rm")
        file = tmp_path / "rm" / "model.safetensors"
        save_file({n: x for n, x in load_file(file).items() if n != "score.weight"}, file, metadata={"format": "pt"})
        assert "score.weight" in self.refused(tmp_path / "rm")

    def test_nothing_there_is_refused(self, tmp_path):
        assert self.refused(tmp_path / "none").startswith(f"model.value_path = {tmp_path}/none: ")

    def test_a_smaller_vocabulary_is_refused(self, tmp_path):
        """Ids of the policy would be read as other words, or not at all."""
        config = tiny_models.configs()["llama-untied"]
        config.vocab_size, config.num_labels = 200, 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
        with pytest.raises(UserError, match="model.value_path.*200"):
            learner(**{"model.value": "separate", "model.value_path": str(tmp_path / "rm")})


class TestWarmup:
    """`ppo.value_warmup_steps`"""

    @pytest.mark.parametrize("more", [{}, {"optim.weight_decay": 0.1}], ids=["plain", "weight decay"])
    @pytest.mark.parametrize("value", ["shared", "shared_detached", "lora", "separate"])
    def test_the_policy_stays_for_as_long_as_it_is_said_and_then_moves(self, value, more):
        settings = {"model.value": value, "ppo.value_warmup_steps": 1, **(LORA if value == "lora" else {}), **more}
        it = stir(learner(**settings))
        first = parameters(it)
        it.update(credited(it))
        second = parameters(it)
        own = {n for n in first if n.startswith(("value_head.", "critic.")) or ".critic." in n}
        assert moved(first, second) == own
        it.update(credited(it))
        trained = {n for n, p in it.policy.named_parameters() if p.requires_grad}
        assert moved(second, parameters(it)) == trained > own

    def test_texts_that_are_mixed_in_wait_too(self):
        cfg = configured(**{"ppo.value_warmup_steps": 1, "ppo.ptx_coef": 0.5, "data.ptx_path": "t.jsonl"})
        texts = [np.arange(1, 9), np.arange(3, 15)]
        name = "llama-untied"
        models = tiny_models.make_model(name), tiny_models.make_model(name)
        it = Learner(cfg, Accelerator(cpu=True), *models, texts=texts)
        first = parameters(it)
        it.update(credited(it))
        second = parameters(it)
        assert moved(first, second) == {"value_head.weight", "value_head.bias"}
        it.update(credited(it))
        assert moved(second, parameters(it)) == first.keys()


@pytest.mark.parametrize("value", ["shared", "lora", "separate"])
def test_the_value_function_has_a_rate_of_its_own(value):
    settings = {"model.value": value, "optim.value_lr": 0.5, "optim.lr": 0.0, **(LORA if value == "lora" else {})}
    it = stir(learner(**settings))
    first = parameters(it)
    means = it.update(credited(it))
    own = {n for n in first if n.startswith(("value_head.", "critic.")) or ".critic." in n}
    assert moved(first, parameters(it)) == own and means["optim/lr"] == 0
    # AdamW's first step is the rate, whatever the gradient: linear decay begins at its peak.
    step = (first["value_head.bias"] - parameters(it)["value_head.bias"]).abs()
    assert step == pytest.approx(0.5, rel=1e-3)


def test_explained_variance_is_reported_for_the_values_before_the_update():
    """A critic that knows nothing is no better than the mean: 0. Without a critic nothing is said."""
    it = learner(**{"model.value": "separate"})
    batch = credited(it)
    assert it.update(batch)["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    again = credited(it)
    again.values.copy_(again.returns)
    assert it.update(again)["value/explained_variance"] == pytest.approx(1)
    without = learner(**{"ppo.estimator": "reinforce_pp"})
    assert "value/explained_variance" not in without.update(credited(without))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-untied", {}),
        ("gpt2", {}),
        ("gpt2", {"model.value": "separate"}),
        ("llama-untied", LORA),
        ("llama-untied", {"model.value": "lora", **LORA}),
    ],
    ids=["llama", "gpt2", "gpt2-separate", "llama-adapter", "llama-value-adapter"],
)
def test_checkpointed_activations_give_the_same_gradients(name, settings):
    """GPT-2's configuration has dropout, which the mode that transformers checkpoints in would turn on."""
    of = []
    for flag in (False, True):
        it = stir(learner(name, **settings, **{"model.gradient_checkpointing": flag}))
        counted = count_forwards(it)
        it.update(credited(it, name))
        of.append((gradients(it), counted[0]))
        assert not [n for n, m in it.policy.named_modules() if isinstance(m, torch.nn.Dropout) and m.training]
    (plain, n_plain), (saved, n_saved) = of
    assert n_saved > n_plain  # it is on
    biggest = max(float(g.abs().max()) for g in plain.values())
    assert biggest > 1e-2
    assert plain.keys() == saved.keys()
    worst = {n: float((plain[n] - saved[n]).abs().max()) for n in plain}
    assert max(worst.values()) <= 1e-6 * max(1.0, biggest), max(worst, key=worst.get)


def count_forwards(it: Learner) -> list[int]:
    """How often a layer norm of a first layer is computed, in all trunks."""
    counted = [0]

    def count(*_: object) -> None:
        counted[0] += 1

    for name, module in it.policy.named_modules():
        if name.endswith(("layers.0.input_layernorm", "h.0.ln_1")):
            module.register_forward_hook(count)
    return counted


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.value": "lora"}, "model.value = lora"),
        ({"model.reference": "adapter"}, "model.reference = adapter"),
        ({"model.value_path": "rm"}, "model.value_path = "),
        ({"model.value_path": "rm", "model.value": "shared_detached"}, "set it to separate"),
        ({"ppo.value_warmup_steps": 1, "ppo.estimator": "reinforce_pp"}, "ppo.value_warmup_steps = 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, says):
    with pytest.raises(UserError) as error:
        configured(**settings)
    assert says in str(error.value) and "\n" not in str(error.value)
