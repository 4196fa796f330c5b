"""Judge the accumulation of several ranks: what each leaves, against one pass over all examples.

Every rank is given its share, as in training, and the reference is computed on each of them from
the examples of all, without any reduction.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradaccum.audit import FLOORS, UNITS
from gradaccum.batch import HostBatch, Listed
from gradaccum.engine import Accumulator
from gradaccum.errors import BadInput
from gradaccum.measures import dot, norm, relative_error, rounding
from gradaccum.objective import Objective
from gradaccum.restore import gradients_aside
from gradaccum.state import without_dropout
from gradaccum.sync.choose import module_of
from gradaccum.sync.replicated import control_group, fingerprints
from gradaccum.trace import Watch
from gradaccum.trees import to_device
from gradaccum.types import Budget
from gradaccum.verdict import Comparison, Diagnosis, Verdict

Loop = Callable[[nn.Module, list[Any]], object]
NEAR = 1e-3  # how near a factor has to be to be named


def audit_ranks(
    loop: Loop | Accumulator, model: nn.Module, share: HostBatch, objective: Objective
) -> Verdict:
    """Compare what a loop leaves on each rank with the gradient of all ranks' examples.

    Collective: every rank calls it with its share. The share runs as one micro-batch, and, where
    all ranks have as many examples, one at a time.

    Args:
        loop: As of `verify`; reduces over ranks, as in training.
        model: What the loop trains, wrapped as there.
        share: This rank's examples, as a list.
        objective: Of the reference.

    Raises:
        BadInput: The share is collated, or no rank has an example.
    """
    if not isinstance(share, Listed):
        raise BadInput("on several ranks verify takes a list of examples, not a collated batch")
    inner, rank = module_of(model), dist.get_rank()
    parameters = [p for p in inner.parameters() if p.requires_grad]
    given = _gathered([_packed(example) for example in share])
    shares = [list(map(_unpacked, rows)) for rows in given]
    rows = [row for own in shares for row in own]
    if not rows:
        raise BadInput("no rank has an example")
    found = [*_diverged(inner), *_doubled(given)]
    sizes = tuple(map(len, shares))
    with gradients_aside(parameters), without_dropout(inner):
        watch = Watch(inner)

        def alone(examples: Sequence[Any]) -> list[Tensor]:
            """Return the gradient of these by our engine, in one pass and on this rank alone."""
            engine = Accumulator(inner, objective, budget=Budget(examples=len(examples)))
            work = watch.run(lambda: engine.attempt(Listed(list(examples), share.collate)))
            return _filled(work.gradients, parameters)

        full = alone(rows)
        floor = max(relative_error(alone(rows[::-1]), full), rounding(inner, full, torch.float32))
        tolerance = max(FLOORS * floor, UNITS * torch.finfo(parameters[0].dtype).eps)
        local = alone(shares[rank]) if shares[rank] else [torch.zeros_like(g) for g in full]
        comparisons: list[Comparison] = []
        for cut in _cuts(sizes):
            left = _filled(_ran(loop, model, watch, share, cut).gradients, parameters)
            comparison = _compared(tuple(min(cut, n) for n in sizes), left, full)
            comparisons.append(comparison)
            names = [name for name, p in inner.named_parameters() if p.requires_grad]
            found += _apart(names, left, tolerance)
            if comparison.relative_error > tolerance:
                found += _named(left, full, local, tolerance)
    diagnoses = {diagnosis.name: diagnosis for diagnosis in found}
    return Verdict(
        subject=f"{getattr(loop, '__qualname__', type(loop).__name__).rpartition('.')[2]} on "
        f"{len(shares)} ranks",
        reference="gradaccum's engine in one pass on one rank",
        num_examples=len(rows),
        comparisons=tuple(comparisons),
        floor=floor,
        tolerance=tolerance,
        diagnoses=tuple(diagnoses.values()),
        notes=(),
        num_passes=3.0 + len(comparisons),
    )


def _cuts(sizes: Sequence[int]) -> list[int]:
    """Return the sizes of micro-batches to run, each in as many on every rank."""
    is_even = len(set(sizes)) == 1 and sizes[0] > 1
    return [max(sizes), 1] if is_even else [max(sizes)]


def _ran(loop: Loop | Accumulator, model: nn.Module, watch: Watch, share: Listed, size: int) -> Any:
    device = next(model.parameters()).device
    examples = list(share)
    parts = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]

    def work() -> None:
        if isinstance(loop, Accumulator):
            budget, loop.budget = loop.budget, Budget(examples=size)
            try:
                loop.backward(examples)
            finally:
                loop.budget = budget
        else:
            loop(model, [to_device(share.take(part), device) for part in parts])

    return watch.run(work)


def _diverged(model: nn.Module) -> list[Diagnosis]:
    prints = _gathered(fingerprints(model.named_parameters()))
    differ = sorted({name for other in prints[1:] for name, _ in prints[0].items() ^ other.items()})
    if not differ:
        return []
    return [
        Diagnosis(
            "diverged replicas",
            f"{len(differ)} of {len(prints[0])} parameters differ between ranks, {differ[0]} "
            "among them",
            "load the same weights on every rank, and step every rank's optimizer alike",
        )
    ]


def _doubled(given: Sequence[Sequence[bytes]]) -> list[Diagnosis]:
    """Look for an example that several ranks have."""
    seen: dict[str, tuple[int, int]] = {}
    doubled = []
    for rank, rows in enumerate(given):
        for i, row in enumerate(rows):
            first = seen.setdefault(hashlib.sha256(row).hexdigest(), (rank, i))
            if first[0] != rank:
                doubled.append(((rank, i), first))
    if not doubled:
        return []
    (rank, i), (other, j) = doubled[0]
    return [
        Diagnosis(
            "duplicated samples",
            f"{len(doubled)} examples are on several ranks: example {i} of rank {rank} is example "
            f"{j} of rank {other}",
            "gradaccum.EffectiveBatchSampler, or a DistributedSampler without padding "
            "(even_batches repeats examples)",
        )
    ]


def _apart(names: Sequence[str], left: Sequence[Tensor], tolerance: float) -> list[Diagnosis]:
    """Look for parameters whose gradients differ between ranks."""
    apart = []
    for name, gradient in zip(names, left, strict=True):
        most, least = gradient.clone(), gradient.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=control_group())
        dist.all_reduce(least, dist.ReduceOp.MIN, group=control_group())
        size = max(most.norm().item(), least.norm().item())
        if (most - least).norm().item() > tolerance * size:
            apart.append(name)
    if not apart:
        return []
    return [
        Diagnosis(
            "unsynchronised parameters",
            f"{len(apart)} of {len(names)} parameters have another gradient on each rank, "
            f"{apart[0]} among them",
            "reduce the gradients of all parameters, in the last backward of each rank",
        )
    ]


def _named(
    left: list[Tensor], full: list[Tensor], local: list[Tensor], tolerance: float
) -> list[Diagnosis]:
    """Name a gradient that is another function of the ranks' shares than it should be."""
    world = dist.get_world_size()
    factor = dot(left, full) / dot(full, full)
    scaled = [gradient * factor for gradient in full]
    near = max(tolerance, NEAR * abs(factor - 1))
    times = {float(world): f"{world} times too large", 1 / world: f"{world} times too small"}
    for exact, said in times.items():
        if abs(factor / exact - 1) < NEAR and relative_error(left, scaled) <= near:
            return [
                Diagnosis(
                    "world-size factor",
                    f"the gradient is {said}: a factor of the {world} ranks",
                    "divide the summed loss by the weight of all ranks, and add gradients up; or "
                    "multiply by the number of ranks where the backend averages",
                )
            ]
    means = [gradient.clone() for gradient in local]
    for gradient in means:
        dist.all_reduce(gradient, group=control_group())
        gradient /= world
    if relative_error(left, means) <= max(tolerance, 1e-6):
        return [
            Diagnosis(
                "mean of rank means",
                "each rank's share counts alike, whatever it weighs: the ranks' means are averaged",
                "divide each rank's summed loss by the weight of all ranks, and add gradients up",
            )
        ]
    return [
        Diagnosis(
            "another gradient",
            f"it differs by {relative_error(left, full):.1e} from that of all ranks' examples",
            "verify one rank alone first, then compare what each rank divides by",
        )
    ]


def _compared(sizes: tuple[int, ...], left: list[Tensor], full: list[Tensor]) -> Comparison:
    size = norm(full) or 1.0
    residual = dot([a - b for a, b in zip(left, full, strict=True)], full) / size**2
    return Comparison(sizes, relative_error(left, full), norm(left) / size, residual, ())


def _filled(gradients: Sequence[Tensor | None], parameters: list[nn.Parameter]) -> list[Tensor]:
    pairs = zip(gradients, parameters, strict=True)
    return [torch.zeros(p.shape, dtype=torch.float64) if g is None else g for g, p in pairs]


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=control_group())  # gradients lie on the host
    return found


def _packed(example: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(example, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=False)  # of ranks of this very job
