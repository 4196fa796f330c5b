"""The shapes of the charts, in Vega-Lite through Altair: lines, stacks over steps, stacked bars.

Vega draws SVG, and its javascript takes 0.9 MB of a page and needs neither a network nor `eval`.
Colours are variables of the page's style sheet, so that light, dark and print need no second
drawing. Keys are not drawn: the page has them as text. What is drawn of a long run is thinned, and
keeps every minimum and maximum.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

DRAWN = 600  # points of a line, or so
BINS = 120  # bars of a stack over steps
CONFIG = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
    "aria": False,  # the page names each figure in words instead
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelOverlap": True,
    },
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6, "tickCount": 5},
    "axisX": {"grid": False, "tickCount": 8},
}
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """Describe a line: points by x, and how it looks."""

    label: str
    points: Sequence[Point]
    color: str = "var(--s1)"
    dash: tuple[int, ...] = ()
    width: float = 2
    opacity: float = 1
    is_stepped: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """Describe a level: a horizontal line with its name."""

    label: str
    y: float
    color: str = "var(--muted)"


@dataclass(frozen=True, slots=True)
class Bar:
    """Describe a part of a stack: one value for each x, or each row."""

    label: str
    values: Sequence[float]
    color: str


def thin(points: Sequence[Point], most: int = DRAWN) -> list[Point]:
    """Return at most about so many points, with the least and the largest of each stretch.

    Example:
        >>> thin([(1, 0.0), (2, 9.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, -7.0), (7, 1.0)], 4)
        [(1, 0.0), (2, 9.0), (5, 1.0), (6, -7.0), (7, 1.0)]
    """
    if len(points) <= most:
        return list(points)
    stretch = -(-2 * len(points) // most)
    kept: dict[Point, None] = {points[0]: None}
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept.update(dict.fromkeys(sorted(ends)))
    kept[points[-1]] = None
    return list(kept)


def lines(
    drawn: Sequence[Line],
    *,
    x: str = "step",
    y: str = "",
    form: str = ",.6~g",
    height: int = 240,
    rules: Sequence[Rule] = (),
    band: Sequence[tuple[float, float, float]] = (),
    marks: Sequence[float] = (),
    is_log: bool = False,
    from_zero: bool = False,
) -> dict[str, Any]:
    """Draw lines over steps or samples.

    Args:
        drawn: The lines, the first behind the others.
        x: What the x axis counts.
        y: What a value is, for the text that shows at the pointer.
        form: How values are written, in d3's format.
        height: In pixels; the width is that of the page.
        rules: Levels.
        band: (x, low, high) of an interval behind the lines.
        marks: Where something happened, as vertical lines.
        is_log: Whether the y axis is logarithmic.
        from_zero: Whether it begins at zero.
    """
    scale = alt.Scale(type="log") if is_log else alt.Scale(zero=from_zero, nice=True)
    axis = alt.Axis(format=form)
    if is_log:
        ys = [y for line in drawn for _, y in line.points] + [y for _, *ends in band for y in ends]
        axis = alt.Axis(format=form, values=_levels(min(ys), max(ys)))
    side = alt.Y("y:Q", scale=scale, title=None, axis=axis)
    below = alt.X("x:Q", title=x, scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1))
    layers: list[Any] = []
    if band:
        rows = [{"x": at, "y": low, "y2": high} for at, low, high in band]
        layers.append(
            _chart(rows).mark_area(color="var(--s1)", opacity=0.18).encode(below, side, y2="y2:Q")
        )
    if marks:
        layers.append(
            _chart([{"x": at} for at in marks])
            .mark_rule(color="var(--warn)", strokeDash=[2, 3])
            .encode(below)
        )
    for line in drawn:
        rows = [{"x": at, "y": value} for at, value in thin(line.points)]
        look = {"color": line.color, "opacity": line.opacity}
        if len(rows) == 1:
            layers.append(_chart(rows).mark_circle(size=50, **look).encode(below, side))
            continue
        mark = _chart(rows).mark_line(
            strokeWidth=line.width,
            strokeDash=list(line.dash) or alt.Undefined,
            interpolate="step-after" if line.is_stepped else "linear",
            **look,
        )
        layers.append(mark.encode(below, side))
    for rule in rules:
        level = _chart([{"y": rule.y, "text": rule.label}])
        layers.append(level.mark_rule(color=rule.color, strokeDash=[5, 4]).encode(side))
        layers.append(
            level.mark_text(
                align="left", baseline="bottom", dx=4, dy=-3, fontSize=12, color=rule.color,
                stroke="var(--paper)", strokeWidth=3,
            ).encode(side, x=alt.value(0), text="text:N")
        )  # fmt: skip
    layers.append(_hover(drawn, x, y or "value", form, below, side))
    return _whole(alt.layer(*layers), height)


def _levels(low: float, high: float) -> list[float]:
    """Return few levels for a logarithmic axis.

    Example:
        >>> _levels(30, 400), _levels(2e-7, 0.5)
        ([50.0, 100.0, 200.0], [1e-06, 0.0001, 0.01])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 4 else (1,)
    found = [float(f"{factor}e{power}") for power in powers for factor in factors]
    found = [level for level in found if low <= level <= high] or [low]
    return found[:: -(-len(found) // 5)]


def _hover(
    drawn: Sequence[Line], x: str, y: str, form: str, below: alt.X, side: alt.Y
) -> alt.Chart:
    """Show the nearest point of any line, with its figures in words."""
    pointer = alt.selection_point(nearest=True, on="pointerover", empty=False, clear="pointerout")
    rows = [
        {"x": at, "y": value, "line": line.label, "color": line.color}
        for line in drawn
        for at, value in thin(line.points, 300)
    ]
    return (
        _chart(rows)
        .mark_circle(size=60)
        .encode(
            below,
            side,
            color=alt.Color("color:N", scale=None, legend=None),
            opacity=alt.when(pointer).then(alt.value(1)).otherwise(alt.value(0)),
            tooltip=[
                alt.Tooltip("line:N", title=" "),
                alt.Tooltip("x:Q", title=x, format=",d"),
                alt.Tooltip("y:Q", title=y, format=form),
            ],
        )
        .add_params(pointer)
    )


def stack_over_steps(
    steps: Sequence[int], bars: Sequence[Bar], *, form: str = ",.6~g", height: int = 200
) -> dict[str, Any]:
    """Draw the parts of each step on top of one another; means where there are many steps."""
    rows = []
    stretch = -(-len(steps) // BINS)
    for begin in range(0, len(steps), stretch):
        end = min(begin + stretch, len(steps))
        base = 0.0
        where = {"x": steps[begin] - 0.5, "x2": steps[end - 1] + 0.5}
        said = f"{steps[begin]:,}" + (f" to {steps[end - 1]:,}" if end - begin > 1 else "")
        for bar in bars:
            value = sum(bar.values[begin:end]) / (end - begin)
            if value:
                rows.append(
                    where | {"y": base, "y2": base + value, "value": value, "steps": said}
                    | {"part": bar.label, "color": bar.color}
                )  # fmt: skip
            base += value
    return _stack(rows, "step", form, height, [_tip("steps:N", "step"), _tip("part:N", " ")])


def stack_of_micros(bars: Sequence[Bar], examples: Sequence[int], *, height: int) -> dict[str, Any]:
    """Draw the micro-batches of one effective batch next to one another."""
    rows = []
    for i, num in enumerate(examples):
        base = 0.0
        for bar in bars:
            if bar.values[i]:
                rows.append(
                    {"x": i + 0.56, "x2": i + 1.44, "y": base, "y2": base + bar.values[i]}
                    | {"value": bar.values[i], "micro": i + 1, "examples": num}
                    | {"part": bar.label, "color": bar.color}
                )
            base += bar.values[i]
    tips = [_tip("micro:Q", "micro-batch"), _tip("examples:Q", "examples"), _tip("part:N", " ")]
    return _stack(rows, "micro-batch, in the order they ran", "~s", height, tips)


def _tip(field: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(field, title=title)


def _stack(
    rows: list[dict[str, Any]], x: str, form: str, height: int, tips: list[alt.Tooltip]
) -> dict[str, Any]:
    shown = (
        _chart(rows)
        .mark_rect()
        .encode(
            alt.X("x:Q", title=x, scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1)),
            alt.Y("y:Q", title=None, axis=alt.Axis(format=form)),
            x2="x2:Q",
            y2="y2:Q",
            color=alt.Color("color:N", scale=None, legend=None),
            tooltip=[*tips, alt.Tooltip("value:Q", title="is", format=",.4~g")],
        )
    )
    return _whole(shown, height)


def horizontal(
    names: Sequence[str], parts: Sequence[Bar], *, x: str, form: str = ",.6~g", is_log: bool = False
) -> dict[str, Any]:
    """Draw one horizontal bar a name, its parts next to one another."""
    rows = []
    for i, name in enumerate(names):
        base = 0.0
        for part in parts:
            if part.values[i]:
                rows.append(
                    {"name": name, "x": base, "x2": base + part.values[i]}
                    | {"value": part.values[i], "part": part.label, "color": part.color}
                )
            base += part.values[i]
    shown = (
        _chart(rows)
        .mark_bar(height=22)
        .encode(
            alt.X("x:Q", title=x, axis=alt.Axis(format=form)),
            alt.Y(
                "name:N",
                title=None,
                sort=list(names),
                axis=alt.Axis(labelLimit=110) if len(names) > 1 else None,
            ),
            x2="x2:Q",
            color=alt.Color("color:N", scale=None, legend=None),
            tooltip=[
                *([_tip("name:N", "run")] if len(names) > 1 else []),
                _tip("part:N", " "),
                alt.Tooltip("value:Q", title="is", format=",.4~g"),
            ],
        )
    )
    return _whole(shown, 32 * len(names))


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    """Return a chart of rows, as text: Altair would look at each row for long."""
    text = json.dumps(rows, separators=(",", ":"))
    return alt.Chart(alt.InlineData(values=text, format=alt.JsonDataFormat(type="json")))


def _whole(chart: Any, height: int) -> dict[str, Any]:
    """Return the specification, as wide as the page lets it be."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec = chart.properties(width="container", height=height, autosize=fit).to_dict()
    del spec["config"]  # the page has one for all
    return spec
