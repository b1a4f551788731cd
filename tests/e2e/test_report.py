"""The report in a real browser, from disk: it asks for nothing, runs its own code alone, shows the ledger's numbers."""

import re
from pathlib import Path

import numpy as np
import psutil
import pytest

import browser
import report_case as case
from cards_run import Run
from core import ledger_table
from launch.report import render, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.chromium() is None, reason=browser.ABSENT),
]
QUANTITIES = ("total", "consistency", "quality", "advantage", "value", "KL", "ratio")
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (over, under) => {
    for (const colour of [under, over]) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => {
    const [r, g, b] = c.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const card = getComputedStyle(document.querySelector('section')).backgroundColor;
  const contrast = (e) => {
    const css = getComputedStyle(e), ink = light(rgb(css.color, css.color));
    const ground = light(rgb(css.backgroundColor, card));
    return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);
  };
  const token = document.querySelector('.tokens .t'), out = [];
  for (const kind of ['plus', 'minus', '']) {
    token.className = `t ${kind}`;
    token.style.setProperty('--x', kind ? 100 : 0);
    out.push(contrast(token));
  }
  return [...out, contrast(document.querySelector('.muted')), contrast(document.querySelector('.chart p'))];
}"""  # full colours, and the quiet words
COLUMNS = {"total": "token_rewards", "advantage": "advantages", "value": "values", "KL": "kl", "ratio": "ratio"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    ledger = {
        1: [case.row(0, reward=-1.0, prompt="again"), case.row(1, reward=0.5), case.row(2, reward=2.0)],
        6: [case.row(7, reward=1.0, prompt="again"), case.row(8, reward=-2.0), case.row(9, reward=3.0)],
    }
    return case.make_run(tmp_path_factory.mktemp("runs") / "made", ledger=ledger)


@pytest.fixture(scope="module")
def chrome():
    with browser.started() as chrome:
        yield chrome


@pytest.fixture(scope="module")
def page(chrome, made):
    with browser.opened(chrome, render.write([made])) as page:
        yield page


def ledger_row(folder: Path, step: int, ordinal: int) -> dict:
    return next(r for r in ledger_table.read(folder, step)[0].to_pylist() if r["ordinal"] == ordinal)


def show(page, view: str) -> None:
    page.locator(".chips label", has_text=re.compile(f"^{view}$")).click()


def responses(page):
    """Each shown response: (step, ordinal), and its tokens."""
    for box in page.locator(".sample").all():
        words = box.locator("header").inner_text()
        yield int(re.search(r"step (\d+)", words)[1]), int(re.search(r"prompt (\d+)", words)[1]), box


def inspected(page) -> dict[str, str]:
    """key of a number -> what the inspector shows for it."""
    return page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.inspector td[data-key]')]"
        ".map(td => [td.dataset.key, td.textContent]))"
    )


def number(row: dict, key: str, i: int) -> str:
    """What must be shown, from the ledger alone: none of the report's own code."""
    kind, _, name = key.partition(":")
    if kind == "raw" and name == "coverage":
        return "not applied"
    values = row[name] if kind == "numbers" else dict(row["component_rewards" if kind == "raw" else kind])[name]
    return values[i]


def test_hovering_shows_every_number_of_the_ledger(page, made):
    compared = 0
    for view in ("step 1", "step 6"):
        show(page, view)
        for step, ordinal, box in responses(page):
            row = ledger_row(made, step, ordinal)
            for i, token in enumerate(box.locator(".t").all()):
                token.hover()
                shown = inspected(page)
                if i == case.THEIRS:
                    assert shown == {} and "environment wrote" in page.locator(".inspector").inner_text()
                    continue
                assert len(shown) == 12 + 3 * len(case.COMPONENTS)
                for key, text in shown.items():
                    want = number(row, key, i)
                    if isinstance(want, str):
                        assert text == want
                    elif key.startswith("raw:"):  # float64, shown with nine digits
                        assert float(text) == pytest.approx(want, rel=1e-8)
                    else:
                        assert np.float32(text) == np.float32(want), (key, i)
                    compared += 1
                words = page.locator(".inspector").inner_text()
                assert ("clipped\tyes" in words) == bool(row["clipped"][i])
                assert f"id {row['response_ids'][i]}" in words and "version 3" in words
    assert compared == 6 * (case.N - 1) * 24


