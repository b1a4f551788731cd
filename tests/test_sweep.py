"""The grid of a sweep: what its trials are, what is refused, and what is said of what came out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.faults import UserError
from launch import arguments
from launch.sweep import Outcome, environment_of_trial, grid_of, name_of, outcome_of, sweep, table, trials_of

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "configs" / "cards.yaml"


def test_a_grid_is_read_as_it_is_typed():
    assert grid_of(["optim.lr=1e-4,1e-3", "run.seed=1"]) == {"optim.lr": ["1e-4", "1e-3"], "run.seed": ["1"]}
    lists = grid_of(["rollout.stop_strings=[['a', 'b'], []]", "optim.schedule=[linear, constant]"])
    assert lists == {"rollout.stop_strings": ['["a", "b"]', "[]"], "optim.schedule": ["linear", "constant"]}


@pytest.mark.parametrize(
    "given, words",
    [
        (["optim.lr"], "wants KEY=VALUE,VALUE"),
        (["optim.lr="], "wants KEY=VALUE,VALUE"),
        (["optim.lr=1,,2"], "a value is missing"),
        (["optim.lr=1,1"], "stands there twice"),
        (["optim.lr=1", "optim.lr=2"], "is given twice"),
        (["run.name=a,b"], "each trial has a run.name of its own"),
    ],
)
def test_a_grid_that_is_none_is_refused_in_words(given, words):
    with pytest.raises(UserError, match=words):
        grid_of(given)


def test_trials_are_all_combinations_each_with_its_settings_and_folder(tmp_path):
    grid = grid_of(["optim.lr=1e-4,1e-3", "rewards.quality.weight=0.5,2"])
    trials = trials_of(CARDS, grid, tmp_path, ["--run.steps", "2"])
    got = [(t.cfg.optim.lr, t.cfg.rewards["quality"].weight, t.cfg.run.steps) for t in trials]
    assert got == [(1e-4, 0.5, 2), (1e-4, 2.0, 2), (1e-3, 0.5, 2), (1e-3, 2.0, 2)]
    assert [t.cfg.run.folder for t in trials] == [tmp_path / t.name for t in trials]
    assert trials[0].name == "optim.lr-1e-4_rewards.quality.weight-0.5"
    assert len({t.name for t in trials}) == 4


def test_the_folder_of_a_trial_depends_on_its_settings_alone():
    assert name_of({"b": "1", "a": "2"}) == name_of({"a": "2", "b": "1"}) == "a-2_b-1"
    paths = [name_of({"model.path": path}) for path in ("/a/b", "/a_b", "/a b")]
    assert len({*paths}) == 3 and not any("/" in name for name in paths)
    long = [name_of({"data.path": "x" * 300 + end}) for end in "ab"]
    assert len({*long}) == 2 and all(len(name) <= 120 for name in long)


@pytest.mark.parametrize(
    "grid, options, words",
    [
        (["optim.lrr=1"], {}, "did you mean optim.lr"),
        (["optim.lr=fast"], {}, "optim.lr"),
        (["optim.lr=1e-3"], {"metric": "eval/slot_eror/x"}, "--metric eval/slot_eror/x"),
        (["optim.lr=1e-3"], {"jobs": 0}, "--jobs 0"),
        (["optim.lr=1e-3"], {"rest": ["--run.stepps", "2"]}, "did you mean run.steps"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_started(tmp_path, grid, options, words):
    with pytest.raises(UserError, match=words):
        sweep(CARDS, grid, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def trial_with(tmp_path: Path, rows: list[dict], summary: dict, log: str = ""):
    (trial,) = trials_of(CARDS, {"optim.lr": ["1e-3"]}, tmp_path, [])
    folder = trial.cfg.run.folder
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))
    folder.with_name(f"{trial.name}.log").write_text(log)
    return trial


def test_what_came_of_a_trial(tmp_path):
    rows = [{"step": i, "eval/slot_error": x} for i, x in enumerate([0.5, 0.125, None, 0.25], start=1)]
    trial = trial_with(tmp_path, rows, {"exit": 0, "steps": 4, "seconds": {"whole_run": 3.5}})
    got = outcome_of(trial, "eval/slot_error", lowest=True)
    assert got == Outcome(trial.name, {"optim.lr": "1e-3"}, 0, 4, 0.25, 0.125, 3.5, None)
    assert outcome_of(trial, "eval/slot_error", lowest=False).best == 0.5
    assert outcome_of(trial, "reward/total", lowest=False).last is None


def test_what_a_failed_trial_said_last_is_told(tmp_path):
    log = "starting\ntokenppo: rewards.quality: raised\n  a frame of something\n"
    trial = trial_with(tmp_path, [], {"exit": 1, "steps": 0}, log)
    got = outcome_of(trial, "reward/total", lowest=False, code=4)
    assert (got.exit, got.error, got.well) == (4, "rewards.quality: raised", False)


def test_the_table_names_settings_values_and_failures():
    outcomes = [
        Outcome("a", {"optim.lr": "1e-3"}, 0, 4, 0.25, 0.5, 3.5, None),
        Outcome("b", {"optim.lr": "1"}, 4, 0, None, None, None, "it raised"),
        Outcome("c", {"optim.lr": "2"}, None, 0, None, None, None, None),
    ]
    assert table(outcomes, "reward/total").splitlines() == [
        "optim.lr  reward/total  best  steps  seconds",
        "1e-3      0.25          0.5   4      3.5",
        "1         -             -     0      -        exit 4: it raised",
        "2         -             -     0      -        not begun",
    ]


def test_an_agent_of_a_wandb_sweep_starts_trials_of_ours():
    """What it would start, composed by W&B's own code from the file that we ship, says what it would train."""
    from wandb.sdk.launch.sweeps import utils

    spec = yaml.safe_load((ROOT / "launch" / "templates" / "wandb_sweep.yaml").read_text())
    values = {"optim.lr": {"value": 0.0005}, "rewards.quality.weight": {"value": 2.0}}
    assert spec["parameters"].keys() == values.keys()
    macros = utils.create_sweep_command_args({"args": values})
    line: list[str] = []
    for word in utils.create_sweep_command(spec["command"]):
        line += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    environment = os.environ | {"WANDB_RUN_ID": "abc", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([*line, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "sweep-abc" in done.stdout
    cfg = arguments.parse([word for word in line if word.startswith("--") and word != "--"]).overrides
    assert cfg == {"optim.lr": "0.0005", "rewards.quality.weight": "2.0"}


def test_a_trial_has_the_environment_of_the_user_and_not_that_of_an_actor():
    actor = {"HOME": "/h", "RAY_JOB_ID": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_AUTH_MODE": "x"}
    user = {"HOME": "/other", "RAY_AUTH_MODE": "token", "CUDA_VISIBLE_DEVICES": "2,3"}
    got = environment_of_trial(actor, user, 0)
    assert got.pop("PYTHONPATH").split(os.pathsep)[0] == str(ROOT)
    assert got == {"HOME": "/h", "RAY_AUTH_MODE": "token", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert "CUDA_VISIBLE_DEVICES" not in environment_of_trial(actor, {}, 0)
    assert environment_of_trial(actor | {"CUDA_VISIBLE_DEVICES": "1"}, user, 1.0)["CUDA_VISIBLE_DEVICES"] == "1"
