"""`tokenppo replay`: an untouched step is the same in every bit, and whatever is changed is named where it is."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import replay_run as made
import test_ledger
import tiny_models
from core import ledger_table
from core.faults import InvariantFault, StorageFault, UserError
from launch.replay import find, lines_of, replay_run, verdict
from trainer.recorded import RecordedStep
from trainer.replay import Comparison, First, Stage, Tolerances

STAGES = ["inputs", "rewards", "weighted rewards", "log-probs and values", "rewards after KL"]
STAGES += ["advantages and returns", "losses and gradients", "weights"]


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return made.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(original, tmp_path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(original, tmp_path / "copy")


def replayed(capsys, run: Path, step: int = 2) -> dict:
    """What --json says, by name of the stage, and the exit code."""
    capsys.readouterr()
    code = replay_run(run, step, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in said["stages"]] == STAGES
    assert code == (0 if said["first_differing"] is None else InvariantFault.exit_code == 5 and 5)
    return said | {s["name"]: s for s in said["stages"]}


def differing(said: dict) -> list[str]:
    return [s["name"] for s in said["stages"] if s["verdict"] == "differs"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_untouched_step_is_equal_in_every_bit(step, original, capsys):
    said = replayed(capsys, original, step)
    assert [s["verdict"] for s in said["stages"]] == ["equal"] * 8, said
    assert said["why_not_exact"] is None and all(s["compared"] and s["largest"] == 0 for s in said["stages"])


def test_two_replays_leave_the_folder_as_it_was(original, capsys):
    before = {p: p.read_bytes() for p in original.rglob("*") if p.is_file()}
    replayed(capsys, original)
    assert {p: p.read_bytes() for p in original.rglob("*") if p.is_file()} == before


def moved(column: str, by: float = 0.25, component: str | None = None):
    """The third row's second token."""

    def change(rows):
        value = rows[3][column] if component is None else dict(rows[3][column])[component]
        value[1] += by

    return change


@pytest.mark.parametrize(
    ("column", "component", "names"),
    [
        ("component_rewards", "vowels", ["rewards", "weighted rewards"]),
        ("normalized", "vowels", ["weighted rewards"]),
        ("weighted", "brevity", ["weighted rewards"]),
        ("old_logprobs", None, ["log-probs and values", "rewards after KL", "losses and gradients", "weights"]),
        ("ref_logprobs", None, ["log-probs and values", "rewards after KL"]),
        ("values", None, ["log-probs and values", "advantages and returns", "losses and gradients"]),
        ("kl", None, ["rewards after KL"]),
        ("rewards", None, ["rewards after KL"]),
        ("advantages", None, ["advantages and returns", "losses and gradients", "weights"]),
        ("returns", None, ["advantages and returns", "losses and gradients", "weights"]),
        ("new_logprobs", None, ["losses and gradients"]),
        ("ratio", None, ["losses and gradients"]),
    ],
)
def test_one_changed_number_of_the_ledger_names_its_stage_and_its_token(column, component, names, run, capsys):
    made.edit_ledger(run, 2, moved(column, component=component))
    said = replayed(capsys, run)
    assert set(differing(said)) >= set(names) and differing(said)[0] == said["first_differing"] == names[0]
    first = said[names[0]]["first"]
    uid = ledger_table.read(run, 2)[0]["sample_uid"][3].as_py()
    assert (first["uid"], first["token"]) == (uid, 1), first
    assert first["recorded"] == pytest.approx(first["replayed"] + 0.25, abs=1e-6)
    assert said["inputs"]["verdict"] == "equal"
    if names == ["rewards", "weighted rewards"]:  # what was trained on was made of the other
        assert differing(said) == names and said["rewards"]["differing"] == 1


def test_other_inputs_are_named_by_their_keys(run, capsys):
    made.edit_config(run, "rewards.brevity.weight", 0.6)
    said = replayed(capsys, run)
    assert differing(said) == ["inputs", "weighted rewards"]
    assert said["inputs"]["first"] == {
        **{"what": "rewards.brevity.weight", "uid": None, "token": None, "recorded": 0.5, "replayed": 0.6}
    }
    assert said["weighted rewards"]["first"]["what"] == "weight of brevity"


