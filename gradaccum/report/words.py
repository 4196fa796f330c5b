"""What is said of runs: sentences, key figures, and all of it as Markdown, without a page.

Nothing here needs more than Python: `--markdown` and `--json` work without the extra `report`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from gradaccum.report.again import again, events, proof
from gradaccum.report.compare import (
    APART,
    DRIFT,
    PART,
    ROUNDING,
    SAME,
    Comparison,
    compare,
    differences,
    explanation,
)
from gradaccum.report.facts import batch_sizes, by_sample, facts, smoothed, window_of
from gradaccum.report.read import Run, number
from gradaccum.report.sections import Section, Table
from gradaccum.types import amount, counted


def padding_words(share: float | None) -> str:
    """Say what `share_of_padding` tells.

    Example:
        >>> padding_words(0.25), padding_words(-0.4), padding_words(0.0)
        ('padding 25%', '40% of the tokens shared', 'no padding')
    """
    if share is None:
        return "padding not known"
    if share < 0:
        return f"{-share:.0%} of the tokens shared"
    return f"padding {share:.1%}".replace(".0%", "%") if share else "no padding"


def span(num_seconds: float) -> str:
    """Return "0.43 s", "61 s", "12:05 min" or "3:20:07 h".

    Example:
        >>> span(0.432), span(61), span(725), span(12_007)
        ('0.43 s', '61 s', '12:05 min', '3:20:07 h')
    """
    if num_seconds < 100:
        return f"{num_seconds:.{2 if num_seconds < 1 else 1 if num_seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(num_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def headline(run: Run, told: dict[str, Any]) -> str:
    """Say in one sentence what became of the run."""
    planned, last, loss = told["planned_steps"], told["last_step"], told["loss"]
    done = counted(told["steps"], "step")
    if planned and last < planned:
        state = {"running": "so far", "stopped": "and stopped"}.get(str(told["status"]), "")
        done = f"{last:,} of {counted(int(planned), 'step')} {state}".strip()
    parts = [done]
    if told["samples"] is not None:
        parts.append(counted(told["samples"], "sample"))
    if told["effective_batch_sizes"]:
        parts.append(f"effective batch {_batches(run)}")
    text = ", ".join(parts)
    if run.nonfinite:
        return (
            f"{text}: the loss is not finite in {counted(len(run.nonfinite), 'step')}, "
            f"first in step {run.nonfinite[0]:,}"
        )
    if loss["before"] is None:
        return text
    return f"{text}: loss {loss['before']:.4f} to {loss['after']:.4f}"


def remarks(run: Run, told: dict[str, Any]) -> list[str]:
    """Say what the reader has to know first: whether it ended, and what could not be read."""
    state = {
        "running": f"The run had not ended: this is up to step {told['last_step']:,}.",
        "stopped": f"The run was stopped after step {told['last_step']:,}.",
    }.get(str(told["status"]))
    notes = [f"{note[0].upper()}{note[1:]}." for note in run.notes]
    return notes if state is None else [state, *notes]


def key_figures(told: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the figures to know first: what it is, the figure, and what goes with it."""
    loss, tokens, speed = told["loss"], told["tokens"], told["speed"]
    if loss["after"] is not None:
        yield (
            "loss",
            f"{loss['after']:.4f}",
            f"from {loss['before']:.4f}"
            + (f"; evaluated {loss['eval_last']:.4f}" if loss["eval_last"] is not None else ""),
        )
    sizes, micros = told["effective_batch_sizes"], told["micros"]
    if sizes:
        text = " to ".join(f"{e['size']:,}" for e in (*sizes[:1], *sizes[1:][-1:]))
        cut = "" if micros["per_step"] is None else f"in {micros['per_step']:.3g} micro-batches"
        yield "effective batch", text, cut
    if speed["tokens_per_second"]:
        yield (
            "tokens a second",
            f"{speed['tokens_per_second']:,.0f}",
            padding_words(tokens["padding"]),
        )
    elif speed["samples_per_second"]:
        yield "samples a second", f"{speed['samples_per_second']:,.3g}", ""
    if told["seconds"]["steps"]:
        split = told["seconds"]["of_steps"]
        part = split.get("forward and backward", 0) / (sum(split.values()) or 1)
        yield (
            "time in steps",
            span(told["seconds"]["steps"]),
            (f"{part:.0%} forward and backward" if part else f"{counted(told['steps'], 'step')}"),
        )
    memory = told["memory"]
    if memory["peak_bytes"]:
        cap = memory["cap_bytes"] or memory["total_bytes"]
        yield "peak memory", amount(memory["peak_bytes"]), f"of {amount(cap)}" if cap else ""
    proof = told["proof"]
    if isinstance(proof, dict) and number(proof.get("relative_error")) is not None:
        floor = number(proof.get("floor"))
        yield (
            "gradient error",
            f"{proof['relative_error']:.1e}",
            ("" if floor is None else f"rounding alone {floor:.1e}"),
        )


