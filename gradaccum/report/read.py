"""Read a run directory: metrics.jsonl as columns, and run.json where there is one.

What a run may leave behind is read as far as it goes: a last line cut off by a kill, fields that
are absent or unknown, steps that a resumed run took again. Only what would be misread is refused:
a newer schema.
"""

import json
import shlex
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradaccum.errors import BadInput
from gradaccum.metrics import SCHEMA
from gradaccum.types import counted
from gradaccum.watch import METRICS

MOST = sys.float_info.max
RUN, FLAGS = "run.json", "flags.json"


@dataclass(slots=True)
class Window:
    """Hold how one effective batch was cut.

    Args:
        step: Of this window.
        micros: (examples, size as it ran, useful size) of each micro-batch of the first rank, in
            the order in which they ran.
        ranks: (micro-batches, examples, size, useful size) of each rank; empty without ranks.
    """

    step: int
    micros: list[list[int]]
    ranks: list[list[int]]


@dataclass(slots=True)
class Run:
    """Hold what one run directory tells.

    Args:
        name: What the run is called beside others.
        folder: Where it is.
        about: run.json; empty where there is none.
        steps: The optimizer steps that were read, ascending.
        columns: Each number of metrics.jsonl by name, one value a step, None where it is not known
            or not finite; those of objects as "noise.scale" or "terms.lm".
        nonfinite: Steps whose loss was not a finite number.
        events: (step, what happened).
        unit: What the weight counts.
        window: How an effective batch was cut, the last one that was whole.
        notes: What could not be read, in words.
    """

    name: str
    folder: Path
    about: dict[str, Any]
    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    nonfinite: list[int] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    unit: str = ""
    window: Window | None = None
    notes: list[str] = field(default_factory=list)

    def column(self, name: str) -> list[float | None]:
        """Return the values of a field, one a step; None where it is not known."""
        return self.columns.get(name) or [None] * len(self.steps)

    def known(self, name: str) -> list[float]:
        """Return the values of a field in the steps where it is known."""
        return [value for value in self.columns.get(name, []) if value is not None]

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) where the field is known."""
        column = self.columns.get(name, [])
        return [(s, v) for s, v in zip(self.steps, column, strict=False) if v is not None]

    def last(self, name: str) -> float | None:
        """Return the last value that is known."""
        return next((v for v in reversed(self.columns.get(name, [])) if v is not None), None)

    def stated(self, *path: str) -> Any:
        """Return what run.json says at a path of names; None where it says nothing."""
        found: Any = self.about
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found


def read(path: Path) -> Run:
    """Read a run directory, or the metrics.jsonl in it.

    Raises:
        BadInput: There is no such directory, no metrics.jsonl, no step in it, or its schema is
            newer than this version knows.
    """
    folder = path.parent if path.name == METRICS else path
    file = folder / METRICS
    if not folder.is_dir():
        raise BadInput(f"there is no run directory {folder}", hint="name the --output_dir of a run")
    if not file.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{METRICS}"))[:3]
        raise BadInput(
            f"{folder} has no {METRICS}, so it is no run directory",
            hint=f"gradaccum report {shlex.quote(str(folder / inside[0]))}"
            if inside
            else "name the --output_dir of a run of gradaccum train",
        )
    run = Run(folder.resolve().name, folder, _about(folder))
    if run.about.pop("unreadable", None):
        run.notes.append(f"{RUN} is cut off or damaged, so what was asked is not known")
    try:
        with file.open("rb") as lines:
            _Reading(run).take(lines)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from error
    if not run.steps:
        raise BadInput(
            f"{file} has no step yet" if not run.notes else f"{file}: {'; '.join(run.notes)}",
            hint="a line is written when the next step begins: try again once two have run",
        )
    return run


def read_all(paths: Iterable[Path]) -> list[Run]:
    """Read several runs and give each a name that no other has.

    Raises:
        BadInput: One cannot be read, or is given twice.
    """
    runs = [read(path) for path in paths]
    folders = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise BadInput(f"{runs[i].folder} is given twice", hint="name each run once")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    for run, folder in zip(runs, folders, strict=True):
        run.name = "/".join(folder.parts[-depth:]) or str(folder)
    return runs


def number(value: Any) -> float | None:
    """Return a finite number as it is, and None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and -MOST <= value <= MOST else None