def test_another_seed_makes_other_mini_batches(run, capsys):
    made.edit_config(run, "run.seed", 7)
    said = replayed(capsys, run)
    assert differing(said) == ["inputs", "losses and gradients", "weights"]
    assert said["inputs"]["first"]["what"] == "run.seed" and said["inputs"]["differing"] == 1 + 16


def test_more_steps_are_the_schedule_of_later_ones(run, capsys):
    """A run that went on for longer has other rates from then on, not before."""
    made.edit_config(run, "run.steps", 30)
    assert differing(replayed(capsys, run)) == []


def test_another_weight_in_the_checkpoint(run, capsys):
    made.edit_tensors(run, 1, made.move_one_weight)
    said = replayed(capsys, run)
    assert differing(said) == ["log-probs and values", "losses and gradients", "weights"]
    assert said["log-probs and values"]["first"]["what"] == "old_logprobs"
    assert differing(replayed(capsys, run, 3)) == []


def test_a_damaged_checkpoint_is_an_input_and_no_policy(run, capsys):
    made.edit_tensors(run, 1, made.move_one_weight, sealed=False)
    said = replayed(capsys, run)
    assert differing(said) == ["inputs"]
    assert "learner/model.safetensors holds other bytes" in said["inputs"]["first"]["replayed"]
    for name in ("log-probs and values", "losses and gradients", "weights"):
        assert said[name]["verdict"] == "out of reach" and "is damaged" in said[name]["notes"][0]
    assert said["advantages and returns"]["verdict"] == "equal"


def test_the_state_of_the_optimizer_shows_after_the_first_of_its_steps(run, capsys):
    place = run / "checkpoints" / "step-1"
    state = torch.load(place / "learner" / "optimizer.bin")
    for of_parameter in state["state"].values():
        of_parameter["exp_avg"] *= 1.5
    torch.save(state, place / "learner" / "optimizer.bin")
    made.seal(run, 1)
    assert differing(replayed(capsys, run)) == ["losses and gradients", "weights"]


def test_the_value_function_after_the_step_is_in_no_digest_but_in_the_checkpoint(run, capsys):
    made.edit_tensors(run, 2, lambda tensors: tensors["value_head.bias"].add_(1e-6))
    said = replayed(capsys, run)
    assert differing(said) == ["weights"] and said["weights"]["first"]["what"] == "value_head.bias"
    shutil.rmtree(run / "checkpoints" / "step-2")
    said = replayed(capsys, run)
    assert differing(said) == [] and "not of the value function" in said["weights"]["notes"][0]


def test_another_digest_of_the_weights(run, capsys):
    made.edit_said(run, 2, policy_digest="0" * 64)
    said = replayed(capsys, run)
    assert differing(said) == ["weights"] and said["weights"]["first"]["what"] == "policy_digest"


