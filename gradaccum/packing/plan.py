"""Which tokens of a padded micro-batch run, and in what order: a tree of segments in one row.

    padded (B, T)                 packed (1, S)
    s s s a a .                   s s s | a a | b
    s s s b . .                   `b` sees `s s s` and itself, at the positions that it had

Rows that begin alike share a segment; the rest of each is a branch. What a causal model computes
for a token depends on the tokens before it alone, so the shared ones give each row what it would
have computed by itself, and their gradients add up. Only host data is looked at here.

Shapes: B rows, T tokens of the longest with padding, S tokens that run.
"""

import struct
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Tokens from which a common beginning is worth a segment of its own (docs/log.md).
SHARED = 16
NOTHING_SHARED = sys.maxsize  # so many that no beginning is, where tokens see those behind them


class Layout(Protocol):
    """Lay a micro-batch out for the model in another way than it was collated.

    Args:
        shared: Tokens that rows have to begin with alike before these are run once; None: rows
            are padded from now on.
    """

    shared: int | None

    def running(self, inputs: Any, moved: Any) -> AbstractContextManager[None]:
        """Do so inside, where a micro-batch runs both ways.

        Args:
            inputs: As collated, on the host.
            moved: The same on the device, as the loss is given them.
        """
        ...


class Segment(NamedTuple):
    """Name a run of tokens in the packed row, and what it sees before itself.

    Args:
        begin: Its first token.
        end: Behind its last.
        before: Runs of tokens that come before it in its rows, first to last.
    """

    begin: int
    end: int
    before: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold how a padded micro-batch is packed.

    Args:
        shape: B and T.
        source_S: Where each token comes from, in the flattened (B, T).
        position_S: Its column there, which is its position.
        target_N: Where each of the B * T tokens lies in the packed row; for padding, anywhere.
        segments: In packed order; every one comes after what it sees.
    """

    shape: tuple[int, int]
    source_S: Tensor
    position_S: Tensor
    target_N: Tensor
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens run."""
        return len(self.source_S)


def plan(ids_BT: Tensor, mask_BT: Tensor | None, *, shared: int = SHARED) -> Plan | None:
    """Return how these rows are packed; None where that saves nothing.

    So it is without padding or common beginnings, or where padding lies between tokens.

    Args:
        ids_BT: Tokens on the host, shape (B, T).
        mask_BT: 1 where a token is, 0 where padding; None: there is none.
        shared: Tokens that rows have to begin with alike before they are run once.

    Example:
        >>> ids = torch.tensor([[7, 7, 1], [7, 7, 2]])
        >>> found = plan(ids, None, shared=2)
        >>> found.source_S.tolist(), found.target_N.tolist(), found.segments[2].before
        ([0, 1, 2, 5], [0, 1, 2, 0, 1, 3], ((0, 2),))
    """
    num_rows, width = ids_BT.shape
    if mask_BT is None:
        begins, ends = [0] * num_rows, [width] * num_rows
    else:
        mask_BT = mask_BT.bool()
        lengths = mask_BT.sum(1)
        first = mask_BT.int().argmax(1)
        column_T = torch.arange(width)
        is_run_BT = (column_T >= first[:, None]) & (column_T < (first + lengths)[:, None])
        if not torch.equal(is_run_BT, mask_BT):
            return None
        begins, ends = first.tolist(), (first + lengths).tolist()
    rows = ids_BT.tolist()
    bounds = zip(rows, begins, ends, strict=True)
    runs = [(begin, row[begin:end]) for row, begin, end in bounds]
    found = _Packer(runs, width, shared).plan()
    return found if 0 < found.num_tokens < num_rows * width else None


