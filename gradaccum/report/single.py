"""The page of one run. How it was cut is in `cutting`, events and settings are in `again`."""

import statistics
from typing import Any

from gradaccum.report import charts
from gradaccum.report.again import again, events, proof
from gradaccum.report.charts import Bar, Line, Rule
from gradaccum.report.cutting import cut
from gradaccum.report.facts import (
    BETWEEN,
    OTHER,
    WHOLE,
    facts,
    phases,
    smoothed,
    window_of,
)
from gradaccum.report.read import Run, number
from gradaccum.report.sections import Figure, Key, Page, Section, Table, table_of_steps
from gradaccum.report.words import headline, key_figures, remarks, span
from gradaccum.types import GIB, amount, counted

COLORS = {
    "forward and backward": "var(--s1)",
    "preparing": "var(--s2)",
    "waiting for data": "var(--s4)",
    "optimizer": "var(--s3)",
    "out-of-memory recovery": "var(--warn)",
    OTHER: "var(--s6)",
    WHOLE: "var(--s1)",
    BETWEEN: "var(--s5)",
}


def page(run: Run) -> Page:
    """Return the page of a run."""
    told = facts(run)
    sections = (
        _loss(run, told), _time(run, told), cut(run, told), _memory(run, told),
        _batch(run, told), _noise(run, told), events(run, told), proof(told), again(run, told),
    )  # fmt: skip
    return Page(
        run.name, f"{headline(run, told)}.", remarks(run, told), list(key_figures(told)),
        [section for section in sections if section is not None],
    )  # fmt: skip


def _loss(run: Run, told: dict[str, Any]) -> Section | None:
    points = run.points("loss")
    if not points:
        return None
    window = window_of(run)
    smooth = smoothed(points, window)
    evaluated = run.points("eval_loss")
    loss = told["loss"]
    over = f"mean of {loss['mean_over']} steps" if loss["mean_over"] > 1 else "one step"
    lowest = min(points, key=lambda p: p[1])
    finding = (
        f"The loss goes from {loss['before']:.4f} to {loss['after']:.4f} ({over} at either end) in "
        f"{counted(told['steps'], 'step')}; the lowest of a step is {lowest[1]:.4f}, in step "
        f"{lowest[0]:,}."
    )
    keys = [Key("each step", "var(--s1)", "thin")]
    drawn = [Line("loss", points, width=1, opacity=0.45)]
    if window > 1:
        drawn.append(Line(f"mean of the last {window:,} steps", smooth, width=2.5))
        keys.append(Key(drawn[-1].label, "var(--s1)"))
    if evaluated:
        drawn.append(Line("evaluated", evaluated, "var(--s2)", (6, 3)))
        keys.append(Key("evaluated", "var(--s2)", "dashed"))
        finding += f" Evaluated, it is {evaluated[-1][1]:.4f} at step {evaluated[-1][0]:,}."
    if run.nonfinite:
        keys.append(Key("loss not finite", "var(--warn)", "mark"))
        finding += (
            f" It is not finite in {counted(len(run.nonfinite), 'step')}, first in step "
            f"{run.nonfinite[0]:,}."
        )
    by_step = dict(smooth)
    columns = {
        "loss": (run.column("loss"), ".4f"),
        f"mean of {window:,}": ([by_step.get(s) for s in run.steps], ".4f"),
        "evaluated": (run.column("eval_loss"), ".4f"),
        "samples": (run.column("samples"), ",.0f"),
    }
    figures = [
        Figure(
            "loss", "loss", finding,
            charts.lines(drawn, y="loss", form=".4~f", marks=run.nonfinite[:50], height=260),
            keys, table_of_steps("Loss by step", run.steps, columns),
        )
    ]  # fmt: skip
    for name, title, form in (
        ("grad_norm", "gradient norm", ".3g"),
        ("learning_rate", "learning rate", ".2e"),
    ):
        if known := run.points(name):
            values = [v for _, v in known]
            said = (
                f"The {title} lies between {min(values):{form}} and {max(values):{form}}; at the "
                f"end it is {values[-1]:{form}}."
            )
            chart = charts.lines(
                [Line(title, known, width=1.5)], y=title, height=140, form=".3~g",
                from_zero=name == "learning_rate",
            )  # fmt: skip
            table = table_of_steps(
                f"The {title} by step", run.steps, {title: (run.column(name), form)}
            )
            figures.append(Figure(name, title, said, chart, (), table, is_small=True))
    for term in [name for name in run.columns if name.startswith("terms.")]:
        known, title = run.points(term), f"loss term {term.removeprefix('terms.')}"
        said = f"The {title} goes from {known[0][1]:.4f} to {known[-1][1]:.4f}."
        chart = charts.lines([Line(title, known, width=1.5)], y=title, height=140)
        table = table_of_steps(
            f"The {title} by step", run.steps, {title: (run.column(term), ".4f")}
        )
        name = f"term-{len(figures)}"
        figures.append(Figure(name, title, said, chart, (), table, is_small=True))
    return Section("training", "How the loss went", (), figures)


