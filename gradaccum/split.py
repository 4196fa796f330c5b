"""Cut an effective batch into micro-batches under a budget. Pure and deterministic."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from gradaccum.batch import HostBatch
from gradaccum.errors import BadInput
from gradaccum.objective import Objective
from gradaccum.packing.plan import NOTHING_SHARED, by_beginning
from gradaccum.types import Budget, Micro

TRIES = 12  # to even out: the bound is then within 1 / 4,096 of the smallest
FEW = 1024  # micro-batches, up to which they are evened out: among more there is little to gain


def split(
    batch: HostBatch | list[Any],
    objective: Objective,
    budget: Budget,
    *,
    shared: int | None = None,
) -> list[Micro]:
    """Return the fewest micro-batches that hold every example once, the largest first.

    Padded: examples are sorted by size, ties in their own order, and cut into runs: the largest
    example left opens a micro-batch and takes along as many of the next largest as the budget has
    room for at its size. No cut has fewer micro-batches: whichever holds the largest example left
    can hold no more rows than that, and taking the next largest leaves the smallest to the others.

    Packed: a micro-batch costs the sum of its sizes, and what examples begin with alike
    (`input_ids`) costs once in each, so that they stay together.

    Both are then cut again under the smallest bound that gives as many micro-batches, unless they
    are very many: of more equal cost, at a lower peak.

    Args:
        batch: Iterates over its examples.
        objective: Its `size` says what an example costs.
        budget: An example larger than this gets a micro-batch of its own.
        shared: Micro-batches run packed, and so many tokens that examples begin with alike, or
            more, once; None: padded.

    Raises:
        BadInput: The size of an example is not a whole number of at least 0.

    Example:
        >>> objective = Objective(loss=None, weight=None, size=len)
        >>> [m.examples for m in split(["aa", "aaaa", "a", "aaa"], objective, Budget(tokens=6))]
        [(1,), (0, 2), (3,)]
    """
    sizes = [objective.size(example) for example in batch]
    if not all(type(size) is int and size >= 0 for size in sizes):
        bad = next(i for i, size in enumerate(sizes) if type(size) is not int or size < 0)
        raise BadInput(
            f"the size of example {bad} is {sizes[bad]!r}, not a whole number of at least 0"
        )
    most = min(len(sizes), budget.examples or len(sizes))
    costs, order, mates = sizes, range(len(sizes)), dict[int, list[int]]()
    if shared is not None and shared < NOTHING_SHARED:
        costs, mates = _alike(batch, sizes, budget.tokens, most, shared)
        along = {i for found in mates.values() for i in found[1:]}
        order = [i for i in order if i not in along]
    order = sorted(order, key=costs.__getitem__, reverse=True)
    rows = [len(mates[i]) if i in mates else 1 for i in order]
    cut = _Cut([costs[i] for i in order], rows, packed=shared is not None)
    tokens = budget.tokens
    ends = cut.ends(tokens, most)
    low, high = 0, tokens or 0
    for _ in range(TRIES if 1 < len(ends) < FEW else 0):
        middle = (low + high) // 2
        if not low < middle < high:
            break
        found = cut.ends(middle, most)
        low, high = (low, middle) if len(found) == len(ends) else (middle, high)
        ends = found if len(found) == len(ends) else ends
    if tokens is None and ends:
        ends = cut.ends(None, -(-len(sizes) // len(ends)))
    micros: list[Micro] = []
    begin = 0
    for end in ends:
        examples = tuple(j for i in order[begin:end] for j in mates.get(i, (i,)))
        size = cut.size(begin, end)
        micros.append(Micro(examples, size, sum(sizes[i] for i in examples)))
        begin = end
    # A later run can be larger than the first: 2 x 5 tokens beside 1 x 6. Memory runs out, if it
    # does, at the first micro-batch, before work is spent.
    micros.sort(key=lambda micro: -micro.size)
    return micros


def split_parts(
    batch: HostBatch | list[Any],
    parts: Sequence[Sequence[int]],
    objective: Objective,
    budget: Budget,
    *,
    shared: int | None = None,
) -> list[list[Micro]]:
    """Return the micro-batches of each part of an effective batch, as `split` cuts it by itself.

    Args:
        parts: The positions of the examples in each.
    """
    examples = list(batch)
    return [
        [
            micro._replace(examples=tuple(part[i] for i in micro.examples))
            for micro in split([examples[i] for i in part], objective, budget, shared=shared)
        ]
        for part in parts
    ]


class _Cut:
    """Cut items, the largest first, into runs.

    Args:
        costs: Of each item.
        rows: Of each item.
        packed: Whether a run costs the sum of its items, or each of them as much as the largest.
    """

    def __init__(self, costs: list[int], rows: list[int], *, packed: bool) -> None:
        self._costs, self._packed = costs, packed
        self._cost_until = [0, *accumulate(costs)]
        self._rows_until = [0, *accumulate(rows)]

    def size(self, begin: int, end: int) -> int:
        if self._packed:
            return self._cost_until[end] - self._cost_until[begin]
        return (end - begin) * self._costs[begin]

    def ends(self, tokens: int | None, rows: int) -> list[int]:
        """Return where runs end of at most that cost and that many rows, or of a single item."""
        found, begin, num = [], 0, len(self._costs)
        while begin < num:
            largest = self._costs[begin]
            end = bisect_right(self._rows_until, self._rows_until[begin] + rows, begin) - 1
            if tokens and self._packed:
                room = self._cost_until[begin] + tokens
                end = min(end, bisect_right(self._cost_until, room, begin) - 1)
            elif tokens and largest:
                end = min(end, begin + tokens // largest)
            begin = max(end, begin + 1)
            found.append(begin)
        return found


def _alike(
    batch: HostBatch | list[Any], sizes: list[int], tokens: int | None, most: int, shared: int
) -> tuple[list[int], dict[int, list[int]]]:
    """Join examples that begin alike, as far as a budget has room for them.

    Args:
        batch: Iterates over its examples.
        sizes: What each costs by itself.
        tokens: What joined ones may cost.
        most: Examples that may be joined.
        shared: Tokens that they have to begin with alike.

    Returns:
        What each costs, the first of joined ones with all the others; the joined ones, by the first
        of them.
    """
    costs, joined, first = list(sizes), dict[int, list[int]](), -1
    for i, alike in zip(*by_beginning([_ids(example) for example in batch]), strict=True):
        more = sizes[i] - min(alike, sizes[i])
        fits = first >= 0 and (tokens is None or costs[first] + more <= tokens)
        if alike >= shared and fits and len(joined.get(first, "1")) < most:
            costs[first] += more
            joined.setdefault(first, [first]).append(i)
        else:
            first = i
    return costs, joined


def _ids(example: Any) -> Sequence[int]:
    """Return the tokens of an example, none where there are no such."""
    ids: Any = example.get("input_ids") if isinstance(example, Mapping) else None
    if not isinstance(ids, (list, tuple)) and getattr(ids, "ndim", 0) != 1:
        return ()
    ids = ids if isinstance(ids, (list, tuple)) else ids.tolist()
    return ids if ids and isinstance(ids[0], int) else ()
