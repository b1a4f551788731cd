"""The report: its words follow the numbers, its numbers are the ledger's, and no text of a response is ever markup."""

import fcntl
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

import recorded_step
import report_case as case
import tiny_models
from core import config, ledger_table
from core.faults import StorageFault, UserError
from launch import cli, run, run_folder
from launch.heat_map import pieces
from launch.report import curves, gather, render, samples, words
from launch.report.record import Responses


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with a ledger of two steps; prompt "again" is in both."""
    ledger = {
        1: [case.row(0, reward=-1.0, prompt="again"), case.row(1, reward=0.5), case.row(2, reward=2.0)],
        6: [case.row(7, reward=1.0, prompt="again"), case.row(8, reward=-2.0), case.row(9, reward=3.0)],
    }
    return case.make_run(tmp_path_factory.mktemp("runs") / "made", ledger=ledger)


def data_of(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_every_number_of_a_token_is_the_ledgers(made):
    shown = data_of(render.page(gather.gather([made])))["runs"][0]["responses"]["samples"]
    assert {(s["step"], s["ordinal"]) for s in shown} == {(1, 0), (1, 1), (1, 2), (6, 7), (6, 8), (6, 9)}
    compared = 0
    for s in shown:
        table, _ = ledger_table.read(made, s["step"])
        (row,) = [r for r in table.to_pylist() if r["ordinal"] == s["ordinal"]]
        pairs = [(s["numbers"][name], row[name]) for name in (*ledger_table.NUMBERS, *samples.ELSEWHERE)]
        for column in ("normalized", "weighted"):
            pairs += [(s[column][name], values) for name, values in row[column]]
        for got, want in pairs:
            for i, (x, y) in enumerate(zip(got, want, strict=True)):
                assert (x is None) == (i == case.THEIRS)
                if x is not None:
                    assert np.float32(x) == np.float32(y) and x == float(f"{x:.9g}")  # bit for bit, in nine digits
                    compared += 1
        for name, values in row["component_rewards"]:
            want = [None if i == case.THEIRS or name == "coverage" else x for i, x in enumerate(values)]
            assert s["raw"][name] == want  # `coverage` does not apply
        assert s["clipped"] == row["clipped"] and s["ids"] == row["response_ids"] and s["ours"] == row["action_mask"]
        assert s["total"] == pytest.approx(sum(x for x in row["token_rewards"] if x is not None), rel=1e-5)
    assert compared == 6 * (case.N - 1) * (len(ledger_table.NUMBERS) + 2 + 8)


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_the_parts_of_an_advantage_are_its_whole(tmp_path, estimator):
    """Of a step that the loop made, with samples of a prompt beside each other: the page has the split of all."""
    table, said, cfg = recorded_step.step(tiny_models.make_tokenizer(), **{"ppo.estimator": estimator})
    folder = case.make_run(tmp_path / "credited")
    (folder / "config.yaml").write_text(config.to_yaml(cfg))
    path = ledger_table.file_of(folder, said["step"], 0)
    path.parent.mkdir()
    pyarrow.parquet.write_table(table, path)
    (run,) = gather.gather([folder]).runs
    shown = 0
    for sample in run.responses.samples:
        assert {"quality", "coverage", "kl"} <= set(sample.credit) and ("others" in sample.credit) == (
            estimator == "grpo"
        )
        for i, advantage in enumerate(sample.numbers["advantages"]):
            parts = [values[i] for values in sample.credit.values()]
            if sample.ours[i]:
                assert sum(parts) == pytest.approx(advantage, abs=1e-5)
                shown += 1
            else:
                assert set(parts) == {None}
    assert shown > 10


def test_the_text_of_a_response_is_cut_into_its_tokens_each_character_once():
    text, spans = case.text_and_offsets()
    cut = pieces(text, spans)
    assert "".join(piece for piece, _ in cut) == text
    assert [i for i, (_, shares) in enumerate(cut) if shares] == [7, 8]
    assert cut[6] == ("☕", False) and cut[7] == ("", True) and cut[-1] == ("", False)
    # A token may have the first byte of a character beside others of its own, and the next the rest of it.
    assert pieces("a é!", [(0, 3), (2, 4)]) == [("a é", False), ("!", True)]


def test_what_is_shown_of_a_shared_character_says_which(made):
    sample = samples.sample_of(case.row(3), 1, ["best"])
    assert [sample.shares[i] for i in case.SHARED] == [None, "☕", "☕"]
    assert [i for i, text in enumerate(sample.texts) if not text] == [7, 8, case.N - 1]


def test_no_text_ends_the_data_or_is_markup(made, monkeypatch):
    monkeypatch.setattr(samples, "MOST_TEXTS", 20)
    text = render.page(gather.gather([made]))
    assert case.EVIL not in text and "<img" not in text and len(re.findall(r"(?i)<script", text)) == 3
    assert "&lt;script&gt;window.pwned=1" in text  # of the table of tokens that earn most
    assert "prompt 1 " + case.EVIL in {s["prompt"] for s in data_of(text)["runs"][0]["responses"]["samples"]}
    escaped = render.embedded({"a": "</script><!-- \ud800 &", "b": [0.1, None]})
    assert escaped.isascii() and not set("<>&") & set(escaped)
    assert json.loads(escaped) == {"a": "</script><!-- \ud800 &", "b": [0.1, None]}
    with pytest.raises(ValueError):
        render.embedded({"a": float("nan")})  # it would be no JSON


def test_the_page_runs_its_own_scripts_and_loads_nothing(made):
    text = render.page(gather.gather([made]))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2 and text.count("Plotly.react(") >= 1 and text.count("plotly.js v") == 1
    assert re.findall(r"'(sha256-[^']+)'", policy) == [render.digest(s) for s in scripts]
    assert policy.split("script-src")[1].split(";")[0].count("'") == 4  # nothing beside the two digests
    own = text.replace(scripts[1], "")
    assert not re.search(r'(?:src|href)="(?!#|data:)', own), "the page asks for a file"
    for mark in ("</SCRIPT>", "<!--"):
        with pytest.raises(ValueError):
            render.script(f"a = '{mark}'")


def test_a_share_of_the_page_is_small_enough(tmp_path):
    """5,000 tokens of samples: below 8 MB, plotly's 4.8 among them."""
    ledger = {s: [case.row(100 * s + i, reward=i - 3.0) for i in range(8)] for s in range(1, 16)}
    folder = case.make_run(tmp_path / "long", steps=15, ledger=ledger)
    report = gather.gather([folder])
    shown = sum(len(s.texts) for s in report.runs[0].responses.samples)
    assert len(report.runs[0].responses.steps) == samples.MOST_STEPS and shown > 400
    per_token = (len(render.embedded(gather.as_json(report)["runs"][0]["responses"]["samples"]))) / shown
    assert len(render.page(report)) + per_token * (samples.MOST_TOKENS - shown) < 8e6


