"""An accumulator that finds its budget itself, by measuring at its first batch."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer

import gradaccum.engine
from gradaccum.batch import HostBatch, as_batch
from gradaccum.engine import Window
from gradaccum.errors import LESS_MEMORY, BadInput, DoesNotFit
from gradaccum.measured import quiet
from gradaccum.memory import choose
from gradaccum.memory.cap import Cap, cap_of, held_bytes
from gradaccum.memory.choose import Choice
from gradaccum.memory.layout import find_layout
from gradaccum.memory.predict import switch
from gradaccum.memory.probe import EXTRAPOLATED, Probed, probe, shapes, within
from gradaccum.memory.remembered import keep, key_of, recall
from gradaccum.objective import Objective
from gradaccum.optimizers import materialize, state_bytes
from gradaccum.state import batch_norms
from gradaccum.sync.choose import is_sharded, num_ranks
from gradaccum.types import Budget, amount, counted

AUTO = "auto"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """Tell the budget that was found, and why. Print it for a sentence.

    Args:
        budget: The largest micro-batch.
        choice: What it means for the batches that were looked at; None where there is no choice.
        cap: What memory there is.
        num_probes: Micro-batches measured for it; 0 if that was remembered.
        seconds: What finding it has taken.
        why: Where there is no choice.
        checkpointing: Whether it was switched on for it; None: it was not asked to choose.
    """

    budget: Budget
    choice: Choice | None
    cap: Cap
    num_probes: int
    seconds: float
    why: str = ""
    checkpointing: bool | None = None

    def __str__(self) -> str:
        if self.choice is None:
            return f"micro-batches of up to {self.budget}: {self.why}"
        num = counted(max(1, round(self.choice.num_micros)), "micro-batch")
        source = f"measured in {self.seconds:.1f} s" if self.num_probes else "remembered"
        checkpointing = ", gradient checkpointing on" if self.checkpointing else ""
        return (
            f"about {num} of up to {self.budget}{checkpointing} ({source}; larger are not 2% "
            f"faster, or take more than the {amount(self.cap.stated_bytes)})"
        )


class Accumulator(gradaccum.engine.Accumulator):
    """Leave in `.grad` what one pass over the whole effective batch would have left.

    How large a micro-batch may be is found at the first batch: the smallest that is as fast as any
    that fits, by three short micro-batches of that batch; much larger ones have to show that they
    are faster. It is remembered on disk for this model and device, so that another run cuts its
    batches alike. If memory runs out all the same, the batch runs again in smaller ones.

    Args:
        model: Any module that holds all parameters to train.
        objective: What is minimised, see `Objective`.
        budget: How large one micro-batch may be; "auto": as above. May be set anew between two
            calls.
        memory: What there is for "auto": "20GiB", bytes, or a fraction of the device; by default
            what is available.
        optimizer: Its state is made before the first batch, where it is known how, and counted.
            Without it, "auto" leaves no room for the state.
        aside: Keeps what is measured out of the training, where more than random state, buffers
            and dropout have to be put back.
        options: As of `gradaccum.engine.Accumulator`, which tells what is exact and what is not:
            `collate`, `accumulate_dtype`, `grad_dtype`, `backward`, `after_micro`.

    Raises:
        BadInput: An argument is wrong.

    Example:
        >>> from gradaccum import causal_lm
        >>> Accumulator(nn.Linear(3, 1), causal_lm()).budget
        'auto'
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        budget: Budget | Literal["auto"] = AUTO,
        memory: str | float | None = None,
        optimizer: Optimizer | None = None,
        aside: Callable[..., AbstractContextManager[None]] = quiet,
        **options: Any,
    ) -> None:
        is_auto = isinstance(budget, str) and budget == AUTO
        if isinstance(budget, str) and not is_auto:
            raise BadInput(f"budget={budget!r} is neither a gradaccum.Budget nor 'auto'")
        given: Any = Budget(examples=1) if is_auto else budget
        super().__init__(model, objective, budget=given, **options)
        check(memory, is_auto, next(model.parameters(), torch.empty(0)).device)
        self.found: Found | None = None
        self.optimizer = optimizer
        self._memory = memory
        self._aside = aside
        self._is_laid_out = False
        if is_auto:
            self.budget = cast(Budget, AUTO)  # until the first batch

    def prepare(self, batch: Any) -> Window:
        """Do as the engine does; at the first batch, find layout and budget before.

        Raises:
            BadInput: As the engine; the model is sharded, so that no rank can measure by itself.
        """
        if not self._is_laid_out and not is_sharded(self.model):
            batch = as_batch(
                batch, self._collate, trim=self.objective.trim, may_be_empty=num_ranks() > 1
            )
            if len(batch) > 1:
                self.layout, self._is_laid_out = find_layout(self, batch, self._aside), True
        if not isinstance(self.budget, Budget):
            if is_sharded(self.model):
                raise BadInput(
                    "budget='auto' is measured by micro-batches that each rank runs on its own, "
                    "and the model is sharded by fully_shard, whose forwards take all ranks",
                    hint="budget=Budget(tokens=...); gradaccum.plan(..., ranks=...) finds it",
                )
            batch = as_batch(
                batch, self._collate, trim=self.objective.trim, may_be_empty=num_ranks() > 1
            )
            if not len(batch):  # there is nothing to measure on
                self.budget = Budget(examples=1)
                try:
                    return super().prepare(batch)
                finally:
                    self.budget = cast(Budget, AUTO)
            if self.optimizer is not None:
                materialize(self.optimizer)
            sizes = [self.objective.size(example) for example in batch]
            self.found = find(
                self,
                batch,
                sizes,
                len(sizes),
                memory=self._memory,
                optimizer=self.optimizer,
                aside=self._aside,
            )
            self.budget = self.found.budget
        return super().prepare(batch)


