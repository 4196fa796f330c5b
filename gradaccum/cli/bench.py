"""`gradaccum bench`: the run of these flags by several contenders, side by side.

The table goes to stdout, progress to stderr. What each contender does is in `contenders`.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import gradaccum
from gradaccum.bench import Contender, Outcome, Row, Spread, Turn, race, rotated, rows
from gradaccum.cli.arguments import Arguments, parse
from gradaccum.cli.contenders import LOOP, OURS, STOCK, Spec, defaults, read
from gradaccum.cli.picture import check
from gradaccum.cli.summary import say
from gradaccum.cli.train import _quiet
from gradaccum.errors import BadInput
from gradaccum.types import amount, counted

TOLERATED = 1e-4  # a float32 gradient that is farther from float64 than this is another one
FLAGS = ("--contenders", "--rounds", "--steps", "--plot")


def run(words: list[str]) -> int:
    """Race the contenders, print what they did and return the exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        _quiet()
        mine, rest = _own(words)
        if mine.plot is not None:
            _check_plot(Path(mine.plot))
        arguments = parse(rest, others=FLAGS)
        if arguments is None:
            return 0
        _refuse(arguments)
        specs = _specs(mine.contenders, arguments)
        say("gradaccum bench")
        outcomes = _race(specs, arguments, mine, rest)
    _raise_if_none_ran(outcomes)
    found = rows(outcomes, _base(specs, outcomes))
    if mine.plot is not None:
        _draw(found, Path(mine.plot), _base(specs, outcomes))
        say(f"plot      {mine.plot}")
    told = _as_json if arguments.json else _text
    print(told(found, _base(specs, outcomes), arguments, mine))
    return 0 if all(row.failure is None for row in found) else 1


def _own(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this command, and those of train."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--contenders")
    own.add_argument("--rounds", type=int, default=5)
    own.add_argument("--steps", type=int, default=2)
    own.add_argument("--plot")
    try:
        mine, rest = own.parse_known_args(words)
    except (SystemExit, argparse.ArgumentError) as error:
        raise BadInput(
            "--rounds and --steps take a number, --plot a file, --contenders a list",
            hint='--contenders "ours,stock 2x16,loop"',
        ) from error
    for name in ("rounds", "steps"):
        if getattr(mine, name) < 1:
            raise BadInput(f"--{name} {getattr(mine, name)} is below 1")
    return mine, rest


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".svg"):
        raise BadInput(f"--plot {path} is neither .png nor .svg")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"there is no directory {path.parent} for --plot")
    check()


def _refuse(arguments: Arguments) -> None:
    if arguments.training.world_size > 1:
        raise BadInput("bench times one process", hint="start it without torchrun")
    if arguments.training.resume_from_checkpoint:
        raise BadInput("bench begins anew", hint="leave out --resume_from_checkpoint")
    if arguments.schedule is not None:
        raise BadInput(
            f"bench times one effective batch, and --effective_batch_schedule has several: "
            f"{arguments.schedule}",
            hint=f"--effective_batch_size {arguments.schedule.largest}, the largest",
        )


def _specs(listed: str | None, arguments: Arguments) -> list[Spec]:
    """Return the contenders without repetitions."""
    shape = defaults(arguments)
    names = [STOCK, f"{STOCK} 1x{arguments.effective_batch_size}", LOOP, OURS]
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
    return list(dict.fromkeys(read(name, shape) for name in names))


def _base(specs: list[Spec], outcomes: list[Outcome]) -> str:
    """Return whose speed is 1: the first stock trainer, or else the first that ran at all."""
    ran = {outcome.name for outcome in outcomes if any(outcome.turns)}
    alive = [spec for spec in specs if spec.name in ran]
    plain = [spec for spec in alive if spec.kind == STOCK and not spec.modifier]
    return next(iter(plain or alive)).name


