"""Which figures a report has, and what each is drawn from: curves of the runs by name. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from core.metrics import PHASES, SECTIONS
from launch.report.record import Figure, Line, Report, RunRecord
from launch.report.words import figure, meaning_of

OTHER = "Of another version"
_KEY = (
    "objective/kl",
    "objective/entropy",
    "response/length_mean",
    "ppo/pg_clipfrac",
    "ppo/approx_kl",
    "value/explained_variance",
    "optim/grad_norm",
)


def key_figures(runs: list[RunRecord]) -> list[Figure]:
    """What one looks at first: reward in training and on held-out prompts, what no reward sees, then the health."""
    numbered = dict(enumerate(runs))
    reward = _lines(runs, "reward/total", "training") + _lines(runs, "eval/reward/total", "held-out")
    out = [_figure("reward", "reward/total", reward, numbered)]
    for name in _names(runs, evals=True):
        if name.count("/") == 1:
            out.append(_figure(f"key-{name}", name, _lines(runs, name, "held-out"), numbered))
    out += [_figure(f"key-{name}", name, _lines(runs, name), numbered) for name in _KEY]
    return [f for f in out if f.lines]


def all_figures(runs: list[RunRecord]) -> dict[str, list[Figure]]:
    """Every number that was logged, by the question that it answers in core/metrics.py."""
    sections: dict[str, list[Figure]] = {title: [] for title in [*SECTIONS, OTHER]}
    for name in [*_names(runs), *_names(runs, evals=True)]:
        sections[_section(name)].append(_figure(f"all-{name}", name, _lines(runs, name), dict(enumerate(runs))))
    return {title: of for title, of in sections.items() if of}


def component_figures(i: int, run: RunRecord) -> list[Figure]:
    """What each component adds to the reward, and how much of its spread each explains."""
    paid = [c.name for c in run.components if c.paid]
    adds = [Line(run=i, label="total", curve="reward/total")]
    adds += [Line(run=i, label=name, curve=f"reward/{name}/weighted") for name in paid]
    shares = [Line(run=i, label=name, curve=f"reward/{name}/variance_share") for name in paid]
    return _there(
        run,
        Figure(
            id=f"adds-{i}",
            kind="lines",
            title="What each component adds to the reward of a response",
            caption="After normaliser, clip and weight; together they are the total.",
            unit="reward",
            lines=adds,
        ),
        Figure(
            id=f"shares-{i}",
            kind="lines",
            title="Whose differences are learnt from",
            caption="Share of the variance of the reward between responses: what a component has here, it teaches.",
            unit="share",
            lines=shares,
        ),
    )


def gaming_figures(i: int, run: RunRecord) -> list[Figure]:
    """Length against reward over training and within its last steps; cut responses; what no reward sees."""
    reward, length = "reward/total", "response/length_mean"
    out = _there(
        run,
        Figure(
            id=f"length-{i}",
            kind="scatter",
            title="Length and reward over training",
            caption="One point a step. A straight band means that the two move together.",
            unit="reward",
            x_title="tokens of a response",
            lines=[Line(run=i, label="step", curve=reward, against=length)],
        ),
    )
    if run.responses.lengths:
        out.append(
            Figure(
                id=f"within-{i}",
                kind="scatter",
                title="Length and reward of single responses",
                caption=f"Of the steps {', '.join(map(str, run.responses.spread_steps))}.",
                unit="reward",
                x_title="tokens of a response",
                lines=[Line(run=i, label="response", curve="totals", of="responses", against="lengths")],
                alt=_alt_within(run),
            )
        )
    for component in run.components:
        name = f"eval/{component.name}"
        if not component.paid and name in run.eval_curves:
            out.append(
                Figure(
                    id=f"apart-{component.name}-{i}",
                    kind="scatter",
                    title=f"Held-out reward and {component.name}, which no reward sees",
                    caption="One point an evaluation. The reward goes to the right: does the task follow?",
                    unit=meaning_of(name)[1],
                    x_title="held-out reward",
                    lines=[Line(run=i, label="step", curve=name, of="evals", against="eval/reward/total")],
                )
            )
    cut = "response/truncated_frac"
    if cut in run.curves.values:
        out.append(_figure(f"cut-{i}", cut, [Line(run=i, label=run.name, curve=cut)], {i: run}))
    return out


def _alt_within(run: RunRecord) -> str:
    r = run.responses.correlation
    said = "no correlation can be told" if r is None else f"correlation {r:+.2f}"
    return f"Length against reward of {run.responses.n_responses} single responses: {said}."


def time_figures(i: int, run: RunRecord) -> list[Figure]:
    lines = [Line(run=i, label=phase, curve=f"time/{phase}") for phase in PHASES if phase in run.phases]
    of_phases = Figure(
        id=f"time-{i}",
        kind="stack",
        title="Seconds of a step, by phase",
        caption="Phases never overlap: they add up to the step.",
        unit="s",
        lines=lines,
    )
    return _there(run, of_phases)


def every(report: Report) -> Iterator[Figure]:
    """All figures of a report, in the order of the page."""
    yield from report.key_figures
    for of in report.all_figures.values():
        yield from of
    for of_runs in report.run_figures.values():
        for of in of_runs:
            yield from of


def _there(run: RunRecord, *of: Figure) -> list[Figure]:
    """Those that have something to show, without the lines that have not."""
    out = []
    for f in of:
        lines = [line for line in f.lines if line.curve in run.curves.values]
        if lines:
            out.append(
                Figure(**{**vars(f), "lines": lines, "alt": f.alt or _alt(f.title, lines, {f.lines[0].run: run})})
            )
    return out


def _names(runs: Sequence[RunRecord], *, evals: bool = False) -> list[str]:
    return sorted({name for run in runs for name in (run.eval_curves if evals else run.curves.values)})


def _lines(runs: Sequence[RunRecord], name: str, label: str = "") -> list[Line]:
    of = "evals" if name.startswith("eval/") else "curves"
    has = [name in (run.eval_curves if of == "evals" else run.curves.values) for run in runs]
    several = len(runs) > 1
    return [
        Line(run=i, label=" ".join(filter(None, [run.name if several else "", label])) or name, curve=name, of=of)
        for i, run in enumerate(runs)
        if has[i]
    ]


def _figure(id: str, name: str, lines: list[Line], runs: Mapping[int, RunRecord]) -> Figure:
    meaning, unit, healthy = meaning_of(name)
    caption = (
        f"{meaning} Healthy: {healthy}.".replace("`", "") if meaning else "Not in this version's table of metrics."
    )
    alt, id = _alt(name, lines, runs), id.replace("/", "-")
    return Figure(id=id, kind="lines", title=name, caption=caption, unit=unit, lines=lines, alt=alt)


def _alt(title: str, lines: list[Line], runs: Mapping[int, RunRecord]) -> str:
    said = []
    for line in lines:
        run = runs[line.run]
        if line.of == "evals":
            steps, values = run.eval_curves[line.curve].steps, run.eval_curves[line.curve].values
        else:
            steps, values = run.curves.steps, run.curves.values[line.curve]
        known = [(s, figure(line.curve, v)) for s, v in zip(steps, values, strict=True) if v is not None]
        if known:
            (a, first), (b, last) = known[0], known[-1]
            said.append(f"{line.label} from {first} at step {a} to {last} at step {b}")
    return f"{title}: {'; '.join(said)}." if said else f"{title}: no numbers."


def _section(name: str) -> str:
    """The question of core/metrics.py that a metric answers."""
    for fits in (lambda template: template == name, lambda template: _fits(template, name)):
        for title, rows in SECTIONS.items():
            if any(fits(row.name) for row in rows):
                return title
    return OTHER


def _fits(template: str, name: str) -> bool:
    ours, theirs = template.split("/"), name.split("/")
    return len(ours) == len(theirs) and all(a == b or a.startswith("<") for a, b in zip(ours, theirs, strict=True))