def check(memory: str | float | None, is_auto: bool, device: torch.device) -> None:
    """Refuse a wrong amount of memory at once, and any beside a budget.

    Raises:
        BadInput: As said.
    """
    if memory is not None and not is_auto:
        raise BadInput(f"memory={memory!r} is for budget='auto', and a budget is given")
    if memory is not None:
        cap_of(memory, device)


def find(
    accumulator: gradaccum.engine.Accumulator,
    host: HostBatch,
    sizes: Sequence[int],
    effective_batch: int,
    *,
    memory: str | float | None,
    optimizer: Optimizer | None = None,
    aside: Callable[..., AbstractContextManager[None]] = quiet,
    name: str = "",
    may_checkpoint: bool = False,
) -> Found:
    """Find the budget of an accumulator, and say it.

    Where nothing fits into what is available, the smallest is tried all the same.

    Args:
        accumulator: Is left as it is.
        host: A batch to measure on.
        sizes: Of the data's examples, as far as they are known.
        effective_batch: Examples in one step.
        memory: As of `cap_of`.
        optimizer: Whose state takes memory as well; on an accelerator it is counted where it lies.
        aside: Keeps what runs inside out of the training.
        name: Tells losses apart that the same model may have.
        may_checkpoint: Where memory costs speed, measure with gradient checkpointing as well, and
            leave it on if that is faster.

    Raises:
        DoesNotFit: Nothing does into the memory that is stated.
    """
    begin = time.perf_counter()
    model = accumulator.model
    device = next(model.parameters()).device
    if device.type == "cpu":
        held = held_bytes(model) + (0 if optimizer is None else state_bytes(optimizer))
    else:
        held = torch.get_device_module(device).memory_allocated(device)
    cap = cap_of(memory, device, held_bytes=held)
    if batch_norms(model):
        whole = Budget(examples=effective_batch)
        return _said(
            Found(whole, None, cap, 0, 0.0, "BatchNorm in training mode needs all at once")
        )
    packed = accumulator.layout is not None
    drawn = choose.windows(list(sizes), effective_batch)
    budgets = choose.budgets(list(sizes), effective_batch)

    def of(budget: Budget) -> int:
        """Return the tokens of a budget."""
        return budget.tokens or (budget.examples or effective_batch) * max(sizes)

    def weighed() -> tuple[list[Choice], int]:
        """Return what each budget means, and how many probes it took to tell."""
        probes = shapes(list(map(accumulator.objective.size, host)), device, packed=packed)
        key = key_of(accumulator, device, probes, name)
        probed, num = recall(key), 0
        if probed is None:
            probed, num = probe(accumulator, host, aside)
        is_new = num == len(probes) > 1
        careful = _Careful(probed, held)
        choices = [choose.weigh(budget, drawn, careful, packed=packed) for budget in budgets]
        best = choose.best(choices, cap.num_bytes)
        if best is not None and probed.within is None:
            least, most, more = within(accumulator, host, aside, of(best.budget))
            probed, num = replace(probed, within=(least, most)), num + more
        if is_new and probed.within is not None:
            keep(key, probed)
        least, most = probed.within or (0, sys.maxsize)
        fast = [c for c in choices if least <= of(c.budget) <= most]
        # None of them may be, or may fit, where rows are long or memory is short.
        return fast if choose.best(fast, cap.num_bytes) else choices, num

    checkpointing = False if may_checkpoint else None
    switch(model, on=checkpointing)
    choices, num = weighed()
    best = choose.best(choices, cap.num_bytes)
    fastest = min(choice.seconds for choice in choices)
    if may_checkpoint and (best is None or best.seconds > choose.AS_FAST * fastest):
        switch(model, on=True)
        others, more = weighed()
        other, num = choose.best(others, cap.num_bytes), num + more
        # Where nothing fits, the device has the last word, with what takes the least.
        checkpointing = best is None or (other is not None and other.seconds < best.seconds)
        choices, best = (others, other) if checkpointing else (choices, best)
        switch(model, on=checkpointing)
    best = best or _smallest(choices, cap, is_stated=memory is not None)
    budget = best.budget
    if budget.examples is not None and max(sizes) > 1:  # of longer examples it then takes fewer
        budget = Budget(tokens=budget.examples * max(sizes))
    spent = time.perf_counter() - begin
    return _said(Found(budget, best, cap, num, spent, checkpointing=checkpointing))


