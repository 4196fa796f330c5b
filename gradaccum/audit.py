"""Run a subject in several cuts, compare each with the full batch, and judge by rounding alone.

What a subject is (a loop, an Accumulator, a Trainer) is known to whoever makes it; here it is two
functions: one that runs an effective batch in micro-batches, and one that runs rows in one pass.
"""

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.device import is_out_of_memory, suppressing_out_of_memory
from gradaccum.diagnosis import diagnose
from gradaccum.errors import BadInput, GradaccumError
from gradaccum.measures import dot, norm, relative_error, rounding
from gradaccum.restore import dropping, gradients_aside
from gradaccum.state import without_dropout
from gradaccum.trace import Trace, Watch, sample
from gradaccum.types import counted
from gradaccum.verdict import Comparison, Verdict
from gradaccum.weights import Cut, Evidence, Fit, fit

# An error passes up to so many times the measured floor, or so many units in the last place where
# that is more. 400 correct loops stay below half of it (docs/guides/verify.md).
FLOORS, UNITS = 20, 16
# Above this, two orders of the same rows differ by more than rounding does in 32 bits and more.
UNORDERED = 1e-3
ONE_BY_ONE, UNFIT = "gradaccum's engine one example at a time", "the full batch does not fit"
SUM_OF_MEANS = "the means of the micro-batches are added up and never divided by their number"
FIXED_OR_NONE = (
    "nothing divides by the number of micro-batches that ran (a fixed divisor or none at all: its "
    "own full batch has it too)"
)
UNSEEN = "a factor that is the same at every cut cannot be seen against its own full batch"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """Say how what is audited runs.

    Args:
        name: What it is called in the verdict.
        model: Holds the gradients.
        num_examples: Examples in the effective batch.
        run: Runs the effective batch in these micro-batches.
        full: Runs these examples in one pass: the reference.
        reference: What the reference is.
        take: Collates some examples, for looking at their labels.
        alone: Runs these examples one at a time through our own engine, on the model or on a copy
            of it in float64: the reference where the full batch does not fit.
        is_own: The reference is `run` with one micro-batch, so that one needs no comparison.
        unseen: What the reference cannot show, where it is worth a note.
        undivided: Why nothing divides by the number of micro-batches, where that is found.
        remedy: What to do about a wrong weight, where that is not to change the loop.
        beside: Looks at what leaves no gradient, and returns a note or nothing.
    """

    name: str
    model: nn.Module
    num_examples: int
    run: Callable[[Cut], object]
    full: Callable[[Sequence[int]], object]
    reference: str
    take: Callable[[Sequence[int]], Any]
    alone: Callable[[nn.Module, Sequence[int]], object] | None = None
    is_own: bool = True
    unseen: str = ""
    undivided: str = SUM_OF_MEANS
    remedy: str = ""
    beside: Callable[[], str] = str


def chunks(num_examples: int, size: int) -> tuple[int, ...]:
    """Return the sizes of micro-batches of `size` rows, the last one with what is left."""
    whole, rest = divmod(num_examples, size)
    return (size,) * whole + ((rest,) if rest else ())


def default_splits(num_examples: int) -> tuple[tuple[int, ...], ...]:
    """Return one at a time, pairs, and one with a short last micro-batch.

    Example:
        >>> default_splits(4)
        ((1, 1, 1, 1), (2, 2), (3, 1))
    """
    sizes = dict.fromkeys([1, 2])
    ragged = [size for size in range(2, num_examples) if num_examples % size]
    found = dict.fromkeys([*sizes, *ragged[-1:], *ragged[:1]])
    splits = dict.fromkeys(chunks(num_examples, size) for size in found if size < num_examples)
    return tuple(splits)[:3]


def audit(subject: Subject, splits: Iterable[Sequence[int]] | None = None) -> Verdict:
    """Compare every cut with the full batch and name what is wrong.

    Takes two passes over the effective batch (the full batch in both orders of its rows) and one
    for each split; what is not exact takes up to one more for each split, to find the weights of
    the micro-batches; what does not fit one more, in float64. On the host: the weights, and three
    gradients in float64.

    Raises:
        BadInput: A split does not hold all examples; the full batch has no gradient.
    """
    num = subject.num_examples
    if num == 1 and splits is None:
        raise BadInput("1 example is no split", hint="pass at least 2 examples")
    wanted = default_splits(num) if splits is None else tuple(map(tuple, splits))
    if not subject.is_own:
        wanted = ((num,), *wanted)
    cuts = tuple(_cut(sizes, num) for sizes in wanted)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    if not parameters:
        raise BadInput("the model has no parameter that requires a gradient")
    dropped = dropping(subject.model)
    with gradients_aside(parameters), without_dropout(subject.model):
        return _Audit(subject, cuts).verdict(dropped)


