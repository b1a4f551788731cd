"""The best evaluation, patience and the bound on KL; the record of trained samples."""

import json
import math

import pytest

from core.config import load
from core.faults import UserError
from launch import trained
from launch.stopping import Stopping
from launch.trained import Trained

LEAST = {"model.path": "gpt2", "data.path": "p.jsonl", "rewards.mine.fn": "r.py:fn"}


def stopping(**limits) -> Stopping:
    return Stopping(**({"metric": "reward/total", "patience": None, "max_kl": None} | limits))


def test_patience_counts_evaluations_since_the_best_and_a_draw_is_no_improvement():
    s = stopping(patience=2)
    seen = []
    for reward in (1.0, 3.0, 3.0, 3.5, 2.0, 3.4):
        best = s.is_best({"reward/total": reward})
        seen.append((best, s.since, s.reason({})))
    assert seen == [
        (True, 0, None),
        (True, 0, None),
        (False, 1, None),
        (True, 0, None),
        (False, 1, None),
        (False, 2, "patience"),
    ]


def test_with_a_minus_lower_is_better():
    s = stopping(metric="-slot_error", patience=1)
    assert [s.is_best({"slot_error": x}) for x in (0.5, 0.4, 0.45)] == [True, True, False] and s.reason(
        {}
    ) == "patience"


def test_nan_is_never_better_and_anything_is_better_than_nan():
    s = stopping()
    assert [s.is_best({"reward/total": x}) for x in (math.nan, math.nan, -9.0, math.nan)] == [True, False, True, False]
    assert s.best == -9.0 and stopping(metric="absent").is_best({}) is True


def test_kl_above_its_bound_ends_a_run_and_on_it_does_not():
    s = stopping(max_kl=0.5)
    assert [s.reason({"objective/kl": x}) for x in (0.2, 0.5, 0.5000001, math.nan)] == [None, None, "max_kl", None]


def test_counters_come_back_from_json_as_they_were():
    whole, first = stopping(patience=3), stopping(patience=3)
    rewards = [0.1 + 0.2, 0.3, 0.25, 0.1, 0.0]
    for reward in rewards:
        whole.is_best({"reward/total": reward})
    for reward in rewards[:2]:
        first.is_best({"reward/total": reward})
    second = stopping(patience=3)
    second.restore(json.loads(json.dumps(first.to_json())))
    for reward in rewards[2:]:
        second.is_best({"reward/total": reward})
    assert second == whole and second.reason({}) == "patience"  # 0.1 + 0.2 is more than 0.3: four without a better one


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"run.best_metric": "slot_eror"},
            "run.best_metric = slot_eror: is no mean of an evaluation; there are reward",
        ),
        ({"run.best_metric": "mine"}, "reward/mine/raw"),
        ({"run.patience": 3}, "run.patience = 3: counts evaluations and there are none: give data.eval_path"),
        ({"run.keep_checkpoints": 1}, "run.keep_checkpoints"),
        ({"run.max_kl": 0}, "run.max_kl"),
    ],
)
def test_limits_that_cannot_work_are_refused_in_one_line(overrides, words):
    with pytest.raises(UserError) as caught:
        load(None, LEAST | overrides)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_metric_of_weight_nought_may_decide_what_is_best():
    cfg = load(None, LEAST | {"rewards.slot_error.fn": "r.py:e", "rewards.slot_error.weight": 0})
    assert "slot_error" in cfg.evaluation_means and "reward/slot_error/raw" not in cfg.evaluation_means
    assert load(None, LEAST | {"run.best_metric": "-response/length_mean"}).run.best_metric == "-response/length_mean"


# SHA-256 of "\n" + line 1, then of that in hex + "\n" + line 2, by coreutils' sha256sum.
LINES = ['{"step": 1, "uids": ["a", "b"]}', '{"step": 2, "uids": ["c"]}']
CHAINS = [
    "0aab3cd7b751f0161d7a53905780a6e6529d5da9c7f034885490ce813938a606",
    "0d3d6ad3da485218d0475c37bafcdea982248e712502280efc11fb1cfce663c7",
]


def written(folder, n: int = 2) -> list[Trained]:
    proofs = [Trained()]
    for step, uids in [(1, ["b", "a"]), (2, ["c"]), (3, ["d", "e", "f"])][:n]:
        proofs.append(trained.append(folder, proofs[-1], step, uids))
    return proofs


def test_the_proof_is_a_chain_of_sha256_over_the_lines(tmp_path):
    proofs = written(tmp_path)
    assert (tmp_path / "trained.jsonl").read_text().splitlines() == LINES
    assert [(p.step, p.samples, p.chain) for p in proofs[1:]] == [(1, 2, CHAINS[0]), (2, 3, CHAINS[1])]


def test_what_was_trained_after_the_checkpoint_is_cut_and_a_torn_line_with_it(tmp_path):
    proofs = written(tmp_path, 3)
    with open(tmp_path / "trained.jsonl", "a") as file:
        file.write('{"step": 4, "ui')
    assert trained.cut_to(tmp_path, proofs[2]) is None
    assert trained.uids_by_step(tmp_path) == {1: ["a", "b"], 2: ["c"]}
    assert trained.append(tmp_path, proofs[2], 3, ["d", "f", "e"]) == proofs[3]
    assert trained.cut_to(tmp_path, Trained()) is None and trained.uids_by_step(tmp_path) == {}


@pytest.mark.parametrize("how", ["lost", "changed", "repeated", "moved", "absent", "no JSON"])
def test_a_record_that_is_not_what_the_checkpoint_says_is_set_aside_and_named(tmp_path, how):
    proofs, file = written(tmp_path, 3), tmp_path / "trained.jsonl"
    lines = file.read_text().splitlines()
    wrong = {
        "lost": lines[1:],
        "changed": [lines[0].replace("a", "x"), *lines[1:]],
        "repeated": [lines[0], *lines],
        "moved": [lines[1], lines[0], lines[2]],
        "no JSON": ["{", *lines],
    }
    file.write_text("".join(f"{line}\n" for line in wrong[how])) if how != "absent" else file.unlink()
    words = trained.cut_to(tmp_path, proofs[3])
    assert "does not list the 6 samples" in words and "up to step 3" in words
    assert (tmp_path / "trained.jsonl.damaged-at-3").exists() == (how != "absent")
    after = trained.append(tmp_path, proofs[3], 4, ["g"])  # the run goes on, and its proof with it
    assert trained.cut_to(tmp_path, after) is None and trained.uids_by_step(tmp_path) == {4: ["g"]}
    assert (after.step, after.samples) == (4, 7)
