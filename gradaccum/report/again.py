"""What happened in a run, whether its gradient was right, and how to do it again."""

import json
import shlex
from typing import Any

from gradaccum.report.read import METRICS, Run, number
from gradaccum.report.sections import Section, Table
from gradaccum.types import counted


def events(run: Run, told: dict[str, Any]) -> Section | None:
    """Return what happened, in plain words, with its step."""
    rows = [(step, text) for step, text in run.events]
    rows += [(step, "the loss is not finite") for step in run.nonfinite]
    for entry in told["resumed"]:
        step = number(entry.get("step"))
        if step is not None:
            source = entry.get("checkpoint")
            rows.append(
                (int(step), "resumed after this step" + (f" from {source}" if source else ""))
            )
    if not rows:
        return None
    rows = sorted(dict.fromkeys(rows), key=lambda row: row[0])
    shown = rows if len(rows) <= 200 else [*rows[:100], *rows[-100:]]
    caption = "Events by step"
    if len(shown) < len(rows):
        caption += f" (the first and the last 100 of {len(rows):,})"
    table = Table(caption, ["step", "what happened"], [[f"{step:,}", text] for step, text in shown])
    return Section("events", "What happened", (), (), [table])


def proof(told: dict[str, Any]) -> Section | None:
    """Return how far the accumulated gradient is from that of one pass."""
    found = told["proof"]
    if not isinstance(found, dict) or number(found.get("relative_error")) is None:
        return None
    error, floor = found["relative_error"], number(found.get("floor"))
    text = f"The relative error of the gradient is {error:.1e}"
    if number(found.get("num_micros")) and number(found.get("num_examples")):
        text = (
            f"{counted(int(found['num_examples']), 'example')} in "
            f"{counted(int(found['num_micros']), 'micro-batch')}, accumulated by this run's own "
            f"trainer, against one pass over all of them: the relative error of the gradient is "
            f"{error:.1e}"
        )
    if floor:
        text += (
            f". Rounding alone makes {floor:.1e} (two full passes with their rows in opposite "
            f"order): the error is {error / floor:.2g} times what rounding makes"
        )
    return Section("proof", "Is the gradient that of the whole batch?", [f"{text}."])


def again(run: Run, told: dict[str, Any]) -> Section:
    """Return the command, the packages and the settings."""
    listing = []
    if told["command"]:
        listing.append(("the command", str(told["command"])))
    versions = run.stated("versions")
    if isinstance(versions, dict) and versions:
        pinned = [f"{name}=={v}" for name, v in versions.items() if name != "python"]
        listing.append(("its packages", shlex.join(["pip", "install", *pinned])))
    tables = []
    asked = {
        label: run.stated(*path)
        for label, path in (
            ("device", ("device",)), ("ranks", ("world",)), ("seed", ("seed",)),
            ("effective batch", ("effective_batch_size",)), ("schedule", ("schedule",)),
            ("steps", ("num_steps",)),
        )
    }  # fmt: skip
    for section in ("model", "data"):
        inside = run.stated(section)
        for name, value in inside.items() if isinstance(inside, dict) else ():
            asked[f"{section}: {name.removeprefix('num_').replace('_', ' ')}"] = value
    if isinstance(versions, dict) and "python" in versions:
        asked["python"] = versions["python"]
    rows = [[label, _said(value)] for label, value in asked.items() if value is not None]
    if rows:
        tables.append(Table("What was run", ["what", "value"], rows))
    settings = run.stated("settings")
    if isinstance(settings, dict) and settings:
        rows = [[name, _said(value)] for name, value in sorted(settings.items())]
        tables.append(Table("Settings that are not the default", ["setting", "value"], rows))
    if not listing and not tables:
        text = f"There is no run.json in {run.folder}, so only {METRICS} is told."
        return Section("again", "How to do it again", [text])
    return Section("again", "How to do it again", (), (), tables, listing)


def _said(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
