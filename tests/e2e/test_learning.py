"""The demo learns, and what must not learn does not: shuffled rewards, learning rate 0, a weight sync that is cut."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from cards_run import CARDS, ROOT, Run, checkout
from core.config import load
from core.faults import InvariantFault
from core.weights import WeightManifest, bucket_digest, version_digest
from launch.job import Inline
from launch.run import run
from launch.weight_transport import ObjectStoreTransport

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long(seconds=150)) for n in (1, 2))])
def test_the_demo_learns_to_state_facts_and_to_stop(seed, tmp_path):
    """The command of the first screen."""
    place = checkout(tmp_path / "tokenppo")
    command = ["bash", str(place / "launch" / "demo.sh")]
    demo = Run(place / "runs" / "demo", *(["--run.seed", str(seed)] if seed else []), command=command)
    assert demo.end() == 0, demo.words()
    evals = demo.summary()["eval"]
    assert 0.40 <= evals["before"]["slot_error"] <= 0.45
    assert evals["after"]["slot_error"] <= 0.05
    assert evals["after"]["response/truncated_frac"] <= 0.02
    assert evals["best"]["reward/total"] >= evals["after"]["reward/total"] > 4.5  # the clean text has 5
    rows = demo.rows()
    assert len(rows) <= 40
    # First mini-batch, and the first step against the reference: both are exact but for rounding.
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4 * 48)
    assert max(row["logprob_diff/mean"] for row in rows) < 1e-5
    # Scores arrive while other workers still write: in the middle step at least two of the four chunks.
    assert statistics.median(row["perf/scored_early_frac"] for row in rows) >= 0.5
    assert max(abs(row["staleness/mean"]) for row in rows) == 0


@pytest.mark.long(seconds=120)
def test_it_learns_from_filtered_samples_too(tmp_path):
    """Kept ids go from worker to reward server, which has the reference, and on to the learner. The run's checks are
    on: a log-prob over other ids anywhere would stop it."""
    filters = ["--rollout.top_p", "0.9", "--model.reference", "reward_server", "--ppo.kl_loss_coef", "0.01"]
    demo = Run(tmp_path / "nucleus", *filters, "--run.steps", "10", "--run.eval_every", "100")
    assert demo.end() == 0, demo.words()
    rows, evals = demo.rows(), demo.summary()["eval"]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4 * 48)
    assert max(row["logprob_diff/mean"] for row in rows) < 1e-5
    assert max(row["logprob_diff/max"] for row in rows) < 1e-4
    assert all(row["objective/kl"] > 0 for row in rows[2:])  # over one set of tokens it is a KL, and not negative
    assert evals["after"]["slot_error"] < 0.5 * evals["before"]["slot_error"]
    assert evals["after"]["reward/total"] > evals["before"]["reward/total"]


def slot_errors(demo: Run) -> list[float]:
    return [row["eval/slot_error"] for row in demo.rows() if "eval/slot_error" in row]


@pytest.mark.long(seconds=150)
def test_shuffled_rewards_teach_nothing(tmp_path):
    file = ROOT / "tests" / "e2e" / "shuffled_rewards.py"
    fns = [word for c in ("consistency", "quality", "coverage") for word in (f"--rewards.{c}.fn", f"{file}:{c}")]
    demo = Run(tmp_path / "shuffled", *fns, "--rollout.workers", "1", "--run.eval_every", "5")
    assert demo.end() == 0, demo.words()
    assert len(slot_errors(demo)) == 6 and min(slot_errors(demo)) > 0.35


def test_learning_rate_0_changes_nothing(tmp_path):
    demo = Run(
        tmp_path / "still", "--optim.lr", "0", "--rollout.workers", "1", "--run.steps", "3", "--run.eval_every", "1"
    )
    assert demo.end() == 0, demo.words()
    evals = demo.summary()["eval"]
    without_step = [{k: v for k, v in evals[when].items() if k != "step"} for when in ("before", "after")]
    assert without_step[0] == without_step[1] and min(slot_errors(demo)) > 0.35


class CutTransport(ObjectStoreTransport):
    """Delivers version 0 for ever, under the number and the digest of each new one: as an engine that keeps its own
    copy of the weights would look to the sender."""

    first: tuple[WeightManifest, list] | None = None

    def __init__(self, group, timeout_s):
        super().__init__(group, timeout_s)
        self.arrays = []

    def open(self, manifest):
        self.wanted, self.arrays = manifest, []

    def send(self, index, tensors, raw):
        self.arrays.append([piece.copy() for piece in raw])

    def offer(self, digests):
        self.claimed = version_digest(self.wanted, digests)

    def commit(self, probe, verify):
        if self.first is None:
            self.first = (self.wanted, self.arrays)
        old, arrays = self.first
        super().open(replace(old, version=self.wanted.version))
        for index, array in enumerate(arrays):
            super().send(index, [], array)
        super().offer(tuple(map(bucket_digest, arrays)))
        return super().commit(probe, lambda ack: verify(replace(ack, digest=self.claimed)))


def cut_run(tmp_path: Path, **settings: object) -> Path:
    cfg = load(CARDS, {"run.dir": str(tmp_path), "run.name": "cut", "log.trackers": [], **settings})
    run(cfg, Inline(make_transport=CutTransport))
    return tmp_path / "cut"


def test_a_cut_weight_sync_shows_in_the_samples(tmp_path):
    """With the checks off the learner improves and its workers do not: only their samples tell."""
    folder = cut_run(tmp_path, **{"run.checks": False, "run.steps": 12, "run.eval_every": 4})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert min(row["eval/slot_error"] for row in rows if "eval/slot_error" in row) > 0.35
    assert min(row["reward/slot_error/raw"] for row in rows) > 0.35
    assert rows[-1]["logprob_diff/mean"] > 1e-3


def test_a_cut_weight_sync_stops_a_checked_run_with_an_explanation(tmp_path):
    with pytest.raises(InvariantFault, match="committed version 1 .*not in use there"):
        cut_run(tmp_path)
    assert '"exit": 5' in (tmp_path / "cut" / "summary.json").read_text()
