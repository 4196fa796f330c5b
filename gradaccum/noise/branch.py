"""The honest experiment: from where a run stands, some steps at two batch sizes, and the loss.

Merrill et al. 2025 (arXiv:2505.23971) measure up to which batch size nothing is lost by branches of
a run, each on the same data: no theory of noise stands in between.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradaccum.dealing import hashes, upto
from gradaccum.engine import Accumulator
from gradaccum.errors import BadInput
from gradaccum.schedule import BatchSchedule, Rule
from gradaccum.state import undisturbed
from gradaccum.trees import to_device
from gradaccum.types import Budget, counted

BRANCH = 3  # what a hash is for, beside those of `sampler.py` and `parts.py`


@dataclass(frozen=True, slots=True)
class Branch:
    """Hold what came of two branches. Print it for a sentence.

    Args:
        sizes: The effective batch sizes, in examples.
        num_steps: Optimizer steps of each.
        num_examples: What each was trained on.
        losses: On the examples held out, after each; means over the repeats.
        difference: Of the second to the first.
        error: Its standard error: over the examples held out, which are the same for both, and over
            the repeats.
        num_repeats: Orders of the examples that were tried.
    """

    sizes: tuple[int, int]
    num_steps: tuple[int, int]
    num_examples: int
    losses: tuple[float, float]
    difference: float
    error: float
    num_repeats: int

    def __str__(self) -> str:
        ends = [
            f"loss {loss:.4f} after {counted(num, 'step')} of {size:,}"
            for loss, num, size in zip(self.losses, self.num_steps, self.sizes, strict=True)
        ]
        if abs(self.difference) <= 2 * self.error:
            verdict = "no difference can be told"
        else:
            verdict = f"{self.sizes[1]:,} is {'worse' if self.difference > 0 else 'better'}"
        return (
            f"from {counted(self.num_examples, 'example')}: {ends[0]}, {ends[1]}: "
            f"{self.difference:+.4f} +- {self.error:.4f}, {verdict}"
        )


def branch(
    accumulator: Accumulator,
    optimizer: Optimizer,
    examples: Sequence[Any],
    held_out: Sequence[Any],
    *,
    sizes: tuple[int, int],
    lr: Rule = "sqrt",
    beta2: bool = False,
    repeats: int = 1,
    before_step: Callable[[], Any] = lambda: None,
    seed: int = 0,
) -> Branch:
    """Train on the same examples at two batch sizes, from where model and optimizer stand.

    Model, optimizer and random state are afterwards what they were; that takes a copy of the
    parameters, and one of the optimizer's state, while it runs. The learning rate stays what it is,
    but for the rule.

    Args:
        accumulator: With the model. Its `collate` takes lists of examples.
        optimizer: Of the model.
        examples: To train on; as many as make whole batches of the larger size.
        held_out: To compare on; each is run by itself, so that the error is known.
        sizes: Effective batch sizes, the present one first.
        lr: What the learning rate is at the second size, as in `BatchSchedule`.
        beta2: Scale beta2 as well, as there.
        repeats: Orders of the examples to try; from two on the error covers the order as well.
        before_step: Is called between backward and the optimizer's step: to clip, for one.
        seed: Of the orders.

    Raises:
        BadInput: A size is not a whole number of at least 1, or there are too few examples.
    """
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise BadInput(f"sizes={sizes!r} are not two whole numbers of at least 1")
    if type(repeats) is not int or repeats < 1:
        raise BadInput(f"repeats={repeats!r} is not a whole number of at least 1")
    largest = max(sizes)
    num = len(examples) - len(examples) % largest
    if not num or len(held_out) < 2:
        raise BadInput(
            f"{counted(len(examples), 'example')} to train on and {len(held_out)} held out are too "
            f"few: at least {largest:,} and 2 are needed"
        )
    schedule = BatchSchedule(((sizes[0], 0),), lr=lr, beta2=beta2)
    model, found = accumulator.model, []
    for repeat in range(repeats):
        order = hashes(upto(len(examples)), BRANCH, seed, repeat).argsort(stable=True)[:num]
        for size in sizes:
            with _undone(model, optimizer), _unmeasured(accumulator):
                for rows in order.split(size):
                    accumulator.backward([examples[i] for i in rows.tolist()])
                    before_step()
                    with schedule.scaled(optimizer, size):
                        optimizer.step()
                    optimizer.zero_grad()
                found.append(_losses(accumulator, held_out))
    return _compared(sizes, num, found)


def _compared(
    sizes: tuple[int, int], num: int, found: list[tuple[torch.Tensor, torch.Tensor]]
) -> Branch:
    """Return the result from losses and weights of the examples, of one size and the other."""
    losses = torch.stack([loss for loss, _ in found]).view(-1, 2, len(found[0][0]))
    weights = found[0][1]
    total, count = weights.sum(), len(weights)
    means = losses.sum(-1) / total  # (repeats, sizes)
    each = losses.mean(0)
    difference = means[:, 1] - means[:, 0]
    mean = difference.mean()
    rest = (each[1] - each[0]) - mean * weights
    variance = rest.square().sum() * count / (count - 1) / total**2
    if len(difference) > 1:
        variance = variance + difference.var() / len(difference)
    one, other = means.mean(0).tolist()
    return Branch(
        sizes=sizes,
        num_steps=(-(-num // sizes[0]), -(-num // sizes[1])),
        num_examples=num,
        losses=(one, other),
        difference=float(mean),
        error=math.sqrt(float(variance)),
        num_repeats=len(difference),
    )


def _losses(accumulator: Accumulator, examples: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the loss over each example, in eval mode, and its weight: shape (n,)."""
    model, budget = accumulator.model, accumulator.budget
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    accumulator.budget = Budget(examples=1)
    try:
        window = accumulator.prepare(list(examples))
        if window.weights is None or window.totals is None or len(window.totals) > 1:
            raise BadInput(
                "examples are compared by one weight that is known before their loss, and this "
                "loss reports it, or has several terms",
                hint="an Objective with weight=, of one term",
            )
        losses, weights = [], []
        with torch.no_grad():
            for loss, inputs, weight in zip(
                window.losses, window.inputs, window.weights, strict=True
            ):
                value: Any = loss(model, to_device(inputs, device)) if any(weight.values()) else 0.0
                value = sum(value.values()) if isinstance(value, dict) else value
                losses.append(torch.as_tensor(value).double().cpu())
                weights.append(next(iter(weight.values())))
    finally:
        accumulator.budget = budget
        for module, training in modes:
            module.training = training
    return torch.stack(losses), torch.tensor(weights, dtype=torch.float64)


@contextmanager
def _undone(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Put back, on leaving, parameters, buffers, the optimizer's state and random state."""
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    with undisturbed(model):
        try:
            yield
        finally:
            model.load_state_dict(kept)
            optimizer.load_state_dict(state)
            optimizer.zero_grad()


@contextmanager
def _unmeasured(accumulator: Accumulator) -> Iterator[None]:
    """Leave the noise scale out of it."""
    parts, accumulator.parts = accumulator.parts, None
    try:
        yield
    finally:
        accumulator.parts = parts
