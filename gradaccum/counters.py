"""What a loss may be averaged over, counted from collated inputs: rows, labels, masks, elements.

A counter is a name such as "trained:labels", so that it can be written into a checkpoint. Which of
them a loss is divided by is measured in `contract.py`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from gradaccum.trees import named_leaves
from gradaccum.types import IGNORE_INDEX

ROWS = "rows:"
CLAMPED = "|1"  # how a counter ends that is at least 1, as what is divided by clamp(count, min=1)
UNCLAMPED = ("rows", "elements", "finite")  # never 0


def _first_dimension(labels: Tensor) -> Tensor:
    """Return a mask as (rows, rest)."""
    return labels.reshape(len(labels), -1) if labels.ndim else labels.reshape(1, 1)


# In the order in which they are preferred where several fit. Each takes the leaf's value and the
# inputs, and returns None where it does not apply.
KINDS: dict[str, tuple[str, Callable[[Any, Mapping[str, Any]], Any]]] = {
    "shifted": (
        "trained tokens in {}, each row's first left out",
        lambda x, _: (x[..., 1:] != IGNORE_INDEX).sum() if _is_ids(x) and x.ndim > 1 else None,
    ),
    "trained": (
        "labels in {} that are not -100",
        lambda x, _: (x != IGNORE_INDEX).sum() if _is_ids(x) else None,
    ),
    "labelled": (
        "rows with a label in {}",
        lambda x, _: (
            (_first_dimension(x) != IGNORE_INDEX).any(1).sum()
            if _is_ids(x) and x.ndim > 1
            else None
        ),
    ),
    "attended": (
        "labels in {} that are not -100 and not masked",
        lambda x, inputs: _attended(x, inputs, 0),
    ),
    "shifted_attended": (
        "labels in {} that are not -100 and not masked, each row's first left out",
        lambda x, inputs: _attended(x, inputs, 1),
    ),
    "nonzero": (
        "values in {} that are not 0",
        lambda x, _: (x != 0).sum() if isinstance(x, Tensor) else None,
    ),
    "not_negative": (
        "values in {} that are not negative",
        lambda x, _: (x >= 0).sum() if _is_ids(x) else None,
    ),
    "not_255": (
        "values in {} that are not 255",
        lambda x, _: (x != 255).sum() if _is_ids(x) and x.ndim > 2 else None,
    ),
    "in_range": (
        "rows whose value in {} is a position of their inputs",
        lambda x, inputs: _in_range(x, inputs),
    ),
    "finite": (
        "values in {} that are not nan",
        lambda x, _: (
            x.isfinite().sum() if isinstance(x, Tensor) and x.is_floating_point() else None
        ),
    ),
    "total": (
        "the sum of {}",
        lambda x, _: x.double().sum() if _is_summed(x) else None,
    ),
    "elements": ("elements of {}", lambda x, _: x.numel() if isinstance(x, Tensor) else None),
    "listed": (
        "objects in {}",
        lambda x, _: sum(map(_num_listed, x)) if isinstance(x, list) else None,
    ),
}


def _is_tried(kind: str, key: str) -> bool:
    """Tell whether to try a counter: no loss is taken over ids, and of a mask what it lets pass."""
    if key.endswith("_ids"):
        return False
    return kind == "nonzero" or not key.endswith("attention_mask")


def counts(inputs: Any, num_rows: int, names: Collection[str] | None = None) -> dict[str, float]:
    """Return the counters that apply to these collated inputs, the preferred ones first.

    Args:
        inputs: A collated micro-batch.
        num_rows: Its examples.
        names: Only these; by default all.
    """
    given = _given(inputs)
    plain = None if names is None else {name.removesuffix(CLAMPED) for name in names}
    found = {ROWS: float(num_rows)} if plain is None or ROWS in plain else {}
    for kind, (_, counter) in KINDS.items():
        for key in sorted(given, key=lambda key: "label" not in key):
            name = f"{kind}:{key}"
            if name in plain if plain is not None else _is_tried(kind, key):
                value = counter(given[key], given)
                if value is not None:
                    found[name] = float(value)
    clamped = {
        name + CLAMPED: max(1.0, value)
        for name, value in found.items()
        if name.partition(":")[0] not in UNCLAMPED
    }
    return {name: n for name, n in (found | clamped).items() if names is None or name in names}


def describe(name: str) -> str:
    """Return a counter in words: "labels in labels that are not -100"."""
    kind, _, key = name.removesuffix(CLAMPED).partition(":")
    if name == ROWS or kind not in KINDS:
        return kind
    return KINDS[kind][0].format(key) + (" (at least 1)" if name.endswith(CLAMPED) else "")


def _given(inputs: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves by their paths, such as "labels", "target.boxes" or, in a tuple, "1"."""
    if isinstance(inputs, Mapping):
        parts = [(str(name), value) for name, value in inputs.items()]
    elif isinstance(inputs, tuple):
        parts = [(str(i), value) for i, value in enumerate(inputs)]
    else:
        return {path: inputs}
    found: dict[str, Any] = {}
    for name, value in parts:
        found |= _given(value, f"{path}.{name}" if path else name)
    return found


def _is_ids(value: Any) -> bool:
    """Tell whether a value may be labels: whole numbers."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.dtype in (torch.long, torch.int)


def _is_summed(value: Any) -> bool:
    """Tell whether a value may hold lengths or weights; of flags, the sum is what is not 0."""
    return isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex()


def _attended(labels: Any, inputs: Mapping[str, Any], begin: int) -> Tensor | None:
    mask = inputs.get("attention_mask")
    if not _is_ids(labels) or not isinstance(mask, Tensor) or labels.shape != mask.shape:
        return None
    trained = (labels != IGNORE_INDEX) & (mask != 0).to(labels.device)
    return trained[..., begin:].sum() if labels.ndim > begin else None


def _in_range(positions: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Count answers inside of the inputs: question answering ignores those that are cut off."""
    ids = inputs.get("input_ids")
    if not _is_ids(positions) or positions.ndim != 1 or not isinstance(ids, Tensor) or ids.ndim < 2:
        return None
    return ((positions >= 0) & (positions < ids.shape[1])).sum()


def _num_listed(example: Any) -> int:
    """Return the objects of one example: how long the first tensor in it is."""
    leaves = [leaf for _, leaf in named_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(leaves[0]) if leaves else 0
