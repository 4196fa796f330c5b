"""How the batch was cut: a picture of one effective batch, and tokens and micro-batches by step."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from gradaccum.report import charts
from gradaccum.report.charts import Bar, Line
from gradaccum.report.facts import share_of_padding
from gradaccum.report.read import Run, number
from gradaccum.report.sections import Figure, Key, Section, Table, table_of_steps
from gradaccum.report.words import padding_words
from gradaccum.types import counted

USEFUL, PADDING, SHARED = "var(--s1)", "var(--s2)", "var(--s3)"


def cut(run: Run, told: dict[str, Any]) -> Section | None:
    """Return how each effective batch was cut, and what padding or sharing made of it."""
    micros, tokens = told["micros"], told["tokens"]
    if micros["num"] is None:
        return None
    text = f"{micros['num']:,.0f} micro-batches in {counted(told['steps'], 'step')}"
    if micros["least"] != micros["most"]:
        text += f", {micros['least']:,.0f} to {micros['most']:,.0f} a step"
    if tokens["padding"] is not None:
        text += f"; {padding_words(tokens['padding'])}"
    sentences = [f"{text}."]
    budget = told["budget"] if isinstance(told["budget"], dict) else {}
    if budget:
        bounds = [
            counted(int(budget[f"{noun}s"]), noun)
            for noun in ("token", "example")
            if number(budget.get(f"{noun}s"))
        ]
        how = "was stated" if budget.get("is_stated") else "was found by measuring"
        why = f": {budget['why']}" if budget.get("why") else ""
        sentences.append(f"The budget of a micro-batch, {' and '.join(bounds)}, {how}{why}.")
    figures = [f for f in (_window(run), _tokens(run, told), _micros(run)) if f is not None]
    return Section("cut", "How the batch was cut", sentences, figures, list(_ranks(run)))


def _window(run: Run) -> Figure | None:
    """Draw the micro-batches of one effective batch."""
    window = run.window
    if window is None or not window.micros:
        return None
    ran, useful = ([micro[i] for micro in window.micros] for i in (1, 2))
    parts = _parts(useful, ran)
    share = share_of_padding(sum(useful), sum(ran))
    who = " of the first rank" if window.ranks else ""
    finding = (
        f"In step {window.step:,} {counted(len(ran), 'micro-batch')}{who} of {min(ran):,} to "
        f"{max(ran):,} tokens: {padding_words(share)}."
    )
    table = Table(
        f"The micro-batches of step {window.step:,}",
        ["micro-batch", "examples", "tokens as it ran", "useful tokens"],
        [
            [f"{i:,}", *(f"{value:,}" for value in micro)]
            for i, micro in enumerate(window.micros, start=1)
        ],
    )
    spec = charts.stack_of_micros(parts, [micro[0] for micro in window.micros], height=200)
    keys = [Key(part.label, part.color, "box") for part in parts]
    return Figure(
        "window", f"tokens of each micro-batch of step {window.step:,}", finding, spec, keys, table
    )


def _tokens(run: Run, told: dict[str, Any]) -> Figure | None:
    if told["tokens"]["padding"] is None or len(run.steps) < 2:
        return None
    useful, ran = run.column("useful_tokens"), run.column("padded_tokens")
    parts = _parts([u or 0 for u in useful], [r or 0 for r in ran])
    finding = (
        f"{told['tokens']['useful']:,.0f} useful tokens, {told['tokens']['ran']:,.0f} ran: "
        f"{padding_words(told['tokens']['padding'])}."
    )
    table = table_of_steps(
        "Tokens by step", run.steps, {"useful": (useful, ",.0f"), "as they ran": (ran, ",.0f")}
    )
    return Figure(
        "tokens", "tokens of each step", finding,
        charts.stack_over_steps(run.steps, parts, form="~s", height=140),
        [Key(part.label, part.color, "box") for part in parts], table, is_small=True,
    )  # fmt: skip


def _micros(run: Run) -> Figure | None:
    known = run.points("num_micros")
    if len(known) < 2:
        return None
    values = [v for _, v in known]
    finding = (
        f"Each step had {counted(int(values[0]), 'micro-batch')}."
        if min(values) == max(values)
        else f"A step had {min(values):,.0f} to {max(values):,.0f} micro-batches, "
        f"{statistics.fmean(values):.3g} in the mean."
    )
    chart = charts.lines(
        [Line("micro-batches", known, is_stepped=True, width=1.5)], y="micro-batches", height=140,
        from_zero=True, form="~d",
    )  # fmt: skip
    columns = {
        "micro-batches": (run.column("num_micros"), ",.0f"),
        "budget, tokens": (run.column("budget_tokens"), ",.0f"),
        "budget, examples": (run.column("budget_examples"), ",.0f"),
        "recoveries": (run.column("num_recoveries"), ",.0f"),
    }
    table = table_of_steps("Micro-batches by step", run.steps, columns)
    return Figure("micros", "micro-batches of each step", finding, chart, (), table, is_small=True)


def _ranks(run: Run) -> Iterator[Table]:
    if run.window is not None and run.window.ranks:
        yield Table(
            f"What each rank had of step {run.window.step:,}",
            ["rank", "micro-batches", "examples", "tokens as they ran", "useful tokens"],
            [
                [str(rank), *(f"{value:,}" for value in share)]
                for rank, share in enumerate(run.window.ranks)
            ],
        )


def _parts(useful: Sequence[float], ran: Sequence[float]) -> list[Bar]:
    """Return what ran and was useful, what ran and was not, and what did not have to run."""
    both = list(zip(useful, ran, strict=True))
    parts = (
        Bar("useful", [min(u, r) for u, r in both], USEFUL),
        Bar("padding", [max(0, r - u) for u, r in both], PADDING),
        Bar("shared, so not run", [max(0, u - r) for u, r in both], SHARED),
    )
    return [part for part in parts if any(part.values)]