def by_beginning(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Order rows so that those that begin alike lie together.

    Only what some begin with alike is looked at, and `SHARED` tokens more of each.

    Returns:
        The rows, and how many tokens each begins with alike with the one before it.

    Example:
        >>> by_beginning([[5, 6, 7], [4], [5, 6]])
        ([1, 2, 0], [0, 0, 2])
    """
    order, alike = list(range(len(rows))), [0] * len(rows)
    todo = [(0, len(rows), 0)] if rows else []  # places from where to where, the same up to there
    while todo:
        low, high, same = todo.pop()
        group = order[low:high]
        common = rows[group[0]][same:]
        for i in group:
            other = rows[i][same : same + len(common)]
            if other != common:
                common = common[: _num_alike(_key(other), _key(common))]
        same += len(common)
        heads = {i: _key(rows[i][same : same + SHARED]) for i in group}
        group.sort(key=heads.__getitem__)
        order[low:high] = group
        begin, before = low, heads[group[0]]
        for place in range(low + 1, high + 1):
            head = heads[order[place]] if place < high else None
            if head == before:
                alike[place] = same  # and more, if they are not the same to their ends
                continue
            if 1 < place - begin < high - low:
                todo.append((begin, place, same))
            if head is not None:
                alike[place] = same + _num_alike(before, head)
                begin, before = place, head
    return order, alike


def _key(ids: Sequence[int]) -> bytes:
    """Return tokens as bytes, by which many rows are sorted and compared in little time."""
    return struct.pack(f"{len(ids)}i", *ids)


def _num_alike(one: bytes, other: bytes) -> int:
    """Return how many tokens two keys begin with alike."""
    num = min(len(one), len(other))
    differ = int.from_bytes(one[:num], "big") ^ int.from_bytes(other[:num], "big")
    return (num - (differ.bit_length() + 7) // 8) // struct.calcsize("i")


class _Packer:
    """Lay rows out as the tree of their common beginnings.

    Args:
        runs: First column and tokens of each row.
        width: T.
        shared: As of `plan`.
    """

    def __init__(self, runs: list[tuple[int, list[int]]], width: int, shared: int) -> None:
        self._runs, self._width, self._shared = runs, width, shared
        self._order, self._alike = list[int](), list[int]()
        for at in sorted({begin for begin, _ in runs}):  # from other columns: other positions
            rows = [i for i, (begin, _) in enumerate(runs) if begin == at]
            order, alike = by_beginning([runs[i][1] for i in rows])
            self._order += [rows[i] for i in order]
            self._alike += alike
        self._source: list[Tensor] = []
        self._position: list[Tensor] = []
        self._segments: list[Segment] = []
        self._size = 0

    def plan(self) -> Plan:
        self._target = torch.full((len(self._runs) * self._width,), -1)
        self._grow(0, len(self._order), 0, ())
        # Nobody reads padding; spread out, its gradients of zero do not queue for one token.
        padding = (self._target < 0).nonzero()[:, 0]
        self._target[padding] = padding % max(1, self._size)
        empty = torch.zeros(0, dtype=torch.long)
        return Plan(
            (len(self._runs), self._width),
            torch.cat([empty, *self._source]),
            torch.cat([empty, *self._position]),
            self._target,
            tuple(self._segments),
        )

    def _grow(self, low: int, high: int, depth: int, before: tuple[tuple[int, int], ...]) -> None:
        """Lay out rows that agree up to `depth`, which is laid out already."""
        if high - low == 1:
            self._add(low, high, depth, len(self._runs[self._order[low]][1]), before)
            return
        common = min(self._alike[low + 1 : high], default=0)
        if common >= max(self._shared, depth + 1):
            before = self._add(low, high, depth, common, before)
            depth = common
        begin = low
        for i in range(low + 1, high + 1):
            if i == high or self._alike[i] < max(self._shared, depth + 1):
                self._grow(begin, i, depth, before)
                begin = i

    def _add(
        self, low: int, high: int, begin: int, end: int, before: tuple[tuple[int, int], ...]
    ) -> tuple[tuple[int, int], ...]:
        """Add tokens `begin` to `end` of these rows; return what comes before those after them."""
        if begin == end:
            return before
        first, num = self._size, end - begin
        packed = torch.arange(first, first + num)
        for i in self._order[low:high]:
            at = i * self._width + self._runs[i][0]
            self._target[at + begin : at + end] = packed
        row = self._order[low]
        column = torch.arange(begin, end) + self._runs[row][0]
        self._source.append(row * self._width + column)
        self._position.append(column)
        self._segments.append(Segment(first, first + num, before))
        self._size += num
        if before and before[-1][1] == first:
            return (*before[:-1], (before[-1][0], first + num))
        return (*before, (first, first + num))
