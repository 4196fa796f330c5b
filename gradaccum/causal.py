"""The objective of causal language models, whose head sees trained tokens alone.

A forward in which the head lets through what it is handed gives the hidden states of any model,
wrapped or compiled; their trained rows then go through the head.

Shapes: B rows, T tokens, N trained tokens, D hidden, V vocabulary; X is D or V.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from gradaccum.compiled import is_compiled, uncompiled
from gradaccum.errors import BadInput
from gradaccum.modules import having
from gradaccum.objective import Objective, labels_of, length, shifted_tokens
from gradaccum.types import IGNORE_INDEX

CHUNK = 1024  # positions whose logits a leaner loss holds: enough to keep a product busy
TRAINED = "trained_rows"  # added to a micro-batch: where its trained predictions are
# Whether a model's logits are what its head returns, as far as that has been seen.
_PLAIN: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def causal_lm(*, chunk: int | None = None) -> Objective:
    """Return the objective of a causal language model: token cross entropy, labels shifted here.

        loss = sum over t with labels[t] != -100 of -log p(labels[t] | inputs before t)

    Micro-batches are dicts with `labels` of shape (B, T) and whatever the model's forward takes;
    the model returns logits of shape (B, T, V), alone, first in a tuple or as `.logits`. Logits
    of 16 bits are reduced in float32. Weight: trained tokens. Size: padded tokens. Padding is
    trimmed: a causal model does not see what comes after, and `attention_mask` hides what comes
    before. Where the model's logits are what its `get_output_embeddings()` returns, as is looked at
    once, only those of trained tokens are computed: none of prompts and padding.

    Args:
        chunk: Hold the logits of so many trained tokens at a time, and compute them again in
            backward: less memory where V is large, for one more product with the head.

    Raises:
        BadInput: `chunk` is below 1. At the first batch, with `chunk`: the model has no such head.

    Example:
        >>> causal_lm().weight({"labels": torch.tensor([[-100, 5, 6], [1, 2, -100]])})
        tensor(3)
    """
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise BadInput(f"chunk={chunk!r} is not a whole number of at least 1")

    def loss(model: nn.Module, micro: dict[str, Any]) -> Tensor:
        given = {key: value for key, value in micro.items() if key not in ("labels", TRAINED)}
        found_BTX, head = _before_head(model, given, is_required=chunk is not None)
        rows = _at_trained(micro) if micro.get(TRAINED) is None else micro[TRAINED]
        labels = micro["labels"].flatten()[rows + 1].to(found_BTX.device)
        found_NX = found_BTX.flatten(0, 1).index_select(0, rows.to(found_BTX.device))
        if chunk is None:
            return _summed_nll(head(found_NX), labels)
        parts = zip(found_NX.split(chunk), labels.split(chunk), strict=True)
        score = partial(checkpoint, lambda h, y: _summed_nll(head(h), y), use_reentrant=False)
        return torch.stack([score(*part) for part in parts]).sum()

    return Objective(
        loss,
        shifted_tokens,
        length,
        "trained tokens",
        trim=True,
        ready=_with_trained,
        chunk=chunk,
        leaner=causal_lm(chunk=CHUNK) if chunk is None else None,
    )


def _with_trained(micro: Any) -> Any:
    is_known = isinstance(micro, Mapping) and isinstance(micro.get("labels"), Tensor)
    return dict(micro) | {TRAINED: _at_trained(micro)} if is_known else micro


def _at_trained(micro: Mapping[str, Any]) -> Tensor:
    """Return where trained tokens are predicted: one before them, in the flattened (B, T)."""
    is_label = F.pad(labels_of(micro)[:, 1:] != IGNORE_INDEX, (0, 1))
    return is_label.flatten().nonzero()[:, 0]


def _summed_nll(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


def _before_head(
    model: nn.Module, given: dict[str, Any], *, is_required: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what the model hands its head, shape (B, T, D), and the head.

    Where there is no such head, or its logits are changed: the logits, (B, T, V), and the identity.

    Raises:
        BadInput: It is required, and so.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if is_required and not isinstance(head, nn.Module):
        raise BadInput(
            f"{type(model).__name__} has no output embeddings whose logits could be chunked",
            hint="causal_lm() without chunk",
        )
    # A sharded head is gathered by the model's forward alone.
    is_whole = isinstance(head, nn.Module) and not any(
        isinstance(p, DTensor) for p in head.parameters()
    )
    if isinstance(head, nn.Module) and (is_required or (is_whole and _PLAIN.get(model, True))):
        try:
            hidden = _let_through(model, head, given)
            _PLAIN[model] = True
            return hidden, head
        except Exception:
            if is_required or model in _PLAIN:
                raise
    logits = _logits(model(**given))
    _PLAIN[model] = False
    return logits, lambda logits_NV: logits_NV


def _let_through(model: nn.Module, head: nn.Module, given: dict[str, Any]) -> Tensor:
    """Return what the model hands its head.

    The head lets it through for one forward, so that this holds for wrapped models as well; what
    the model then returns as logits has to be just that. It is compared once: that may wait for
    the device.
    """
    if model in _PLAIN and is_compiled(model):
        with having(head, _through):
            hidden = _logits(model(**given))
        # Models may widen their logits, which a head does not take; of one in 4 bits nothing tells.
        wanted = [p.dtype for p in head.parameters() if p.is_floating_point()]
        return hidden.to(wanted[0]) if wanted else hidden
    passed: list[Tensor] = []
    with uncompiled(model), having(head, lambda hidden: passed.append(hidden) or hidden):
        logits = _logits(model(**given))
    is_same = len(passed) == 1 and (
        logits is passed[0]
        or model in _PLAIN
        or (logits.shape == passed[0].shape and torch.equal(logits.to(passed[0]), passed[0]))
    )
    if not is_same:
        raise BadInput(
            f"{type(model).__name__} changes what its head returns (caps or scales the logits), "
            "so that they cannot be chunked",
            hint="causal_lm() without chunk",
        )
    return passed[0]


def _through(hidden: Tensor) -> Tensor:
    """Be the forward of a head: always this very function, by which a compiled model is known."""
    return hidden


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if hasattr(outputs, "logits"):
        return outputs.logits
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
