"""The folder of a run: one run at a time, nothing overwritten, summaries whole."""

import json

import pytest

import tokenppo
from core.config import Config, load
from core.faults import UserError
from launch import run_folder


def configured(folder, **overrides) -> Config:
    least = {"model.path": "m", "data.path": "d.jsonl", "rewards.a.fn": "r.py:f", "run.dir": str(folder)}
    return load(None, least | overrides)


def test_two_runs_cannot_share_a_folder(tmp_path):
    cfg = configured(tmp_path)
    with run_folder.created(cfg) as folder:
        assert load(folder / "config.yaml") == cfg
        with pytest.raises(UserError, match="another run is at work"), run_folder.created(cfg):
            pass
    with run_folder.created(cfg):  # the first one ended before it got anywhere: its name is free again
        pass


@pytest.mark.parametrize("trace", ["metrics.jsonl", "best", "final"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, trace):
    cfg = configured(tmp_path)
    cfg.run.folder.mkdir()
    if trace == "metrics.jsonl":
        (cfg.run.folder / trace).write_text("{}\n")
    else:
        (cfg.run.folder / trace).mkdir()
    with pytest.raises(UserError, match=trace):
        run_folder.refuse_used(cfg)
    with pytest.raises(UserError, match=trace), run_folder.created(cfg):
        pass


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="run.dir"):
        run_folder.refuse_used(configured(tmp_path / "runs"))


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
