"""The effective batch on the host: examples, rows of nested tensors, collating.

A batch comes in one of two forms, and both answer the same three questions: how many examples,
what is example i, what are the model's inputs for these examples.

- `Listed`: a list of examples and a function that collates some of them.
- `Collated`: tensors already collated, in any nesting of dicts, lists and tuples.

Which leaves of a collated batch belong to its rows is read from types and shapes: a tensor whose
first dimension is the number of rows, or a list (of strings also a tuple) of that many values, one
for each row. Dicts and tuples only nest. All else is handed to every micro-batch untouched. A batch
whose images or patches are not laid out in rows therefore has to come as a list of examples.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
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
MASKS = ("attention_mask", "decoder_attention_mask")


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
        self._collate = collate
        self._ready = ready or {}

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._examples)

    def take(self, examples: Sequence[int]) -> Any:
        rows = tuple(examples)
        if rows in self._ready:
            return self._ready[rows]
        return self._collate([_copied(self._examples[i]) for i in rows])

    def settled(self, examples: Sequence[int]) -> HostBatch:
        """Return these examples, the random numbers of their collator drawn for good.

        Comparing two ways of running a batch needs the same inputs twice. Without random numbers
        each micro-batch is collated by itself, as in training.
        """
        chosen = Listed([self._examples[i] for i in examples], self._collate)
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
        self._useful = _useful_columns(tree, self._num_rows) if trim else {}

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


def as_batch(batch: Any, collate: Collate | None, *, trim: bool = False) -> HostBatch:
    """Return the batch in the form that its type calls for; `trim` as for `Collated`.

    Raises:
        BadInput: It is empty, or no list and holds no tensor.
    """
    if isinstance(batch, (Listed, Collated)):
        return batch
    is_examples = isinstance(batch, Sequence) and (collate is not None or not _is_collated(batch))
    if is_examples:
        host = Listed(batch, collate or pad_collate)
    else:
        host = Collated(tuple(batch) if isinstance(batch, list) else batch, trim=trim)
    if not len(host):
        raise BadInput("the effective batch has no examples")
    return host


def pad_collate(examples: list[Any]) -> Any:
    """Collate examples: stack what is equal in shape, pad what is ragged, list the rest.

    Numbers and sequences of numbers become tensors. Ragged token sequences are padded on the
    right: labels with -100, all others with 0; where `input_ids` are padded and have no
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


def _copied(example: Any) -> Any:
    """Return a copy down to the lists in a dict; tensors are shared."""
    if type(example) is dict:
        return {k: v.copy() if type(v) is list else v for k, v in example.items()}
    return copy.copy(example)


def _pad(key: str, values: list[Any]) -> Any:
    try:
        tensors = _tensors(values)
    except (TypeError, ValueError, RuntimeError):
        return values  # strings, nested ragged lists, objects
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    if any(tensor.ndim != 1 for tensor in tensors):
        return tensors
    filled = [tensor.dtype for tensor in tensors if len(tensor)]  # an empty list says float32
    dtype = functools.reduce(torch.promote_types, filled)
    tensors = [tensor.to(dtype) for tensor in tensors]
    fill = IGNORE_INDEX if key.endswith("labels") else 0
    return pad_sequence(tensors, batch_first=True, padding_value=fill)


def _tensors(values: list[Any]) -> list[Tensor]:
    """Return each value as a tensor; flat lists all at once, which is several times faster."""
    if all(
        isinstance(value, list) and value and type(value[0]) in (int, float) for value in values
    ):
        lengths = [len(value) for value in values]
        return list(torch.tensor(list(itertools.chain.from_iterable(values))).split(lengths))
    return [torch.as_tensor(value) for value in values]


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
        return True
    if not all(isinstance(part, (Tensor, Mapping)) for part in batch):
        return False
    if is_list and not any(isinstance(part, Tensor) for part in batch):
        return False
    return len(batch) > 0 and len({count_rows(part, 0) for part in batch} | {0}) == 2


def _useful_columns(tree: Any, num_rows: int) -> dict[int, tuple[list[int], list[int]]]:
    """Find the padding: `{width: (first useful column of each row, end of each row)}`.

    A width is that of the second dimension of some leaves. It is trimmed where the padding is known
    from an attention mask of that width (or from labels that no input shares the width with, as a
    decoder's do), every leaf of the width is one of `TRIMMED`, and no leaf has the width in a
    dimension that is not cut; on the left only where the positions are given, or the model would
    count others.
    """
    leaves = [(k, leaf) for k, leaf in named_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim]
    useful: dict[int, tuple[list[int], list[int]]] = {}
    for width in {leaf.shape[1] for _, leaf in leaves if leaf.ndim > 1 and len(leaf) == num_rows}:
        group = [(key, leaf) for key, leaf in leaves if leaf.shape[1:2] == (width,)]
        # In a third dimension (a mask of T x T), or as rows of something else (positions).
        elsewhere = any(
            width in leaf.shape[2:] or width == len(leaf) != num_rows for _, leaf in leaves
        )
        foreign = any(len(leaf) not in (num_rows, 1) for _, leaf in group)
        if elsewhere or foreign or not all(key.startswith(TRIMMED) for key, _ in group):
            continue
        plain = [(key, leaf) for key, leaf in group if leaf.shape == (num_rows, width)]
        # A mask of floats is added to scores, and says something else.
        masks = [leaf != 0 for k, leaf in plain if k in MASKS and not leaf.is_floating_point()]
        if not masks and not all(key.startswith(("labels", "decoder")) for key, _ in group):
            continue
        for key, leaf in plain:
            if key in ("labels", "shift_labels"):
                is_target = leaf != IGNORE_INDEX
                masks.append(is_target)
                if key == "labels":  # a causal loss predicts it from the column before
                    masks.append(F.pad(is_target[:, 1:], (0, 1)))
        if not masks:
            continue
        mask = torch.stack(masks).any(dim=0)
        position = torch.arange(width)
        ends = torch.where(mask, position + 1, 0).amax(dim=1).tolist()
        starts = torch.where(mask, position, width).amin(dim=1).tolist()
        has_positions = any(key == "position_ids" for key, _ in group)
        useful[width] = (starts if has_positions else [0] * num_rows, ends)
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
    is_parts = isinstance(tree, tuple) and not _are_words(tree)
    if isinstance(tree, list) and num_rows > 1 and any(map(is_rows, tree)):
        is_parts = len(tree) != num_rows and all(map(is_rows, tree))
        if not is_parts:
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


def _are_words(values: tuple[Any, ...]) -> bool:
    """Tell whether a tuple holds strings, as `DataLoader` leaves those of a batch."""
    return bool(values) and all(isinstance(value, (str, bytes)) for value in values)
