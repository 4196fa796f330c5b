"""Nested dicts, lists and tuples: walking over their leaves, and building the same with others.

torch has functions for this (`torch.utils._pytree`), but takes mappings that are no dict, such as
the `BatchEncoding` of transformers, for leaves.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


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


def to_device(tree: Any, device: torch.device) -> Any:
    """Return the tree with its tensors on the device; pinned ones without waiting for the copy."""
    return map_tensors(tree, lambda leaf: leaf.to(device, non_blocking=True))


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the tree with `function` applied to every tensor; all other leaves stay."""
    return map_leaves(tree, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return the tree with `function` applied to all that is no dict, list or tuple."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return rebuild(tree, [map_leaves(value, function) for value in tree])
    return function(tree)


def rebuild(like: Any, values: list[Any]) -> Any:
    """Return the values as the same kind of sequence; a named tuple takes them one by one."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
