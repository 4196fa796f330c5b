"""Forecast time and memory of a micro-batch of any shape: from traces, or from short runs."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import nn

from gradaccum.measured import quiet
from gradaccum.memory.cap import held_bytes
from gradaccum.memory.machine import Machine
from gradaccum.memory.predict import (
    Envelope,
    Job,
    Operations,
    as_trained,
    is_large,
    needs_whole,
    switch,
    trace,
)
from gradaccum.memory.probe import EXTRAPOLATED, Probed, measure, shapes
from gradaccum.memory.recipes import FourBit
from gradaccum.memory.spread import Spread
from gradaccum.memory.tracker import (
    ACTIVATIONS,
    AFTER,
    CATEGORIES,
    INPUTS,
    PARAMETERS,
    STATE,
    TEMPORARIES,
    Tracker,
)
from gradaccum.memory.twin import plain_tensors
from gradaccum.optimizers import materialize, state_bytes

MIDDLE = 0.6  # the part of the examples that are shorter than a row of middle length
PASSING = (ACTIVATIONS, TEMPORARIES, INPUTS)
SMALL = 2**30  # bytes of parameters, up to which a model is run to time it


class Traced:
    """Forecast from traces of the longest rows, of rows of middle length, and of one row alone.

    Shorter rows count by their tokens, as rows of the next longer trace: a little too much. One
    row alone has no padding, and with it no mask. The time of a small model on the machine at hand
    is measured instead.

    Args:
        job: What one step is.
        lengths: Of the examples.
        machine: Whose time is told.
        cap_bytes: If one row of a large model takes more, nothing else is traced; None: it all is.
    """

    def __init__(
        self, job: Job, lengths: Sequence[int], machine: Machine, cap_bytes: int | None
    ) -> None:
        ordered = sorted(lengths)
        longest, middle = ordered[-1], ordered[int(MIDDLE * len(ordered))]
        kinds = [middle, longest] if 2 * middle < longest else [longest]
        is_first = (job.padded or is_large(job.model)) and not needs_whole(job.model)
        self._alone = Operations(job, 1, longest) if is_first else None
        most = sum(self._alone.categories().values()) if self._alone is not None else 0
        self.is_hopeless = is_large(job.model) and cap_bytes is not None and most > cap_bytes
        one = None if job.padded else self._alone
        self._envelopes = (
            [] if self.is_hopeless else [Envelope(job, length, one) for length in kinds]
        )
        self._longest, self._least = longest, 0.0
        after = self._envelopes[0].after if self._alone is None else self._alone.costs(AFTER)
        self.seconds_after = machine.seconds(*after)
        self._seconds = functools.cache(lambda of, rows: of.seconds(rows, machine))
        self._peak = functools.cache(lambda of, rows: of.peak_bytes(rows))
        self._probed = _probed(job, lengths) if machine.is_here and is_small(job.model) else None
        if self._alone is not None:
            self._seconds_alone = machine.seconds(*self._alone.costs(self._alone.last))

    def placed(self, spread: Spread) -> "Traced":
        """Return the same for one rank of several, which sends while it computes."""
        other = copy.copy(self)
        other._envelopes = [envelope.placed(spread) for envelope in self._envelopes]
        other._alone = None if self._alone is None else self._alone.placed(spread)
        other._peak = functools.cache(lambda of, rows: of.peak_bytes(rows))
        other._least = spread.micro_seconds
        other.seconds_after = self.seconds_after / spread.shard_ranks + spread.step_seconds
        return other

    def seconds(self, rows: float, length: float) -> float:
        """Return the time of a micro-batch, forward and backward."""
        return max(self._least, self._computing(rows, length))

    def _computing(self, rows: float, length: float) -> float:
        if self._probed is not None:
            return self._probed.seconds(rows, length)
        if rows == 1 and self._alone is not None:
            return self._seconds_alone * length / self._longest
        return self._seconds(*self._beside(rows, length))

    def peak_bytes(self, rows: float, length: float) -> int:
        """Return what a step with such micro-batches takes at its peak."""
        if rows == 1 and self._alone is not None:
            return sum(self.categories(rows, length).values())
        return self._peak(*self._beside(rows, length))

    def categories(self, rows: float, length: float) -> dict[str, int]:
        """Return the same by category."""
        if rows > 1 or self._alone is None:
            envelope, share = self._beside(rows, length)
            return envelope.categories(share)
        found = self._alone.categories()
        return found | {name: int(found[name] * length // self._longest) for name in PASSING}

    def _beside(self, rows: float, length: float) -> tuple[Envelope, float]:
        envelope = next(e for e in self._envelopes if e.length >= length)
        return envelope, rows * length / envelope.length


def is_small(model: nn.Module) -> bool:
    """Tell whether the model can be made here with random weights and run a few times."""
    if any(isinstance(m, FourBit) for m in model.modules()):
        return False
    return held_bytes(model) < SMALL and not any(t.is_meta for t in plain_tensors(model))


class Measured:
    """Forecast from three short micro-batches, where a model cannot be traced.

    Args:
        job: What one step is; its model has values.
        lengths: Of the examples.
    """

    seconds_after, is_hopeless = 0.0, False

    def __init__(self, job: Job, lengths: Sequence[int]) -> None:
        self._probed, model = _probed(job, lengths), copy.deepcopy(job.model)
        self._held = held_bytes(model)
        optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
        if not materialize(optimizer):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()  # of a copy: its values do not matter
        self._state = state_bytes(optimizer)
        self.seconds = self._probed.seconds

    def peak_bytes(self, rows: float, length: float) -> int:
        """Return what a step with such micro-batches takes at its peak."""
        return sum(self.categories(rows, length).values())

    def categories(self, rows: float, length: float) -> dict[str, int]:
        """Return the same; gradients are told as activations, since it was measured at once."""
        taken = round(EXTRAPOLATED * self._probed.peak_bytes(rows, length))
        return dict.fromkeys(CATEGORIES, 0) | {
            PARAMETERS: self._held,
            ACTIVATIONS: taken,
            STATE: self._state,
        }


def beyond_tensors(job: Job, length: int) -> int:
    """Return the bytes that one row on the GPU takes beyond what its trace says.

    That is what kernels take inside, which no trace sees. Not cuBLAS's workspaces: they are there
    from the first run on, before the one that is measured.
    """
    expected = trace(dataclasses.replace(job, optimizer=torch.optim.SGD), 1, length).peak_bytes
    taken = held_bytes(job.model) + _probed(job, [length]).peak_bytes(1, length)
    return max(0, taken - expected)


def _probed(job: Job, lengths: Sequence[int]) -> Probed:
    """Return what three short micro-batches take, with random weights if there are none."""
    device = torch.device("cuda" if job.as_cuda and torch.cuda.is_available() else "cpu")
    model = copy.deepcopy(job.model)
    with torch.random.fork_rng():
        if next(model.parameters()).is_meta:
            model.to_empty(device=device)
            with torch.no_grad():
                for t in (*model.parameters(), *model.buffers()):
                    t.normal_(0, 0.02) if t.is_floating_point() else t.zero_()
        as_trained(model.to(device))
        switch(model, job.checkpointing)
        engine = job.accumulator(model, Tracker())
        least = 2 if needs_whole(model) else 1  # of rows
        given = {
            shape: functools.partial(job.inputs, *shape)
            for shape in shapes(lengths, device)
            if shape[0] >= least
        }
        return measure(engine, given, device, quiet, num_micros=job.num_micros)[0]