def asked(runs: Sequence[Run]) -> Section:
    """Return what was asked of these runs in different ways."""
    found = differences(list(runs))
    names = [run.name for run in runs]
    if not all(run.stated("settings") or run.stated("command") for run in runs):
        text = "What was asked is not known of all of them: there is no run.json that tells."
        return Section("asked", "What was asked", [text])
    if not found:
        return Section("asked", "What was asked", ["The same of all of them."])
    table = Table(
        "What was asked differently",
        ["what", *names, "which"],
        [
            [d.name.removeprefix("settings."), *(value or "-" for value in d.values), d.effect]
            for d in found
        ],
    )
    return Section("asked", "What was asked", (), (), [table])


def results(runs: Sequence[Run], told: Sequence[dict[str, Any]]) -> Section:
    """Return what became of each run, side by side."""
    rows = [
        ["steps", *(f"{t['steps']:,}" for t in told)],
        ["samples", *(or_dash(t["samples"], ",") for t in told)],
        ["effective batch", *(_batches(run) for run in runs)],
        ["loss at the end", *(or_dash(t["loss"]["after"], ".4f") for t in told)],
    ]
    if (same := _at_the_same_samples(runs)) is not None:
        rows.append([f"loss after {same[0]:,} samples", *same[1]])
    rows += [
        ["lowest loss evaluated", *(or_dash(t["loss"]["eval_lowest"], ".4f") for t in told)],
        ["seconds in steps", *(or_dash(t["seconds"]["steps"], ",.1f") for t in told)],
        ["seconds a step", *(or_dash(t["speed"]["seconds_per_step"], ".3f") for t in told)],
        ["tokens a second", *(or_dash(t["speed"]["tokens_per_second"], ",.0f") for t in told)],
        ["micro-batches a step", *(or_dash(t["micros"]["per_step"], ".3g") for t in told)],
        ["padding", *(_padding(t) for t in told)],
        ["out-of-memory recoveries", *(or_dash(t["micros"]["recoveries"], ",.0f") for t in told)],
        ["peak memory", *(bytes_or_dash(t["memory"]["peak_bytes"]) for t in told)],
        ["gradient error", *(_error(t["proof"]) for t in told)],
    ]  # fmt: skip
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    table = Table("Figures of each run", ["figure", *(run.name for run in runs)], rows)
    return Section("results", "What became of them", (), (), [table])


def or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _batches(run: Run) -> str:
    sizes = [f"{entry['size']:,}" for entry in batch_sizes(run)]
    return " to ".join(sizes if len(sizes) < 3 else (sizes[0], sizes[-1])) or "-"


def _padding(told: dict[str, Any]) -> str:
    share = told["tokens"]["padding"]
    return "-" if share is None else padding_words(share).removeprefix("padding ")


def bytes_or_dash(value: float | None) -> str:
    return "-" if value is None else amount(value)


def _error(proof: Any) -> str:
    error = proof.get("relative_error") if isinstance(proof, dict) else None
    return f"{error:.1e}" if isinstance(error, float) else "-"


