"""Measure, on a foreign loss, that it is a sum over examples divided by a count it is given.

Signatures do not tell: most heads of transformers accept `num_items_in_batch` and ignore it. So a
few forwards without gradient on some examples decide. What is not such a sum is refused.
Only this one reduction is recognised here; means over rows or over other counts are not yet.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradaccum.batch import HostBatch, Listed
from gradaccum.errors import BadInput, NotDecomposable
from gradaccum.objective import Number, length, shifted_tokens, tokens

Counter = Callable[[Any], Number]
# Maps collated inputs and the count to divide by (None: the loss's own) to the loss, shape ().
CountedLoss = Callable[[Any, int | None], Tensor]

COUNTERS: tuple[Counter, ...] = (shifted_tokens, tokens)
# Isolates what is not divided: with a count of 1, token losses of hundreds drown a router loss.
HUGE = 10**18


def refuse_undivided(loss: CountedLoss, batch: Listed, *, name: str) -> None:
    """Refuse a loss that is not divided by the count, in whole or in a term.

    loss(x, huge) has to be zero. A term may be zero at first and grow (an annealed coefficient, a
    distance from the first weights), so this is worth asking again later. Dropout does not matter.

    Args:
        loss: Runs in training mode, in which some terms exist alone.
        batch: Where the examples are taken from.
        name: What the loss is called in messages.

    Raises:
        NotDecomposable: Something is left when the count is huge.
    """
    chosen = _short(batch, COUNTERS[-1:], num=2)
    if not chosen:
        return
    inputs = batch.take(chosen)
    with torch.no_grad():
        total, undivided = loss(inputs, 1).item(), loss(inputs, HUGE).item()
    if not abs(undivided) > 1e-6 * abs(total) / float(COUNTERS[-1](inputs)):
        return
    what = (
        "ignores num_items_in_batch and divides by a count of its own"
        if abs(undivided - total) <= 0.5 * abs(total)
        else f"adds a term of {undivided:.3g} that num_items_in_batch does not divide "
        "(a router loss, a regulariser, or another auxiliary loss)"
    )
    raise NotDecomposable(
        f"{name} {what}, so its micro-batches do not add up to the full batch",
        hint="pass compute_loss_func= to the trainer: a sum divided by num_items_in_batch; or "
        "use gradaccum.Accumulator with gradaccum.from_mean and the right weight",
    )


def consistent_counters(
    loss: CountedLoss,
    batch: Listed,
    *,
    is_low: bool,
    name: str,
    counters: tuple[Counter, ...] = COUNTERS,
) -> tuple[Counter, ...]:
    """Return the counters that the loss divides by when it is given no count.

    With S(x) = loss(x, 1) the loss has to satisfy, on short examples a, b, c and the longest one z:

        S(abc) = S(a) + S(b) + S(c)    rows do not depend on each other
        S(az) = S(a) + S(z)            nor on how long the others are
        loss(abc, None) = S(abc) / D   D is one of the counters

    Several counters are returned where they agree on these examples: the caller has to measure
    again on a batch on which they differ.

    Args:
        loss: Runs without dropout, and twice the same on the same inputs.
        batch: Where the examples are taken from.
        is_low: The loss is computed in 16 bits, so rows alone and in a batch differ by rounding.
        name: What the loss is called in messages.
        counters: Which to try. One alone is taken as it is: then `loss(abc, None)` is not asked.

    Raises:
        NotDecomposable: One of them does not hold; it says which, with the figures.
    """
    longest = max(range(len(batch)), key=[length(example) for example in batch].__getitem__)
    # More short ones than needed: a random collator may mask a few.
    examples = batch.settled(list(dict.fromkeys([*_short(batch, counters, num=8), longest])))
    chosen = _short(examples, counters, num=3)
    if not chosen:
        return counters  # nothing to train, so nothing to measure: every counter gives zero
    union = examples.take(chosen)
    counts = {counter: float(counter(union)) for counter in counters}
    with torch.no_grad():
        total = loss(union, 1).item()
        own = loss(union, None if len(counts) > 1 else round(min(counts.values()))).item()
    if not math.isfinite(total):
        raise BadInput(
            f"{name} is {total} on {len(chosen)} examples before the first step",
            hint="look for values that are not finite in the weights and in the data",
        )
    if total == 0:  # rows of one token, which a causal model does not train, are counted by neither
        return tuple(c for c in counters if not counts[c]) or counters
    groups = (chosen, list(dict.fromkeys([chosen[0], len(examples) - 1])))
    _refuse_coupled(loss, examples, groups, counters, is_low=is_low, name=name)
    agree = tuple(
        c for c, count in counts.items() if count and abs(total / count - own) <= 1e-4 * abs(own)
    )
    if not agree:
        found = " or ".join(f"{count:.0f}" for count in counts.values())
        raise NotDecomposable(
            f"{name} divides by {total / own:.6g}, and the examples have {found} trained tokens"
        )
    return agree


def _refuse_coupled(
    loss: CountedLoss,
    examples: HostBatch,
    groups: Iterable[list[int]],
    counters: tuple[Counter, ...],
    *,
    is_low: bool,
    name: str,
) -> None:
    """Refuse a loss that is not the sum of its rows' losses, within each group."""

    @functools.cache
    def alone(i: int) -> float:
        return loss(examples.take([i]), 1).item()

    for group in groups:
        inputs = examples.take(group)
        count = max(float(counter(inputs)) for counter in counters)
        with torch.no_grad():
            together, apart = loss(inputs, 1).item(), sum(map(alone, group))
        # A token too many or too few changes the sum by about sum / count. Rounding in 16 bits
        # changes it by 1e-3 at most where there are many tokens; where there are few, by more.
        tolerance = max(1e-3, min(3e-2, 0.3 / max(count, 1))) if is_low else 1e-4
        if abs(together - apart) > tolerance * abs(together):
            raise NotDecomposable(
                f"{name} gives {together:.6g} for {len(group)} examples together and {apart:.6g} "
                "one by one: its rows depend on each other (in-batch negatives, batch statistics, "
                "or padding that the attention mask does not hide)"
            )


def differ(counters: tuple[Counter, ...], inputs: Any) -> bool:
    """Tell whether the counters give different counts on collated inputs."""
    return len({float(counter(inputs)) for counter in counters}) > 1


def _short(batch: HostBatch, counters: tuple[Counter, ...], *, num: int) -> list[int]:
    """Choose short examples with a weight, first one on which the counters differ, if any."""
    lengths = [length(example) for example in batch]
    weighted: list[int] = []
    telling: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        counts = [float(counter(batch.take([i]))) for counter in counters]
        if any(counts):
            weighted.append(i)
        if all(counts) and len(set(counts)) == len(counts):
            telling.append(i)
        if telling and len(weighted) >= num:
            break
    return list(dict.fromkeys([*telling[:1], *weighted]))[:num]