def _race(
    specs: list[Spec], arguments: Arguments, mine: argparse.Namespace, words: list[str]
) -> list[Outcome]:
    # Several models would share the memory of an accelerator, so there only one is up at a time.
    is_fresh = arguments.training.device.type != "cpu"
    most = mine.steps + 2 if is_fresh else mine.steps * (mine.rounds + 1) + 1
    worker = [sys.executable, "-m", "gradaccum.cli.contenders"]
    contenders = [
        Contender(spec.name, [*worker, spec.name, *words, "--max_steps", str(most)], _alone())
        for spec in specs
    ]
    names = [contender.name for contender in contenders]
    last = rotated(names, mine.rounds - 1)[-1]
    say(f"start     {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:

        def heard(round_: int, name: str, turn: Turn | None) -> None:
            said = f"round {round_}/{mine.rounds}" if round_ else "warm-up"
            seconds = f"{sum(turn.seconds) / len(turn.seconds):.2f} s a step" if turn else "failed"
            say(f"{said:<9} {name}: {seconds}")
            if round_ == mine.rounds and not is_fresh and name == last:
                say("check     the gradients of the first step against float64 ...")

        question = {"name": "gradient error", "folder": folder}
        return race(
            contenders,
            rounds=mine.rounds,
            steps=mine.steps,
            is_fresh=is_fresh,
            question=None if is_fresh else question,
            heard=heard,
        )


def _alone() -> dict[str, str]:
    """Return what lets a worker see one GPU: a Trainer would spread its batch over all."""
    is_many = torch.accelerator.is_available() and torch.accelerator.device_count() > 1
    return {"CUDA_VISIBLE_DEVICES": "0"} if is_many else {}


def _raise_if_none_ran(outcomes: list[Outcome]) -> None:
    """Raise the first failure where there is nothing else to show, as `gradaccum train` would."""
    if any(any(outcome.turns) for outcome in outcomes):
        return
    failure = next(outcome.failure for outcome in outcomes if outcome.failure is not None)
    if failure.code == 2:
        raise BadInput(failure.message.rpartition("error: ")[2])
    raise failure


def _text(found: list[Row], base: str, arguments: Arguments, mine: argparse.Namespace) -> str:
    return "\n".join([*_table(found, base), "", *_sentences(found, base, mine.rounds)])


def _table(found: list[Row], base: str) -> list[str]:
    heads = [
        "contender", "s/step", "least..most", "trained tokens/s", "padding", "memory",
        f"times {base}", "gradient error",
    ]  # fmt: skip
    lines = [
        [
            row.name,
            _number(row.seconds, "{:.3g}"),
            f"{row.seconds.least:.3g}..{row.seconds.most:.3g}" if row.seconds else "-",
            _number(row.rate, "{:,.0f}"),
            _padding(row.padding),
            "-" if row.peak_bytes is None else amount(row.peak_bytes),
            _number(row.speed, "{:.2f}"),
            "failed" if row.failure else _error(row),
        ]
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in (heads, *lines)
    ]


def _padding(share: float | None) -> str:
    """Tell the padding; below zero, fewer tokens ran than there are, as some were shared.

    Example:
        >>> _padding(0.25), _padding(-1.0)
        ('25.0%', '50.0% shared')
    """
    if share is None:
        return "-"
    return f"{share:.1%}" if share >= 0 else f"{1 - 1 / (1 - share):.1%} shared"


def _number(value: Spread | None, form: str) -> str:
    return "-" if value is None else form.format(value.median)


def _error(row: Row) -> str:
    known = row.answer or {}
    return "not measured" if known.get("error") is None else f"{known['error']:.1e}"


def _sentences(found: list[Row], base: str, rounds: int) -> list[str]:
    """Say in words what the table says, whoever is faster."""
    by_name = {row.name: row for row in found}
    ours, loop = by_name.get(OURS), by_name.get(LOOP)
    told = []
    if ours is not None and ours.speed is not None and base != OURS:
        told.append(f"{_compared(ours.speed, base, rounds)}{_to_loop(ours, loop)}.")
    told += _of_gradients(found)
    told += [f"{row.name} failed: {row.failure}" for row in found if row.failure]
    return told


def _compared(speed: Spread, base: str, rounds: int) -> str:
    """Tell how ours compares with the base; only what all rounds agree on is a difference."""
    over = f"{speed.least:.2f} to {speed.most:.2f} over {counted(rounds, 'round')}"
    if speed.least > 1:
        return f"ours is {speed.median:.2f} times as fast as {base} ({over})"
    if speed.most < 1:
        return f"ours is slower than {base}: {speed.median:.2f} times its speed ({over})"
    return f"ours and {base} are equally fast, as far as these rounds can tell ({over})"


def _to_loop(ours: Row, loop: Row | None) -> str:
    if loop is None or loop.speed is None or ours.speed is None:
        return ""
    return f", and runs at {ours.speed.median / loop.speed.median:.2f} of the speed of the loop"


def _of_gradients(found: list[Row]) -> list[str]:
    answers = {row.name: row.answer for row in found if row.answer}
    errors = {name: a["error"] for name, a in answers.items() if a["error"] is not None}
    causes = {a["why_not"] for a in answers.values() if a["why_not"]}
    told = [f"Gradients were not compared with float64: {cause}." for cause in sorted(causes)]
    if not answers and any(row.rate for row in found):
        told.append("Gradients were not compared with float64: it is measured on the CPU only.")
    if not errors:
        return told
    most = max(errors.values())
    if not all(answers[name]["is_float32"] for name in errors):
        told.append(
            f"Gradients are up to {most:.1e} from float64, rounding in low precision included."
        )
        return told
    wrong = {name: e for name, e in errors.items() if not e <= TOLERATED}
    for name, e in wrong.items():
        told.append(f"The gradient of {name} is not that of its batch: it is off by {e:.1e}.")
    right = [e for name, e in errors.items() if name not in wrong]
    if right:
        told.append(
            f"{'The other' if wrong else 'All'} gradients are those of the whole batch in float64, "
            f"to {max(right):.1e}."
        )
    return told


def _as_json(found: list[Row], base: str, arguments: Arguments, mine: argparse.Namespace) -> str:
    return json.dumps(
        {
            "effective_batch_size": arguments.effective_batch_size,
            "rounds": mine.rounds,
            "steps": mine.steps,
            "base": base,
            "device": str(arguments.training.device),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "gradaccum": gradaccum.__version__},
            "contenders": [_flat(row) for row in found],
        }
    )


