"""What a run shows while it runs, from the lines of its metrics.

A table that stays in place on a terminal; one bar in a notebook; one line a step where the output
is piped or goes to a log. `show` picks by where standard error goes.
"""

import collections
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from gradaccum.errors import MissingExtra
from gradaccum.metrics import Line
from gradaccum.noise import Noise
from gradaccum.types import Budget, amount, counted

SMOOTH = 0.9  # what the smoothed loss keeps of itself at each step
RECENT = 20  # steps, by whose speed what is left is told
SHOWN = 4  # the latest events
BARS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """Show lines of a run as they come."""

    def show(self, line: Line) -> None: ...
    def close(self) -> None: ...


def view(num_steps: int | None, first_step: int = 0) -> View:
    """Return what suits where standard error goes.

    Args:
        num_steps: Of the whole run; None: not known.
        first_step: After which it goes on.

    Raises:
        MissingExtra: It is a terminal, and rich is not installed.
    """
    if "ipykernel" in sys.modules:
        return Bar(num_steps, first_step)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Board(num_steps, first_step)
    return Log(num_steps, first_step)


class Told:
    """Hold what views tell beyond a line: the smoothed loss, and how much time is left.

    Args:
        num_steps: Of the whole run.
    """

    def __init__(self, num_steps: int | None, first_step: int) -> None:
        self.num_steps, self.first_step = num_steps, first_step
        self.losses: collections.deque[float] = collections.deque(maxlen=60)  # smoothed
        self.smoothed: float | None = None
        self._seconds: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._last_time: float | None = None

    def take(self, line: Line) -> None:
        loss, spent = line.get("loss"), line.get("seconds")
        if loss is not None and math.isfinite(loss):
            kept = loss if self.smoothed is None else self.smoothed
            now = self.smoothed = SMOOTH * kept + (1 - SMOOTH) * loss
            self.losses.append(now)
        if self._last_time is not None:  # with what happens between steps
            self._seconds.append(line["time"] - self._last_time)
        elif spent is not None and line["step"] > self.first_step + 1:
            self._seconds.append(spent)
        self._last_time = line["time"]

    def left(self, step: int) -> str:
        """Return the time that is left, empty where it is not known yet."""
        if self.num_steps is None or not self._seconds:
            return ""
        return clock(sum(self._seconds) / len(self._seconds) * (self.num_steps - step))

    def steps(self, line: Line) -> str:
        total = "" if self.num_steps is None else f"/{self.num_steps:,}"
        return f"step {line['step']:,}{total}"