def test_a_ledger_of_many_steps_is_not_read_whole(tmp_path, monkeypatch):
    folder = case.make_run(tmp_path / "many", steps=4)
    case.write_ledger(folder, 1, [case.row(0), case.row(1, reward=2.0)])
    first = ledger_table.file_of(folder, 1, 0)
    for step in range(2, 2001):
        ledger_table.file_of(folder, step, 0).symlink_to(first)
    opened = []
    real = ledger_table.read
    monkeypatch.setattr(ledger_table, "read", lambda f, s, columns=None: opened.append(s) or real(f, s, columns))
    got = samples.of_run(folder, run_folder.configuration(folder))
    assert got.recorded == 2000 and len(opened) <= 2 * samples.MOST_STEPS + samples.SPREAD_STEPS
    assert {min(opened), max(opened)} == {1, 2000}


def rows_of(totals: list[float], step: int = 1, tokens: int = 10) -> list[samples.Row]:
    return [samples.Row(step, i, i, 0, f"p{i}", x, tokens, tokens) for i, x in enumerate(totals)]


def test_samples_are_chosen_by_rule():
    rows = rows_of([1.0, 5.0, -2.0, 3.0, 0.0], step=1) + rows_of([2.0, 9.0, -4.0, 3.0, 1.0, 7.0, -1.0], step=8)
    chosen = samples.choose(rows, 10_000)
    said = {(r.step, r.total): why for r, why in chosen.items()}
    assert "best" in said[8, 9.0] and "worst" in said[8, -4.0] and "best" in said[1, 5.0] and "worst" in said[1, -2.0]
    assert "typical" in said[8, 2.0] and "typical" in said[1, 1.0]
    assert "same prompt" in said[1, 1.0] and "same prompt" in said[8, 2.0]  # p0 comes again, of the lowest ordinal
    assert chosen == samples.choose(rows[::-1], 10_000)
    few = samples.choose(rows, 30)  # room for three responses: the extremes of the last step first
    assert [(r.step, r.total, why[0]) for r, why in few.items()] == [
        *((8, 9.0, "best"), (8, -4.0, "worst"), (8, 7.0, "best")),
    ]
    assert list(samples.choose(rows_of([1.0]), 99).values()) == [["best", "typical"]]  # the worst of one is no news
    assert samples.choose(rows_of([1.0], tokens=10**6), 10_000)  # a long one is shown from its beginning
    assert curves.spaced(list(range(100)), 4) == [0, 33, 66, 99] and curves.spaced([1, 2], 4) == [1, 2]


