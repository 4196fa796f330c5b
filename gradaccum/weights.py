"""Name what the weights say with which micro-batches enter an accumulated gradient.

A gradient that is added up from micro-batches is a weighted sum of the gradients that these have
alone, and so is that of the full batch wherever it decomposes at all:

    G = sum of found_i g_i          f = sum of right_i g_i

Both weights are found by least squares. What `found` is in terms of `right`, of the number of
micro-batches and of the labels is what the loop does wrong. What the g_i cannot explain is another
kind of error: rows that depend on each other here, gradients changed on the way in `diagnosis.py`.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradaccum.trace import Trace
from gradaccum.types import IGNORE_INDEX, counted
from gradaccum.verdict import Comparison, Diagnosis

Cut = tuple[tuple[int, ...], ...]

WEIGH = "divide by the weight of the whole effective batch, or use gradaccum.Accumulator"
DIVIDE_ONCE = "divide once, by the weight of the whole effective batch"
# No larger number of processes or steps is guessed at.
MOST_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Fit:
    """Say how the gradient of a cut and that of the full batch are made of its micro-batches'.

    Args:
        found: The weight with which each micro-batch entered the accumulated gradient.
        right: The weight that it has in the full batch.
        is_unique: No other weights give the same; otherwise only `scale` and `equal` tell.
        unexplained: The relative part of the accumulated gradient that is no such sum.
        coupled: The relative part of the full gradient that is no such sum.
        beside_model: What is left of `unexplained` if a multiple of the model's weights is added.
        scale: The factor between the accumulated and the full gradient, and what it leaves.
        equal: The one weight of all micro-batches that fits best, and what it leaves.
    """

    found: tuple[float, ...]
    right: tuple[float, ...]
    is_unique: bool
    unexplained: float
    coupled: float
    beside_model: float
    scale: tuple[float, float]
    equal: tuple[float, float]


def fit(accumulated: Tensor, full: Tensor, parts: Sequence[Tensor], model: Tensor) -> Fit:
    """Return the weights of both gradients by least squares; all are flat and in float64.

    Args:
        accumulated: The gradient of a cut.
        full: That of the full batch.
        parts: Those that its micro-batches have alone.
        model: The weights of the model, along which the gradient of a penalty points.
    """
    norms = [part.norm().item() or 1.0 for part in parts]
    basis = torch.stack([part / size for part, size in zip(parts, norms, strict=True)], dim=1)
    both = torch.stack([accumulated, full], dim=1)
    # Through singular values: examples that are alike make columns that are nearly the same.
    solved = torch.linalg.lstsq(basis, both, rcond=1e-6, driver="gelsd")
    left = (both - basis @ solved.solution).norm(dim=0) / both.norm(dim=0).clamp(min=1e-300)
    beside = torch.cat([basis, (model / model.norm().clamp(min=1e-300))[:, None]], dim=1)
    again = torch.linalg.lstsq(beside, both[:, :1], rcond=1e-6, driver="gelsd").solution
    rest = (both[:, :1] - beside @ again).norm() / accumulated.norm().clamp(min=1e-300)
    found, right = (solved.solution / torch.tensor(norms, dtype=torch.float64)[:, None]).T.tolist()
    return Fit(
        found=tuple(found),
        right=tuple(right),
        is_unique=int(solved.rank) == len(parts),
        unexplained=left[0].item(),
        coupled=left[1].item(),
        beside_model=rest.item(),
        scale=_along(accumulated, full),
        equal=_along(accumulated, torch.stack(list(parts)).sum(dim=0)),
    )


def _along(gradient: Tensor, direction: Tensor) -> tuple[float, float]:
    """Return the factor by which one is the other, and the relative part of it that is not."""
    square = direction.square().sum().item()
    factor = (gradient * direction).sum().item() / square if square else 0.0
    return factor, ((gradient - factor * direction).norm() / gradient.norm()).nan_to_num(0).item()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Hold all that the diagnoses are read from.

    Args:
        cuts: The examples of each micro-batch, cut by cut.
        comparisons: What each cut was compared to be.
        traces: What was seen while each cut ran.
        fits: The weights of the cuts that are wrong, by their number; no others.
        tolerance: The relative error that passes.
        leftover: By how much the gradient changed when the run before was not cleared away.
        random: By how much the full batch differs from itself under another seed.
        unordered: By how much it differs from itself with its rows in opposite order.
        labels: Labels of each micro-batch, where they are known: `labels(rows)`.
        undivided: Why nothing divides by the number of micro-batches.
        remedy: What to do about a wrong weight, where that is not to change the loop.
    """

    cuts: tuple[Cut, ...]
    comparisons: tuple[Comparison, ...]
    traces: tuple[Trace, ...]
    fits: Mapping[int, Fit]
    tolerance: float
    leftover: float
    random: float
    unordered: float
    labels: Callable[[Sequence[int]], Any]
    undivided: str
    remedy: str

    def weighing(self, name: str, message: str, remedy: str = WEIGH) -> Diagnosis:
        """Name a wrong weight, with the remedy that whoever runs the subject can follow."""
        return Diagnosis(name, message, self.remedy or remedy)

    @property
    def wrong(self) -> list[int]:
        """Return which cuts are not within the tolerance."""
        errors = [c.relative_error for c in self.comparisons]
        return [i for i, error in enumerate(errors) if not error <= self.tolerance]


