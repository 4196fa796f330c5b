"""What a page is made of: sections with sentences, figures and tables, before any HTML.

A figure says in words what it shows, and has its numbers as a table: whoever cannot see it, or has
no scripts, reads the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ROWS = 60  # of a table of steps


class Key(NamedTuple):
    """Name what is drawn in a colour.

    Args:
        label: What it is.
        color: The variable of the style sheet.
        look: "line", "dashed", "thin", "band", "box" or "mark".
    """

    label: str
    color: str
    look: str = "line"


@dataclass(frozen=True, slots=True)
class Table:
    """Hold rows of text; the first column names the row."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """Hold a chart and what it says.

    Args:
        name: Its id on the page.
        title: What is drawn, with its unit.
        finding: What it shows, in a sentence.
        spec: Vega-Lite.
        keys: What its colours mean.
        table: Its numbers.
        is_small: Whether two fit beside one another.
    """

    name: str
    title: str
    finding: str
    spec: dict[str, Any]
    keys: Sequence[Key] = ()
    table: Table | None = None
    is_small: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """Hold a heading and what is below it, in this order."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    listing: Sequence[tuple[str, str]] = ()  # (what it is, text to copy)


@dataclass(frozen=True, slots=True)
class Page:
    """Hold a page before it is HTML.

    Args:
        title: Of the page.
        headline: The answer, in a sentence.
        notes: What the reader has to know about it first.
        facts: (name, figure, what it is about) of the key figures.
        sections: In their order.
    """

    title: str
    headline: str
    notes: Sequence[str]
    facts: Sequence[tuple[str, str, str]]
    sections: Sequence[Section] = field(default_factory=tuple)


def evenly(num: int, most: int = ROWS) -> list[int]:
    """Return positions of at most so many of `num`, evenly, with the first and the last.

    Example:
        >>> evenly(5, 3), evenly(2, 3)
        ([0, 2, 4], [0, 1])
    """
    if num <= most:
        return list(range(num))
    return [round(i * (num - 1) / (most - 1)) for i in range(most)]


def table_of_steps(
    caption: str, steps: Sequence[int], columns: Mapping[str, tuple[Sequence[float | None], str]]
) -> Table:
    """Return the values of some columns by step, of those where any is known.

    Args:
        caption: What they are.
        steps: The steps.
        columns: By head: values, one a step, and how they are written.
    """
    columns = {
        head: (values, form)
        for head, (values, form) in columns.items()
        if any(value is not None for value in values)
    }
    shown = evenly(len(steps))
    if len(shown) < len(steps):
        caption += f" ({len(shown)} of {len(steps):,} steps)"
    rows = [
        [f"{steps[i]:,}", *(_cell(values[i], form) for values, form in columns.values())]
        for i in shown
    ]
    return Table(caption, ["step", *columns], rows)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
