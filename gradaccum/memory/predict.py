"""Predict what a step needs, on a twin of the model that holds no data.

The step is a steady one, run by the engine itself: the optimizer has its state, and the second
micro-batch finds the gradients of the first. Two traces, with two and with three rows, have the
same operations; whatever is alive after each of them is an affine function of the rows, so the peak
for any number of rows is the largest of these, exactly.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from gradaccum.batch import Listed
from gradaccum.engine import Accumulator, Window
from gradaccum.memory.machine import Machine
from gradaccum.memory.spread import Spread
from gradaccum.memory.tracker import AFTER, CATEGORIES, Op, Tracker
from gradaccum.memory.twin import fake_like, faking, twin_of
from gradaccum.objective import Objective, unweighted
from gradaccum.state import batch_norms
from gradaccum.trees import map_leaves
from gradaccum.types import Budget

LARGE = 10**9  # parameters, from which a trace takes many seconds


@dataclass(frozen=True, slots=True)
class Job:
    """Say what one step is.

    Args:
        model: Real or on the meta device. In eval mode it is put into training mode; otherwise
            modules that are in eval mode (frozen BatchNorm) stay there.
        objective: Its loss is traced; nothing is counted.
        optimizer: Makes the optimizer of some parameters.
        inputs: Makes the collated micro-batch of so many rows and so many tokens each.
        padded: Rows differ in length, so that a micro-batch of several has padding.
        autocast: The dtype of autocast, if forwards run under it.
        as_cuda: Count as on CUDA, as far as that is known, see `Tracker`.
        checkpointing: Whether activations are computed again in backward, where the model has the
            switch that those of transformers have; None: as it is.
        num_micros: 2, of which the second finds gradients; 1 where a step has no more.
    """

    model: nn.Module
    objective: Objective
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    inputs: Callable[[int, int], Any]
    padded: bool = False
    autocast: torch.dtype | None = None
    as_cuda: bool = False
    checkpointing: bool | None = None
    num_micros: int = 2

    def window(self, rows: int, length: int, num_micros: int) -> Window:
        """Return a window of so many equal micro-batches."""
        collate = functools.partial(self._collate, rows, length)
        accumulator = self.accumulator(self.model, Tracker())
        return accumulator.prepare(Listed(range(num_micros), collate))

    def _collate(self, rows: int, length: int, _: Any) -> Any:
        return self.inputs(rows, length)

    def accumulator(self, model: nn.Module, tracker: Tracker) -> Accumulator:
        """Return the engine that runs the step of this model, or of its twin."""

        own = unweighted(self.objective)

        def loss(model: nn.Module, micro: Any) -> Tensor:
            with self._casting(next(model.parameters()).device.type):
                return own.loss(model, micro)

        def after(_: Any) -> None:
            tracker.part += 1

        plain = dataclasses.replace(own, loss=loss, size=lambda _: 1)
        return Accumulator(model, plain, budget=Budget(examples=1), after_micro=after)

    def _casting(self, device: str) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device, self.autocast)


def run_step(
    job: Job, model: nn.Module, optimizer: Optimizer, window: Window, tracker: Tracker
) -> None:
    """Run one steady step of a model, real or fake, under the tracker."""
    tracker.follow(model, optimizer, window.inputs)
    try:
        with tracker:
            job.accumulator(model, tracker).attempt(window)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        tracker.close()


def trace(
    job: Job,
    rows: int,
    length: int,
    *,
    num_micros: int | None = None,
    is_short: bool = False,
    record: bool = False,
) -> Tracker:
    """Run one steady step on a twin of the model: seconds for billions of parameters, no memory.

    Args:
        job: What one step is.
        rows: Of each micro-batch.
        length: Tokens of each row.
        num_micros: Instead of the job's own.
        is_short: The first of two leaves gradients of all trained parameters without a forward:
            half the time, and too much where the loss does not use some.
        record: As of `Tracker`.

    Raises:
        Exception: The forward depends on values, which the twin does not have.
    """
    tracker = Tracker(record=record, as_cuda=job.as_cuda)
    window = job.window(rows, length, num_micros or job.num_micros)
    with faking(job.model, padded=job.padded and rows > 1, as_cuda=job.as_cuda) as mode:
        same = functools.cache(functools.partial(fake_like, mode=mode))  # one for each tensor
        inputs = map_leaves(window.inputs, same)
        model = as_trained(twin_of(job.model, mode))
        switch(model, job.checkpointing)
        optimizer = job.optimizer(_trained(model))
        for p in _trained(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()  # its first, which makes its state; there are no values to change
        optimizer.zero_grad()
        kept = _kept(model, rows, length)
        losses = (_touching(kept), *window.losses[1:]) if is_short else window.losses
        window = dataclasses.replace(window, inputs=inputs, losses=losses)
        run_step(job, model, optimizer, window, tracker)
    return tracker


def _touching(kept: Callable[[], Any]) -> Callable[[nn.Module, Any], Tensor]:
    """Return a loss that uses every trained parameter and runs nothing else."""

    def loss(model: nn.Module, _: Any) -> Tensor:
        # They live as long as the loss, as those of a real one.
        return torch.stack([p.sum().float() for p in (*_trained(model), *kept())]).sum()

    return loss


def _kept(model: Any, rows: int, length: int) -> Callable[[], list[Tensor]]:
    """Return what makes the tensors beside parameters that get gradients in a micro-batch.

    With adapters and checkpointing, transformers makes the embedding's output a leaf
    (`enable_input_require_grads`), which stays, with its gradient, as long as its loss.
    """
    is_hooked = any(getattr(m, "_require_grads_hook", None) is not None for m in model.modules())
    weight = model.get_input_embeddings().weight if is_hooked else None
    if weight is None or weight.requires_grad:
        return list
    shape = (rows, length, weight.shape[-1])
    return lambda: [torch.empty(shape, dtype=weight.dtype, requires_grad=True)]


def as_trained(model: nn.Module) -> nn.Module:
    """Put a model into training mode; one that is there already keeps what it has frozen."""
    return model if model.training else model.train()


def needs_whole(model: nn.Module) -> bool:
    """Tell whether BatchNorm will normalise by the statistics of a micro-batch."""
    if model.training:
        return bool(batch_norms(model))
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def is_checkpointing(model: Any) -> bool | None:
    """Tell whether checkpointing is on; None where the model has no switch for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that are about to change
        return getattr(model, "is_gradient_checkpointing", None)