def _flat(row: Row) -> dict[str, Any]:
    told = row.to_json()
    answer = told.pop("answer") or {}
    return told | {"gradient_error": answer.get("error"), "why_not": answer.get("why_not") or None}


def _draw(found: list[Row], path: Path, base: str) -> None:
    """Write a picture: speed, with its spread over the rounds, and memory."""
    from matplotlib.figure import Figure

    shown = [row for row in found if row.speed is not None][::-1]
    names = [row.name for row in shown]
    colors = ["C1" if name == OURS else "C0" for name in names]
    figure = Figure(figsize=(9, 1.6 + 0.4 * len(shown)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    speeds = [row.speed for row in shown if row.speed]
    reach = [[s.median - s.least for s in speeds], [s.most - s.median for s in speeds]]
    speed.barh(names, [s.median for s in speeds], xerr=reach, color=colors, ecolor="0.3")
    speed.axvline(1, color="0.3", linestyle="--")
    speed.set(xlabel=f"trained tokens a second, times {base}", title="speed")
    memory.barh(names, [(row.peak_bytes or 0) / 2**20 for row in shown], color=colors)
    memory.set(xlabel="peak beyond the first step's start, MiB", title="memory")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadInput(f"cannot write --plot {path}: {os.strerror(error.errno or 0)}") from error
