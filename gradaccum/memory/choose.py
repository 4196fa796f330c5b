"""Choose a budget: the smallest that is as fast as any that fits."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gradaccum.memory.probe import AS_FAST, shape_of
from gradaccum.objective import Objective
from gradaccum.packing.plan import NOTHING_SHARED
from gradaccum.split import split
from gradaccum.types import Budget

WINDOWS = 16  # effective batches that are looked at
SIZES = Objective(lambda *_: None, None, size=lambda size: size)


class Forecast(Protocol):
    """Tell time and memory of a micro-batch of so many rows of so many tokens."""

    def seconds(self, rows: float, length: float) -> float: ...
    def peak_bytes(self, rows: float, length: float) -> int: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Hold what a budget means for an effective batch.

    Args:
        budget: The largest micro-batch.
        num_micros: Micro-batches of an effective batch, in the mean.
        most_micros: The same of that which has most.
        rows: Of the micro-batch that takes the most memory.
        length: Its tokens a row.
        peak_bytes: What a step takes at its peak, in the worst effective batch.
        seconds: Of forward and backward of an effective batch, in the mean.
    """

    budget: Budget
    num_micros: float
    most_micros: int
    rows: int
    length: int
    peak_bytes: int
    seconds: float


def windows(lengths: Sequence[int], effective_batch: int, seed: int = 0) -> list[list[int]]:
    """Return effective batches as a shuffle would draw them, and last the worst: the longest."""
    order = list(lengths)
    random.Random(seed).shuffle(order)
    while len(order) < effective_batch:
        order += lengths
    found = [
        order[i : i + effective_batch]
        for i in range(0, len(order) - effective_batch + 1, effective_batch)
    ]
    return [*found[:WINDOWS], sorted(order)[-effective_batch:]]


def budgets(lengths: Sequence[int], effective_batch: int) -> list[Budget]:
    """Return the budgets to choose from, the smallest first.

    Of equal lengths it is the rows that make each number of micro-batches; else tokens, in steps
    of a half octave.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        rows = {-(-effective_batch // num) for num in range(1, effective_batch + 1)}
        return [Budget(examples=n) for n in sorted(rows)]
    most, tokens, found = longest * effective_batch, 2, []
    while 2 * tokens <= min(lengths):
        tokens *= 2
    while tokens < 2 * most:
        found += [Budget(tokens=tokens), Budget(tokens=tokens * 3 // 2)]
        tokens *= 2
    return found


def weigh(
    budget: Budget, drawn: Sequence[Sequence[int]], forecast: Forecast, *, packed: bool = False
) -> Choice:
    """Return what a budget means, over effective batches of which the last is the worst."""
    seconds, num_micros, most, peaks = 0.0, 0, 0, []
    for window in drawn:
        micros = split(list(window), SIZES, budget, shared=NOTHING_SHARED if packed else None)
        shapes = [shape_of([window[i] for i in m.examples], packed=packed) for m in micros]
        most = max(most, len(shapes))
        peaks += [(forecast.peak_bytes(*shape), shape) for shape in set(shapes)]
        if window is not drawn[-1]:
            seconds += sum(forecast.seconds(*shape) for shape in shapes)
            num_micros += len(shapes)
    peak, (rows, length) = max(peaks)
    num = len(drawn) - 1
    return Choice(budget, num_micros / num, most, round(rows), round(length), peak, seconds / num)


def best(choices: Sequence[Choice], cap_bytes: int) -> Choice | None:
    """Return the choice of least memory among those within 2% of the fastest that fits."""
    fitting = [choice for choice in choices if choice.peak_bytes <= cap_bytes]
    if not fitting:
        return None
    enough = AS_FAST * min(choice.seconds for choice in fitting)
    return min(
        (choice for choice in fitting if choice.seconds <= enough), key=lambda c: c.peak_bytes
    )
