"""Attention of one packed row: each segment sees what comes before it in its own rows, and itself.

Where tokens see those behind them as well, segments are whole rows.

Segment by segment through the kernels of torch, so that nothing is computed for pairs that do not
see each other; on CUDA in 16 bits all segments at once, through its kernel for varying lengths.

Shapes: H heads, G heads of keys and values, S tokens, D features of a head.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.packing.plan import Segment
from gradaccum.trees import to_device

# What models hand their attention that changes nothing here.
IGNORED = (
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "num_items_in_batch", "is_causal",
)  # fmt: skip


class Unpackable(Exception):
    """A model asks for what a packed row cannot give; it is caught where packing is tried."""


class Attention:
    """The attention of one packed micro-batch, for all layers; what they share goes with it.

    Args:
        segments: Of the packed row.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._is_shared = any(segment.before for segment in segments)
        self._most = max(segment.end - segment.begin for segment in segments)
        self._longest = max(s.end - s.begin + _num_before(s) for s in segments)
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}
        self._offsets: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __call__(
        self,
        module: nn.Module,
        query_1HSD: Tensor,
        key_1GSD: Tensor,
        value_1GSD: Tensor,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> Tensor:
        """Return what each token sees, shape (1, S, H, D).

        Raises:
            Unpackable: It is asked for what is not known here (a cap, sinks, a bias of positions).
        """
        asked = {n: x for n, x in others.items() if x is not None and x is not False}
        unknown = [n for n in asked if n not in IGNORED]
        said = others.get("is_causal")  # as transformers reads it
        is_causal = bool(getattr(module, "is_causal", True) if said is None else said)
        is_wide = sliding_window is None or sliding_window >= self._longest
        window = None if is_wide else sliding_window
        if not is_causal and (window is not None or self._is_shared):
            unknown.append("what comes after")
        if unknown:
            raise Unpackable(f"attention with {', '.join(unknown)}")
        if query_1HSD.is_cuda and torch.is_autocast_enabled("cuda"):  # as torch's own does
            dtype = torch.get_autocast_dtype("cuda")
            query_1HSD, key_1GSD, value_1GSD = (
                x.to(dtype) for x in (query_1HSD, key_1GSD, value_1GSD)
            )
        dtype = query_1HSD.dtype
        if self._is_shared and dtype.itemsize == 2:
            # What many rows see gets a gradient from each: they are added up in 32 bits.
            key_1GSD, value_1GSD = key_1GSD.float(), value_1GSD.float()
        if window is None and not dropout and _has_kernel(query_1HSD, value_1GSD):
            sees = (-1, 0) if is_causal else (-1, -1)
            return self._all_at_once(query_1HSD, key_1GSD, value_1GSD, scaling, sees)
        is_grouped = query_1HSD.shape[1] != key_1GSD.shape[1]
        parts = []
        for begin, end, before in self._segments:
            query = query_1HSD[:, :, begin:end]
            key, value = (_seen(x, before, begin, end).to(dtype) for x in (key_1GSD, value_1GSD))
            if is_grouped and query.is_cuda:  # few kernels take grouped heads there
                key, value = (_ungrouped(x, query.shape[1]) for x in (key, value))
            num, num_seen = end - begin, key.shape[2]
            is_plain = num == num_seen and window is None
            mask = None if is_plain else self._mask(num, num_seen, window, query.device)
            parts.append(
                F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    mask,
                    dropout,
                    is_plain and is_causal,
                    scale=scaling,
                    enable_gqa=is_grouped and not query.is_cuda,
                )
            )
        return torch.cat(parts, 2).transpose(1, 2)

    def _mask(self, num: int, num_seen: int, window: int | None, device: torch.device) -> Tensor:
        """Return who sees whom: the last of `num` tokens all of `num_seen`, or a window of them."""
        asked = num, num_seen, window, device
        if asked not in self._masks:
            sees = torch.ones(num, num_seen, dtype=torch.bool, device=device).tril(num_seen - num)
            if window is not None:
                sees = sees.triu(num_seen - num - window + 1)
            self._masks[asked] = sees
        return self._masks[asked]

    def _all_at_once(
        self,
        query_1HSD: Tensor,
        key_1GSD: Tensor,
        value_1GSD: Tensor,
        scaling: float | None,
        sees: tuple[int, int],
    ) -> Tensor:
        """Return the same by one kernel, which aligns the last queries and keys of a segment."""
        from torch.nn.attention.varlen import varlen_attn

        if query_1HSD.device not in self._offsets:
            self._offsets[query_1HSD.device] = to_device(self._counted(), query_1HSD.device)
        begins_q, begins_k, index = self._offsets[query_1HSD.device]
        query, key, value = (x[0].transpose(0, 1) for x in (query_1HSD, key_1GSD, value_1GSD))
        if index is not None:
            key, value = (x.index_select(0, index).to(query.dtype) for x in (key, value))
        kernel: Callable[..., Any] = varlen_attn
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in inspect.signature(kernel).parameters:  # not in torch 2.11
                kernel = partial(kernel, enable_gqa=True)
            else:
                key, value = (_ungrouped(x, query.shape[1]) for x in (key, value))
        seen = kernel(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            begins_q,
            begins_k,
            self._most,
            self._longest,
            scale=scaling,
            window_size=sees,
        )
        return seen[None]

    def _counted(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return where queries and keys of each segment begin, and the keys to take, if not all."""
        nums_q = torch.tensor([0, *(s.end - s.begin for s in self._segments)])
        nums_k = torch.tensor([0, *(s.end - s.begin + _num_before(s) for s in self._segments)])
        index = None
        if self._is_shared:
            runs = [run for s in self._segments for run in (*s.before, (s.begin, s.end))]
            index = torch.cat([torch.arange(begin, end) for begin, end in runs])
        return nums_q.cumsum(0).to(torch.int32), nums_k.cumsum(0).to(torch.int32), index


def _has_kernel(query_1HSD: Tensor, value_1GSD: Tensor) -> bool:
    """Tell whether one kernel runs all segments here: flash attention, with what it asks for."""
    is_16_bits = query_1HSD.is_cuda and query_1HSD.dtype in (torch.float16, torch.bfloat16)
    size = query_1HSD.shape[-1]
    fits = size % 8 == 0 and size <= 256 and value_1GSD.shape[-1] == size
    return is_16_bits and fits and torch.cuda.get_device_capability(query_1HSD.device) >= (8, 0)


def _ungrouped(x: Tensor, num_heads: int) -> Tensor:
    """Return keys or values, heads in the second dimension, with one for each of the queries."""
    return x.repeat_interleave(num_heads // x.shape[1], 1)


def _num_before(segment: Segment) -> int:
    return sum(end - begin for begin, end in segment.before)


def _seen(x: Tensor, before: Sequence[tuple[int, int]], begin: int, end: int) -> Tensor:
    """Return the tokens that a segment sees: those before it, and its own."""
    runs = [*before, (begin, end)]
    if len(runs) > 1 and runs[-2][1] == begin:
        runs[-2:] = [(runs[-2][0], end)]
    parts = [x[:, :, first:last] for first, last in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