class _Reading:
    """Take the lines of a metrics.jsonl into a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._unread: list[int] = []  # lines
        self._again = 0  # steps
        self._window: tuple[int, Any, Any] | None = None

    def take(self, lines: Iterable[bytes]) -> None:
        raw = b""
        at = 0
        for at, raw in enumerate(lines, start=1):
            if raw.strip():
                self._line(at, raw)
        run, unread = self._run, self._unread
        if unread and unread[-1] == at and not raw.endswith(b"\n"):
            unread.pop()
            run.notes.append("the last line is cut off, as when a run is killed, and is left out")
        if unread:
            run.notes.append(
                f"{counted(len(unread), 'line')} of {METRICS} could not be read and "
                f"{'is' if len(unread) == 1 else 'are'} left out (the first is line {unread[0]})"
            )
        if self._again:
            run.notes.append(
                f"{counted(self._again, 'step')} ran again after the run was resumed; what counts "
                "is the last time"
            )
        if self._window is not None:
            step, micros, ranks = self._window
            run.window = Window(step, _rows(micros, 3), _rows(ranks, 4))
        missing = len(run.steps)
        for column in run.columns.values():
            column.extend([None] * (missing - len(column)))

    def _line(self, at: int, raw: bytes) -> None:
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        step = line.get("step") if isinstance(line, dict) else None
        if line is None or not isinstance(step, int) or isinstance(step, bool) or step < 0:
            self._unread.append(at)
            return
        _check_schema(line, f"line {at} of {self._run.folder / METRICS}")
        self._back_to(step)
        self._add(step, line)

    def _back_to(self, step: int) -> None:
        """Drop the steps from this one on: a resumed run takes them again."""
        run = self._run
        if not run.steps or step > run.steps[-1]:
            return
        kept = bisect_left(run.steps, step)
        self._again += len(run.steps) - kept
        del run.steps[kept:]
        for column in run.columns.values():
            del column[kept:]
        run.nonfinite = [s for s in run.nonfinite if s < step]
        run.events = [(s, text) for s, text in run.events if s < step]
        if self._window is not None and self._window[0] >= step:
            self._window = None

    def _add(self, step: int, line: dict[str, Any]) -> None:
        run, index = self._run, len(self._run.steps)
        run.steps.append(step)
        columns = run.columns
        for name, value in _numbers(line):
            column = columns.get(name)
            if column is None:
                column = columns[name] = []
            if len(column) < index:
                column.extend([None] * (index - len(column)))
            column.append(value)
        if "loss" in line and number(line["loss"]) is None:
            run.nonfinite.append(step)
        events = line.get("events")
        for text in events if isinstance(events, list) else []:
            run.events.append((step, str(text)))
        if isinstance(line.get("unit"), str):
            run.unit = line["unit"]
        is_whole = line.get("num_examples") == line.get("effective_batch_size")
        micros, ranks = line.get("micros"), line.get("ranks")
        if (micros or ranks) and (is_whole or self._window is None):
            self._window = step, micros, ranks


def _numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each finite number of a line; an object's by dotted names, a weight's as their sum."""
    for name, value in line.items():
        if isinstance(value, dict):
            inner = [(f"{name}.{key}", number(v)) for key, v in value.items()]
            found = [(key, v) for key, v in inner if v is not None]
            yield from found
            if name == "weight" and found:
                yield name, sum(v for _, v in found)
        elif type(value) in (int, float) and -MOST <= value <= MOST:
            yield name, value


def _rows(value: Any, width: int) -> list[list[int]]:
    """Return rows of so many numbers each; none at all where one is of another form."""
    rows = value if isinstance(value, list) else []
    is_right = all(
        isinstance(row, list) and len(row) == width and all(number(n) is not None for n in row)
        for row in rows
    )
    return rows if is_right else []


def _check_schema(found: dict[str, Any], where: str) -> None:
    schema = found.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise BadInput(
            f"{where} has schema {schema!r}, and this version of gradaccum reads up to {SCHEMA}",
            hint="pip install --upgrade gradaccum",
        )


def _about(folder: Path) -> dict[str, Any]:
    """Return run.json; of a run that wrote none, what its flags tell."""
    try:
        found = json.loads((folder / RUN).read_text())
    except FileNotFoundError:
        return _from_flags(folder)
    except (OSError, ValueError):
        return _from_flags(folder) | {"unreadable": True}
    if not isinstance(found, dict):
        return {"unreadable": True}
    _check_schema(found, str(folder / RUN))
    return found


def _from_flags(folder: Path) -> dict[str, Any]:
    try:
        flags = json.loads((folder / FLAGS).read_text())
        return {"command": shlex.join(["gradaccum", "train", *flags])}
    except (OSError, ValueError, TypeError):
        return {}
