"""A picture of a plan: memory and time against the size of a micro-batch, and the cap as a line."""

import importlib.util
from pathlib import Path

from gradaccum.errors import BadInput, MissingExtra
from gradaccum.memory.options import Option
from gradaccum.memory.plan import Plan
from gradaccum.types import GIB


def check() -> None:
    """Refuse, before any work, to draw without matplotlib.

    Raises:
        MissingExtra: It is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "--plot needs matplotlib, which is not installed",
            hint='pip install "gradaccum[report]"',
        )


def draw(plan: Plan, path: Path) -> None:
    """Write the picture as PNG or SVG.

    Raises:
        MissingExtra: matplotlib is not installed.
        BadInput: The file cannot be written.
    """
    check()
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    memory, time = figure.subplots(1, 2)
    is_even = plan.chosen.budget.examples is not None
    settings: dict[str, list[Option]] = {}
    for option in plan.options:
        name = f"checkpointing {'on' if option.checkpointing else 'off'}"
        name += f", loss in chunks of {option.chunk:,}" if option.chunk else ""
        name += f", sync {option.sync}" if option.sync else ""
        settings.setdefault(name, []).append(option)
    fastest = min(option.seconds for option in plan.options if option.fits)
    for number, (name, options) in enumerate(settings.items()):
        sizes, color = [_size(option) for option in options], f"C{number}"
        peaks = [option.peak_bytes / GIB for option in options]
        memory.plot(sizes, peaks, "o-", color=color, markersize=3, label=name)
        seconds = [option.seconds / fastest for option in options]
        time.plot(sizes, seconds, "-", color=color, alpha=0.4)
        for fits, style in ((True, "o"), (False, "x")):
            shown = [i for i, option in enumerate(options) if option.fits is fits]
            xs, ys = [sizes[i] for i in shown], [seconds[i] for i in shown]
            time.plot(xs, ys, style, color=color, markersize=4)
    cap = plan.cap.num_bytes / GIB
    memory.axhline(cap, color="0.3", linestyle="--", label=f"for tensors: {cap:.3g} GiB")
    one = plan.chosen
    memory.plot(_size(one), one.peak_bytes / GIB, "k*", markersize=12, label="chosen")
    time.plot(_size(one), one.seconds / fastest, "k*", markersize=12)
    memory.set(ylabel="peak memory, GiB", title="memory", ylim=(0, None))
    time.set(ylabel="time of a step, times the fastest that fits", title="time")
    for axes in (memory, time):
        unit = "examples" if is_even else "padded tokens"
        axes.set(xlabel=f"largest micro-batch, {unit}", xscale="log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.3)
    memory.legend(fontsize=8)
    time.plot([], [], "x", color="0.3", label="does not fit")
    time.legend(fontsize=8)
    figure.suptitle(f"effective batch {plan.effective_batch:,} of up to {plan.longest:,} tokens")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadInput(f"cannot write --plot {path}: {error.strerror}") from error


def _size(option: Option) -> int:
    return option.budget.examples or option.budget.tokens or 1