def _smallest(choices: Sequence[Choice], cap: Cap, *, is_stated: bool) -> Choice:
    """Return what takes the least, where nothing fits; refuse it if the memory is stated.

    A batch that is one micro-batch finds no gradients, and takes less than what was measured.
    """
    least = min(choices, key=lambda choice: choice.peak_bytes)
    has_failed = least.peak_bytes >= sys.maxsize
    peak = "more than was available just now" if has_failed else amount(least.peak_bytes)
    cause = (
        f"even the smallest micro-batch, {counted(least.rows, 'example')} of {least.length:,}, "
        f"takes {peak} with what is held, and there are {amount(cap.num_bytes)} for tensors of the "
        f"{amount(cap.stated_bytes)}"
    )
    if is_stated and least.most_micros > 1:
        raise DoesNotFit(cause, hint=LESS_MEMORY)
    logger.warning("%s: it is tried all the same", cause)
    return least


def _said(found: Found) -> Found:
    logger.info(str(found))
    return found


@dataclass(frozen=True, slots=True)
class _Careful:
    """Forecast with room for what lies beyond the probes.

    Args:
        probed: What they have told.
        held_bytes: What is there before a micro-batch runs.
    """

    probed: Probed
    held_bytes: int

    def seconds(self, rows: float, length: float) -> float:
        return self.probed.seconds(rows, length)

    def peak_bytes(self, rows: float, length: float) -> int:
        fixed, found = round(self.probed.sizes[0]), self.probed.peak_bytes(rows, length)
        return self.held_bytes + fixed + round(EXTRAPOLATED * (found - fixed))
