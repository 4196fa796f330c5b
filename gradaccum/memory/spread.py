"""What one of several ranks holds of a step and waits for, from the trace of one process.

Replicas hold what one process holds, and a bucket for sums. With `fully_shard` a rank holds its
part of parameters, gradients and optimizer state, and of the whole what `sync` says (`sync/`); and
at a time the parameters of two blocks, one of them gathered ahead, and the gradients of two, one of
them being reduced. What is in no block is gathered from the beginning of a forward to the end of
its backward. That counts at every moment of a micro-batch, which is a little too much.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradaccum.errors import BadInput
from gradaccum.memory.tracker import (
    AFTER,
    CATEGORIES,
    GRADIENTS,
    PARAMETERS,
    STATE,
    TEMPORARIES,
)
from gradaccum.sync.modes import MODES, TEXTS, Mode
from gradaccum.sync.replicated import BUCKET_BYTES

WIDE = 4  # bytes in which a gradient is summed, at the least
# Bytes a second that a rank sends: one InfiniBand adapter of 400 Gbit/s for each GPU; a process on
# the same host. Assumed: FSDP hides what is shorter than the computation beside it.
LINK = {"cuda": 50e9, "cpu": 1e9}


@dataclass(frozen=True, slots=True)
class Group:
    """Count what `fully_shard` moves together.

    Args:
        num_bytes: Of its parameters, in their own dtype.
        gradient_bytes: Of those that are trained, as they are summed.
    """

    num_bytes: int
    gradient_bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Say how a model is spread over ranks.

    Args:
        ranks: That train it together.
        shard_ranks: That hold one copy of it together; 1: every rank holds all of it.
        sync: When shards are gathered and reduced; None if there are none.
        blocks: The groups that are gathered one after the other.
        root: What is in no block.
        link: Bytes a second that a rank sends.
    """

    ranks: int
    shard_ranks: int
    sync: Mode | None
    blocks: tuple[Group, ...]
    root: Group
    link: float

    def __str__(self) -> str:
        if self.ranks == 1:
            return ""
        if self.sync is None:
            return f"{self.ranks:,} replicas"
        copies = self.ranks // self.shard_ranks
        more = f", {copies:,} copies" if copies > 1 else ""
        return f"sharded over {self.shard_ranks:,} ranks{more}, {TEXTS[self.sync]}"

    def ways(self) -> Iterator["Spread"]:
        """Yield the same with each mode, that of most memory and least communication first."""
        if self.sync is None:
            yield self
        else:
            for mode in reversed(MODES):
                yield dataclasses.replace(self, sync=mode)

    def place(self, live: Tensor, part: Tensor) -> Tensor:
        """Return what is alive on one rank, from what is in one process that does its share alone.

        Args:
            live: Bytes by operation and category, (ops, categories), float64.
            part: Of the step, for each operation, (ops,).
        """
        column = {name: i for i, name in enumerate(CATEGORIES)}
        found, after = live.clone(), part == AFTER
        if self.sync is None:
            if self.ranks > 1:
                found[~after, column[TEMPORARIES]] += min(BUCKET_BYTES, self.gradient_bytes)
            return found
        num, sync = self.shard_ranks, self.sync
        for name in (PARAMETERS, STATE):
            found[:, column[name]] /= num
        found[after, column[TEMPORARIES]] /= num  # of the optimizer, which runs on shards
        found[after if sync != "each" else slice(None), column[GRADIENTS]] /= num
        blocks = sorted(self.blocks, key=lambda block: block.num_bytes)[-2:]
        gathered = self.root.num_bytes + sum(block.num_bytes for block in blocks)
        if sync == "hold":
            gathered = self.num_bytes + max(g.num_bytes for g in (self.root, *blocks))
        root, most = self.root.gradient_bytes, max(b.gradient_bytes for b in (Group(0, 0), *blocks))
        found[~after, column[PARAMETERS]] += gathered
        if sync == "each":
            found[~after, column[TEMPORARIES]] += root + max(root, 2 * most)
        else:  # at the end, beside whole gradients: what is sent, in two copies, and what results
            last = (~after).nonzero().max()
            found[last, column[TEMPORARIES]] += 2 * max(root, most) + self.gradient_bytes / num
        return found

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all parameters."""
        return self.root.num_bytes + sum(block.num_bytes for block in self.blocks)

    @property
    def gradient_bytes(self) -> int:
        """Return the bytes of all gradients, as they are summed."""
        return self.root.gradient_bytes + sum(block.gradient_bytes for block in self.blocks)

    @property
    def micro_bytes(self) -> float:
        """Return the bytes that a rank sends in each micro-batch."""
        whole = {"each": 2 * self.num_bytes + self.gradient_bytes, "once": 2 * self.num_bytes}
        return whole.get(self.sync or "", 0) * (1 - 1 / self.shard_ranks)

    @property
    def step_bytes(self) -> float:
        """Return the bytes that a rank sends in each step beside its micro-batches."""
        whole = {"once": self.gradient_bytes, "hold": self.num_bytes + self.gradient_bytes}
        copies = self.ranks // self.shard_ranks
        summed = 2 * self.gradient_bytes / self.shard_ranks * (1 - 1 / copies)
        return whole.get(self.sync or "", 0) * (1 - 1 / self.shard_ranks) + summed

    @property
    def micro_seconds(self) -> float:
        return self.micro_bytes / self.link

    @property
    def step_seconds(self) -> float:
        return self.step_bytes / self.link


def spread_of(model: nn.Module, ranks: int, shard_ranks: int, device: torch.device) -> Spread:
    """Return how ranks share a model: each layer a group of its own, as in the recipes of FSDP2.

    Raises:
        BadInput: The numbers do not fit together.
    """
    for name, value in (("ranks", ranks), ("shard_ranks", shard_ranks)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInput(f"{name}={value!r} is not a whole number of at least 1")
    if ranks % shard_ranks:
        raise BadInput(
            f"{ranks} ranks cannot hold copies of the model on {shard_ranks} ranks each",
            hint=f"shard_ranks={ranks} (FSDP2), a divisor of it (HSDP), or 1 (replicas)",
        )
    blocks, taken = [], set[nn.Parameter]()
    for module in model.modules():
        for block in module if isinstance(module, nn.ModuleList) else ():
            own = set(block.parameters()) - taken
            taken |= own
            if own:
                blocks.append(_group(own))
    root = _group(set(model.parameters()) - taken)
    sync = "each" if shard_ranks > 1 else None
    return Spread(ranks, shard_ranks, sync, tuple(blocks), root, LINK[device.type])


def _group(parameters: set[nn.Parameter]) -> Group:
    trained = [p for p in parameters if p.requires_grad]
    summed = sum(max(WIDE, p.dtype.itemsize) * p.numel() for p in trained)
    return Group(sum(p.nbytes for p in parameters), summed)
