"""What W&B and TensorBoard hold besides numbers: responses with their heat maps, histograms, charts in order, files."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.metrics import SECTIONS
from core.schema import Config
from launch import heat_map
from launch.shown import HIDDEN
from launch.wandb_tracker import best_of
from tests import exhibits, wandb_file
from tests.tracker_job import ids, jobs_in, scalars, settings, steps


@pytest.fixture
def job(tmp_path):
    return jobs_in(tmp_path)


def table_of(folder: Path, row: dict) -> tuple[dict, dict[str, str]]:
    """The sample table that a row of W&B's file names, and the pages of its heat maps by path."""
    artifact = next(
        a for file in wandb_file.files(folder) for a in wandb_file.read(file).artifacts if a.client_id in row_id(row)
    )
    files = {entry.path: Path(entry.local_path).read_text() for entry in artifact.manifest.contents}
    table = json.loads(files.pop("samples.table.json"))
    return table, files


def row_id(row: dict) -> str:
    return row["samples.artifact_path"]


@pytest.mark.slow
def test_responses_and_histograms_are_in_the_row_of_their_step_once(job):
    """Over a resume, too: what was replayed is not shown again."""
    first = job("tensorboard", "wandb", steps=[1, 2, 3], looks=[2, 3])
    job("tensorboard", "wandb", steps=[3, 4], looks=[3, 4], resumed_from=2, ids=ids(first))
    one, two = (wandb_file.read(file) for file in wandb_file.files(job.folder))
    assert steps(one) == [0, 1, 2, 3] and steps(two) == [4]
    shown_at = [row["step"] for run in (one, two) for row in run.rows if "samples._type" in row]
    assert shown_at == [2, 3, 4]
    row = one.rows[2]
    assert row["reward/total"] == 0.5 and row["samples._type"] == "table-file"
    assert row["histogram/ratio.values"] == [2, 0, 1, 1] and row["histogram/ratio.bins"] == [1, 2, 3, 4, 5]
    for row in (*one.rows[2:], *two.rows):
        table, pages = table_of(job.folder, row)
        head = ["step", "prompt", "response", "tokens", "reward", "ended", "tokens' worth", "reward/quality"]
        assert table["columns"] == head
        want = [exhibits.shown(), exhibits.shown(f"step {row['step']}", total=2.5)]
        for cells, sample in zip(table["data"], want, strict=True):
            assert cells[:6] == [row["step"], sample.prompt, sample.text, 3, sample.total, "stop"]
            assert cells[7] == sample.total and pages[cells[6]["path"]] == heat_map.html(sample)

    reader = EventAccumulator(str(job.folder / "tests"), size_guidance={"histograms": 0, "tensors": 0})
    reader.Reload()
    histograms = reader.Histograms("histogram/ratio")
    assert [h.step for h in histograms] == [2, 3, 4]
    assert histograms[0].histogram_value.bucket == [2, 0, 1, 1] and histograms[0].histogram_value.sum == 10
    assert (histograms[0].histogram_value.min, histograms[0].histogram_value.max) == (1, 5)
    texts = reader.Tensors("samples/1/text_summary")
    assert [t.step for t in texts] == [2, 3, 3, 4]  # the mark of a resume hides numbers and histograms, but no texts
    assert texts[0].tensor_proto.string_val[0].decode() == heat_map.markdown(exhibits.shown("step 2", total=2.5))


def test_tensorboard_has_the_charts_in_the_order_of_the_page(job):
    from tensorboard.plugins.custom_scalar import layout_pb2

    job("tensorboard", steps=[1])
    reader = EventAccumulator(str(job.folder / "tests"))
    reader.Reload()
    (event,) = reader.Tensors("custom_scalars__config__")
    got = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in got.category] == list(SECTIONS)
    drawn = [pattern for category in got.category for chart in category.chart for pattern in chart.multiline.tag]
    assert r"^reward/quality/raw$" in drawn and r"^time/rollout$" in drawn
    written = [name for name in reader.Tags()["scalars"] if name not in ("hp_metric",)]
    assert written and all(any(re.search(pattern, name) for pattern in drawn) for name in written)


def test_the_best_values_are_those_that_choose_the_best_weights():
    cfg = settings(Path("a-run"), "wandb")
    assert best_of(Config(**cfg)) == {"eval/reward/total": "max"}
    cfg["run"] |= {"best_metric": "-response/length_mean"}
    assert best_of(Config(**cfg)) == {"eval/reward/total": "max", "eval/response/length_mean": "min"}


def test_files_are_kept_as_asked_for(job):
    """A checkpoint that training has deleted since is there; no secret is."""
    files = ("checkpoints/step-2/state.json", "final/model.safetensors", "best/model.safetensors")
    for path in (*files, "report.html", "summary.json"):
        (job.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / path).write_text(path)
    log = {"artifacts": ["record", "final", "checkpoints"]}
    job("wandb", steps=[1, 2, 3], checkpoints=[2], options={"api_key": "hunter2"}, log=log)
    (file,) = wandb_file.files(job.folder)
    got = wandb_file.read(file)
    kept = {
        a.name.removeprefix(f"{got.run_id}-"): {e.path: e.local_path for e in a.manifest.contents}
        for a in got.artifacts
    }
    assert {name: {*files} for name, files in kept.items()} == {
        "record": {"metrics.jsonl", "settings.json", "summary.json", "report.html"},
        "final": {"model.safetensors"},
        "checkpoint": {"state.json"},
    }
    assert {*next(a.aliases for a in got.artifacts if a.name.endswith("checkpoint"))} == {"latest", "step-2"}
    assert Path(kept["checkpoint"]["state.json"]).read_text() == "checkpoints/step-2/state.json"
    assert Path(kept["record"]["metrics.jsonl"]).read_bytes() == (job.folder / "metrics.jsonl").read_bytes()
    assert json.loads(Path(kept["record"]["settings.json"]).read_text())["rewards.quality.options.api_key"] == HIDDEN
    for path in job.folder.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


def test_a_run_that_failed_keeps_its_record_and_no_model(job):
    (job.folder / "final").mkdir()
    for path in ("final/model.safetensors", "report.html", "summary.json"):
        (job.folder / path).write_text("of an earlier process")
    job("wandb", steps=[1], exit=3, log={"artifacts": ["record", "final"]})
    (file,) = wandb_file.files(job.folder)
    (record,) = wandb_file.read(file).artifacts
    assert record.type == "run-record" and wandb_file.read(file).exit_code == 3
    assert {entry.path for entry in record.manifest.contents} == {"metrics.jsonl", "settings.json"}


def test_names_of_a_peer_come_beside_ours(job):
    job("tensorboard", "wandb", steps=[1, 2], log={"peer_names": "trl"})
    (file,) = wandb_file.files(job.folder)
    assert [row.get("objective/scores") for row in wandb_file.read(file).rows] == [None, 0.25, 0.5]
    assert scalars(job.folder, "objective/scores") == scalars(job.folder, "reward/total") == [(1, 0.25), (2, 0.5)]
    assert "objective/scores" not in (job.folder / "metrics.jsonl").read_text()
