"""Measure what a micro-batch takes, on the device and with the loss of the run itself.

Three short micro-batches tell time and memory of any other:

    seconds = t0 + t1 * tokens + t2 * rows * length^2
    bytes   = m0 + m1 * tokens + m2 * rows * length^2, beyond what was there before

That is a straight line, and caches end: what it says is tried (`within`). Nothing of
it belongs to the training: gradients are dropped, random state and buffers put back.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gradaccum.batch import HostBatch, Listed
from gradaccum.device import release, suppressing_out_of_memory
from gradaccum.engine import Accumulator, Window
from gradaccum.memory.tracker import BUFFERS, PARAMETERS, Tracker
from gradaccum.objective import unweighted
from gradaccum.packing.plan import Layout
from gradaccum.split import split
from gradaccum.state import Random
from gradaccum.sync.alone import Alone, Hearing
from gradaccum.types import Budget, Micro, Share

# Tokens of the probe of several rows: enough to see what a token costs, few enough to be short.
TOKENS = {"cpu": 512}
OTHER_TOKENS = 4096
EXTRAPOLATED = 1.1  # times what is read off beyond the probes; where it is too little, it recovers
SHORT = 0.2  # seconds, below which a probe is run twice
TURNS = 2  # of what is compared
LONG = 4.0  # seconds of a turn that is enough by itself
AS_FAST = 1.02  # times the best; beyond the knee, larger micro-batches buy nothing
Shape = tuple[float, float]  # rows, and tokens of a row


@dataclass(frozen=True, slots=True)
class Probed:
    """Give time and memory by what three micro-batches took.

    Args:
        times: t0, t1, t2 in seconds.
        sizes: m0, m1, m2 in bytes; m0 holds gradients, no parameters.
        too_large: Padded tokens of the smallest that did not fit.
        within: From and up to how many tokens a micro-batch is fast, whatever the line says; None
            where that was not tried.
    """

    times: tuple[float, float, float]
    sizes: tuple[float, float, float]
    too_large: int = sys.maxsize
    within: tuple[int, int] | None = None

    def seconds(self, rows: float, length: float) -> float:
        return _at(self.times, (rows, length))

    def peak_bytes(self, rows: float, length: float) -> int:
        """Return what it takes beyond what is there before."""
        if rows * length >= self.too_large:
            return sys.maxsize
        return round(_at(self.sizes, (rows, length)))


def probe(
    accumulator: Accumulator, host: HostBatch, aside: Callable[..., AbstractContextManager[None]]
) -> tuple[Probed, int]:
    """Run up to three short micro-batches of this batch; return what they tell and their number.

    Args:
        accumulator: Is left as it is.
        host: An effective batch.
        aside: Keeps what runs inside out of the training.

    Raises:
        Exception: Other than that memory runs out: as the loss does.
    """
    sizes = [accumulator.objective.size(example) for example in host]
    device = next(accumulator.model.parameters()).device
    engine = alone(accumulator)
    chosen = _chosen(sizes, TOKENS.get(device.type, OTHER_TOKENS))
    packed = engine.layout is not None
    given = {
        shape_of([sizes[i] for i in rows], packed=packed): partial(host.take, rows)
        for rows in chosen
    }
    return measure(engine, given, device, aside)


def within(
    accumulator: Accumulator,
    host: HostBatch,
    aside: Callable[..., AbstractContextManager[None]],
    said: int,
) -> tuple[int, int, int]:
    """Return from and up to how many tokens micro-batches are fast, and how many were run for it.

    What a line says is best is timed against what a few hundred tokens (some thousands on an
    accelerator) take: fewer have to be no slower; and more are doubled while that is faster.

    Args:
        accumulator: Is left as it is.
        host: An effective batch.
        aside: As of `probe`.
        said: Tokens that are said to be best.
    """
    engine, num = alone(accumulator), 0
    total = sum(engine.objective.size(example) for example in host)
    few = min(total, TOKENS.get(next(engine.model.parameters()).device.type, OTHER_TOKENS))

    def compared(*sizes: int) -> tuple[list[float], int]:
        shared = engine.layout.shared if engine.layout is not None else None
        budgets = [Budget(tokens=size) for size in sizes]
        cuts = [split(host, engine.objective, budget, shared=shared) for budget in budgets]
        return in_turns(engine, host, aside, [(engine.layout, micros) for micros in cuts])

    if 2 * said <= few:
        (least, middle), num = compared(said, few)
        return (few if middle * AS_FAST < least else 0), sys.maxsize, num
    most, best = 2 * few, 1.0  # times what a few take
    while most < min(said, total):
        larger = min(2 * most, said)
        (seconds, middle), more = compared(larger, few)
        num += more
        if not seconds * AS_FAST < best * middle:
            return 0, most, num
        most, best = larger, seconds / middle
    return 0, most if num else sys.maxsize, num


def in_turns(
    engine: Accumulator,
    host: HostBatch,
    aside: Callable[..., AbstractContextManager[None]],
    cuts: Sequence[tuple[Layout | None, Sequence[Micro]]],
) -> tuple[list[float], int]:
    """Return the seconds a token of the examples in the middle micro-batch of each cut.

    They run in turns, as the machine may be busy, and the better turn counts; one turn is enough
    where it is long. Where memory runs out there is nothing to compare: infinity for all that have
    not run. How many ran is returned as well.

    Args:
        engine: Its objective counts nothing.
        host: An effective batch.
        aside: As of `probe`.
        cuts: Layouts, and micro-batches for them.
    """
    seconds, spent = [float("inf")] * len(cuts), list[float]()
    layout = engine.layout
    with suppressing_out_of_memory(), aside(engine.model, dropout=True):
        runs = []
        for which, micros in cuts:
            micro = micros[len(micros) // 2]
            shape = len(micro.examples), micro.size / len(micro.examples)
            window = repeated(engine, host.take(micro.examples), shape, 1)
            runs.append((which, window, max(1, micro.useful)))
        for _ in range(TURNS):
            for i, (which, window, useful) in enumerate(runs):
                engine.layout = which
                spent.append(engine.attempt(window).seconds)
                seconds[i] = min(seconds[i], spent[-1] / useful)
                clear(engine.model)
            if sum(spent) > LONG:
                break
    clear(engine.model)
    engine.layout = layout
    return seconds, len(spent)


def alone(accumulator: Accumulator) -> Accumulator:
    """Return an accumulator of the same model that counts nothing and tells nobody."""
    engine = copy.copy(accumulator)
    engine.objective, engine.limit = unweighted(accumulator.objective), None
    engine._after_micro = engine._last = None
    return engine


def measure(
    engine: Accumulator,
    given: Mapping[Shape, Callable[[], Any]],
    device: torch.device,
    aside: Callable[..., AbstractContextManager[None]],
    num_micros: int = 2,
) -> tuple[Probed, int]:
    """Run micro-batches for their memory, then for their time; return what they tell, and how many.

    Args:
        engine: Its objective counts nothing.
        given: What makes the inputs of each, by rows and tokens of a row.
        device: Of the model.
        aside: As of `probe`.
        num_micros: Of the step whose memory is told; from the second on there are gradients.
    """
    seconds: dict[Shape, float] = {}
    peaks: dict[Shape, float] = {}
    for shape, make in given.items():
        with suppressing_out_of_memory(), aside(engine.model, dropout=True):
            inputs = make()
            peaks[shape] = _peak(engine, repeated(engine, inputs, shape, num_micros), device)
            seconds[shape] = _timed(engine, inputs, shape)
        clear(engine.model)
    release(device)
    failed = [int(rows * length) for rows, length in given if (rows, length) not in seconds]
    fitting = {shape: peaks[shape] for shape in seconds}
    probed = Probed(_fitted(seconds), _fitted(fitting), min(failed, default=sys.maxsize))
    return probed, len(seconds)


def shapes(sizes: Sequence[int], device: torch.device, *, packed: bool = False) -> list[Shape]:
    """Return the rows and their tokens of each probe."""
    chosen = _chosen(sizes, TOKENS.get(device.type, OTHER_TOKENS))
    return [shape_of([sizes[i] for i in rows], packed=packed) for rows in chosen]


def shape_of(sizes: Sequence[int], *, packed: bool) -> Shape:
    """Return rows and tokens of a row that cost as much as examples of these sizes.

    Padded, each is as long as the longest. Packed, they are a part of rows of one length, such that
    tokens and their squares add up to those of the examples.
    """
    if not packed:
        return len(sizes), max(sizes)
    total = max(1, sum(sizes))
    length = max(1.0, sum(size**2 for size in sizes) / total)
    return total / length, length


def _timed(engine: Accumulator, inputs: Any, shape: Shape) -> float:
    """Return the seconds of one micro-batch that has run before; of short ones the faster of two.

    Args:
        engine: Its objective counts nothing.
        inputs: The micro-batch.
        shape: Its rows and their tokens.
    """
    window, found = repeated(engine, inputs, shape, 1), 0.0
    for _ in range(2):
        spent = engine.attempt(window).seconds
        clear(engine.model)
        if not found and spent > SHORT:
            return spent
        found = min(spent, found or spent)
    return found


def _chosen(sizes: Sequence[int], tokens: int) -> list[list[int]]:
    """Return the rows of each probe: a short one, a long one, several of middle length.

    Of equal lengths the first two are one, and four times as many take the place of the other: few
    rows alone overrate what a micro-batch costs by itself.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    middle = len(order) // 2
    num = max(2, tokens // max(1, sizes[order[middle]]))
    begin = max(0, min(middle, len(order) - num))
    found = [[order[0]], order[begin : begin + num], [order[-1]]]
    if sizes[order[0]] == sizes[order[-1]]:
        found[-1] = order[: 4 * num]
    shapes = {(len(rows), max(sizes[i] for i in rows)): rows for rows in found}
    return list(shapes.values())


def repeated(engine: Accumulator, inputs: Any, shape: Shape, num: int) -> Window:
    """Return a window of the same micro-batch so many times; the second finds gradients."""
    rows, size = max(1, round(shape[0])), round(shape[0] * shape[1])
    micro = Micro(tuple(range(rows)), size, size)
    share = Share(num, num * rows, num * size, num * size)
    return Window(
        (micro,) * num,
        (inputs,) * num,
        (engine.objective.loss,) * num,
        ({"loss": 1.0},) * num,
        {"loss": float(num)},
        "",
        Listed([inputs], lambda _: inputs),
        (Random(), Random()),
        Hearing(Alone()),
        [{"share": share, "num_runs": num}],
    )


def _peak(accumulator: Accumulator, window: Window, device: torch.device) -> int:
    """Return the most bytes that are alive, beyond parameters and what else there was before."""
    if device.type == "cpu":
        tracker = Tracker()
        tracker.follow(accumulator.model, None, window.inputs)
        try:
            with tracker:
                accumulator.attempt(window)
        finally:
            tracker.close()
        clear(accumulator.model)
        return tracker.peak_bytes - tracker.peak[PARAMETERS] - tracker.peak[BUFFERS]
    module = torch.get_device_module(device)
    before = module.memory_allocated(device)
    module.reset_peak_memory_stats(device)
    accumulator.attempt(window)
    clear(accumulator.model)
    return module.max_memory_allocated(device) - before


def clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def _features(shape: Shape) -> tuple[float, float, float]:
    rows, length = shape
    return 1.0, rows * length, rows * length**2


def _at(coefficients: Sequence[float], shape: Shape) -> float:
    return sum(c * x for c, x in zip(coefficients, _features(shape), strict=True))


def _fitted(found: dict[Shape, float]) -> tuple[float, float, float]:
    """Return the coefficients, none below zero, that come closest to what was found."""
    if not found:
        return 0.0, 0.0, 0.0
    rows = torch.tensor([_features(shape) for shape in found], dtype=torch.float64)
    target = torch.tensor(list(found.values()), dtype=torch.float64)
    best: tuple[float, tuple[float, float, float]] = (float("inf"), (0.0, 0.0, 0.0))
    for num in range(1, min(3, len(found)) + 1):
        for used in itertools.combinations(range(3), num):
            part = rows[:, list(used)] / rows[:, list(used)].abs().amax(0)
            solved = torch.linalg.lstsq(part, target[:, None]).solution[:, 0]
            solved = solved / rows[:, list(used)].abs().amax(0)
            full = [0.0, 0.0, 0.0]
            for index, value in zip(used, solved.tolist(), strict=True):
                full[index] = value
            off = (rows @ torch.tensor(full, dtype=torch.float64) - target).square().sum().item()
            if min(full) >= 0 and off < best[0] * (1 - 1e-9):
                best = off, (full[0], full[1], full[2])
    return best[1]