def test_a_long_response_is_shown_from_its_beginning_and_summed_whole(monkeypatch):
    monkeypatch.setattr(samples, "LONGEST", 5)
    sample = samples.sample_of(case.row(3), 1, ["best"])
    assert sample.n_tokens == case.N and {len(x) for x in (sample.texts, sample.ids, *sample.numbers.values())} == {5}
    assert sample.total == pytest.approx(sum(x for x in case.row(3)["token_rewards"] if x is not None), rel=1e-5)


def test_numbers_that_are_none_are_words():
    assert samples.decimals([0.1, float("nan"), float("-inf"), 2.0], [True, True, True, False]) == [
        0.1,
        "NaN",
        "-Infinity",
        None,
    ]


def test_a_curve_of_many_steps_is_means_of_equal_shares_and_what_they_lay_between():
    rows = [{"step": i + 1, "a": float(i), "b": None if i % 2 else 1.0, "eval/c": 5.0} for i in range(1000)]
    got = curves.curves_of(rows, most=10)
    assert got.steps == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000] and got.steps_per_point == 100
    assert got.values["a"][0] == 49.5 and (got.low["a"][0], got.high["a"][0]) == (0.0, 99.0)
    assert got.values["b"] == [1.0] * 10 and "eval/c" not in got.values
    few = curves.curves_of(rows[:3], most=10)
    assert few.steps == [1, 2, 3] and few.values["b"] == [1.0, None, 1.0] and few.low == {}
    evals = curves.evaluations_of(rows[:2], {"c": 0.5})
    assert evals["eval/c"].steps == [0, 1, 2] and evals["eval/c"].values == [0.5, 5.0, 5.0]
    assert curves.evaluations_of(rows, {"c": 0.5}, most=3)["eval/c"].steps == [0, 500, 1000]


def test_correlation_is_pearsons():
    assert curves.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert curves.correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0)
    assert curves.correlation([1, 2, 3], [5, 5, 5]) is None and curves.correlation([1, 2], [1, 2]) is None
    assert curves.correlation([1, None, 2, 3], [3, 9, 2, 1]) == pytest.approx(-1)


KNOWN = words.Known(
    rows=[case.metrics(s) for s in range(1, 21)],
    evals={"before": case.BEFORE, "after": case.AFTER | {"step": 20}},
    n_prompts=400,
    most_prompts=500,
    paid=["consistency", "quality", "coverage"],
    metrics=["slot_error"],
    comparable=True,
)


def after(**more: float) -> dict[str, dict[str, float]]:
    return {"before": case.BEFORE, "after": case.AFTER | {"step": 20} | more}


def test_the_verdict_says_from_what_to_what_on_how_many_prompts():
    said = words.headline(KNOWN)
    assert (said.level, said.word) == ("good", "Learned")
    assert said.text == (
        "On 400 held-out prompts the reward went from 0.5 to 4.5 (step 20); slot_error, which no reward sees, from"
        " 40.0 % to 1.0 %."
    )
    assert said.notes == ["No rule of the diagnosis spoke."]


