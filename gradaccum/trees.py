"""Nested dicts, lists and tuples: walking over their leaves, and building the same with others.

torch has functions for this (`torch.utils._pytree`), but takes mappings that are no dict, such as
the `BatchEncoding` of transformers, for leaves.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import BadInput


def named_leaves(tree: Any, key: str = "", lists: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree, each with the last key on its way.

    With `lists=False` a list is one leaf, since it may hold one value for each row.
    """
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from named_leaves(value, str(name), lists)
    elif isinstance(tree, tuple) or (lists and isinstance(tree, list)):
        for value in tree:
            yield from named_leaves(value, key, lists)
    else:
        yield key, tree


def count_rows(tree: Any, otherwise: int | None = None) -> int:
    """Return the number of rows: of the labels or inputs, of any tensor, of a list of tensors."""
    found = list(named_leaves(tree, lists=False))
    counts = [(key, len(leaf)) for key, leaf in found if isinstance(leaf, Tensor) and leaf.ndim]
    counts = counts or [(key, len(leaf)) for key, leaf in found if isinstance(leaf, list) and leaf]
    named = [(key, n) for key, n in counts if key in ("labels", "input_ids", "attention_mask")]
    decisive = named or counts
    if len({n for _, n in decisive}) > 1:
        listed = ", ".join(f"{key} {n}" if key else str(n) for key, n in decisive)
        raise BadInput(
            f"the first dimensions of the batch disagree ({listed}), so its rows are not known",
            hint="pass a list of examples; constants belong in the objective, not the batch",
        )
    if decisive:
        return decisive[0][1]
    if otherwise is not None:
        return otherwise
    raise BadInput(
        f"the batch ({type(tree).__name__}) holds no tensor with a batch dimension",
        hint="pass a list of examples, or a dict of tensors whose first dimension is the rows",
    )


def to_device(tree: Any, device: torch.device) -> Any:
    """Return the tree with its tensors on the device, without waiting for the copy.

    Only pinned memory is copied without waiting; torch keeps what was pinned for the next time.
    """

    def move(leaf: Tensor) -> Tensor:
        if device.type == "cuda" and leaf.device.type == "cpu" and not leaf.is_sparse:
            leaf = leaf.pin_memory()
        return leaf.to(device, non_blocking=True)

    return map_tensors(tree, move)


def widened(tree: Any) -> Any:
    """Return the tree with its floating-point tensors in float64."""
    return map_tensors(tree, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the tree with `function` applied to every tensor; all other leaves stay."""
    return map_leaves(tree, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return the tree with `function` applied to all that is no dict, list or tuple."""
    if isinstance(tree, Mapping):
        return rebuild(tree, {key: map_leaves(value, function) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return rebuild(tree, [map_leaves(value, function) for value in tree])
    return function(tree)


def rebuild(like: Any, values: Any) -> Any:
    """Return the values as the same kind of dict or sequence; named tuples take them one by one."""
    if hasattr(like, "_fields"):
        return type(like)(*values)
    try:
        return type(like)(values)
    except TypeError:  # of mappings that are not made from a dict, such as defaultdict
        return values
