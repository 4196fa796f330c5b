"""Name what is wrong with an accumulated gradient, from what was seen while it was made.

What only the gradients themselves tell (wrong divisors, coupled rows) is named in `weights.py`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradaccum.types import IGNORE_INDEX, counted
from gradaccum.verdict import Diagnosis
from gradaccum.weights import Evidence, name_weights


def diagnose(evidence: Evidence) -> tuple[Diagnosis, ...]:
    """Return every cause that was found, those that explain the rest first."""
    if any(trace.too_few is not None for trace in evidence.traces):
        return tuple(_batch_norm(evidence))  # the rest of that cut never ran
    breaking = [_not_finite, _random, _tail, _steps, _changed, _moved, _batch_norm]
    others = [_not_zeroed, _schedule, _low_precision]
    found = [d for look in breaking for d in look(evidence)]
    # A gradient that something else has spoilt has no weights worth a name.
    weights = [] if found else name_weights(evidence)
    found += weights + [d for look in others for d in look(evidence)]
    if evidence.wrong and not found:
        found.append(_unexplained(evidence))
    return tuple(found)


def _not_finite(e: Evidence) -> list[Diagnosis]:
    bad = [i for i in e.wrong if not math.isfinite(e.comparisons[i].relative_error)]
    if not bad:
        return []
    for i in bad:
        for rows in e.cuts[i]:
            if _is_untrained(e.labels(rows)):
                return [
                    Diagnosis(
                        "no trained label",
                        f"the gradient is not finite: every label of the micro-batch with "
                        f"examples {list(rows)} is {IGNORE_INDEX}, and its mean is 0/0",
                        e.remedy
                        or "divide a summed loss by the labels of the whole effective batch; "
                        "gradaccum.Accumulator does not run a micro-batch without weight",
                    )
                ]
    return [
        Diagnosis(
            "not finite",
            f"the gradient is not finite in {len(bad)} of {counted(len(e.cuts), 'cut')}",
            "look for infinite weights, an overflow of float16, or a division by zero in the loss",
        )
    ]


def _is_untrained(labels: Any) -> bool:
    return isinstance(labels, Tensor) and bool((labels == IGNORE_INDEX).all())


def _random(e: Evidence) -> list[Diagnosis]:
    if not e.random:
        return []
    return [
        Diagnosis(
            "random",
            f"two runs of the same full batch differ by {e.random:.2g} under two seeds, "
            "so no cut can be compared with it",
            "switch the noise off while verifying (F.dropout, noise on inputs, random masks); "
            "in training it draws others for another cut, as for another seed",
        )
    ]


def _steps(e: Evidence) -> list[Diagnosis]:
    most = max((sorted(set(t.steps)) for t in e.traces), key=len)
    if len(most) < 2:
        return []
    trace = next(t for t in e.traces if sorted(set(t.steps)) == most)
    return [
        Diagnosis(
            "optimizer steps inside the window",
            f"{len(most)} optimizer steps in one effective batch of "
            f"{counted(trace.num_backwards, 'micro-batch')}, the first after "
            f"{most[0]} of them",
            "step once, after the last micro-batch",
        )
    ]


def _tail(e: Evidence) -> list[Diagnosis]:
    stepping = any(t.steps for t in e.traces)
    for trace in e.traces:
        unstepped = trace.num_backwards - max(trace.steps, default=0)
        if stepping and unstepped:
            leak = f", and the next window starts with them (changed by {e.leftover:.2g})"
            return [
                Diagnosis(
                    "tail left unstepped",
                    f"{unstepped} of {counted(trace.num_backwards, 'micro-batch')} were added up "
                    f"after the last optimizer step{leak if e.leftover else ''}",
                    "step after the last micro-batch of every effective batch, also of a short one",
                )
            ]
    return []


def _changed(e: Evidence) -> list[Diagnosis]:
    # Only where the gradient is wrong: whoever measures first and clears again has changed nothing.
    for trace in (e.traces[i] for i in e.wrong):
        if trace.changed:
            before, (factor, change) = next(iter(trace.changed.items()))
            return [
                Diagnosis(
                    "gradients changed inside the window",
                    f"before micro-batch {before + 1} of {trace.num_backwards} the gradients are "
                    f"{factor:.4g} times what had been added up, a change of {change:.2g} of "
                    f"their norm ({counted(len(trace.changed), 'change')} in all)",
                    "clear, clip, scale and decay gradients once, after the last micro-batch",
                )
            ]
    return []


def _moved(e: Evidence) -> list[Diagnosis]:
    if not any(e.traces[i].moved for i in e.wrong):
        return []
    return [
        Diagnosis(
            "weights changed inside the window",
            "the weights are not the same for all micro-batches of one effective batch, and no "
            "optimizer has stepped",
            "apply weight decay, averages of weights and projections once, after the step",
        )
    ]


def _batch_norm(e: Evidence) -> list[Diagnosis]:
    names = {name for i in e.wrong for name in e.traces[i].batch_norms}
    if not names:
        return []
    failed = [e.comparisons[i].cut for i in e.wrong if e.traces[i].too_few is not None]
    errors = [e.comparisons[i].relative_error for i in e.wrong if e.traces[i].too_few is None]
    said = [f"error {max(errors):.2g}"] if errors else []
    said += [f"torch refuses a micro-batch of one row (at {', '.join(failed)})"] if failed else []
    return [
        Diagnosis(
            "BatchNorm in training mode",
            f"{_some(names)} {'normalise' if len(names) > 1 else 'normalises'} each micro-batch by "
            f"its own statistics: {'; '.join(said)}",
            "put these modules in eval mode, or use GroupNorm; no accumulation is exact with them",
        )
    ]


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(shown[:3]) + more


def _not_zeroed(e: Evidence) -> list[Diagnosis]:
    is_tail = any(t.num_backwards > max(t.steps, default=0) for t in e.traces)
    if not e.leftover or is_tail:
        return []
    return [
        Diagnosis(
            "gradients not zeroed",
            f"the gradients of one step are still there in the next: they change it by "
            f"{e.leftover:.2g} of its norm",
            "optimizer.zero_grad() after each optimizer.step()",
        )
    ]


def _schedule(e: Evidence) -> list[Diagnosis]:
    for trace in e.traces:
        if trace.scheduler_steps > max(1, len(set(trace.steps))):
            return [
                Diagnosis(
                    "scheduler per micro-batch",
                    f"the learning rate scheduler stepped {trace.scheduler_steps} times in one "
                    f"effective batch of {counted(trace.num_backwards, 'micro-batch')}, so the "
                    f"schedule ends {trace.scheduler_steps} times too early",
                    "scheduler.step() once after each optimizer.step()",
                )
            ]
    return []


def _low_precision(e: Evidence) -> list[Diagnosis]:
    low = {torch.bfloat16, torch.float16}
    for trace, comparison in zip(e.traces, e.comparisons, strict=True):
        found = sorted(map(str, trace.sum_dtypes & low))
        if found:
            kind = found[0].removeprefix("torch.")
            return [
                Diagnosis(
                    "16-bit sum",
                    f"gradients are added up in {kind}, which keeps "
                    f"{8 if kind == 'bfloat16' else 11} bits: error "
                    f"{comparison.relative_error:.1e} at "
                    f"{counted(trace.num_backwards, 'micro-batch')}, growing with their number",
                    "add up in float32: set p.grad_dtype = torch.float32 for the window, as "
                    "gradaccum.Accumulator does",
                )
            ]
    return []


def _unexplained(e: Evidence) -> Diagnosis:
    worst = max((e.comparisons[i] for i in e.wrong), key=lambda c: c.relative_error)
    where = ", ".join(f"{name} {error:.1e}" for name, error in worst.worst)
    return Diagnosis(
        "unexplained",
        f"error {worst.relative_error:.2g} at {worst.cut}, no weighting of the micro-batches "
        f"explains it; worst in {where}",
        "look there for gradients that are changed by a hook, or a loss that sees several batches",
    )