def _cut(sizes: tuple[int, ...], num_examples: int) -> Cut:
    is_whole = all(isinstance(size, int) and size > 0 for size in sizes)
    if not is_whole or sum(sizes) != num_examples:
        raise BadInput(
            f"the split {sizes} does not cut {counted(num_examples, 'example')}",
            hint=f"such as {default_splits(num_examples)[0] if num_examples > 1 else (1,)}",
        )
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True))


@dataclass(frozen=True, slots=True)
class _Run:
    """Hold what is known of one cut once it has run.

    Args:
        cut: The examples of each micro-batch.
        trace: What was seen.
        left: How the gradient compares that the cut left.
        before: How it compares before it was rescaled after the last backward.
        factor: Makes the gradient that was left the one before.
        values: Stand for the gradient that was left.
    """

    cut: Cut
    trace: Trace
    left: Comparison
    before: Comparison
    factor: float
    values: Tensor


class _Audit:
    """Hold what one audit measures; `verdict` runs it."""

    def __init__(self, subject: Subject, cuts: tuple[Cut, ...]) -> None:
        self._subject = subject
        self._cuts = cuts
        self._watch = Watch(subject.model)
        self._rows = tuple(range(subject.num_examples))
        self._num_passes = 0.0
        self._run_whole = subject.full
        self._reference_name = subject.reference
        self._full: list[Tensor] = []
        self._full_rescaled = 1.0
        self._random = self._unordered = 0.0

    def verdict(self, dropped: list[str]) -> Verdict:
        subject = self._subject
        trace = self._whole()
        self._full = self._gradients(trace)
        self._refuse_empty(trace)
        if subject.is_own:
            self._full_rescaled = trace.rescaled
        floor = max(self._floor(trace), self._widen())
        logger.info("%-16s error %.1e", "rounding alone", floor)
        tolerance = max(FLOORS * floor, UNITS * self._eps())
        runs = [run for cut in self._cuts if (run := self._run(cut)) is not None]
        is_before, notes = _rescaled(runs, tolerance, [trace] if subject.is_own else [])
        comparisons = tuple(run.before if is_before else run.left for run in runs)
        wrong = {
            i: run for i, run in enumerate(runs) if not comparisons[i].relative_error <= tolerance
        }
        evidence = Evidence(
            cuts=tuple(run.cut for run in runs),
            comparisons=comparisons,
            traces=tuple(run.trace for run in runs),
            fits=self._fits(wrong, is_before=is_before),
            tolerance=tolerance,
            leftover=self._leftover(runs, tolerance),
            random=self._random,
            unordered=self._unordered,
            labels=self._labels,
            undivided=subject.undivided,
            remedy=subject.remedy,
        )
        unseen = subject.unseen if self._run_whole is subject.full else ""
        return Verdict(
            subject=subject.name,
            reference=self._reference_name,
            num_examples=subject.num_examples,
            comparisons=comparisons,
            floor=floor,
            tolerance=tolerance,
            diagnoses=diagnose(evidence),
            notes=(*notes, *filter(None, [_dropped(dropped), unseen, subject.beside()])),
            num_passes=self._num_passes,
        )

    def _run(self, cut: Cut) -> _Run | None:
        """Run one cut; None where it is the whole batch, which need not fit."""
        self._num_passes += 1
        work = functools.partial(self._subject.run, cut)
        try:
            trace = self._watch.run(work)
        except Exception as error:
            if len(cut) > 1 or not is_out_of_memory(error):
                raise
            return None
        gradients = self._gradients(trace)
        trace.gradients = []
        left = self._compare(cut, gradients)
        if trace.too_few is not None:
            left = Comparison(left.sizes, math.inf, math.nan, math.nan, ())
        logger.info("%-16s error %.1e", left.cut, left.relative_error)
        values, before, factor = _flat(gradients), left, self._full_rescaled / trace.rescaled
        if factor != 1 and trace.too_few is None:
            before = self._compare(cut, [gradient.mul_(factor) for gradient in gradients])
        return _Run(cut, trace, left, before, factor, values)

    def _whole(self) -> Trace:
        """Run the full batch, by our own engine one example at a time where it does not fit."""
        with suppressing_out_of_memory():
            return self._reference(self._rows)
        # Outside of the except block, whose traceback keeps every activation alive.
        num, alone = counted(len(self._rows), "example"), self._subject.alone
        if alone is None:
            raise BadInput(
                f"the full batch of {num} does not fit into memory",
                hint="pass objective=, and our engine runs it one by one; or fewer examples",
            )
        self._run_whole = functools.partial(alone, self._subject.model)
        self._reference_name = f"{ONE_BY_ONE} in the model's own precision, as {UNFIT}"
        with suppressing_out_of_memory():
            return self._reference(self._rows)
        raise BadInput(
            f"of {num}, not even one at a time fits into memory", hint="give shorter examples"
        )

    def _widen(self) -> float:
        """Take float64 for a reference that runs one by one; return by how much it differs.

        What differs by more than rounding does is not the same function (a quantised weight, a
        part that runs in 32 bits alone); that, what does not fit and what fails stays as it was.
        """
        alone = self._subject.alone
        if self._run_whole is self._subject.full or alone is None:
            return 0.0
        self._num_passes += 1
        # Out of memory is a RuntimeError.
        with contextlib.suppress(RuntimeError, TypeError, GradaccumError):
            model = copy.deepcopy(self._subject.model).double()
            trace = Watch(model).run(functools.partial(alone, model, self._rows))
            wide = self._gradients(trace)
            error = relative_error(self._full, wide)
            stored = rounding(self._subject.model, wide, trace.autocast)
            if error <= max(UNORDERED, FLOORS * stored):
                self._full = wide
                self._reference_name = f"{ONE_BY_ONE} in float64, as {UNFIT}"
                return error
        return 0.0

    def _reference(self, rows: Sequence[int], *, seed: int | None = None) -> Trace:
        def work() -> None:
            if seed is not None:
                torch.manual_seed(seed)
            self._run_whole(rows)

        self._num_passes += len(rows) / len(self._rows)
        trace = self._watch.run(work)
        if trace.too_few is not None:
            raise trace.too_few
        return trace

    def _gradients(self, trace: Trace) -> list[Tensor]:
        pairs = zip(trace.gradients, self._watch.parameters, strict=True)
        return [torch.zeros(p.shape, dtype=torch.float64) if g is None else g for g, p in pairs]

    def _refuse_empty(self, trace: Trace) -> None:
        if all(gradient is None for gradient in trace.gradients):
            raise BadInput(
                f"{self._subject.name} left no gradient on the full batch of "
                f"{counted(len(self._rows), 'example')}",
                hint="the loop has to leave it in .grad of the model it is given",
            )
        if not norm(self._full):
            raise BadInput(
                "the gradient of the full batch is zero, so there is nothing to compare",
                hint="give examples that are trained on",
            )

    def _floor(self, trace: Trace) -> float:
        """Measure what rounding alone causes: other orders of the rows, and the dtype itself."""
        stored = rounding(self._subject.model, self._full, trace.autocast)
        turned = relative_error(self._gradients(self._reference(self._rows[::-1])), self._full)
        if not turned > max(1e3 * self._eps(), 20 * stored):
            return max(turned, stored)
        again = relative_error(self._gradients(self._reference(self._rows, seed=1)), self._full)
        if again > 0.1 * turned:
            self._random = again
            return stored
        if turned > max(UNORDERED, 20 * stored):
            self._unordered = turned
            return stored
        return turned

    def _eps(self) -> float:
        """Return the last place of the widest dtype in which these gradients may be summed."""
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in self._watch.parameters]
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _compare(self, cut: Cut, gradients: list[Tensor]) -> Comparison:
        size = norm(self._full)
        error = relative_error(gradients, self._full)
        return Comparison(
            sizes=tuple(map(len, cut)),
            relative_error=error if math.isfinite(error) else math.inf,
            norm_ratio=norm(gradients) / size,
            signed_residual=dot(gradients, self._full) / size**2 - 1,
            worst=self._worst(gradients),
        )

    def _worst(self, gradients: list[Tensor]) -> tuple[tuple[str, float], ...]:
        """Return the modules whose own gradient is the farthest off."""
        named = [n for n, p in self._subject.model.named_parameters() if p.requires_grad]
        modules: dict[str, list[int]] = {}
        for i, name in enumerate(named):
            modules.setdefault(name.rpartition(".")[0] or name, []).append(i)
        errors = {
            module: relative_error([gradients[i] for i in own], [self._full[i] for i in own])
            for module, own in modules.items()
        }
        order = sorted(errors, key=lambda m: (not math.isnan(errors[m]), -errors[m]))
        return tuple((module, errors[module]) for module in order[:3] if errors[module] != 0)

    def _fits(self, wrong: Mapping[int, _Run], *, is_before: bool) -> dict[int, Fit]:
        """Find the weights of the micro-batches of the cuts that are wrong.

        Args:
            wrong: By their number.
            is_before: Of the gradients before they were rescaled after the last backward.
        """
        alone: dict[tuple[int, ...], Tensor] = {}
        fits, full = {}, _flat(self._full)
        model = _flat([p.detach().to("cpu", torch.float64) for p in self._watch.parameters])
        for i, run in wrong.items():
            if run.trace.too_few is not None:
                continue
            logger.info("%-16s is wrong: its micro-batches run alone", run.left.cut)
            for rows in run.cut:
                if rows not in alone:
                    alone[rows] = self._alone(rows, is_before=is_before)
            parts = [alone[rows] for rows in run.cut]
            values = run.values * run.factor if is_before else run.values
            if all(bool(t.isfinite().all()) for t in (values, full, *parts)):
                fits[i] = fit(values, full, parts, model)
        return fits

    def _alone(self, rows: Sequence[int], *, is_before: bool) -> Tensor:
        trace = self._reference(rows)
        is_rescaled = is_before and self._subject.is_own
        factor = self._full_rescaled / trace.rescaled if is_rescaled else 1.0
        return _flat(self._gradients(trace)) * factor

    def _leftover(self, runs: list[_Run], tolerance: float) -> float:
        """Run a cut twice without clearing in between; return by how much the second differs."""
        cut = next((run.cut for run in runs if run.trace.left and run.trace.too_few is None), None)
        if cut is None:
            return 0.0
        work = functools.partial(self._subject.run, cut)
        self._num_passes += 2
        once = self._gradients(self._watch.run(work))
        again = self._gradients(self._watch.run(work, keep_gradients=True))
        change = relative_error(again, once)
        return change if change > tolerance else 0.0

    def _labels(self, rows: Sequence[int]) -> Any:
        inputs = self._subject.take(rows)
        return inputs.get("labels") if isinstance(inputs, Mapping) else None


