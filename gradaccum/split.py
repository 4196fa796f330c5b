"""Cut an effective batch into micro-batches under a budget. Pure and deterministic."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from gradaccum.batch import HostBatch
from gradaccum.errors import BadInput
from gradaccum.objective import Objective
from gradaccum.packing.plan import NOTHING_SHARED, key, num_alike
from gradaccum.types import Budget, Micro

TRIES = 12  # to even out: the bound is then within 1 / 4,096 of the smallest
FEW = 1024  # micro-batches, up to which they are evened out: among more there is little to gain
Items = list[tuple[int, Sequence[int]]]  # what it costs, and its examples


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
    items: Items = list(zip(sizes, zip(range(len(sizes)), strict=True), strict=True))
    if shared is not None and shared < NOTHING_SHARED:
        items = _alike(batch, items, budget.tokens, most, shared)
    items.sort(key=lambda item: -item[0])
    cut = _Cut(items, packed=shared is not None)
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
        examples = tuple(i for _, mates in items[begin:end] for i in mates)
        size = cut.size(begin, end)
        micros.append(Micro(examples, size, sum(sizes[i] for i in examples)))
        begin = end
    # A later run can be larger than the first: 2 x 5 tokens beside 1 x 6. Memory runs out, if it
    # does, at the first micro-batch, before work is spent.
    micros.sort(key=lambda micro: -micro.size)
    return micros


class _Cut:
    """Cut items, the largest first, into runs.

    Args:
        items: With what they cost.
        packed: Whether a run costs the sum of its items, or each of them as much as the largest.
    """

    def __init__(self, items: Items, *, packed: bool) -> None:
        self._costs = [cost for cost, _ in items]
        self._rows = [len(mates) for _, mates in items]
        self._packed = packed
        self._cost_until = [0, *accumulate(self._costs)]
        self._rows_until = [0, *accumulate(self._rows)]

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
    batch: HostBatch | list[Any], items: Items, tokens: int | None, most: int, shared: int
) -> Items:
    """Join items that begin alike, as far as a budget has room for them.

    Args:
        batch: Iterates over its examples.
        items: One for each example.
        tokens: What a joined one may cost.
        most: Examples it may have.
        shared: Tokens that it has to begin with alike.
    """
    examples = list(batch)
    begins = [tuple(_ids(example, shared)) for example in examples]
    num = Counter(begins)
    maybe = [i for i, begin in enumerate(begins) if len(begin) == shared and num[begin] > 1]
    keys = {i: key(_ids(examples[i])) for i in maybe}
    joined: Items = [item for item in items if item[1][0] not in keys]
    before, cost, mates = b"", 0, list[int]()
    for i in sorted(maybe, key=keys.__getitem__):
        size = items[i][0]
        alike, before = min(num_alike(before, keys[i]), size), keys[i]
        fits = tokens is None or cost + size - alike <= tokens
        if not (alike >= shared and fits and len(mates) < most):
            joined += [(cost, mates)] if mates else []
            cost, mates, alike = 0, [], 0
        cost += size - alike
        mates.append(i)
    return [*joined, (cost, mates)] if mates else joined


def _ids(example: Any, num: int | None = None) -> Sequence[int]:
    """Return the first tokens of an example, none where there are no such."""
    ids: Any = example.get("input_ids") if isinstance(example, Mapping) else None
    if not isinstance(ids, (list, tuple)) and getattr(ids, "ndim", 0) != 1:
        return ()
    ids = ids[:num] if isinstance(ids, (list, tuple)) else ids[:num].tolist()
    return ids if ids and isinstance(ids[0], int) else ()
