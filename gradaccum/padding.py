"""Padding: made when ragged examples are collated, found and trimmed when a batch is cut."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradaccum.errors import BadInput
from gradaccum.trees import named_leaves, rebuild
from gradaccum.types import IGNORE_INDEX

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


def pad_collate(examples: list[Any], *, masked: bool = False) -> Any:
    """Collate examples: stack what is equal in shape, pad what is ragged, list the rest.

    Numbers and sequences of numbers become tensors. Ragged token sequences are padded on the
    right: labels with -100, all others with 0; where `input_ids` are padded and have no
    `attention_mask`, one is added. Ragged tensors of more than one dimension stay a list.

    Args:
        examples: Those of one micro-batch.
        masked: Whether to add the mask in any case, as others of the same batch are padded.

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
        if masked or are_padded(examples):
            ones = [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples]
            padded["attention_mask"] = _pad("attention_mask", ones)
        return padded
    if isinstance(first, tuple):
        return rebuild(first, [_pad("", list(c)) for c in zip(*examples, strict=True)])
    return _pad("", examples)


def are_padded(examples: Sequence[Any]) -> bool:
    """Tell whether `pad_collate` pads the `input_ids` of these examples and adds their mask."""
    first = examples[0] if len(examples) else None
    if not isinstance(first, Mapping) or "input_ids" not in first or "attention_mask" in first:
        return False
    return len({len(e["input_ids"]) for e in examples if "input_ids" in e}) > 1


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


def useful_columns(tree: Any, num_rows: int) -> dict[int, tuple[list[int], list[int]]]:
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