class Log:
    """Print one line a step to standard error."""

    def __init__(self, num_steps: int | None, first_step: int = 0) -> None:
        self._told = Told(num_steps, first_step)

    def show(self, line: Line) -> None:
        told = self._told
        told.take(line)
        for event in line["events"]:
            print(f"{told.steps(line)}: {event}", file=sys.stderr)
        parts = [
            told.steps(line),
            counted(line["samples"], "sample"),
            f"loss {line['loss']:.4f}",
            f"{trained(line):,.0f} {line['unit']} in {counted(line['num_micros'], 'micro-batch')}",
            padding(line),
            speed(line),
            memory(line),
            f"{left} left" if (left := told.left(line["step"])) else "",
        ]
        print(" | ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """Move one bar: in a notebook, by the library that knows them."""

    def __init__(self, num_steps: int | None, first_step: int = 0) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise missing("tqdm") from error
        self._told = Told(num_steps, first_step)
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", file=sys.stderr)

    def show(self, line: Line) -> None:
        self._told.take(line)
        for event in line["events"]:
            self._bar.write(f"{self._told.steps(line)}: {event}", file=sys.stderr)
        parts = [f"loss {line['loss']:.4f}", speed(line), padding(line), memory(line)]
        self._bar.set_postfix_str(", ".join(filter(None, parts)), refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()


class Board:
    """Keep a table in place on a terminal, above it whatever else is printed."""

    def __init__(self, num_steps: int | None, first_step: int = 0) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn
        except ImportError as error:
            raise missing("rich") from error
        self._told = Told(num_steps, first_step)
        self._events: collections.deque[str] = collections.deque(maxlen=SHOWN)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task(
            "waiting for the first step", total=num_steps, completed=first_step, left=""
        )
        self._live = Live(
            self._bar,
            console=Console(stderr=True),
            auto_refresh=False,
            # What is piped elsewhere stays there.
            redirect_stdout=sys.stdout.isatty(),
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)

    def show(self, line: Line) -> None:
        told = self._told
        told.take(line)
        self._events.extend(f"{told.steps(line)}: {event}" for event in line["events"])
        left = told.left(line["step"])
        self._bar.update(
            self._task,
            completed=line["step"],
            description=f"{told.steps(line)}, {counted(line['samples'], 'sample')}",
            left=f"{left} left" if left else "",
        )
        self._live.update(self._table(line), refresh=True)

    def _table(self, line: Line) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        told = self._told
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in (
            ("loss", _loss(line, told)),
            ("speed", f"{speed(line)}, {_seconds(line)}"),
            ("batch", _batch(line)),
            ("memory", memory(line)),
            ("noise", _noise(line).removeprefix("noise ")),
            *(("event", event) for event in self._events),
        ):
            if text:
                table.add_row(name, Text(text, style="yellow" if name == "event" else ""))
        return Group(self._bar, table)

    def close(self) -> None:
        self._live.stop()


def trained(line: Line) -> float:
    """Return the weight of a step, all terms together."""
    weight = line["weight"] or 0.0
    return sum(weight.values()) if isinstance(weight, dict) else weight


def padding(line: Line) -> str:
    """Say how many of the tokens that ran were padding, or how many did not have to run.

    Example:
        >>> padding({"useful_tokens": 90, "padded_tokens": 100})
        'padding 10%'
        >>> padding({"useful_tokens": 100, "padded_tokens": 60})
        '40% of the tokens shared'
    """
    useful, run = line["useful_tokens"], line["padded_tokens"]
    if run < 0.995 * useful:
        return f"{1 - run / useful:.0%} of the tokens shared"
    return f"padding {1 - useful / max(1, run):.0%}"


def speed(line: Line) -> str:
    """Say how much of what the loss counts is trained in a second; measuring is not counted."""
    spent = line.get("seconds", line["compute_seconds"]) - line.get("measuring_seconds", 0.0)
    return f"{trained(line) / spent:,.0f} {line['unit']}/s" if spent > 0 else ""


def memory(line: Line) -> str:
    """Say the peak, what there is, and what is left of it."""
    peak, total = line["peak_bytes"], line.get("cap_bytes") or line["total_bytes"]
    if not peak or not total:
        return ""
    room = f", {amount(total - peak)} head-room" if total > peak else ", above what was stated"
    return f"peak {amount(peak)} of {amount(total)}{room}"


def _loss(line: Line, told: Told) -> str:
    parts = [f"{line['loss']:.4f}"]
    if told.smoothed is not None:
        parts.append(f"smoothed {told.smoothed:.4f} {sparkline(told.losses)}")
    for name, spelled in (("grad_norm", "gradient norm"), ("learning_rate", "learning rate")):
        if line.get(name) is not None:
            parts.append(f"{spelled} {line[name]:.3g}")
    return "   ".join(parts)


def _seconds(line: Line) -> str:
    parts = [f"{line['compute_seconds']:.2f} s forward and backward"]
    for name in ("prepare", "data", "optimizer", "recovery"):
        spent = line.get(f"{name}_seconds") or 0.0
        if spent >= 0.005:
            parts.append(f"{spent:.2f} {name}")
    return f"{line['seconds']:.2f} s a step: {', '.join(parts)}" if "seconds" in line else parts[0]


def _batch(line: Line) -> str:
    cut = counted(line["num_micros"], "micro-batch")
    if line.get("budget_tokens") or line.get("budget_examples"):
        cut += f" of up to {Budget(line.get('budget_tokens'), line.get('budget_examples'))}"
    ranks = f" on {len(line['ranks'])} ranks" if "ranks" in line else ""
    return f"{counted(line['num_examples'], 'example')} = {cut}{ranks}, {padding(line)}"


def _noise(line: Line) -> str:
    noise = line.get("noise")
    if not noise:
        return ""
    return str(Noise(**noise))


def sparkline(values: Sequence[float]) -> str:
    """Draw numbers as bars of eight heights.

    Example:
        >>> sparkline([1, 2, 3, 8])
        '▁▂▃█'
    """
    low, high = min(values), max(values)
    top = len(BARS) - 1
    return "".join(BARS[round((v - low) / (high - low) * top) if high > low else 0] for v in values)


def clock(seconds: float) -> str:
    """Return "3:12", or "1:03:12".

    Example:
        >>> clock(192), clock(3792)
        ('3:12', '1:03:12')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def missing(package: str) -> MissingExtra:
    return MissingExtra(
        f"the live view needs {package}, which is not installed",
        hint='pip install "gradaccum[live]"',
    )
