"""The effective batch on the host: examples, rows of nested tensors, collating.

A batch comes in one of two forms, and both answer the same three questions: how many examples,
what is example i, what are the model's inputs for these examples.

- `Listed`: a list of examples and a function that collates some of them.
- `Collated`: tensors already collated, in any nesting of dicts, lists and tuples.

Which leaves of a collated batch belong to its rows is read from types and shapes: a tensor whose
first dimension is the number of rows, or a list (of plain values also a tuple) of that many values,
one for each row. Dicts and tuples only nest. All else is handed to every micro-batch untouched. A
batch whose images or patches are not laid out in rows has to come as a list of examples.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradaccum.errors import BadInput
from gradaccum.padding import are_padded, pad_collate, useful_columns
from gradaccum.trees import count_rows, map_leaves, named_leaves, rebuild

Collate = Callable[[list[Any]], Any]


class HostBatch(Protocol):
    """Answer what the split and the engine ask of an effective batch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def take(self, examples: Sequence[int]) -> Any: ...


class Listed:
    """Hold examples as a list; collate the ones that are taken.

    Args:
        examples: The examples; collators get copies, so that what they change in place is theirs.
        collate: Turns a list of examples into a micro-batch.
        ready: Micro-batches that have been collated elsewhere, by the positions of their examples.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Collate,
        ready: Mapping[tuple[int, ...], Any] | None = None,
    ) -> None:
        self._examples = examples
        self.collate = collate
        self._ready = ready or {}

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._examples)

    def take(self, examples: Sequence[int]) -> Any:
        rows = tuple(examples)
        if rows in self._ready:
            return self._ready[rows]
        return self.collate([_copied(self._examples[i]) for i in rows])

    def settled(self, examples: Sequence[int]) -> HostBatch:
        """Return these examples, the random numbers of their collator drawn for good.

        Comparing two ways of running a batch needs the same inputs twice. Without random numbers
        each micro-batch is collated by itself, as in training.
        """
        chosen = Listed([self._examples[i] for i in examples], self.collate)
        if not examples:
            return chosen
        once, again = self.take(examples), self.take(examples)
        pairs = zip(named_leaves(once), named_leaves(again), strict=False)
        if all(torch.equal(a, b) for (_, a), (_, b) in pairs if isinstance(a, Tensor)):
            return chosen
        drawn = Collated(once, trim=False)
        return drawn if len(drawn) == len(chosen) else chosen


class Collated:
    """Hold collated tensors; slice the rows that are taken and trim the padding they share.

    Args:
        tree: Tensors in any nesting of dicts, lists and tuples.
        trim: Whether padding may be cut, that is whether the loss is the same without it.
    """

    def __init__(self, tree: Any, *, trim: bool) -> None:
        self._tree = tree = map_leaves(tree, _as_tensor)
        for key, leaf in named_leaves(tree):
            if dataclasses.is_dataclass(leaf):
                raise BadInput(
                    f"{key or 'the batch'} is a {type(leaf).__name__}, whose rows are not known",
                    hint="pass a dict (dataclasses.asdict), or a list of examples",
                )
        self._num_rows = count_rows(tree)
        self._useful = useful_columns(tree, self._num_rows) if trim else {}

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Any]:
        return map(self._example, range(self._num_rows))

    def _example(self, row: int) -> Any:
        """Return one row, its padding trimmed, without the batch dimension."""

        def cut(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[1] in self._useful:
                starts, ends = self._useful[leaf.shape[1]]
                return leaf[row, starts[row] : ends[row]]
            return leaf[row]

        return _map_rows(self._tree, self._num_rows, cut)

    def take(self, examples: Sequence[int]) -> Any:
        rows = list(examples)
        index = torch.tensor(rows)
        columns = {
            width: (min(starts[r] for r in rows), max(1, *(ends[r] for r in rows)))
            for width, (starts, ends) in self._useful.items()
        }

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return type(leaf)([leaf[r] for r in rows])
            return trim(leaf.index_select(0, index.to(leaf.device)))

        def trim(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[1] in columns:
                start, end = columns[leaf.shape[1]]
                return leaf[:, min(start, end - 1) : end].contiguous()  # models call .view
            return leaf

        return _map_rows(self._tree, self._num_rows, cut, trim)


def as_batch(
    batch: Any, collate: Collate | None, *, trim: bool = False, may_be_empty: bool = False
) -> HostBatch:
    """Return the batch in the form that its type calls for; `trim` as for `Collated`.

    Raises:
        BadInput: It is empty, or no list and holds no tensor.
    """
    if isinstance(batch, (Listed, Collated)):
        return batch
    if may_be_empty and isinstance(batch, Sequence) and not batch:
        return Listed(batch, collate or pad_collate)
    is_examples = isinstance(batch, Sequence) and (collate is not None or not _is_collated(batch))
    if is_examples:
        host = Listed(batch, collate or functools.partial(pad_collate, masked=are_padded(batch)))
    else:
        host = Collated(tuple(batch) if isinstance(batch, list) else batch, trim=trim)
    if not len(host) and not may_be_empty:
        raise BadInput("the effective batch has no examples")
    return host


def _copied(example: Any) -> Any:
    """Return a copy down to the lists in a dict; tensors are shared."""
    if type(example) is dict:
        return {k: v.copy() if type(v) is list else v for k, v in example.items()}
    return copy.copy(example)


def _as_tensor(leaf: Any) -> Any:
    """Return arrays of NumPy as tensors, those of strings or objects as lists."""
    if isinstance(leaf, Tensor) or not getattr(leaf, "shape", ()) or not hasattr(leaf, "tolist"):
        return leaf
    try:
        return torch.as_tensor(leaf)
    except ValueError:  # torch takes no arrays that run backwards
        return torch.as_tensor(leaf.copy())
    except TypeError:
        return leaf.tolist()


def _is_collated(batch: Sequence[Any]) -> bool:
    """Tell whether a sequence holds batched parts, as (x, y), rather than examples.

    `DataLoader` collates tuples to a list of tensors; so a list of bare tensors that agree in
    their first dimension is a batch, and examples of that kind need a collate function. A tensor
    beside anything else, as (x, names) or (x, (a, b)), is no example either.
    """
    is_list, batch = isinstance(batch, list), [_as_tensor(part) for part in batch]
    if len({isinstance(part, Tensor) for part in batch}) == 2:
        # `DataLoader` leaves no list of numbers; arrays beside such lists are ragged examples.
        return not any(isinstance(p, list) and p and isinstance(p[0], (int, float)) for p in batch)
    if not all(isinstance(part, (Tensor, Mapping)) for part in batch):
        return False
    if is_list and not any(isinstance(part, Tensor) for part in batch):
        return False
    return len(batch) > 0 and len({count_rows(part, 0) for part in batch} | {0}) == 2


def _map_rows(
    tree: Any,
    num_rows: int,
    rows: Callable[[Any], Any],
    other: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """Return the tree with `rows` applied to the leaves that hold rows and `other` to the rest."""

    def is_rows(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == num_rows

    if is_rows(tree):
        return rows(tree)
    if isinstance(tree, PackedSequence):
        raise BadInput(
            "a PackedSequence is not laid out in rows",
            hint="pass a list of examples, and pack them in collate=",
        )
    if isinstance(tree, Mapping):
        return rebuild(
            tree, {key: _map_rows(value, num_rows, rows, other) for key, value in tree.items()}
        )
    is_parts = isinstance(tree, tuple) and not _are_values(tree)
    if isinstance(tree, list) and num_rows > 1:
        has_rows = [any(is_rows(leaf) for _, leaf in named_leaves(part)) for part in tree]
        is_parts = len(tree) != num_rows and bool(tree) and all(has_rows)
        if not is_parts and any(map(is_rows, tree)):
            raise BadInput(
                f"a list of {len(tree)} holds tensors whose first dimension is {num_rows}, the "
                "number of rows: it may be one value for each row, or parts that have these rows",
                hint="make parts a tuple; give values of rows as a list of examples",
            )
    if is_parts:
        return rebuild(tree, [_map_rows(value, num_rows, rows, other) for value in tree])
    if isinstance(tree, (list, tuple)) and len(tree) == num_rows:
        return rows(tree)
    return other(tree)


def _are_values(values: tuple[Any, ...]) -> bool:
    """Tell whether a tuple holds plain values, as `DataLoader` leaves the strings of a batch."""
    is_named = hasattr(values, "_fields")
    return not is_named and not any(isinstance(v, (Tensor, Mapping, list, tuple)) for v in values)