def test_another_loss_in_the_metrics(run, capsys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1]["loss/policy"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = replayed(capsys, run)
    assert (
        differing(said) == ["losses and gradients"] and said["losses and gradients"]["first"]["what"] == "loss/policy"
    )


def test_another_state_of_the_loop(run, capsys):
    before = ledger_table.read(run, 2)[1][0]["before"]
    made.edit_said(run, 2, before=before | {"kl_coef": before["kl_coef"] * 2})
    assert differing(replayed(capsys, run)) == ["rewards after KL", "advantages and returns"]


def test_another_or_a_random_reward_function(original, run, capsys):
    """Its source is named where a checkpoint knows it; what it pays, in any case."""
    file = original.parent / "rewards.py"
    text = file.read_text()
    copy = run.parent / "rewards.py"
    copy.write_text(text.replace("-0.1", "-0.2"))
    made.edit_config(run, "rewards.brevity.fn", f"{copy}:brevity")
    said = replayed(capsys, run)
    assert differing(said) == ["inputs", "rewards"]
    assert said["inputs"]["first"]["what"] == "source of rewards.brevity.fn"
    assert said["inputs"]["notes"][0].startswith(f"rewards.brevity.fn = {copy}:brevity: the step was made with")
    paid = sum(text != "" for text in ledger_table.read(run, 2)[0]["response_text"].to_pylist())
    assert said["rewards"]["first"]["what"] == "brevity" and said["rewards"]["differing"] == paid
    assert differing(replayed(capsys, run, 1)) == ["rewards"]


def test_a_reward_that_fails_now_or_is_not_there(run, capsys):
    copy = run.parent / "other.py"
    copy.write_text("def brevity(completions, **_):\n    raise RuntimeError('no luck')\n")
    made.edit_config(run, "rewards.brevity.fn", f"{copy}:brevity")
    said = replayed(capsys, run, 1)
    assert differing(said) == ["rewards"] and said["rewards"]["differing"] == 16
    assert "no luck" in said["rewards"]["first"]["replayed"]
    copy.unlink()
    made.edit_config(run, "rewards.brevity.fn", f"{copy}:brevity")
    said = replayed(capsys, run, 1)
    assert said["rewards"]["verdict"] == "out of reach" and "there is no file" in said["rewards"]["notes"][0]
    assert differing(said) == [] and said["weights"]["verdict"] == "equal"


def test_without_the_checkpoint_what_needs_no_weights_is_done(run, capsys):
    shutil.rmtree(run / "checkpoints" / "step-1")
    said = replayed(capsys, run)
    verdicts = {s["name"]: s["verdict"] for s in said["stages"]}
    reach = ("inputs", "rewards", "weighted rewards", "rewards after KL", "advantages and returns")
    assert verdicts == {name: "equal" if name in reach else "out of reach" for name in STAGES}
    assert (
        "--run.save_every 1" in said["weights"]["notes"][0] and "--run.keep_checkpoints" in said["weights"]["notes"][0]
    )


def test_a_checkpoint_of_shards_or_of_another_model_is_no_policy_here(run, capsys):
    place = run / "checkpoints" / "step-1"
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"engine": "DEEPSPEED", "ranks": 4}))
    made.seal(run, 1)
    said = replayed(capsys, run)
    assert differing(said) == [] and "4 processes as DEEPSPEED" in said["weights"]["notes"][0]
    tiny_models.save_model(run.parent / "other", "llama-tied")
    made.edit_config(run, "model.path", str(run.parent / "other"))
    said = replayed(capsys, run, 3)
    assert "does not fit model.path" in said["log-probs and values"]["notes"][0]
    assert said["inputs"]["verdict"] == "equal" and said["inputs"]["notes"][0].startswith("model.path = ")


def test_a_ledger_that_lost_a_row(run, capsys):
    made.edit_ledger(run, 2, lambda rows: rows[:-1])
    said = replayed(capsys, run)
    assert differing(said) == ["inputs"] and said["inputs"]["first"]["what"] == "samples that are not there"
    assert "15 of the 16 samples" in said["inputs"]["notes"][0]
    assert said["weights"]["verdict"] == said["advantages and returns"]["verdict"] == "out of reach"
    assert said["weighted rewards"]["verdict"] == "out of reach" and "normalize" in said["weighted rewards"]["notes"][0]
    assert said["log-probs and values"]["verdict"] in ("equal", "within tolerance")
    assert said["rewards after KL"]["verdict"] in ("equal", "within tolerance")


