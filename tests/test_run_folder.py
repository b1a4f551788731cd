"""The folder of a run: one run at a time, nothing overwritten, summaries whole."""

import json

import pytest

import tokenppo
from core.config import load
from core.faults import UserError
from core.schema import Config
from launch import run_folder


def configured(folder, **overrides) -> Config:
    least = {"model.path": "m", "data.path": "d.jsonl", "rewards.a.fn": "r.py:f", "run.dir": str(folder)}
    return load(None, least | overrides)


def test_two_runs_cannot_share_a_folder(tmp_path):
    cfg = configured(tmp_path)
    with run_folder.opened(cfg) as folder:
        assert load(folder / "config.yaml") == cfg
        with pytest.raises(UserError, match="another run is at work"), run_folder.opened(cfg):
            pass
    with run_folder.opened(cfg):  # the first one ended before it got anywhere: its name is free again
        pass


def begun(cfg: Config, *, rows: int = 3, checkpoints: tuple[int, ...] = (), **summary) -> None:
    """A run folder as a run of `cfg` leaves it behind."""
    with run_folder.opened(cfg) as folder:
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1}) + "\n" for i in range(rows)))
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step}" / "manifest.json").write_text("{}")
    if summary:
        run_folder.write_summary(folder, summary)


def test_a_run_that_stopped_is_found_with_its_checkpoints(tmp_path):
    cfg = configured(tmp_path)
    assert run_folder.examine(cfg) == run_folder.Found() and not run_folder.examine(cfg).started
    begun(cfg)
    (cfg.run.folder / "checkpoints" / ".step-10.new").mkdir(parents=True)  # it was never finished
    (cfg.run.folder / "checkpoints" / "step-20.damaged").mkdir()
    assert run_folder.examine(cfg) == run_folder.Found(rows=3)
    for step in (9, 10):
        (cfg.run.folder / "checkpoints" / f"step-{step}").mkdir()
        (cfg.run.folder / "checkpoints" / f"step-{step}" / "manifest.json").write_text("{}")
    assert run_folder.examine(cfg).saved == (10, 9)  # by number, not by name


def test_never_refuses_what_auto_would_go_on_with(tmp_path):
    begun(configured(tmp_path))
    with pytest.raises(UserError, match="run.resume = never: .*metrics.jsonl"):
        run_folder.examine(configured(tmp_path, **{"run.resume": "never"}))


def test_every_changed_key_is_listed_but_more_steps_are_welcome(tmp_path):
    begun(configured(tmp_path, **{"run.steps": 5}), checkpoints=(4,))
    assert run_folder.examine(configured(tmp_path, **{"run.steps": 9})).saved == (4,)
    changed = {"optim.lr": 0.5, "rewards.b.fn": "r.py:g", "run.steps": 9}
    with pytest.raises(UserError) as caught:
        run_folder.examine(configured(tmp_path, **changed))
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines[:-1] if "optim" in line] == ["optim.lr"]
    assert any(line.startswith("rewards.b.fn = ") for line in lines) and "run.steps may grow" in lines[-1]
    assert not any(line.startswith("run.") for line in lines)
    with pytest.raises(UserError, match="run.steps = 3: .* has done 4 already"):
        run_folder.examine(configured(tmp_path, **{"run.steps": 3}))


def test_only_a_run_that_ended_well_at_its_last_step_is_finished(tmp_path):
    cfg = configured(tmp_path, **{"run.steps": 3})
    begun(cfg, checkpoints=(3,), exit=143)
    (cfg.run.folder / "final").mkdir()
    assert not run_folder.examine(cfg).finished
    run_folder.write_summary(cfg.run.folder, {"exit": 0, "steps": 3})
    assert run_folder.examine(cfg).finished
    assert not run_folder.examine(configured(tmp_path, **{"run.steps": 4})).finished


def test_a_run_that_was_stopped_is_finished_until_its_limit_is_another(tmp_path):
    held_out = {"data.eval_path": "e.jsonl", "run.steps": 9}
    cfg = configured(tmp_path, **held_out, **{"run.patience": 2})
    begun(cfg, checkpoints=(3,), exit=0, steps=3, stopped="patience", limit=2)
    (cfg.run.folder / "final").mkdir()
    found = run_folder.examine(cfg)
    assert found.finished
    assert "raise --run.patience" in run_folder.farewell(
        cfg.run.folder, run_folder.read_summary(cfg.run.folder), was_finished=True
    )
    assert not run_folder.examine(configured(tmp_path, **held_out, **{"run.patience": 3})).finished
    assert not run_folder.examine(configured(tmp_path, **held_out)).finished


def test_must_refuses_where_there_is_no_checkpoint_to_go_on_from(tmp_path):
    must = configured(tmp_path, **{"run.resume": "must"})
    with pytest.raises(UserError, match="run.resume = must: .* no checkpoint"):
        run_folder.examine(must)
    begun(configured(tmp_path))  # rows, but it never reached a checkpoint
    with pytest.raises(UserError, match="run.resume = must"):
        run_folder.examine(must)
    (must.run.folder / "checkpoints" / "step-3").mkdir(parents=True)
    assert run_folder.examine(must).saved == (3,)


def test_rows_after_the_checkpoint_are_dropped_and_a_torn_one_with_them(tmp_path):
    cfg = configured(tmp_path)
    begun(cfg, rows=5)
    path = cfg.run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "rew')
    assert run_folder.drop_after(cfg.run.folder, 3) == 2
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="run.dir"):
        run_folder.examine(configured(tmp_path / "runs"))


def test_a_summary_has_no_nan(tmp_path):
    run_folder.write_summary(tmp_path, {"eval": {"x": float("nan"), "y": 1.5}, "exit": 0})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"eval": {"x": None, "y": 1.5}, "exit": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_prompts_of_a_script_go_into_the_folder_of_its_own_run(tmp_path, monkeypatch):
    """The name comes from the config file; a bystander `runs/run` keeps its prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "prompts.jsonl").write_text("mine")
    (tmp_path / "c.yaml").write_text("run: {name: other}\ndata: {prompt_column: question}\n")
    with pytest.raises(UserError, match="model.path"):
        tokenppo.train(model="./absent", prompts=["a"], rewards={"a": len}, config="c.yaml")
    assert (tmp_path / "runs" / "run" / "prompts.jsonl").read_text() == "mine"
    assert not (tmp_path / "runs" / "other").exists()