def name_weights(e: Evidence) -> list[Diagnosis]:
    """Name what the weights of the micro-batches say."""
    near = max(1e-3, 3 * e.tolerance)
    fits = [(len(e.cuts[i]), e.fits[i]) for i in e.wrong if i in e.fits]
    coupled = max((f.coupled for _, f in fits), default=0.0)
    if e.unordered or coupled > 10 * e.tolerance:
        return [_coupled(e, coupled)]
    limit = max(near, 10 * e.tolerance)
    strange = [f for _, f in fits if f.unexplained > limit]
    if strange and all(f.beside_model <= max(0.01 * f.unexplained, e.tolerance) for f in strange):
        return [_penalty(max(f.unexplained for f in strange))]
    fits = [(num, f) for num, f in fits if f.unexplained <= limit]
    if not fits:
        return []
    scales = _that_fit([(num, f.scale) for num, f in fits], near)
    if len(scales) == len(fits):
        return [_scale(e, scales, near)]
    return [_unequal(e, fits, near)]


def _that_fit(
    factors: list[tuple[int, tuple[float, float]]], near: float
) -> list[tuple[int, float]]:
    """Return (number of micro-batches, factor) of the cuts at which a factor leaves nothing."""
    return [(num, factor) for num, (factor, left) in factors if left <= near]


def _coupled(e: Evidence, coupled: float) -> Diagnosis:
    what = (
        f"the gradient of the full batch changes by {e.unordered:.2g} with the order of its rows"
        if e.unordered
        else f"{coupled:.2%} of the gradient of the full batch is no sum over its micro-batches"
    )
    return Diagnosis(
        "rows depend on each other",
        f"{what} (in-batch negatives, router losses, statistics of the batch, padding that "
        "no mask hides)",
        "no accumulation of this loss is exact: give it one micro-batch, or compute what couples "
        "the rows over the whole batch first",
    )


def _penalty(unexplained: float) -> Diagnosis:
    return Diagnosis(
        "penalty per micro-batch",
        f"{unexplained:.2%} of the gradient is no sum over its micro-batches, and a multiple of "
        "the model's weights explains it: a penalty on them that every micro-batch adds",
        "add the penalty once in each effective batch, or leave it to the optimizer's weight_decay",
    )


def _scale(e: Evidence, scales: list[tuple[int, float]], near: float) -> Diagnosis:
    """Name a factor that all micro-batches of a cut share; `scales` has (their number, factor)."""
    figures = _size(scales)
    if all(_same(c, m, near) for m, c in scales):
        return e.weighing("missing division", f"{figures}: {e.undivided}")
    if all(_same(c, 1 / m, near) for m, c in scales):
        return e.weighing(
            "doubled division",
            f"{figures}: it is divided by the number of micro-batches once more than needed",
            DIVIDE_ONCE,
        )
    steps = _common([m / c for m, c in scales if c], near)
    if steps is not None and len({m for m, _ in scales}) > 1:
        return _configured(e, figures, steps)
    if (one := _common([c for _, c in scales], near)) is not None:
        return _constant(e, figures, one, near)
    listed = ", ".join(f"{c:.4g} at {m}" for m, c in scales)
    return e.weighing("wrong factor", f"the gradient is multiplied by {listed}")


def _size(scales: list[tuple[int, float]]) -> str:
    """Say how large the gradient is at the cut at which it is the farthest off."""
    num, factor = max(scales, key=lambda pair: abs(math.log(abs(pair[1]) or 1e-300)))
    if factor <= 0:
        return f"gradient multiplied by {factor:.3g} at {counted(num, 'micro-batch')}"
    size = f"{factor:.2f} times too large" if factor >= 1 else f"{1 / factor:.2f} times too small"
    return f"gradient {size} at {counted(num, 'micro-batch')}"


def _configured(e: Evidence, figures: str, steps: float) -> Diagnosis:
    return e.weighing(
        "configured steps",
        f"{figures}: every micro-batch is divided by {steps:.4g}, however many there are, so "
        "that a short window weighs too little",
        "divide by what this window holds: its trained labels, or its own number of micro-batches",
    )