def _at_the_same_samples(runs: Sequence[Run]) -> tuple[int, list[str]] | None:
    """Return the smoothed loss after the most samples that all have; None if that is all they are.

    Runs of other batch sizes have other steps: their samples are what can be compared.
    """
    totals = [run.last("samples") for run in runs]
    if any(total is None for total in totals) or len(set(totals)) == 1:
        return None
    common = min(total for total in totals if total is not None)
    told = []
    for run in runs:
        by_samples = [p for p in by_sample(run, "loss") if p[0] <= common]
        told.append(f"{smoothed(by_samples, window_of(run))[-1][1]:.4f}" if by_samples else "-")
    return int(common), told


def headline_of(runs: Sequence[Run], found: Sequence[Comparison]) -> str:
    """Say in one sentence whether all trained the same."""
    kinds = [comparison.kind for comparison in found]
    if all(kind == SAME for kind in kinds):
        return f"{_all(runs)} the same to the last digit in {_steps(found)}."
    if all(kind in (SAME, ROUNDING) for kind in kinds):
        largest = max(comparison.largest for comparison in found)
        return (
            f"{_all(runs)} the same within rounding in {_steps(found)} (largest relative "
            f"difference of the loss {largest:.1e})."
        )
    told = [f"{run.name} {_clause(c)}" for run, c in zip(runs[1:], found, strict=True)]
    return f"Against {runs[0].name}: {'; '.join(told)}."


def _all(runs: Sequence[Run]) -> str:
    names = " and ".join(run.name for run in runs)
    return f"{names} are" if len(runs) == 2 else f"All {len(runs)} runs are"


def _steps(found: Sequence[Comparison]) -> str:
    num = min(comparison.num_common for comparison in found)
    return "the one step that they have in common" if num == 1 else f"all {num:,} steps in common"


def _clause(comparison: Comparison) -> str:
    step = comparison.step
    return {
        SAME: "is the same to the last digit",
        ROUNDING: "is the same within rounding",
        DRIFT: f"has drifted apart at step {step}, without a jump",
        PART: f"parts at step {step}",
        APART: "has nothing to compare",
    }[comparison.kind]


def verdicts(runs: Sequence[Run], found: Sequence[Comparison]) -> Section:
    """Return for each run but the first whether it trained the same, and why not."""
    sentences = []
    for run, comparison in zip(runs[1:], found, strict=True):
        reason = explanation(runs[0], run, comparison)
        text = f"{runs[0].name} and {run.name}: {comparison.sentence}. {reason}"
        sentences.append(text.strip())
    return Section("same", "Did they train the same?", sentences)


def markdown(runs: Sequence[Run]) -> str:
    """Return the report as Markdown, short enough for an issue."""
    if len(runs) == 1:
        run, told = runs[0], facts(runs[0])
        known = Table("", ["figure", "value", ""], list(key_figures(told)))
        sections = [events(run, told), proof(told), again(run, told)]
        title, answer, notes = run.name, f"{headline(run, told)}.", remarks(run, told)
        tables = [known]
    else:
        found = [compare(runs[0], run) for run in runs[1:]]
        title, answer, notes = f"{len(runs)} runs", headline_of(runs, found), []
        sections = [
            verdicts(runs, found), asked(runs), results(runs, [facts(run) for run in runs])
        ]  # fmt: skip
        tables = []
    blocks = [f"### {title}: gradaccum report", f"**{_escaped(answer)}**"]
    blocks += [f"- {_escaped(note)}" for note in notes]
    blocks += [_table(table) for table in tables]
    for section in sections:
        blocks += [] if section is None else list(_blocks(section))
    return "\n\n".join(blocks)


def _blocks(section: Section) -> Iterator[str]:
    yield f"#### {section.title}"
    yield from (_escaped(sentence) for sentence in section.sentences)
    for name, text in section.listing:
        yield f"{name}:\n\n```\n{text}\n```"
    yield from (_table(table) for table in section.tables)


def _table(table: Table) -> str:
    rows = [table.heads, ["---"] * len(table.heads), *table.rows]
    return "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in rows)


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is."""
    for mark in "\\|<>*`":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