def test_of_a_share_what_is_sound_is_done(tmp_path, capsys):
    run = made.make(tmp_path, **{"log.ledger": 0.5, "rewards.vowels.normalize": "none"})
    said = replayed(capsys, run)
    assert differing(said) == [] and "some of its samples" in said["why_not_exact"]
    beyond = [s["name"] for s in said["stages"] if s["verdict"] == "out of reach"]
    assert beyond == ["advantages and returns", "losses and gradients", "weights"]
    assert all("--log.ledger 1" in said[name]["notes"][0] for name in beyond)
    made.edit_ledger(run, 2, moved("rewards"))
    assert differing(replayed(capsys, run)) == ["rewards after KL"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "options",
    [
        {"model.value_heads": "components", "ppo.scale_values": "running"},
        {"model.lora_rank": 2, "ppo.estimator": "grpo", "ppo.scale_rewards": "batch"},
        {"run.deterministic": False, "rollout.top_p": 0.9},
    ],
    ids=["value heads", "lora, grpo", "loose, top_p"],
)
def test_other_algorithms_are_replayed_too(options, tmp_path, capsys):
    run = made.make(tmp_path, **options)
    for step in (1, 3):
        said = replayed(capsys, run, step)
        assert differing(said) == []
        wanted = {"equal"} if options.get("run.deterministic", True) else {"equal", "within tolerance", "out of reach"}
        assert {s["verdict"] for s in said["stages"]} <= wanted, said
    made.edit_ledger(run, 3, moved("returns", 0.5))
    assert differing(replayed(capsys, run, 3))[0] == "advantages and returns"


def test_where_bits_are_not_promised_a_little_is_nothing_and_much_is_named(run, capsys):
    made.edit_said(run, 2, device="cpu of another kind", policy_digest="other bits")
    made.edit_ledger(run, 2, moved("old_logprobs", 5e-6))
    said = replayed(capsys, run)
    assert differing(said) == [] and "cpu of another kind" in said["why_not_exact"]
    assert said["log-probs and values"]["verdict"] == "within tolerance"
    assert said["log-probs and values"]["tolerance"] == 1e-4
    assert said["log-probs and values"]["largest"] == pytest.approx(5e-6, rel=0.1)
    assert said["weights"]["verdict"] == "out of reach" and "knows no distance" in said["weights"]["notes"][0]
    made.edit_ledger(run, 2, moved("old_logprobs", 1e-3))
    assert differing(replayed(capsys, run))[0] == "log-probs and values"


def test_what_cannot_be_replayed_is_said_in_one_line(original, run, tmp_path):
    with pytest.raises(UserError, match="nothing of step 4; it has steps 1 to 3"):
        find(original, 4)
    with pytest.raises(UserError, match="there is no run in this folder"):
        find(tmp_path, 1)
    config = ledger_table.read(run, 3)[1][0]["config"]
    made.edit_said(run, 3, config=config | {"ppo": config["ppo"] | {"gone": 1}})
    with pytest.raises(UserError, match="step 3 was made by another version of tokenppo .ppo.gone is no key"):
        find(run, 3)
    del config["ppo"]["dual_clip"]
    made.edit_said(run, 3, config=config)
    assert find(run, 3).inputs.verdict == "equal"  # a key that is younger than the run
    path = ledger_table.file_of(run, 2, 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageFault, match="step 2 cannot be read"):
        find(run, 2)


def test_the_terminal_has_a_line_for_each_stage(run, capsys):
    assert replay_run(run, 2) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("compared bit for bit") and "16 responses" in said[0]
    assert [line[:22].strip() for line in said[1:9]] == STAGES and said[9] == "8 stages equal, none differs"
    made.edit_ledger(run, 2, moved("advantages"))
    assert replay_run(run, 2) == 5
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "the first stage that differs: advantages and returns"
    assert any("first: sample" in line and "token 1, advantages:" in line for line in said)


def test_the_record_is_what_the_loop_had(original):
    table, said = ledger_table.read(original, 2)
    recorded = RecordedStep.of(table, said, scored_reference=False)
    assert recorded.step == 2 and len(recorded.uids) == 16 and recorded.batch.ref_logprobs is None
    rows = table.to_pylist()
    for i, row in enumerate(rows):
        n = len(row["response_ids"])
        assert recorded.numbers["advantages"][i, :n].tolist() == row["advantages"]
        assert not recorded.numbers["advantages"][i, n:].any()
        assert recorded.weighted["brevity"][i, :n].tolist() == dict(row["weighted"])["brevity"]
        assert recorded.numbers["clipped"][i, :n].bool().tolist() == row["clipped"]