def switch(model: Any, on: bool | None) -> None:
    """Switch checkpointing on or off, if it is the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if on is None or is_checkpointing(model) in (None, on):
            return
        if on:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            model.gradient_checkpointing_disable()


def is_large(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) > LARGE


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Envelope:
    """Give peak and cost of a micro-batch with any number of rows of one length.

    A loss that takes its positions in chunks costs more a token up to one chunk than beyond. Then
    it is read off between traces below and above: no longer exact, and to be confirmed.

    Args:
        job: What one step is.
        length: Tokens of each row.
        one_row: The trace of one row, where there is one: it then takes the place of another.
    """

    def __init__(self, job: Job, length: int, one_row: "Operations | None" = None) -> None:
        self.length = length
        chunk = job.objective.chunk
        one = max(2, -(-(chunk or 0) // length))  # rows of one chunk
        rows = {2, 3} if chunk is None else {2, one, 2 * one}
        if one_row is not None:
            rows = {3} if chunk is None else {2 * one}
        traced = [Operations(job, num, length) for num in sorted(rows)]
        self._known = traced if one_row is None else [one_row, *traced]
        self.is_exact = chunk is None and torch.equal(self._known[0].part, self._known[1].part)

    def placed(self, spread: Spread) -> "Envelope":
        """Return the same for one rank of several."""
        other = copy.copy(self)
        other._known = [traced.placed(spread) for traced in self._known]
        return other

    def categories(self, rows: float) -> dict[str, int]:
        """Return the bytes that are alive where they are most, by category.

        Args:
            rows: May be a fraction: that many tokens in shorter rows.
        """
        if self.is_exact:
            most = self._between(rows, lambda traced: traced.total).argmax()
            live = self._between(rows, lambda traced: traced.live[most])
        else:
            live = self._between(rows, lambda traced: traced.live[traced.total.argmax()])
        return dict(zip(CATEGORIES, map(round, live.tolist()), strict=True))

    def peak_bytes(self, rows: float) -> int:
        """Return the bytes that are alive where they are most."""
        if self.is_exact:
            return round(self._between(rows, lambda traced: traced.total).max().item())
        return round(self._between(rows, lambda traced: traced.total.max()).item())

    def seconds(self, rows: float, machine: Machine) -> float:
        """Return the time of a micro-batch: the last of a step, which adds to gradients."""
        if not self.is_exact:
            return self._between(
                rows, lambda t: torch.tensor(machine.seconds(*t.costs(t.last)))
            ).item()
        flops, moved, num = self._costs
        low, high = (traced.rows for traced in self._known)
        share = torch.tensor([high - rows, rows - low], dtype=torch.float64) / (high - low)
        return machine.seconds(flops @ share, moved @ share, num)

    @property
    def after(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return FLOPs, bytes moved and number of the operations of the optimizer's step."""
        return self._known[0].costs(AFTER)

    @functools.cached_property
    def _costs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return FLOPs and bytes moved in both traces, (ops, 2), and how often each."""
        low, high = (torch.stack(traced.costs(traced.last)[:2], dim=-1) for traced in self._known)
        # Layers repeat: of 30,000 operations some hundred differ.
        rows, num = torch.cat([low, high], dim=-1).unique(dim=0, return_counts=True)
        return rows[:, [0, 2]], rows[:, [1, 3]], num

    def _between(self, rows: float, of: Callable[["Operations"], Tensor]) -> Tensor:
        """Return a value on the line through the two traces beside these rows."""
        last = len(self._known) - 1
        above = next((i for i in range(1, last) if self._known[i].rows >= rows), last)
        low, high = self._known[above - 1], self._known[above]
        share = (rows - low.rows) / (high.rows - low.rows)
        return of(low) + share * (of(high) - of(low))


class Operations:
    """Hold the operations of one traced step as tensors."""

    def __init__(self, job: Job, rows: int, length: int) -> None:
        self.rows, self.last = rows, job.num_micros - 1
        is_short = is_large(job.model) and job.num_micros == 2
        ops: list[Op] = trace(job, rows, length, is_short=is_short, record=True).ops
        part, *others = (torch.tensor(column) for column in zip(*ops, strict=True))
        self.part = part
        self._flops, self._moved, self.live = (values.double() for values in others)
        self.total = self.live.sum(-1)

    def placed(self, spread: Spread) -> "Operations":
        """Return the same for one rank of several."""
        other = copy.copy(self)
        other.live = spread.place(self.live, self.part)
        other.total = other.live.sum(-1)
        return other

    def categories(self) -> dict[str, int]:
        """Return the bytes that are alive where they are most, by category."""
        most = self.live[self.total.argmax()]
        return dict(zip(CATEGORIES, map(round, most.tolist()), strict=True))

    def costs(self, part: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return FLOPs, bytes moved and number of the operations of one part, (ops,) each."""
        wanted = self.part == part
        return self._flops[wanted], self._moved[wanted], wanted[wanted].double()
