"""The effective batch on the host: examples, rows of nested tensors, collating.

A batch comes in one of two forms, and both answer the same three questions: how many examples,
what is example i, what are the model's inputs for these examples.

- `Listed`: a list of examples and a function that collates some of them.
- `Collated`: tensors already collated, in any nesting of dicts, lists and tuples.

Which leaves of a collated batch belong to its rows is read from types and shapes: a tensor whose
first dimension is the number of rows, or a list of that many values, one for each row. Dicts and
tuples only nest. All else is handed to every micro-batch untouched. A batch whose images or patches
are not laid out in rows therefore has to come as a list of examples.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence

from gradaccum.errors import BadInput
from gradaccum.trees import count_rows, map_leaves, named_leaves, rebuild
from gradaccum.types import IGNORE_INDEX

Collate = Callable[[list[Any]], Any]

# How the names of leaves begin that run along the tokens; another leaf may share a width by chance.
TRIMMED = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "labels",
    "shift_labels",
    "position_ids",
    "token_type_ids",
    "decoder",
    "completion_mask",
    "assistant_masks",
    "special_tokens_mask",
)


class HostBatch(Protocol):
    """Answer what the split and the engine ask of an effective batch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def take(self, examples: Sequence[int]) -> Any: ...


class Listed:
    """Hold examples as a list; collate the ones that are taken."""

    def __init__(self, examples: Sequence[Any], collate: Collate) -> None:
        self._examples = examples
        self._collate = collate

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._examples)

    def take(self, examples: Sequence[int]) -> Any:
        return self._collate([self._examples[i] for i in examples])

    def settled(self, examples: Sequence[int]) -> HostBatch:
        """Return these examples, the random numbers of their collator drawn for good.

        Comparing two ways of running a batch needs the same inputs twice. Without random numbers
        each micro-batch is collated by itself, as in training.
        """
        chosen = Listed([self._examples[i] for i in examples], self._collate)
        once, again = self.take(examples), self.take(examples)
        pairs = zip(named_leaves(once), named_leaves(again), strict=False)
        if all(torch.equal(a, b) for (_, a), (_, b) in pairs if isinstance(a, Tensor)):
            return chosen
        drawn = Collated(once)
        return drawn if len(drawn) == len(chosen) else chosen


