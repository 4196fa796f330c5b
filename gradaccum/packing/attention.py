"""Attention of one packed row: each segment sees what comes before it in its own rows, and itself.

Where tokens see those behind them as well, segments are whole rows.

Segment by segment through the kernels of torch, so that nothing is computed for pairs that do not
see each other; on CUDA in 16 bits all segments at once, through its kernel for varying lengths.

Shapes: H heads, G heads of keys and values, S tokens, D features of a head.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaccum.packing.plan import Segment

# What models hand their attention that changes nothing here.
IGNORED = (
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "num_items_in_batch", "is_causal",
)  # fmt: skip


class Unpackable(Exception):
    """A model asks for what a packed row cannot give; it is caught where packing is tried."""


def attend(
    segments: Sequence[Segment],
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
    longest = max(segment.end - segment.begin + _num_before(segment) for segment in segments)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    if not is_causal and (window is not None or any(segment.before for segment in segments)):
        unknown.append("what comes after")
    if unknown:
        raise Unpackable(f"attention with {', '.join(unknown)}")
    if query_1HSD.is_cuda and query_1HSD.element_size() == 2 and window is None and not dropout:
        sees = (-1, 0) if is_causal else (-1, -1)
        return _all_at_once(segments, query_1HSD, key_1GSD, value_1GSD, scaling, longest, sees)
    grouped = query_1HSD.shape[1] != key_1GSD.shape[1]
    parts = []
    for begin, end, before in segments:
        query = query_1HSD[:, :, begin:end]
        key, value = (_seen(x, before, begin, end) for x in (key_1GSD, value_1GSD))
        num, num_seen = end - begin, key.shape[2]
        is_plain = num == num_seen and window is None
        mask = None if is_plain else _mask(num, num_seen, window, query.device)
        parts.append(
            F.scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                dropout,
                is_plain and is_causal,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


def _num_before(segment: Segment) -> int:
    return sum(end - begin for begin, end in segment.before)


def _seen(x: Tensor, before: Sequence[tuple[int, int]], begin: int, end: int) -> Tensor:
    """Return the tokens that a segment sees: those before it, and its own."""
    runs = [*before, (begin, end)]
    if len(runs) > 1 and runs[-2][1] == begin:
        runs[-2:] = [(runs[-2][0], end)]
    parts = [x[:, :, first:last] for first, last in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@lru_cache(maxsize=256)  # the layers of a model ask for the same
def _mask(num: int, num_seen: int, window: int | None, device: torch.device) -> Tensor:
    """Return who sees whom, where the last of `num` tokens sees all of `num_seen` or a window."""
    distance = torch.arange(num_seen - num, num_seen, device=device)[:, None]
    distance = distance - torch.arange(num_seen, device=device)
    sees = distance >= 0
    return sees if window is None else sees & (distance < window)


def _all_at_once(
    segments: Sequence[Segment],
    query_1HSD: Tensor,
    key_1GSD: Tensor,
    value_1GSD: Tensor,
    scaling: float | None,
    longest: int,
    sees: tuple[int, int],
) -> Tensor:
    """Return the same by one kernel, which aligns the last query of a segment with its last key."""
    from torch.nn.attention.varlen import varlen_attn

    begins_q, begins_k, index = _offsets(tuple(segments), query_1HSD.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query_1HSD, key_1GSD, value_1GSD))
    if index is not None:
        key, value = key.index_select(0, index), value.index_select(0, index)
    if query.shape[1] != key.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    most = max(segment.end - segment.begin for segment in segments)
    seen = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        begins_q,
        begins_k,
        most,
        longest,
        scale=scaling,
        window_size=sees,
    )
    assert isinstance(seen, Tensor), "nothing else was asked for"
    return seen[None]


@lru_cache(maxsize=8)  # the layers of a model ask for the same
def _offsets(
    segments: tuple[Segment, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return where queries and keys of each segment begin, and the keys to take, if not all."""
    nums_q = torch.tensor([0, *(s.end - s.begin for s in segments)])
    nums_k = torch.tensor([0, *(s.end - s.begin + _num_before(s) for s in segments)])
    index = None
    if any(segment.before for segment in segments):
        runs = [run for s in segments for run in (*s.before, (s.begin, s.end))]
        index = torch.cat([torch.arange(begin, end) for begin, end in runs]).to(device)
    begins_q, begins_k = (n.cumsum(0).to(torch.int32).to(device) for n in (nums_q, nums_k))
    return begins_q, begins_k, index