def test_switches_colour_by_the_number_they_name(page, made):
    show(page, "step 1")
    step, ordinal, box = next(responses(page))
    row = ledger_row(made, step, ordinal)
    for name in QUANTITIES:
        page.locator(".chips label", has_text=re.compile(f"^{name}$")).click()
        values = row[COLUMNS[name]] if name in COLUMNS else dict(row["weighted"])[name]
        middle = 1 if name == "ratio" else 0
        for i, token in enumerate(box.locator(".t").all()):
            kind = (token.get_attribute("class") or "").split()
            assert ("plus" in kind) == (values[i] is not None and values[i] > middle), (name, i)
            assert ("minus" in kind) == (values[i] is not None and values[i] < middle), (name, i)
            said = token.get_attribute("aria-label")
            if values[i] is None:
                assert said.endswith("written by the environment")
            else:
                assert np.float32(said.rpartition(" ")[2]) == np.float32(values[i]) and f", {name} " in said
    page.locator(".heat select").select_option("raw:coverage")
    assert box.locator(".t").first.get_attribute("aria-label").endswith("coverage, raw does not apply")
    page.locator(".chips label", has_text=re.compile("^total$")).click()


def test_texts_are_shown_right_and_never_run(page, made):
    show(page, "step 1")
    _, _, box = next(responses(page))
    tokens = box.locator(".t")
    texts = tokens.evaluate_all("all => all.map(t => t.textContent)")
    labels = tokens.evaluate_all("all => all.map(t => t.getAttribute('aria-label'))")
    want = list(case.PIECES)
    want[7] = want[8] = want[-1] = ""  # shown as marks that are no text
    want[9], want[10] = "U+202Eright", "U+001B[31m"  # what would turn the line round, or a terminal red
    assert texts == want
    assert (
        labels[6].startswith("“☕”") and labels[7].startswith("part of “☕”") and labels[8].startswith("part of “☕”")
    )
    assert labels[3].startswith("“↵”") and labels[4].startswith("“⇥next”") and labels[-1].startswith("end of the resp")
    marks = tokens.evaluate_all("all => all.map(t => t.dataset.mark ?? t.querySelector('.mark')?.dataset.mark ?? '')")
    assert (marks[3], marks[4], marks[7], marks[-1]) == ("↵", "⇥", "part", "end")
    tops = tokens.evaluate_all("all => all.map(t => t.getBoundingClientRect().bottom)")
    assert tops[4] > tops[2], "a newline is one"
    assert box.locator(".prompt").inner_text() in {f"prompt {i} {case.EVIL}" for i in range(3)} | {"again"}
    assert page.evaluate("window.pwned") is None and page.locator("main img").count() == 0
    assert page.said == []


def test_the_policy_stops_what_would_be_markup_all_the_same(chrome, made):
    with browser.opened(chrome, made / "report.html") as page:
        page.evaluate("s => { document.getElementById('faults').innerHTML += s }", case.EVIL)
        page.wait_for_function("document.querySelector('main img')?.complete")
        assert page.evaluate("window.pwned") is None
        blocked = [text for text in page.said if "Content Security Policy" in text]
        assert any("image" in text for text in blocked) and any("inline event handler" in text for text in blocked)


def test_a_keyboard_reaches_every_token_and_keeps_one(page):
    show(page, "step 6")
    lines = page.locator(".tokens")
    assert lines.first.locator(".t[tabindex='0']").count() == 1  # one stop of the Tab key for each response
    lines.first.locator(".t").first.focus()

    def focused() -> str:
        return page.evaluate("document.activeElement.getAttribute('aria-label')")

    first = focused()
    page.keyboard.press("ArrowRight")
    assert focused() != first and page.locator(".inspector h3").inner_text() in focused()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    kept = page.locator(".inspector h3").inner_text()
    page.keyboard.press("End")
    assert "end of the response" in focused() and page.locator(".inspector h3").inner_text() == kept
    page.keyboard.press("ArrowDown")
    assert page.evaluate("[...document.querySelectorAll('.tokens')].indexOf(document.activeElement.parentElement)") == 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")  # there is none before the first
    assert page.evaluate("document.activeElement.previousSibling") is None
    lines.first.locator(".t").nth(1).click()  # let go of


def test_everything_that_acts_has_a_name_and_an_outline(page):
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, a[href], input, select, summary, [role]')].filter(e =>
            !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim()))
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    assert page.locator("h1").count() == 1 and page.locator("html").get_attribute("lang") == "en"
    assert page.locator("table").evaluate_all("all => all.every(t => t.querySelector('th'))")
    assert page.locator(".badge .hidden").first.inner_text().strip()  # a verdict is no colour alone


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_on_a_colour_can_be_read(chrome, made, scheme):
    """WCAG's contrast of each token's text on its ground is 4.5 or more, in both schemes."""
    with browser.opened(chrome, made / "report.html", color_scheme=scheme) as page:
        worst = page.evaluate(CONTRASTS)
        assert min(worst) >= 4.5, worst