def _flat(gradients: list[Tensor]) -> Tensor:
    """Return the values that stand for a gradient when its weights are found."""
    return torch.cat([sample(gradient) for gradient in gradients])


def _rescaled(runs: list[_Run], tolerance: float, own: list[Trace]) -> tuple[bool, list[str]]:
    """Tell whether to compare what was there before the last rescaling, and what to say of it.

    A division by the whole weight belongs to the gradient, a clip does not; both are one factor.
    So the gradient that is left is taken where it is exact, and the one before where that is exact
    or the former has one norm at every cut while the factors differ, as only a clip makes it.

    Args:
        runs: One for each cut.
        tolerance: The relative error that passes.
        own: What was seen of the full batch, where it ran as the cuts did.
    """
    factors = [trace.rescaled for trace in (*own, *(run.trace for run in runs))]
    if not runs or all(factor == 1 for factor in factors):
        return False, []
    low, high = min(factors), max(factors)
    is_one = high - low <= 1e-3 * high
    shown = f"{low:.3g}" if is_one else f"{low:.3g} to {high:.3g}"
    norms = [*(1.0 for _ in own), *(run.left.norm_ratio for run in runs)]
    is_changed = any(run.trace.changed for run in runs)  # that is named, and no clip at the end
    is_clipped = not (is_one or is_changed) and max(norms) - min(norms) <= 1e-3 * max(norms)
    if all(run.left.relative_error <= tolerance for run in runs):
        hides = (
            f"after the last backward the gradients are rescaled by {shown}; if that is a clip, it "
            "hides a missing division: verify without it"
        )
        return False, [hides] if is_clipped else []
    if is_clipped or all(run.before.relative_error <= tolerance for run in runs):
        compared = (
            f"after the last backward the gradients are rescaled by {shown} (clipping, unscaling): "
            "compared is what was there before"
        )
        return True, [compared]
    said = f"after the last backward the gradients are rescaled by {shown}"
    return False, [] if is_changed else [said]


def _dropped(dropped: list[str]) -> str:
    if not dropped:
        return ""
    more = f" and {len(dropped) - 3} more" if len(dropped) > 3 else ""
    return (
        f"dropout was switched off to compare ({', '.join(dropped[:3])}{more}): in training it "
        "draws other masks for another cut, as for another seed"
    )
