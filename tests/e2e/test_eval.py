"""`tokenppo eval` on a run of cards: two steps are enough that a gate can tell the policy from its base."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cards_run import ROOT, Run
from core.faults import UnmetRequirement

pytestmark = pytest.mark.slow
PROMPTS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    made = Run(tmp_path_factory.mktemp("runs") / "two", "--run.steps", "2", "--data.eval_prompts", str(PROMPTS))
    assert made.end(300) == 0, made.words()
    return made.folder


@pytest.fixture(scope="module")
def data(run) -> Path:
    """The held-out cards of the run with one more column: whether the first fact after the name is a price."""
    rows = [json.loads(line) for line in (ROOT / "examples/cards/data/heldout.jsonl").read_text().splitlines()]
    for row in rows:
        row["first"] = "price" if row["facts"][1].startswith("price") else "other"
    path = run.parent / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tokenppo", "eval", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def test_two_steps_are_shown_to_be_better_than_the_base(run, data):
    done = evaluated(
        run.parent,
        *("two", "--against", "base", "--json", "--data", str(data), "--by", "first"),
        *("--require", "reward/total > base", "--require", "slot_error < base", "--require", "win_rate > 0.5"),
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    summary, metrics = json.loads((run / "summary.json").read_text()), got["metrics"]
    for side, when in (("policy", "after"), ("against", "before")):  # as training saw them
        of_training = {name: value for name, value in summary["eval"][when].items() if name != "step"}
        assert {n: metrics[n][side]["value"] for n in of_training} == pytest.approx(of_training, abs=1e-5)
    assert got["prompts"] == PROMPTS and metrics["reward/total"]["difference"]["low"] > 0
    assert [r["met"] for r in got["requirements"]] == [True, True, True]
    for name in ("objective/kl", "objective/kl_k3"):  # the base's own log-probs, computed a second time
        assert metrics[name]["against"]["value"] == pytest.approx(0, abs=1e-4)
        assert 0.5 < metrics[name]["policy"]["value"] < 50
    assert sum(s["comparison"]["prompts"] for s in got["slices"]) == PROMPTS
    assert {s["value"] for s in got["slices"]} == {"price", "other"} and any(s["few"] for s in got["slices"])
    assert got["length_controlled"]["difference"]["low"] > 0
    assert got["examples"][0]["which"] == "largest win" and "=>" in got["examples"][0]["prompt"]
    assert 0 < got["diversity"]["policy"]["diversity/distinct_2"] < 1
    assert 0 < got["diversity"]["against"]["diversity/self_bleu"] < 100


def test_a_model_against_itself_is_no_better_and_the_gate_says_so(run):
    """final/ as a folder that any model could be in, by the configuration of its run, against the run: all ties."""
    model = run.parent / "elsewhere"
    model.symlink_to(run / "final")
    done = evaluated(
        run.parent,
        *("elsewhere", "--config", "two/config.yaml", "--against", "two", "--prompts", "12", "--samples", "2"),
        *("--require", "reward/total > against", "--require", "reward/total >= against"),
    )
    assert done.returncode == UnmetRequirement.exit_code, done.stderr
    assert "12 held-out prompts, 2 samples each" in done.stdout and "0 prompts won, 12 tied, 0 lost" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tokenppo: --require 'reward/total > against' is not met: the difference of reward/total")
    assert "met: reward/total >= against" in done.stdout and "Traceback" not in done.stderr
