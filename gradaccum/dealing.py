"""What effective batches are dealt with: shares by cost, hashes for an order, checks of arguments.

Pure functions of what they are given, but for `standing`, which also asks where the process runs.
The batches themselves are in `sampler.py` and `stream.py`.
"""

import heapq
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradaccum.errors import BadInput

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def deal(
    costs: Sequence[float], world: int, speeds: Sequence[float] | None = None
) -> list[list[int]]:
    """Deal positions to ranks so that the most expensive share is cheap: longest first.

        for the most expensive left: to the rank that would be done with it first

    Graham's LPT rule: with equal speeds the largest share is below 4/3 of the best possible. Ties
    go by position, then to whoever has fewer, then by rank. Takes time for each example and each
    distinct speed.

    Args:
        costs: Of each position.
        world: Number of ranks.
        speeds: Relative speed of each rank; None: all the same.

    Returns:
        For each rank its positions, the most expensive first.

    Example:
        >>> deal([5, 1, 4, 2], 2)
        [[0, 1], [2, 3]]
        >>> deal([5, 1, 4, 2], 2, [3.0, 1.0])
        [[0, 2], [3, 1]]
    """
    dealt: list[list[int]] = [[] for _ in range(world)]
    kinds: dict[float, list[tuple[float, int, int]]] = {}  # heaps of (load, number, rank) by speed
    for rank, speed in enumerate(speeds or [1.0] * world):
        kinds.setdefault(speed, []).append((0.0, 0, rank))
    heap = next(iter(kinds.values()))
    for i in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        cost = costs[i]
        if len(kinds) > 1:
            heap = min(
                kinds.items(), key=lambda kind: ((kind[1][0][0] + cost) / kind[0], kind[1][0][1:])
            )[1]
        load, num, rank = heap[0]
        heapq.heapreplace(heap, (load + cost, num + 1, rank))
        dealt[rank].append(i)
    return dealt


def hashes(ids: Tensor, *words: int) -> Tensor:
    """Return a hash of each id and the words, int64: the same on every platform and version.

    splitmix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195): its state
    begins at a hash of the words and advances by GAMMA with each id. int64 wraps around.
    """
    state = torch.zeros((), dtype=torch.int64, device="cpu")
    for word in words:
        state = mixed(state + _signed(GAMMA) ^ _signed(word))
    return mixed(state + (ids + 1) * _signed(GAMMA))


def mixed(z: Tensor) -> Tensor:
    """Return the hashes that splitmix64 makes of its states, int64."""
    for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ shifted(z, by)) * _signed(factor)
    return z ^ shifted(z, 31)


def shifted(z: Tensor, by: int) -> Tensor:
    """Return int64 shifted to the right as if it had no sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)  # int64 shifts the sign in


def upto(num: int) -> Tensor:
    """Return 0 to `num - 1`, shape (num,)."""
    return torch.arange(num, device="cpu")  # a default device is of no use here


def _signed(word: int) -> int:
    word &= MASK
    return word - (1 << 64) if word >> 63 else word


def whole(name: str, value: Any, least: int | None) -> int:
    """Return a whole number, checked."""
    if type(value) is not int or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise BadInput(f"{name} is {value!r:.60}, not a whole number{bound}")
    return value


def flag(name: str, value: Any) -> bool:
    """Return True or False, checked."""
    if not isinstance(value, bool):
        raise BadInput(f"{name} is {value!r:.60}, not True or False")
    return value


def numbers(name: str, values: Any, num: int) -> Tensor:
    """Return a copy in float64, checked: one finite number of at least 0 for each example."""
    try:
        # [:] makes a list of a column of `datasets`, whose items are slow one by one.
        found = torch.as_tensor(values[:], dtype=torch.float64, device="cpu") + 0.0  # no -0.0
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{name} is {values!r:.60}, not a number for each example") from error
    if found.shape != (num,):
        raise BadInput(f"{name} has shape {tuple(found.shape)}, and there are {num:,} examples")
    wrong = ~(found.isfinite() & (found >= 0))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise BadInput(f"{name}[{at}] is {float(found[at])}, not a finite number of at least 0")
    return found


def number(name: str, value: Any) -> float:
    """Return a finite number of at least 0, checked."""
    try:
        cost = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{name} is {value!r:.60}, not a number") from error
    if not (math.isfinite(cost) and cost >= 0):
        raise BadInput(f"{name} is {cost}, not a finite number of at least 0")
    return cost


def relative(speeds: Any, world: int) -> list[float] | None:
    """Return the speeds of ranks, checked, as parts of the fastest."""
    if speeds is None:
        return None
    found = numbers("speeds", speeds, world).tolist()
    if min(found) <= 0:
        raise BadInput(f"speeds[{found.index(min(found))}] is 0, not above 0")
    # Whole percents of the fastest, as good as any measurement: few distinct speeds are fast.
    return [max(round(speed / max(found), 2), 0.01) for speed in found]


def standing(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return rank and world: those given, checked, or else of where the process runs."""
    if (rank is None) != (world is None):
        raise BadInput(f"{rank=} and {world=}: give both or neither")
    if rank is None or world is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        found = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            rank, world = (int(text) for text in found)
        except ValueError as error:
            raise BadInput(
                f"the environment has RANK={found[0]} and WORLD_SIZE={found[1]}"
            ) from error
    whole("world", world, 1)
    if whole("rank", rank, 0) >= world:
        raise BadInput(f"rank is {rank}, and there are {world} ranks, from 0 on")
    return rank, world
