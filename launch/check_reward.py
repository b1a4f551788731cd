"""`tokenppo check-reward FILE:FN`: what a reward function does, on samples, before anything is trained with it."""

import json
import re
from typing import Any

import numpy as np
from rich.console import Console

from core.faults import RewardFault, UserError
from core.plain_text import one_line
from launch import cluster
from launch.heat_map import heat_map
from reward_server.check import Report, check
from reward_server.components import PASSED, Component, ScoreRequest, load_component, missing_arguments
from reward_server.texts import text_of, words
from rollout.prompts import load_rows

COMPLETIONS = ("completion", "response", "answer_text")  # columns of --data that hold what is to be scored
# Prompt and completion. Short and long, polite and not, code and JSON, several scripts, repetition, nothing but a word.
SAMPLES = [
    ("Ask for salt.", "Could you please pass me the salt? Thank you very much."),
    ("Ask for salt.", "GIVE ME THE SALT NOW!!!"),
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "The capital of France is Paris. It is also the largest city of the country."),
    ("Write a function that adds.", "```python\ndef add(a, b):\n    return a + b\n```"),
    ("Write a function that adds.", "```python\ndef add(a, b)\n    return a + b\n```"),
    ("Answer in JSON.", '{"city": "Paris", "country": "France", "people": 2102650}'),
    ("Say hello in four languages.", "Grüß Gott! Здравствуйте! 你好! नमस्ते! \U0001f600"),
    ("Tell me a story.", "Once there was a cat and a cat and a cat and a cat and a cat. The end."),
    ("Tell me a story.", "No."),
]
LONGEST_SHOWN = 400  # characters of a completion in the terminal


def run(
    fn: str,
    *,
    data: str | None = None,
    options: dict[str, Any] | None = None,
    model: str | None = None,
    device: str = "cpu",
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Check and print; returns 0 for a sound component, RewardFault's code for another. Raises UserError."""
    loaded = load_component(fn)
    component = Component(re.sub(r"\W", "_", fn.rpartition(":")[2]), loaded, options)
    request = samples(data, model)
    if missing := missing_arguments(loaded, [*request.columns, *(options or {})]):
        raise UserError(f"{fn} wants {', '.join(missing)}: give rows that have such columns with --data, or --options")
    component.setup(device)
    try:
        report = check(component, request)
    finally:
        component.close()
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        show(report, request, fn, console or Console())
    return 0 if report.sound else RewardFault.exit_code


def samples(data: str | None, model: str | None) -> ScoreRequest:
    """Those of --data, else the ones above, as tokens of the model's tokenizer, else as words. Raises UserError."""
    rows = [{"prompt": prompt, "completion": text} for prompt, text in SAMPLES]
    if data is not None:
        rows = load_rows(data, "train", "--data")[:64]
        if not rows:
            raise UserError(f"--data {data}: has no rows; each line an object with `prompt` and `completion`")
    column = next((name for name in COMPLETIONS if name in rows[0]), None)
    if any("prompt" not in row or (column is not None and not isinstance(row.get(column), str)) for row in rows):
        raise UserError(f"--data {data}: each row wants a `prompt`, and a `completion` as text where the first has one")
    if column is None:  # prompts alone: the built-in completions answer them, with the columns of the data
        rows = [row | {"completion": text} for row, (_, text) in zip(_around(rows), SAMPLES, strict=False)]
        column = "completion"
    taken = {*PASSED, "prompt", column}
    names = dict.fromkeys(name for row in rows for name in row if name not in taken)
    cut = _tokens_of(model) if model else words
    pieces = [cut(row[column]) for row in rows]
    return ScoreRequest(
        prompts=[row["prompt"] for row in rows],
        completions=[
            row[column] if isinstance(row["prompt"], str) else [{"role": "assistant", "content": row[column]}]
            for row in rows
        ],
        prompt_ids=[cut(text_of(row["prompt"]))[0] for row in rows],
        completion_ids=[ids for ids, _ in pieces],
        offsets=[offsets for _, offsets in pieces],
        finish_reasons=["stop"] * len(rows),
        uids=[str(i) for i in range(len(rows))],
        columns={name: [row.get(name) for row in rows] for name in names},
    )


def _around(rows: list[dict]) -> list[dict]:
    return [rows[i % len(rows)] for i in range(len(SAMPLES))]


def _tokens_of(model: str) -> Any:
    cluster.prepare_environment()  # keeps libraries quiet on stdout, where --json writes
    from launch.build import load_tokenizer
    from rollout.offsets import OffsetMapper

    tokenizer = load_tokenizer(model)
    mapper = OffsetMapper(tokenizer)

    def cut(text: str) -> tuple[list[int], np.ndarray]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        said, offsets = mapper(ids)
        if said != text:
            raise UserError(f"--model {model}: its tokenizer does not give back {text[:40]!r}; leave --model out")
        return ids, offsets

    return cut


def show(report: Report, request: ScoreRequest, fn: str, console: Console) -> None:
    """The findings, then each completion as a heat map of its tokens."""
    for finding in report.findings:
        mark, style = {True: ("ok", "green"), None: ("?", "dim")}.get(finding.ok, ("no", "red"))
        if finding.ok is False and not finding.must:
            mark, style = "warn", "yellow"
        console.print(f"  [{style}]{mark:<5}[/]", end="")
        console.print(f"{finding.name:<26}{one_line(finding.says)}", markup=False, highlight=False, soft_wrap=True)
    if report.numbers:
        n = report.numbers
        console.print(
            f"        rewards from {n['least']:.4g} to {n['largest']:.4g}, {n['mean_per_token']:.4g} per token,"
            f" {100 * n['nonzero_share']:.0f} % of the tokens have one; applies to {100 * n['applies_share']:.0f} % of"
            f" the samples; {report.tokens_per_s:,.0f} tokens/s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    placed = [r for r in report.rewards if not isinstance(r, RewardFault)]
    largest = max((float(np.abs(r[0]).max()) for r in placed), default=0.0)
    for prompt, completion, offsets, answer in zip(
        request.prompts, request.completions, request.offsets, report.rewards, strict=True
    ):
        console.print(f"\n[dim]{'':2}[/]", end="")
        console.print(one_line(text_of(prompt))[:LONGEST_SHOWN], markup=False, highlight=False, style="dim")
        if isinstance(answer, RewardFault):
            console.print(f"  {one_line(str(answer))}", style="red", markup=False, highlight=False, soft_wrap=True)
        elif not answer[1].any():
            console.print("  does not apply (None)", style="dim")
        else:
            console.print("  ", heat_map(text_of(completion)[:LONGEST_SHOWN], offsets, answer[0], largest), sep="")
    verdict = "sound" if report.sound else "NOT sound"
    console.print(f"\n{fn}: {verdict}", style="green" if report.sound else "red", markup=False, highlight=False)


def main(args: Any) -> int:
    """The verb, from its parsed arguments."""
    import yaml

    options = {}
    if args.options:
        try:
            options = yaml.safe_load(args.options)
        except yaml.YAMLError:
            options = None
        if not isinstance(options, dict):
            raise UserError(f"--options {args.options}: wants a YAML mapping, e.g. --options '{{scale: 0.1}}'")
    return run(args.fn, data=args.data, options=options, model=args.model, device=args.device, as_json=args.json)
