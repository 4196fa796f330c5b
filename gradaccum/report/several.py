"""The page of several runs: whether they trained the same, what was asked, what became of each."""

from collections.abc import Sequence
from typing import Any

from gradaccum.report import charts
from gradaccum.report.charts import Bar, Line
from gradaccum.report.compare import Comparison, compare
from gradaccum.report.facts import BETWEEN, by_sample, facts, phases, smoothed, window_of
from gradaccum.report.read import Run
from gradaccum.report.sections import Figure, Key, Page, Section, Table, evenly
from gradaccum.report.single import COLORS
from gradaccum.report.words import (
    asked,
    bytes_or_dash,
    headline_of,
    or_dash,
    results,
    span,
    verdicts,
)
from gradaccum.types import GIB, amount

LOOKS = [
    ("var(--s1)", ()),
    ("var(--s2)", (7, 3)),
    ("var(--s3)", (2, 2)),
    ("var(--s4)", (9, 3, 2, 3)),
    ("var(--s5)", (5, 2)),
    ("var(--s6)", (12, 4)),
]


def page(runs: Sequence[Run]) -> Page:
    """Return the page of several runs, each compared with the first."""
    found = [compare(runs[0], run) for run in runs[1:]]
    told = [facts(run) for run in runs]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    figures = (_curves(runs), _differences(runs, found), _norms(runs))
    sections = (
        asked(runs), results(runs, told),
        Section("curves", "Curves", (), [f for f in figures if f is not None]),
        _time(runs, told), _memory(runs, told),
    )  # fmt: skip
    return Page(
        f"{len(runs)} runs: {', '.join(run.name for run in runs)}",
        headline_of(runs, found), notes, (),
        [verdicts(runs, found), *(s for s in sections if s is not None)],
    )  # fmt: skip


def _points(runs: Sequence[Run], name: str) -> tuple[str, list[list[tuple[int, float]]]]:
    """Return the values of each run by samples, or by steps where samples are not known."""
    if all(by_sample(run, name) for run in runs):
        return "samples", [by_sample(run, name) for run in runs]
    return "step", [run.points(name) for run in runs]


def _look(i: int) -> dict[str, Any]:
    color, dash = LOOKS[i % len(LOOKS)]
    return {"color": color, "dash": dash}


def _keys(runs: Sequence[Run]) -> list[Key]:
    return [
        Key(run.name, LOOKS[i % len(LOOKS)][0], "dashed" if LOOKS[i % len(LOOKS)][1] else "line")
        for i, run in enumerate(runs)
    ]


def _curves(runs: Sequence[Run]) -> Figure | None:
    x, points = _points(runs, "loss")
    if not any(points):
        return None
    smooth = [smoothed(p, window_of(run)) if p else [] for p, run in zip(points, runs, strict=True)]
    drawn = [
        *(Line(run.name, p, LOOKS[i % len(LOOKS)][0], width=1, opacity=0.3)
          for i, (run, p) in enumerate(zip(runs, points, strict=True)) if p),
        *(Line(run.name, p, **_look(i))
          for i, (run, p) in enumerate(zip(runs, smooth, strict=True)) if p),
    ]  # fmt: skip
    ends = [
        f"{run.name} {p[-1][1]:.4f} at {p[-1][0]:,}"
        for run, p in zip(runs, smooth, strict=True)
        if p
    ]
    finding = f"The smoothed loss ends at: {', '.join(ends)} {x if x == 'samples' else 'steps'}."
    return Figure(
        "loss", f"loss by {x}, thin as it is and bold smoothed", finding,
        charts.lines(drawn, x=x, y="loss", form=".4~f", height=280),
        _keys(runs), _table(f"Loss by {x}", x, runs, points, ".4f"),
    )  # fmt: skip


def _table(
    caption: str,
    x: str,
    runs: Sequence[Run],
    points: Sequence[Sequence[tuple[int, float]]],
    form: str,
) -> Table:
    known = [dict(p) for p in points]
    every = sorted({at for p in known for at in p})
    rows = [
        [f"{every[i]:,}", *(or_dash(p.get(every[i]), form) for p in known)]
        for i in evenly(len(every))
    ]
    return Table(caption, [x, *(run.name for run in runs)], rows)