class Collated:
    """Hold collated tensors; slice the rows that are taken and trim the padding they share."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree = map_leaves(tree, _as_tensor)
        self._num_rows = count_rows(tree)
        self._useful = _useful_columns(tree, self._num_rows)

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


def as_batch(batch: Any, collate: Collate | None) -> HostBatch:
    """Return the batch in the form that its type calls for.

    Raises:
        BadInput: It is empty, or no list and holds no tensor.
    """
    if isinstance(batch, (Listed, Collated)):
        return batch
    is_examples = isinstance(batch, Sequence) and (collate is not None or not _is_collated(batch))
    if is_examples:
        host = Listed(batch, collate or pad_collate)
    else:
        host = Collated(tuple(batch) if isinstance(batch, list) else batch)
    if not len(host):
        raise BadInput("the effective batch has no examples")
    return host


def pad_collate(examples: list[Any]) -> Any:
    """Collate examples: stack what is equal in shape, pad what is ragged, list the rest.

    Numbers and sequences of numbers become tensors. Ragged token sequences are padded on the
    right: `labels` with -100, all others with 0; where `input_ids` are padded and have no
    `attention_mask`, one is added. Ragged tensors of more than one dimension stay a list.

    Example:
        >>> long, short = [5, 6], [7]
        >>> pad_collate([{"input_ids": ids, "labels": ids} for ids in (long, short)])
        {'input_ids': tensor([[5, 6],
                [7, 0]]), 'labels': tensor([[   5,    6],
                [   7, -100]]), 'attention_mask': tensor([[1, 1],
                [1, 0]])}
    """
    first = examples[0]
    if isinstance(first, Mapping):
        if any(example.keys() != first.keys() for example in examples):
            raise BadInput(
                "the examples of one batch have different keys",
                hint="pass collate= to say how to batch them",
            )
        padded = {key: _pad(key, [example[key] for example in examples]) for key in first}
        if "input_ids" in padded and "attention_mask" not in padded:
            ones = [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples]
            if len({len(one) for one in ones}) > 1:
                padded["attention_mask"] = _pad("attention_mask", ones)
        return padded
    if isinstance(first, tuple):
        return rebuild(first, [_pad("", list(c)) for c in zip(*examples, strict=True)])
    return _pad("", examples)


def _pad(key: str, values: list[Any]) -> Any:
    try:
        tensors = [torch.as_tensor(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return values  # strings, nested ragged lists, objects
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    if any(tensor.ndim != 1 for tensor in tensors):
        return tensors
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    tensors = [tensor.to(dtype) for tensor in tensors]
    fill = IGNORE_INDEX if key == "labels" else 0
    return pad_sequence(tensors, batch_first=True, padding_value=fill)


def _as_tensor(leaf: Any) -> Any:
    """Return arrays of NumPy as tensors, those of strings or objects as lists."""
    if isinstance(leaf, Tensor) or not getattr(leaf, "shape", ()) or not hasattr(leaf, "tolist"):
        return leaf
    try:
        return torch.as_tensor(leaf)
    except TypeError:
        return leaf.tolist()


def _is_collated(batch: Sequence[Any]) -> bool:
    """Tell whether a sequence holds batched parts, as (x, y), rather than examples.

    `DataLoader` collates tuples to a list of tensors; so a list of bare tensors that agree in
    their first dimension is a batch, and examples of that kind need a collate function.
    """
    batch = [_as_tensor(part) for part in batch] if isinstance(batch, list) else batch
    if not all(isinstance(part, (Tensor, Mapping)) for part in batch):
        return False
    if isinstance(batch, list) and not any(isinstance(part, Tensor) for part in batch):
        return False
    return len(batch) > 0 and len({count_rows(part, 0) for part in batch} | {0}) == 2


def _useful_columns(tree: Any, num_rows: int) -> dict[int, tuple[list[int], list[int]]]:
    """Find the padding: `{width: (first useful column of each row, end of each row)}`.

    A width is that of the second dimension of some leaves. It is trimmed only where that cannot
    change what the model computes: the padding is known from an attention mask of that width (or
    from labels that no input shares the width with, as a decoder's do), every leaf of the width
    is one of `TRIMMED`, no leaf has the width in a dimension that we do not cut, and, on the left,
    the positions are given.
    """
    found = [
        (k, leaf) for k, leaf in named_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim > 1
    ]
    useful: dict[int, tuple[list[int], list[int]]] = {}
    for width in {leaf.shape[1] for _, leaf in found if leaf.shape[0] == num_rows}:
        group = {key: leaf for key, leaf in found if leaf.shape[1] == width}
        masks = [
            leaf != 0
            for key, leaf in group.items()
            if key.endswith("attention_mask") and leaf.ndim == 2
        ]
        if "labels" in group and (masks or all(k.startswith(("labels", "decoder")) for k in group)):
            masks.append(group["labels"] != IGNORE_INDEX)
        elsewhere = any(
            size == width for _, leaf in found for axis, size in enumerate(leaf.shape) if axis > 1
        )
        unknown = any(not key.startswith(TRIMMED) for key in group)
        foreign = any(leaf.shape[0] not in (num_rows, 1) for leaf in group.values())
        if (
            not masks
            or elsewhere
            or unknown
            or foreign
            or any(mask.shape[0] != num_rows for mask in masks)
        ):
            continue
        mask = torch.stack(masks).any(dim=0)
        if "labels" in group:  # a causal loss predicts the label of a column from the one before
            mask[:, :-1] |= group["labels"][:, 1:] != IGNORE_INDEX
        position = torch.arange(width)
        ends = torch.where(mask, position + 1, 0).amax(dim=1).tolist()
        starts = torch.where(mask, position, width).amin(dim=1).tolist()
        useful[width] = (starts if "position_ids" in group else [0] * num_rows, ends)
    return useful


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
    if isinstance(tree, tuple):
        return rebuild(tree, [_map_rows(value, num_rows, rows, other) for value in tree])
    if isinstance(tree, list) and num_rows > 1 and any(map(is_rows, tree)):
        raise BadInput(
            f"a list of {len(tree)} holds tensors whose first dimension is {num_rows}, the number "
            "of rows: it may be one value for each row, or parts that all have these rows",
            hint="make parts a tuple; give values of rows as a list of examples",
        )
    if isinstance(tree, list) and len(tree) == num_rows:
        return rows(tree)
    return other(tree)
