"""Whether micro-batches run packed: only where that is exact, measured on this model and this loss.

Some rows run padded and packed, two of which begin alike. The two gradients have to agree as well
as two orders of the same rows do, in 16 bits as well as two of the model's own kernels. Where
packing has something to save, it is then used, unless a micro-batch of each kind shows it to be
slower here.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import measures
from gradaccum.batch import HostBatch, Listed
from gradaccum.device import is_out_of_memory
from gradaccum.engine import Accumulator
from gradaccum.memory.probe import OTHER_TOKENS, TOKENS, alone, clear, in_turns, repeated
from gradaccum.packing.attention import Unpackable
from gradaccum.packing.plan import SHARED, Layout
from gradaccum.split import split
from gradaccum.sync.choose import is_sharded, module_of
from gradaccum.trees import rebuild
from gradaccum.types import Budget

SAVED = 0.03  # of the tokens; below, a packed row is not worth looking at
SLOWER = 1.2  # times padded, a token: a timing of one micro-batch tells no less
SAMPLE = 4096  # elements of each gradient that are compared
# What two exact gradients may differ by where their dtypes allow, as the contract says.
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-6}
TIMES_FLOOR = 4
logger = logging.getLogger(__name__)


def find_layout(
    accumulator: Accumulator, host: HostBatch, aside: Callable[..., AbstractContextManager[None]]
) -> Layout | None:
    """Return how micro-batches of this model run packed; None where they had better not.

    Args:
        accumulator: Is left as it is.
        host: An effective batch of at least two examples.
        aside: Keeps what runs inside out of the training.
    """
    packed = packed_of(accumulator.model)
    if packed is None or len(host) < 2:
        return None
    engine = alone(accumulator)
    tokens = TOKENS.get(next(engine.model.parameters()).device.type, OTHER_TOKENS)
    budget = Budget(tokens=tokens)
    if isinstance(engine.budget, Budget):
        budget = budget.within(engine.budget)
    cuts = {
        layout: split(host, engine.objective, budget, shared=layout.shared if layout else None)
        for layout in (None, packed)
    }
    run = {layout: sum(micro.size for micro in micros) for layout, micros in cuts.items()}
    if run[packed] > (1 - SAVED) * run[None]:
        return None
    try:
        why = _difference(engine, packed, host, aside)
        if why:
            logger.info("micro-batches run padded: %s", why)
            return None
        (padded, as_packed), _ = in_turns(engine, host, aside, list(cuts.items()))
    except Exception as error:
        clear(engine.model)
        if not is_out_of_memory(error):
            raise
        return None
    if as_packed > SLOWER * padded:
        logger.info("micro-batches run padded, which is faster here")
        return None
    return packed


def packed_of(model: nn.Module) -> Any:
    """Return what runs the transformers model in there packed; None if there is none."""
    if "transformers" not in sys.modules or is_sharded(model):
        return None
    from gradaccum.packing.backbone import Packed  # now, since it imports transformers

    try:
        return Packed(module_of(model))
    except Unpackable:
        return None


def _difference(
    engine: Accumulator,
    packed: Any,
    host: HostBatch,
    aside: Callable[..., AbstractContextManager[None]],
) -> str:
    """Return by what the packed gradient is wrong, or "" if it is not."""
    sizes = [engine.objective.size(example) for example in host]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    # Of two lengths, so that there is padding, where nothing is shared.
    one, middle = order[len(order) // 4], len(order) // 2
    other = next((i for i in order[middle:] if sizes[i] != sizes[one]), order[middle])
    rows = [one, other]
    if isinstance(host, Listed):
        host, rows = host.settled(rows), [0, 1]
    one, other = rows

    def gradients(layout: Layout | None, *chosen: int) -> list[Tensor]:
        engine.layout = layout
        window = repeated(engine, _forked(host.take(chosen)), (3, 1), 1)
        return measures.gradients(engine.model, partial(engine.attempt, window), most=SAMPLE)

    with aside(engine.model):
        before = packed.num_run
        expected = gradients(None, one, one, other)
        others = [gradients(None, other, one, one)]
        try:
            found = gradients(packed, one, one, other)
        except Exception as error:
            clear(engine.model)
            if is_out_of_memory(error):
                raise
            return f"packed, it fails ({type(error).__name__}: {error})".splitlines()[0]
        if packed.num_run == before:
            return "nothing passes through the body of the model that could be packed"
        if packed.dtype is not None and packed.dtype.itemsize == 2:
            try:
                with packed.by_another_kernel():
                    others.append(gradients(None, one, one, other))
            except Exception as error:  # not all models have another
                clear(engine.model)
                if is_out_of_memory(error):
                    raise
    return different(engine.model, found, expected, others, packed.dtype)


def _forked(inputs: Any) -> Any:
    """Return three rows of which the second no longer ends like its neighbour, which it was."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return inputs
    mask = inputs.get("attention_mask")
    is_token = mask[1] if isinstance(mask, Tensor) and mask.shape == ids.shape else ids[1] >= 0
    columns = is_token.nonzero()[:, 0]
    at = columns[max(SHARED, len(columns) // 2) :][:1]
    others = ids[1, columns][ids[1, columns] != ids[1, at]] if len(at) else ids[:0, 0]
    if not len(others):
        return inputs
    ids = ids.clone()
    ids[1, at] = others[0]
    return rebuild(inputs, {**inputs, "input_ids": ids})


def different(
    model: nn.Module,
    found: list[Tensor],
    expected: list[Tensor],
    others: list[list[Tensor]],
    computed: torch.dtype | None,
) -> str:
    """Return by what a gradient is wrong, or "" if it is off by no more than rounding.

    Args:
        model: Whose gradients they are.
        found: The one in question.
        expected: That of the same rows.
        others: The same with rows in another order, or by another kernel.
        computed: The dtype of autocast, or of what is computed; None: that of the parameters.
    """
    floor = max(measures.relative_error(other, expected) for other in others)
    floor = max(floor, measures.rounding(model, expected, computed))
    error = measures.relative_error(found, expected)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    allowed = max((ALLOWED.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    if error <= max(TIMES_FLOOR * floor, allowed):
        return ""
    return f"the gradient is {error:.1e} off, and {floor:.1e} is rounding"
