"""The figures of one run, each computed once: for the page, Markdown and JSON alike."""

import statistics
from collections.abc import Sequence
from typing import Any

from gradaccum.report.read import Run, number

# Where the seconds of a step go: field, what it is called.
PHASES = {
    "compute_seconds": "forward and backward",
    "prepare_seconds": "preparing",
    "data_seconds": "waiting for data",
    "optimizer_seconds": "optimizer",
    "recovery_seconds": "out-of-memory recovery",
}
OTHER, WHOLE, BETWEEN = "other", "not split", "between steps"


def facts(run: Run) -> dict[str, Any]:
    """Return the figures of a run as one JSON object; None where they are not known."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "command": run.stated("command"),
        "status": run.stated("status"),
        "steps": len(run.steps),
        "last_step": run.steps[-1],
        "planned_steps": number(run.stated("num_steps")),
        "samples": samples(run),
        "effective_batch_sizes": batch_sizes(run),
        "loss": _loss(run),
        "nonfinite_steps": run.nonfinite,
        "trained": {"weight": _total(run, "weight"), "unit": run.unit or None},
        "tokens": _tokens(run),
        "seconds": seconds(run),
        "speed": _speed(run),
        "micros": _micros(run),
        "memory": {
            name: _last_number(run, name, "memory")
            for name in ("peak_bytes", "cap_bytes", "predicted_bytes", "total_bytes")
        },
        "budget": run.stated("budget"),
        "noise": run.stated("noise") or _noise(run),
        "proof": run.stated("proof"),
        "events": [{"step": step, "text": text} for step, text in run.events],
        "resumed": resumed(run),
        "notes": run.notes,
    }


def window_of(run: Run) -> int:
    """Return how many steps the smoothed loss is a mean of."""
    return max(1, min(5, len(run.steps) // 2), len(run.steps) // 50)


def smoothed(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Return at each step the mean of the last `window` values up to it.

    Example:
        >>> smoothed([(1, 4.0), (2, 2.0), (3, 6.0)], 2)
        [(1, 4.0), (2, 3.0), (3, 4.0)]
    """
    told, total = [], 0.0
    for i, (step, value) in enumerate(points):
        total += value - (points[i - window][1] if i >= window else 0.0)
        told.append((step, total / min(i + 1, window)))
    return told


def samples(run: Run) -> int | None:
    """Return how many examples were trained, if it is known."""
    last = run.last("samples")
    counts = run.known("num_examples")
    if last is None and not counts:
        return None
    return int(sum(counts) if last is None else last)


def batch_sizes(run: Run) -> list[dict[str, int]]:
    """Return the effective batch and since which step, each time that it changed."""
    told: list[dict[str, int]] = []
    for step, size in run.points("effective_batch_size"):
        if not told or told[-1]["size"] != size:
            told.append({"size": int(size), "step": step})
    stated = number(run.stated("effective_batch_size"))
    if not told and stated is None and run.known("num_examples"):
        stated = max(run.known("num_examples"))  # the last of an epoch may have fewer
    return told or ([] if stated is None else [{"size": int(stated), "step": run.steps[0]}])


def phases(run: Run) -> dict[str, list[float]]:
    """Return the seconds of each step by what they went to, the rest as "other".

    A run that does not tell has all of its seconds as "not split".
    """
    whole = [value or 0.0 for value in run.column("seconds")]
    split = {
        label: [value or 0.0 for value in run.column(name)]
        for name, label in PHASES.items()
        if any(run.known(name))
    }
    if not split:
        return {WHOLE: whole} if any(whole) else {}
    spent = [sum(values) for values in zip(*split.values(), strict=True)]
    return split | {OTHER: [max(0.0, w - s) for w, s in zip(whole, spent, strict=True)]}