@pytest.mark.parametrize(
    ("change", "level", "word"),
    [
        # The deviation between responses is 1: twice the error of a difference of two means of 400 is 0.141.
        ({"evals": after(**{"reward/total": 0.64})}, "look", "No clear change"),
        ({"evals": after(**{"reward/total": 0.65})}, "good", "Learned"),
        ({"evals": after(**{"reward/total": 0.2})}, "bad", "Got worse"),
        ({"evals": after(slot_error=0.5)}, "bad", "The reward rose, the task did not"),
        ({"evals": after() | {"best": case.AFTER | {"reward/total": 9.0, "step": 10}}}, "look", "Learned, then lost"),
        ({"evals": {}}, "look", "Rose in training"),
        ({"rows": []}, "unknown", "Nothing to judge yet"),
        ({"failed": "The run ended before its end (exit 5): x"}, "look", "Learned"),
    ],
)
def test_the_verdict_follows_the_numbers(change, level, word):
    said = words.headline(replace(KNOWN, **change))
    assert said.level == level and said.word.startswith(word), said


def test_what_is_not_recorded_is_not_claimed():
    assert "On held-out prompts (up to 500) the" in words.headline(replace(KNOWN, n_prompts=None)).text
    assert "data.eval_path" in words.headline(replace(KNOWN, evals={})).text
    assert "no clear" not in words.headline(replace(KNOWN, comparable=False)).text.lower()


def check(title: str, known: words.Known = KNOWN, responses: Responses = Responses(missing="none")) -> words.Check:  # noqa: B008
    return next(c for c in words.checks(known, responses) if c.title.startswith(title))


def test_a_gamed_reward_is_told_from_an_earned_one():
    assert check("Length and reward over").level == "good"
    longer = [case.metrics(s, **{"response/length_mean": 10.0 + 2 * s}) for s in range(1, 21)]
    grown = check("Length and reward over", replace(KNOWN, rows=longer))
    assert grown.level == "look" and "from 16.0 to 46.0 tokens (+188 %)" in grown.text
    within = Responses(correlation=0.91, n_responses=300, spread_steps=[5, 6])
    assert check("Length and reward within", responses=within).level == "look"
    assert check("Length and reward within", responses=replace(within, correlation=0.2)).level == "good"
    assert "log.ledger" in check("Length and reward within").text
    alone = [case.metrics(s, **{"reward/quality/variance_share": 0.97}) for s in range(1, 21)]
    assert check("One component", replace(KNOWN, rows=alone)).level == "look" and check("One component").level == "good"
    cut = [case.metrics(s, **{"response/truncated_frac": 0.2}) for s in range(1, 21)]
    assert check("Responses that were cut", replace(KNOWN, rows=cut)).level == "look"
    assert check("slot_error").level == "good"
    assert check("slot_error", replace(KNOWN, evals=after(slot_error=0.5))).level == "bad"
    assert check("An independent", replace(KNOWN, metrics=[])).level == "unknown"


