"""Cut an effective batch into micro-batches under a budget. Pure and deterministic."""

from typing import Any

import torch

from gradaccum.batch import HostBatch
from gradaccum.errors import BadInput
from gradaccum.objective import Objective
from gradaccum.types import Budget, Micro


def split(batch: HostBatch | list[Any], objective: Objective, budget: Budget) -> list[Micro]:
    """Return the fewest micro-batches that hold every example once, the largest first.

    Examples are sorted by size, ties in their own order, and cut into runs: the largest example
    left opens a micro-batch and takes along as many of the next largest as the budget has room
    for at its size. No cut has fewer micro-batches: whichever holds the largest example left can
    hold no more rows than that, and taking the next largest leaves the smallest to the others.

    Args:
        batch: Iterates over its examples.
        objective: Its `size` says what an example costs.
        budget: An example larger than this gets a micro-batch of its own.

    Raises:
        BadInput: The size of an example is not a whole number of at least 0.

    Example:
        >>> objective = Objective(loss=None, weight=None, size=len)
        >>> [m.examples for m in split(["aa", "aaaa", "a", "aaa"], objective, Budget(tokens=6))]
        [(3, 0), (1,), (2,)]
    """
    measured = [objective.size(example) for example in batch]
    if not all(type(size) is int and size >= 0 for size in measured):
        bad = next(i for i, size in enumerate(measured) if type(size) is not int or size < 0)
        raise BadInput(
            f"the size of example {bad} is {measured[bad]!r}, not a whole number of at least 0"
        )
    ordered, order_tensor = torch.tensor(measured, dtype=torch.long).sort(
        descending=True, stable=True
    )
    sizes, order = ordered.tolist(), order_tensor.tolist()
    micros: list[Micro] = []
    begin, num_examples = 0, len(order)
    most = min(num_examples, budget.examples or num_examples)
    while begin < num_examples:
        largest = sizes[begin]
        room = max(1, budget.tokens // largest) if budget.tokens and largest else most
        end = min(begin + min(room, most), num_examples)
        useful = sum(sizes[begin:end])
        micros.append(Micro(tuple(order[begin:end]), (end - begin) * largest, useful))
        begin = end
    # A later run can be larger than the first: 2 x 5 tokens beside 1 x 6. Memory runs out, if it
    # does, at the first micro-batch, before work is spent.
    micros.sort(key=lambda micro: -micro.size)
    return micros