def resumed(run: Run) -> list[dict[str, Any]]:
    """Return where the run went on after it had stopped."""
    told = run.stated("resumed")
    return [entry for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []


def between(run: Run) -> float | None:
    """Return the seconds between steps: evaluation, saving, logging; without pauses of the run."""
    times, took = run.column("time"), run.column("seconds")
    pauses = {number(entry.get("step")) for entry in resumed(run)}
    gaps = [
        times[i] - times[i - 1] - took[i]  # type: ignore[operator]
        for i in range(1, len(times))
        if None not in (times[i], times[i - 1], took[i]) and run.steps[i - 1] not in pauses
    ]
    return sum(gap for gap in gaps if gap > 0) if gaps else None


def seconds(run: Run) -> dict[str, Any]:
    """Return where the time went, in seconds."""
    split = {label: sum(values) for label, values in phases(run).items()}
    total = _total(run, "seconds") or sum(split.values()) or None
    began, ended = number(run.stated("began")), number(run.stated("ended"))
    told = {"steps": total, "of_steps": split, "between": between(run), "whole_run": None}
    if began is not None and ended is not None and not resumed(run):
        told["whole_run"] = ended - began
    return told


def share_of_padding(useful: float | None, ran: float | None) -> float | None:
    """Return the share of what ran that was padding; below zero the share that did not have to run.

    Example:
        >>> share_of_padding(75, 100), share_of_padding(100, 60)
        (0.25, -0.4)
    """
    if not useful or not ran:
        return None
    return 1 - useful / ran if ran >= useful else -(1 - ran / useful)


def _loss(run: Run) -> dict[str, Any]:
    losses = run.known("loss")
    edge = max(1, min(5, len(losses) // 2))
    evaluated = run.known("eval_loss")
    return {
        "before": statistics.fmean(losses[:edge]) if losses else None,
        "after": statistics.fmean(losses[-edge:]) if losses else None,
        "mean_over": edge,
        "lowest": min(losses, default=None),
        "last": losses[-1] if losses else None,
        "eval_last": evaluated[-1] if evaluated else None,
        "eval_lowest": min(evaluated, default=None),
    }


def _total(run: Run, name: str) -> float | None:
    known = run.known(name)
    return sum(known) if known else None


def _tokens(run: Run) -> dict[str, Any]:
    useful, ran = _total(run, "useful_tokens"), _total(run, "padded_tokens")
    return {"useful": useful, "ran": ran, "padding": share_of_padding(useful, ran)}


def _speed(run: Run) -> dict[str, float | None]:
    took, tokens = _total(run, "seconds"), _total(run, "useful_tokens")
    examples = _total(run, "num_examples")
    return {
        "tokens_per_second": tokens / took if took and tokens else None,
        "samples_per_second": examples / took if took and examples else None,
        "seconds_per_step": statistics.median(run.known("seconds") or [0.0]) or None,
    }


def _micros(run: Run) -> dict[str, Any]:
    known = run.known("num_micros")
    return {
        "num": sum(known) if known else None,
        "per_step": statistics.fmean(known) if known else None,
        "least": min(known, default=None),
        "most": max(known, default=None),
        "recoveries": _total(run, "num_recoveries"),
    }


def _last_number(run: Run, name: str, section: str) -> float | None:
    if name == "peak_bytes":
        return max(run.known(name), default=None)
    stated = number(run.stated(section, name))
    return stated if stated is not None else run.last(name)


def _noise(run: Run) -> dict[str, Any] | None:
    names = ("scale", "low", "high", "gradient_squared", "variance", "num_steps")
    if run.last("noise.num_steps") is None and run.last("noise.scale") is None:
        return None
    at = max(
        i for name in names for i, v in enumerate(run.column(f"noise.{name}")) if v is not None
    )
    return {name: run.column(f"noise.{name}")[at] for name in names}


def by_sample(run: Run, name: str) -> list[tuple[int, float]]:
    """Return (samples, value) of each step where both are known."""
    pairs = zip(run.column("samples"), run.column(name), strict=True)
    return [(int(s), v) for s, v in pairs if s is not None and v is not None]
