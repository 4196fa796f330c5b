"""Judge anybody's accumulation: a loop, an Accumulator or a Trainer, against the full batch.

The audit itself is in `audit.py`, the names of what is wrong in `diagnosis.py`.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gradaccum.audit import FIXED_OR_NONE, SUM_OF_MEANS, UNSEEN, Subject, audit
from gradaccum.batch import Collate, Collated, HostBatch, Listed, as_batch
from gradaccum.engine import Accumulator
from gradaccum.errors import BadInput
from gradaccum.objective import Objective
from gradaccum.ranked import audit_ranks
from gradaccum.sync.choose import num_ranks
from gradaccum.trees import to_device, widened
from gradaccum.types import Budget
from gradaccum.verdict import Verdict
from gradaccum.weights import Cut

Loop = Callable[[nn.Module, list[Any]], object]


def verify(
    loop: Loop | Accumulator | Any,
    model: nn.Module | None = None,
    batch: Any = None,
    *,
    splits: Iterable[Sequence[int]] | None = None,
    objective: Objective | None = None,
    collate: Collate | None = None,
) -> Verdict:
    """Tell whether an accumulation loop leaves the gradient of the full batch, and why not.

    For every split g is what the loop leaves for these micro-batches, f the gradient of one pass:

        error = ||g - f|| / ||f||,   exact where error <= 20 x what rounding alone causes

    Rounding is measured: f again with its rows in opposite order, and what storing f in the dtype
    of the parameters costs. Where an error is larger, it is named.

    On several ranks (torch.distributed is initialised) every rank calls it with its share, a list
    of examples, and the reference is one pass over the examples of all. Besides, parameters that
    differ between ranks, gradients that do, and examples that several ranks have are named.

    Everything is as before afterwards: weights, optimizers, schedulers, gradients, buffers, modes,
    random state. A correct loop costs five passes over the batch (two full ones, one for each of
    three splits), six with an objective, a wrong one up to twelve; memory on the host for a copy
    of the weights, one of the state of an optimizer that steps, and three gradients in float64.
    Dropout is off inside.

    Args:
        loop: A callable `loop(model, micro_batches)` that runs one effective batch, given as a list
            of collated micro-batches on the model's device, and leaves gradients in `.grad` or
            steps an optimizer (then the gradients are those before the first step). Or an
            `Accumulator`, or a `transformers.Trainer`, attached or not, which runs one step of its
            own training.
        model: Holds the gradients; not needed for an Accumulator or a Trainer.
        batch: A list of examples or a collated batch; for a Trainer by default the first eight
            examples of its data.
        splits: Sizes of micro-batches; by default one at a time, pairs, and a short last one.
        objective: The reference is our own engine with this objective. By default it is the loop's
            own result for the batch as one micro-batch, for a Trainer the loss without
            `num_items_in_batch`. Where the full batch does not fit into memory, it is our engine
            on one example at a time, in float64 if that fits and the model runs in it; for a loop
            this takes an objective. So does a factor that is the same at every cut.
        collate: Turns a list of examples into a micro-batch; `pad_collate` if not given.

    Raises:
        BadInput: An argument is missing or wrong; the full batch has no gradient, or does not fit
            and there is no objective.

    Example:
        >>> def mean_of_means(model, micro_batches):
        ...     for x, y in micro_batches:
        ...         loss = (model(x) - y).square().mean()
        ...         (loss / len(micro_batches)).backward()
        >>> model = nn.Linear(3, 1)
        >>> batch = (torch.arange(15.0).reshape(5, 3), torch.ones(5, 1))
        >>> verify(mean_of_means, model, batch, splits=[(4, 1)]).names
        ('mean of means',)
    """
    if (trainers := sys.modules.get("transformers")) and isinstance(loop, trainers.Trainer):
        # Imported where a Trainer is given: nothing here needs transformers.
        trainer_subject = importlib.import_module("gradaccum.integrations.audit").trainer_subject
        if model is not None or objective is not None or collate is not None:
            raise BadInput("a Trainer brings its own model, loss and collator")
        if num_ranks() > 1:
            raise BadInput(
                "a Trainer is judged on one process, and this is one of several ranks",
                hint="python script.py in place of torchrun; what ranks add is tested with a loop",
            )
        with trainer_subject(loop, batch) as subject:
            return audit(subject, splits)
    if isinstance(loop, Accumulator):
        model, collate = model or loop.model, collate or loop._collate
    if not callable(loop) and not isinstance(loop, Accumulator):
        raise BadInput(f"verify takes a loop or a Trainer, not {type(loop).__name__}")
    if not isinstance(model, nn.Module) or batch is None:
        raise BadInput("verify needs a model and a batch", hint="verify(loop, model, batch)")
    trim = isinstance(loop, Accumulator) and loop.objective.trim
    if num_ranks() > 1:
        if objective is None and isinstance(loop, Accumulator):
            objective = loop.objective
        if objective is None:
            raise BadInput(
                "on several ranks verify needs an objective to compare with",
                hint="objective=gradaccum.causal_lm(), or from_mean(loss)",
            )
        host = as_batch(batch, collate, trim=trim, may_be_empty=True)
        return audit_ranks(loop, model, host, objective)
    return audit(_subject(loop, model, as_batch(batch, collate, trim=trim), objective), splits)


def _subject(
    loop: Loop | Accumulator, model: nn.Module, host: HostBatch, objective: Objective | None
) -> Subject:
    if isinstance(host, Listed):
        host = host.settled(range(len(host)))
    device = next(model.parameters(), torch.empty(0)).device
    one_by_one = objective or (loop.objective if isinstance(loop, Accumulator) else None)

    def take(rows: Sequence[int]) -> Any:
        return to_device(host.take(rows), device)

    def run(cut: Cut) -> None:
        if isinstance(loop, Accumulator):
            _accumulate(loop, host, [i for rows in cut for i in rows], len(cut[0]))
        else:
            loop(model, [take(rows) for rows in cut])

    def full(rows: Sequence[int]) -> None:
        if objective is None:
            run((tuple(rows),))
        else:
            engine = Accumulator(model, objective, budget=Budget(examples=1))
            _accumulate(engine, host, rows, len(rows))

    def alone(given: nn.Module, rows: Sequence[int]) -> None:
        assert one_by_one is not None, "else it is not handed on"
        engine = Accumulator(given, one_by_one, budget=Budget(examples=1))
        _accumulate(engine, host if given is model else _widened(host), rows, 1)

    return Subject(
        name=getattr(loop, "__qualname__", type(loop).__name__).rpartition(".")[2],
        model=model,
        num_examples=len(host),
        run=run,
        full=full,
        reference="its own full batch" if objective is None else "gradaccum's engine in one pass",
        take=host.take,
        alone=None if one_by_one is None else alone,
        is_own=objective is None,
        unseen=f"{UNSEEN}; pass objective= to see it" if one_by_one is None else "",
        undivided=FIXED_OR_NONE if objective is None else SUM_OF_MEANS,
    )


def _widened(host: HostBatch) -> HostBatch:
    """Return the batch as a model in float64 takes it."""
    if isinstance(host, Listed):
        return Listed(list(host), lambda examples: widened(host.collate(examples)))
    return Collated(widened(host.take(range(len(host)))), trim=False)


def _accumulate(accumulator: Accumulator, host: HostBatch, rows: Sequence[int], size: int) -> None:
    """Run some rows in micro-batches of `size` rows, whatever the budget is otherwise."""
    budget, limit = accumulator.budget, accumulator.limit
    if isinstance(host, Listed):
        chosen: HostBatch = host.settled(rows)
    else:
        chosen = Collated(host.take(rows), trim=accumulator.objective.trim)
    try:
        accumulator.budget, accumulator.limit = Budget(examples=size), None
        accumulator.attempt(chosen)
    finally:
        accumulator.budget, accumulator.limit = budget, limit