def test_the_diagnosis_is_that_of_the_run(tmp_path):
    folder = case.make_run(tmp_path / "clipped")
    rows = [case.metrics(s, **{"ppo/pg_clipfrac": 0.5 if s < 5 else 0.0}) for s in range(1, 13)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = gather.gather([folder]).runs[0]
    (found,) = [f for f in run.diagnosis if f.rule == "clipping"]
    assert found.step == 3 and not found.holds and "0.5 (bound 0.3)" in found.text
    assert any("clipping (step 3)" in note and "passed" in note for note in run.headline.notes)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_without_ledger_or_steps_says_what_is_missing(tmp_path, steps):
    folder = case.make_run(tmp_path / "bare", steps=steps, before=None, after=None, overrides={"log.ledger": 0})
    text = render.page(gather.gather([folder]))
    assert "Nothing to judge yet" in text and "--log.ledger 0.1" in text
    assert ("No step is done yet, so there is no curve" in text) == (steps == 0)


def test_a_run_that_is_at_work_is_reported_as_far_as_it_is(tmp_path):
    folder = case.make_run(tmp_path / "busy", overrides={"run.steps": 50}, before=None, after=None)
    (folder / "summary.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "rew')  # it is writing this very moment
    saved = folder / "checkpoints" / "step-4"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps({"eval": {"before": case.BEFORE}}))
    with open(folder / "config.yaml") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        got = gather.gather([folder]).runs[0]
    assert got.state == "at work: step 6 of 50" and got.evals[0].before == 0.5
    assert gather.gather([folder]).runs[0].state == "not at work, and it left no summary: step 6 of 50"


def test_several_runs_are_compared_by_what_differs(tmp_path):
    one = case.make_run(tmp_path / "one")
    two = case.make_run(tmp_path / "two", overrides={"optim.lr": 0.25, "rewards.quality.weight": 2.0})
    report = gather.gather([one, two])
    assert {d.key: d.values for d in report.differences} == {
        "optim.lr": ["0.001", "0.25"],
        "rewards.quality.weight": ["1.0", "2.0"],
    }
    text = render.page(report)
    assert "one:" in text and "two:" in text and 'name="run" value="1"' in text
    assert {line.label for f in report.key_figures for line in f.lines} >= {"one training", "two held-out"}
    assert gather.gather([one]).differences == []


def test_settings_that_are_not_the_default_are_told_apart(made):
    keys = {key: (value, default) for key, value, default in gather.gather([made]).runs[0].changed}
    assert keys["optim.lr"] == ("0.001", "1e-06") and "ppo.cliprange" not in keys and "run.seed" not in keys


def test_every_figure_has_its_curve_and_says_itself_in_words(made):
    report = gather.gather([made])
    page = gather.as_json(report)
    ids = [f["id"] for f in page["figures"]]
    assert len(ids) == len(set(ids)) > 20 and set(re.findall(r'data-figure="([^"]+)"', render.page(report))) == set(ids)
    run = page["runs"][0]
    for f in page["figures"]:
        for line in f["lines"]:
            where = {"curves": run["curves"]["values"], "evals": run["eval_curves"], "responses": run["responses"]}
            assert line["curve"] in where[line["of"]], f["id"]
            assert line["against"] is None or line["against"] in where[line["of"]], f["id"]
    (reward,) = [f for f in page["figures"] if f["id"] == "reward"]
    assert reward["alt"] == (
        "reward/total: training from 1.12 at step 1 to 1.75 at step 6; held-out from 0.5 at step 0 to 4.5 at step 6."
    )


def test_tokens_are_paid_by_their_text(made):
    tables = [ledger_table.read(made, 6)[0]]
    earners, payers = samples.token_pay(tables)
    # Sums of reward over ordinals 7, 8 and 9 are 2 times (i + 1) / 8; the coffee is three tokens, a stop has no text.
    assert (earners[0].text, earners[0].count, earners[0].total) == ("☕", 9, pytest.approx(2 * 24 / 8))
    assert not payers and next(e for e in earners if e.text == "").total == pytest.approx(2 * 14 / 8)


def test_the_verb_writes_beside_the_run_and_asks_for_a_name_for_several(made, tmp_path, capsys):
    assert cli.main(["report", str(made)]) == 0
    assert capsys.readouterr().out.strip() == str(made / "report.html") and (made / "report.html").stat().st_size > 4e6
    other = case.make_run(tmp_path / "other")
    assert cli.main(["report", str(made), str(other)]) == UserError.exit_code
    assert "-o" in capsys.readouterr().err
    assert cli.main(["report", str(made), str(other), "-o", str(tmp_path / "both.html")]) == 0
    assert cli.main(["report", str(tmp_path)]) == UserError.exit_code
    assert "there is no run in this folder" in capsys.readouterr().err
    assert cli.main(["report", str(made), "-o", str(tmp_path / "no" / "r.html")]) == StorageFault.exit_code


def test_no_report_is_no_reason_to_fail_a_run(made, tmp_path, monkeypatch):
    said = []
    job = SimpleNamespace(folder=made, console=SimpleNamespace(print=lambda text, **_: said.append(text)))
    (made / "report.html").unlink(missing_ok=True)
    run._report(job, {"steps": 6, "exit": 130})
    run._report(job, {"steps": 0, "exit": 2})
    assert not (made / "report.html").exists()  # who presses Ctrl-C wants an end; who never trained has nothing to see
    run._report(job, {"steps": 6, "exit": 5})
    assert (made / "report.html").exists() and not said
    monkeypatch.setattr(render, "write", lambda *_, **__: 1 / 0)
    run._report(job, {"steps": 6, "exit": 0})
    assert said == [f"warning: no report (ZeroDivisionError: division by zero); tokenppo report {made} tries again"]
    assert "report.html" in run_folder.farewell(made, {"eval": {}})