def _time(run: Run, told: dict[str, Any]) -> Section | None:
    split = phases(run)
    took = told["seconds"]
    if not split:
        return None
    parts = {label: sum(values) for label, values in split.items()}
    if took["between"]:
        parts[BETWEEN] = took["between"]
    total = sum(parts.values())
    shares = {label: value / total for label, value in parts.items() if value}
    most = max(split, key=lambda label: parts[label])
    finding = f"{counted(told['steps'], 'step')} took {span(took['steps'])}"
    finding += "." if most == WHOLE else f", {parts[most] / took['steps']:.0%} of it {most}."
    if took["between"]:
        finding += f" {span(took['between'])} went by between steps (evaluating, saving, logging)."
    if took["whole_run"]:
        outside = took["whole_run"] - total
        finding += (
            f" The whole run took {span(took['whole_run'])}: {span(max(0.0, outside))} before the "
            "first step and after the last one (loading, writing, proving)."
        )
    keys = [
        Key(f"{label} {_share(share)}", COLORS[label], "box") for label, share in shares.items()
    ]
    table = Table(
        "Where the time went", ["part", "seconds", "share", "a step"],
        [
            [label, f"{parts[label]:,.2f}", f"{share:.1%}",
             span(parts[label] / len(run.steps))]
            for label, share in shares.items()
        ],
    )  # fmt: skip
    unit, of_unit = (
        ("hours", 3600) if total > 7200 else ("minutes", 60) if total > 300 else ("seconds", 1)
    )
    bars = [Bar(label, [parts[label] / of_unit], COLORS[label]) for label in shares]
    whole = charts.horizontal(["run"], bars, x=unit)
    figures = [Figure("time", f"{unit} in all", finding, whole, keys, table)]
    if len(run.steps) > 1:
        shown = {label: values for label, values in split.items() if label in shares}
        each = [sum(values) for values in zip(*split.values(), strict=True)]
        slowest = max(zip(each, run.steps, strict=True))
        figures.append(
            Figure(
                "steps", "seconds of each step",
                f"A step took {span(statistics.median(each))} in the median; the "
                f"slowest, step {slowest[1]:,}, {span(slowest[0])}.",
                charts.stack_over_steps(
                    run.steps, [Bar(label, v, COLORS[label]) for label, v in shown.items()]
                ),
                [Key(label, COLORS[label], "box") for label in shown] if len(shown) > 1 else (),
                table_of_steps("Seconds by step", run.steps,
                    {"all": (each, ".3f")}
                    | {label: (v, ".3f") for label, v in shown.items() if label != WHOLE},
                ),
            )
        )  # fmt: skip
    return Section("time", "Where the time went", (), figures)


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _memory(run: Run, told: dict[str, Any]) -> Section | None:
    memory = told["memory"]
    points = run.points("peak_bytes")
    if not memory["peak_bytes"]:
        return None
    peak, cap, predicted = (memory[f"{name}_bytes"] for name in ("peak", "cap", "predicted"))
    finding = f"The peak of the process was {amount(peak)}"
    if predicted:
        finding += f", {peak / predicted - 1:+.1%} against the {amount(predicted)} predicted"
    finding += f"; there was {amount(cap)} for the run" if cap else ""
    if memory["total_bytes"]:
        finding += f"; the device has {amount(memory['total_bytes'])}"
    levels = [("for the run", cap), ("predicted", predicted)]
    rules = [Rule(f"{label}: {amount(v)}", v / GIB) for label, v in levels if v]
    chart = charts.lines(
        [Line("peak so far", [(s, v / GIB) for s, v in points], is_stepped=True)],
        y="GiB", form=".3~g", height=160, from_zero=True,
        rules=rules,
    )  # fmt: skip
    in_gib = [None if v is None else v / GIB for v in run.column("peak_bytes")]
    table = table_of_steps(
        "Peak memory by step, GiB", run.steps, {"peak so far, GiB": (in_gib, ".3f")}
    )
    figure = Figure("memory", "peak memory so far, GiB", f"{finding}.", chart, (), table)
    return Section("memory", "Memory", (), [figure])