def test_tokens_of_an_environment_have_no_numbers(tmp_path):
    """The second token of every other response is one's; a random number stands in every other place."""
    rows, batch, combined, new = test_ledger.written(tmp_path, test_ledger.cfg_of(), tiny_models.make_tokenizer())
    recorded = RecordedStep.of(*ledger_table.read(tmp_path, 4), scored_reference=True)
    mask = batch.response_mask
    assert not mask[:, 1].all() and torch.equal(recorded.batch.response_mask, mask)
    for name, x in {"advantages": batch.advantages, "new_logprobs": new, "ref_logprobs": batch.ref_logprobs}.items():
        assert torch.equal(recorded.numbers[name], torch.where(mask, x, 0.0)), name
    for name, x in combined.normalized.items():
        assert torch.equal(recorded.normalized[name], torch.where(mask, x.float(), 0.0)), name
    assert torch.equal(recorded.batch.ref_logprobs, recorded.numbers["ref_logprobs"])
    assert recorded.bootstrap_values.tolist() == batch.bootstrap_values.tolist()
    assert [t.request.sample_uid for t in rows] == recorded.uids


def of(recorded, replayed, tolerance=0.0, mask=None) -> Stage:
    a, b = torch.tensor(recorded), torch.tensor(replayed)
    c = Comparison("s", tolerance, ["u0", "u1"])
    c.tokens("x", a, b, torch.ones(a.shape, dtype=torch.bool) if mask is None else torch.tensor(mask))
    return c.stage()


def test_numbers_are_compared_where_there_are_some():
    nan, inf = math.nan, math.inf
    assert of([[1.0, nan]], [[1.0, nan]]).verdict == "equal"
    assert of([[1.0, 5.0]], [[1.0, nan]], mask=[[True, False]]) == Stage(name="s", verdict="equal", compared=1)
    assert of([[inf]], [[inf]]).verdict == "equal"
    lost = of([[1.0], [2.0]], [[1.0], [nan]], tolerance=9.0)
    assert lost.verdict == "differs" and lost.largest == inf and lost.first.uid == "u1"
    assert lost.to_json()["largest"] is None and lost.to_json()["first"]["replayed"] is None
    off = of([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.5], [3.0, 4.25]])
    assert (off.compared, off.differing, off.largest) == (4, 2, 0.5)
    assert off.first == First(what="x", uid="u0", token=1, recorded=2.0, replayed=2.5)


def test_a_tolerance_is_of_one_or_of_the_number():
    assert of([[0.0]], [[0.1]], 0.1 + 1e-6).verdict == "within tolerance"
    assert of([[0.0]], [[0.11]], 0.1).verdict == "differs"
    assert of([[100.0]], [[109.0]], 0.1).verdict == "within tolerance"
    assert of([[100.0]], [[111.0]], 0.1).verdict == "differs"
    c = Comparison("s")
    c.number("loss", None, math.nan)
    c.number("loss", 1.0, 1.0)
    assert c.stage().verdict == "equal" and c.stage().compared == 2
    c = Comparison("s", 1.0)
    c.number("loss", 0.5, 0.6, 0.05)
    assert c.stage().verdict == "differs" and c.stage().first == First(what="loss", recorded=0.5, replayed=0.6)
    assert Tolerances() == Tolerances(scores=0, arithmetic=0, forward=0, update=0, means=0)
    assert Tolerances.of("bfloat16").forward > Tolerances.of("float32").forward


def test_what_is_out_of_reach_is_no_success_unsaid():
    stages = [Stage(name="inputs", verdict="equal", compared=3), Stage.out_of_reach("weights", "no checkpoint")]
    assert verdict(stages) == "1 stages equal, 1 out of reach"
    assert lines_of(stages[1]) == ["weights                 out of reach: no checkpoint"]