def _constant(e: Evidence, figures: str, factor: float, near: float) -> Diagnosis:
    everything = e.labels(sorted(i for rows in e.cuts[0] for i in rows))
    if isinstance(everything, Tensor) and everything.ndim > 1:
        own = (everything[..., 1:] != IGNORE_INDEX).sum().item()
        counts = (everything != IGNORE_INDEX).sum().item()
        if own and _same(factor, own / counts, near) and own != counts:
            return e.weighing(
                "over-count",
                f"gradient {factor:.4f} of what it should be: it is divided by all {counts:,} "
                f"labels, and a causal model trains {own:,} of them, not the first of each row",
                "count labels[:, 1:] != -100",
            )
    size = max(factor, 1 / factor) if factor > 0 else 0.0
    is_whole = 2 <= round(size) <= MOST_STEPS and _same(size, round(size), 1e-4)
    hint = f" (a world size or a number of steps of {round(size)}?)" if is_whole else ""
    return e.weighing(
        "constant factor",
        f"{figures}: the same factor {factor:.4g} at every cut{hint}",
        "divide by the weight of the whole effective batch, and by nothing else",
    )


def _unequal(e: Evidence, fits: list[tuple[int, Fit]], near: float) -> Diagnosis:
    """Name weights that differ from the right ones by different factors."""
    if (left_out := _left_out(e, fits, near)) is not None:
        return left_out
    num, worst = max(fits, key=lambda pair: pair[1].scale[1])
    low = min(a / b for a, b in _weighing(worst))
    high = max(a / b for a, b in _weighing(worst))
    figures = (
        f"the weights of {counted(num, 'micro-batch')} are {low:.3g} to {high:.3g} times what "
        "they should be"
        if worst.is_unique
        else f"{worst.scale[1]:.2g} of the gradient is not that of the full batch at "
        f"{counted(num, 'micro-batch')}"
    )
    known = _that_fit([(num, f.equal) for num, f in fits], near)
    if len(known) < len(fits):
        return e.weighing("wrong weights", f"{figures} ({_both(worst)})")
    if all(_same(weight, 1 / m, near) for m, weight in known):
        return e.weighing(
            "mean of means",
            f"{figures}: each counts 1/{num}, however many labels it holds",
            "sum the loss of each micro-batch and divide it by the labels of all of them",
        )
    if all(_same(weight, 1.0, near) for _, weight in known):
        # Micro-batches that weigh the same have one factor, which says more than a range.
        shared = _that_fit([(m, f.scale) for m, f in fits], near)
        said = _size(shared) if shared else figures
        return e.weighing("missing division", f"{said}: {e.undivided}")
    if all(_same(weight, m**-2, near) for m, weight in known):
        return e.weighing(
            "doubled division", f"{figures}: each counts 1/{num} of 1/{num}", DIVIDE_ONCE
        )
    steps = _common([1 / weight for _, weight in known if weight], near)
    if steps is not None:
        return _configured(e, figures, steps)
    return e.weighing("wrong weights", f"{figures}: all count {known[0][1]:.4g}")


def _left_out(e: Evidence, fits: list[tuple[int, Fit]], near: float) -> Diagnosis | None:
    """Name micro-batches that weigh nothing where they should."""
    for num, f in sorted(fits, key=lambda pair: -pair[0]):
        weighs = [abs(b) > 1e-6 * max(map(abs, f.right)) for b in f.right]
        missing = [abs(a) <= near * abs(b) for a, b in zip(f.found, f.right, strict=True)]
        out = [i for i in range(num) if weighs[i] and missing[i]]
        if not f.is_unique or not out or len(out) == sum(weighs):
            continue
        which = ", ".join(str(i + 1) for i in out[:4]) + ", ..." * (len(out) > 4)
        what = (
            "only the last micro-batch counts"
            if out == [i for i in range(num - 1) if weighs[i]]
            else f"of {num} micro-batches, {len(out)} {'count' if len(out) > 1 else 'counts'} "
            f"nothing (number {which})"
        )
        return e.weighing(
            "micro-batches left out",
            f"{what}: {_both(f)}",
            "call backward for every micro-batch, a short last one too",
        )
    return None


def _weighing(f: Fit) -> list[tuple[float, float]]:
    """Return (found, right) of the micro-batches that weigh something in the full batch."""
    largest = max(map(abs, f.right))
    return [(a, b) for a, b in zip(f.found, f.right, strict=True) if abs(b) > 1e-6 * largest]


def _common(values: list[float], near: float) -> float | None:
    """Return the mean of values that are all the same, or None."""
    mean = sum(values) / len(values) if values else 0.0
    return mean if values and all(_same(value, mean, near) for value in values) else None


def _same(value: float, other: float, near: float) -> bool:
    return abs(value - other) <= near * abs(other)


def _both(f: Fit) -> str:
    return f"{_listed(f.found)} where {_listed(f.right)} is right"


def _listed(values: Sequence[float]) -> str:
    """Show weights, several zeros as one entry and at most six entries."""
    least = 1e-9 * max(map(abs, values))
    shown = [f"{value:.3g}" if abs(value) > least else "0" for value in values]
    runs = [(word, len(list(same))) for word, same in itertools.groupby(shown)]
    words = [
        word
        for value, num in runs
        for word in ([f"{num} x 0"] if value == "0" and num > 2 else [value] * num)
    ]
    return f"[{', '.join(words if len(words) <= 6 else [*words[:3], '...', *words[-2:]])}]"