def _batch(run: Run, told: dict[str, Any]) -> Section | None:
    sizes = told["effective_batch_sizes"]
    if len(sizes) < 2:
        return None
    said = [f"{entry['size']:,} from step {entry['step']:,}" for entry in sizes[:12]]
    more = f", and {len(sizes) - 12:,} changes more" if len(sizes) > 12 else ""
    points = run.points("effective_batch_size")
    chart = charts.lines(
        [Line("effective batch", points, is_stepped=True)], y="examples", height=140,
        from_zero=True, form=",d",
    )  # fmt: skip
    table = Table(
        "The effective batch since step", ["since step", "examples"],
        [[f"{entry['step']:,}", f"{entry['size']:,}"] for entry in sizes[:200]],
    )  # fmt: skip
    finding = f"The effective batch was {', '.join(said)}{more}."
    figure = Figure("batch", "effective batch, examples", finding, chart, (), table)
    schedule = run.stated("schedule")
    asked = [f"It was asked for as a schedule: {schedule}."] if schedule else []
    return Section("batch", "How large the effective batch was", asked, [figure])


def _noise(run: Run, told: dict[str, Any]) -> Section | None:
    noise, points = told["noise"], [p for p in run.points("noise.scale") if p[1] > 0]
    if not isinstance(noise, dict):
        return None
    scale, low, high = (number(noise.get(name)) for name in ("scale", "low", "high"))
    if scale is None and low:
        finding = f"The gradient noise scale is above {low:,.0f} examples, with 95% confidence."
    elif scale is None:
        finding = "The gradient noise scale is not known yet: it takes more steps."
    else:
        between = (
            f"between {low or 0:,.0f} and {high:,.0f}"
            if high is not None
            else f"above {low or 0:,.0f}"
        )
        finding = (
            f"The gradient noise scale is {scale:,.0f} examples, with 95% confidence {between}."
        )
    sentences = str(noise["advice"]).splitlines() if noise.get("advice") else []
    if not points:
        return Section("noise", "Gradient noise scale", [finding, *sentences])
    lows, highs = run.column("noise.low"), run.column("noise.high")
    top = 4 * max(v for _, v in points)  # where an interval has no upper end
    band = [
        (s, low if low and low > 0 else min(v for _, v in points) / 4, high or top)
        for s, value, low, high in zip(
            run.steps, run.column("noise.scale"), lows, highs, strict=True
        )
        if value
    ]
    drawn = [Line("noise scale", points)]
    keys = [Key("noise scale", "var(--s1)"), Key("95% interval", "var(--s1)", "band")]
    batch = run.points("effective_batch_size")
    if batch:
        drawn.append(Line("effective batch", batch, "var(--s2)", (6, 3), is_stepped=True))
        keys.append(Key("effective batch", "var(--s2)", "dashed"))
    chart = charts.lines(
        drawn,
        y="examples",
        band=band[:: max(1, len(band) // charts.DRAWN)],
        is_log=True,
        form=",~r",
        height=200,
    )
    columns = {
        "noise scale": (run.column("noise.scale"), ",.1f"),
        "low": (lows, ",.1f"),
        "high": (highs, ",.1f"),
    }
    table = table_of_steps("The gradient noise scale by step, in examples", run.steps, columns)
    figure = Figure("noise-scale", "gradient noise scale, examples", finding, chart, keys, table)
    return Section("noise", "Gradient noise scale", sentences, [figure])