def _differences(runs: Sequence[Run], found: Sequence[Comparison]) -> Figure | None:
    """Draw how far each run's loss is from that of the first, and up to where that is no jump."""
    drawn, keys, rows = [], [], []
    for i, (run, comparison) in enumerate(zip(runs[1:], found, strict=True), start=1):
        points = [(step, apart) for step, apart in comparison.apart if apart]
        if points:
            drawn.append(Line(run.name, points, **_look(i), width=1.5))
            keys.append(_keys(runs)[i])
            rows += [
                [run.name, f"{s:,}", f"{d:.1e}"]
                for s, d in (points[j] for j in evenly(len(points)))
            ]
    if not drawn:
        return None
    bounds = next(c.bounds for c in found if c.bounds)
    if len(found) == 1:
        drawn.insert(0, Line("more than this is a jump", bounds, "var(--muted)", (2, 3), width=1))
        keys.append(Key("more than this is a jump", "var(--muted)", "dashed"))
    largest = max((d for c in found for _, d in c.apart), default=0.0)
    finding = (
        f"The loss of a step differs from that of {runs[0].name} by at most {largest:.1e} of its "
        f"value. Steps where it is the same to the last digit are not drawn."
    )
    return Figure(
        "apart", f"relative difference of the loss from {runs[0].name}", finding,
        charts.lines(drawn, y="difference", is_log=True, form=".0e", height=180),
        keys, Table("Relative difference of the loss", ["run", "step", "difference"], rows),
    )  # fmt: skip


def _norms(runs: Sequence[Run]) -> Figure | None:
    x, points = _points(runs, "grad_norm")
    if sum(map(bool, points)) < 2:
        return None
    drawn = [
        Line(run.name, p, **_look(i), width=1.5)
        for i, (run, p) in enumerate(zip(runs, points, strict=True)) if p
    ]  # fmt: skip
    ends = [f"{run.name} {p[-1][1]:.3g}" for run, p in zip(runs, points, strict=True) if p]
    return Figure(
        "grad_norm", f"gradient norm by {x}", f"At the end: {', '.join(ends)}.",
        charts.lines(drawn, x=x, y="gradient norm", form=".3~g", height=160),
        _keys(runs), _table(f"Gradient norm by {x}", x, runs, points, ".3g"),
    )  # fmt: skip


def _time(runs: Sequence[Run], told: Sequence[dict[str, Any]]) -> Section | None:
    splits = [phases(run) for run in runs]
    if not all(splits):
        return None
    a_step = [
        {label: sum(values) / len(run.steps) for label, values in split.items()}
        | ({BETWEEN: t["seconds"]["between"] / len(run.steps)} if t["seconds"]["between"] else {})
        for run, split, t in zip(runs, splits, told, strict=True)
    ]
    labels = [name for name in COLORS if any(part.get(name) for part in a_step)]
    parts = [Bar(label, [p.get(label, 0.0) for p in a_step], COLORS[label]) for label in labels]
    names = [run.name for run in runs]
    totals = [sum(part.values()) for part in a_step]
    ends = [f"{name} {span(total)}" for name, total in zip(names, totals, strict=True)]
    finding = f"In the mean a step with what follows it took: {', '.join(ends)}."
    table = Table(
        "Seconds a step, in the mean", ["run", *labels],
        [[name, *(f"{part.get(label, 0):.3f}" for label in labels)]
         for name, part in zip(names, a_step, strict=True)],
    )  # fmt: skip
    keys = [Key(label, COLORS[label], "box") for label in labels]
    figure = Figure(
        "time", "seconds a step", finding,
        charts.horizontal(names, parts, x="seconds a step"), keys, table,
    )  # fmt: skip
    return Section("time", "Where the time went", (), [figure])


def _memory(runs: Sequence[Run], told: Sequence[dict[str, Any]]) -> Section | None:
    peaks = [t["memory"]["peak_bytes"] or 0 for t in told]
    if not any(peaks):
        return None
    names = [run.name for run in runs]
    ends = [
        f"{n} {amount(p)}" if p else f"{n} not known" for n, p in zip(names, peaks, strict=True)
    ]
    parts = [Bar("peak", [p / GIB for p in peaks], "var(--s1)")]
    columns = ("peak_bytes", "predicted_bytes", "cap_bytes")
    rows = [
        [name, *(bytes_or_dash(t["memory"][column]) for column in columns)]
        for name, t in zip(names, told, strict=True)
    ]
    figure = Figure(
        "memory", "peak memory, GiB", f"The peak of the process: {', '.join(ends)}.",
        charts.horizontal(names, parts, x="GiB"), (),
        Table("Memory", ["run", "peak", "predicted", "what there was for it"], rows),
    )  # fmt: skip
    return Section("memory", "Memory", (), [figure])