def test_figures_are_drawn_as_they_come_into_sight(page, made):
    drawn = "document.querySelectorAll('.plot .main-svg').length > 0"
    page.evaluate("document.getElementById('curves').scrollIntoView()")
    page.wait_for_function(drawn)
    reward = page.locator("[data-figure=reward] .plot")
    got = reward.evaluate("p => p.data.filter(t => t.name).map(t => [t.name, [...t.x], [...t.y]])")
    assert got == [
        ["training", [1, 2, 3, 4, 5, 6], [1.125, 1.25, 1.375, 1.5, 1.625, 1.75]],
        ["held-out", [0, 6], [0.5, 4.5]],
    ]
    before = page.locator(".main-svg").count()
    page.locator("#curves summary").click()
    page.wait_for_function(f"document.querySelectorAll('.main-svg').length > {before}")
    page.locator("#theme").click()  # system -> light -> dark, and drawn again
    page.locator("#theme").click()
    assert page.locator("#theme").get_attribute("aria-label") == "Colours: dark"
    font = reward.evaluate("p => p.layout.hoverlabel.bgcolor")
    assert font == "#14171c"
    assert page.said == []


def test_several_runs_are_beside_each_other(chrome, made, tmp_path):
    other = case.make_run(tmp_path / "other", steps=3, overrides={"optim.lr": 0.5, "log.ledger": 0})
    with browser.opened(chrome, render.write([made, other], tmp_path / "both.html")) as page:
        assert page.locator(".verdict h1").all_inner_texts()[1].endswith("other: Learned")
        assert "optim.lr" in page.locator("#verdict").inner_text()
        assert page.locator("#responses .heat").is_visible()
        page.locator(".chips.runs label", has_text="other").click()
        assert not page.locator("#responses .heat").is_visible()
        assert "log.ledger is 0" in page.locator("#responses").inner_text()
        assert page.said == []


def test_five_thousand_tokens_are_small_and_soon_there(chrome, tmp_path, monkeypatch):
    """Below 8 MB, and usable (every token painted, plots ready) within 2 s of the processor: seconds of a clock would
    measure what else runs on the machine."""
    monkeypatch.setattr(samples, "LONGEST", 10**6)
    per_step = samples.MOST_TOKENS // samples.MOST_STEPS // 3 // case.N + 1
    monkeypatch.setattr(case, "PIECES", case.PIECES[:-1] * per_step + [""])
    monkeypatch.setattr(case, "N", len(case.PIECES))
    monkeypatch.setattr(case, "SHARED", (6, 7, 8))
    folder = case.make_run(tmp_path / "big", steps=40)
    for step in range(1, 41):
        case.write_ledger(folder, step, [case.row(10 * step + i, reward=i - 1.0) for i in range(4)])
    out = render.write([folder])
    assert out.stat().st_size < 8e6
    with browser.opened(chrome, out) as page:
        tokens = page.evaluate("data.runs[0].responses.samples.reduce((n, s) => n + s.texts.length, 0)")
        assert 4500 <= tokens <= samples.MOST_TOKENS
        seconds = []
        for _ in range(3):
            processes = [p for p in psutil.Process().children(recursive=True) if "renderer" in " ".join(p.cmdline())]
            before = sum(sum(p.cpu_times()[:2]) for p in processes)
            page.reload(wait_until="load")
            page.locator(".tokens .t").first.hover()
            assert page.locator(".inspector td").count() > 12
            seconds.append(sum(sum(p.cpu_times()[:2]) for p in processes if p.is_running()) - before)
        assert 0 < min(seconds) < 2, seconds
        assert page.said == []


def test_a_run_leaves_its_report(chrome, tmp_path):
    small = (
        "--run.steps 1 --log.ledger 1 --data.eval_prompts 8 --rollout.batch_size 16 --rollout.chunk_size 8"
    ).split()
    small += "--ppo.mini_batch_size 8 --ppo.micro_batch_size 8".split()
    run = Run(tmp_path / "runs" / "small", *small)
    assert run.process.wait(timeout=400) == 0, run.words()
    assert "(report.html, metrics.jsonl" in run.words() and "no report" not in run.words()
    with browser.opened(chrome, run.folder / "report.html") as page:
        assert "8 held-out prompts" in page.locator(".lead").inner_text()
        assert page.locator(".state").inner_text().startswith("finished: step 1 of 1.")
        page.locator(".tokens .t").first.hover()
        assert page.locator(".inspector td").count() > 12
        assert page.said == []
