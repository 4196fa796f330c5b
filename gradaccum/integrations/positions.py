"""`EffectiveBatchSampler` as the sampler of a trainer: its batches as they are, its position kept.

Tested with transformers 5.23 and accelerate 1.15. Its batches are this rank's shares already, so
that nothing shares or shards them again. The position moves with each optimizer step and is part of
the trainer's checkpoints. The trainer counts steps besides, and skips as many batches on resume as
the epoch has had: it is given empty ones for that, since the sampler is behind them already.
"""

import zlib
from collections.abc import Iterator
from itertools import repeat
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Sampler

from gradaccum.errors import BadInput, RankDisagreement
from gradaccum.sampler import EffectiveBatchSampler


class Positioned(Sampler[list[int]]):
    """Yield the batches of a sampler from its position on, after empty ones to be skipped.

    Args:
        sampler: Of effective batches.
    """

    def __init__(self, sampler: EffectiveBatchSampler) -> None:
        self.sampler = sampler
        self.num_skipped = 0  # of the epoch, which the trainer leaves out when it goes on

    def __iter__(self) -> Iterator[list[int]]:
        num, self.num_skipped = self.num_skipped, 0
        yield from repeat([], num)
        yield from self.sampler

    def __len__(self) -> int:
        return self.num_skipped + len(self.sampler)


def is_scheduled(sampler: EffectiveBatchSampler) -> bool:
    """Tell whether the size of its batches changes, so that epochs differ in their number."""
    return not sampler.schedule.is_constant


def sampler_of(loader: Any) -> EffectiveBatchSampler | None:
    """Return what a loader's batches come from, if it is ours.

    `_get_train_sampler` may return it too: then a BatchSampler is around it, which is of no use.
    """
    own = getattr(loader, "batch_sampler", None)
    inner = getattr(own, "sampler", own)
    return inner if isinstance(inner, EffectiveBatchSampler) else None


def take(loader: Any, sampler: EffectiveBatchSampler, accelerator: Accelerator) -> None:
    """Let a loader read a sampler as it is, wherever accelerate or torch have put it.

    Raises:
        BadInput: The sampler is of other ranks than the trainer.
        RankDisagreement: Ranks would read shares of different batches.
    """
    # A loader refuses another one by assignment; that of accelerate has the real one inside.
    vars(getattr(loader, "base_dataloader", loader))["batch_sampler"] = Positioned(sampler)
    rank, world = accelerator.process_index, accelerator.num_processes
    # Shares show what costs, speeds, seed and weights decide.
    dealt = str(sampler.schedule), sampler.shares(sampler.consumed), sampler.state_dict()
    own = sampler.rank, sampler.world, zlib.crc32(repr(dealt).encode())
    told: list[tuple[int, int, int]] = gather_object([own]) if world > 1 else [own]
    if [of for *of, _ in told] != [[rank, world] for rank in range(world)]:
        raise BadInput(
            f"the train loader's EffectiveBatchSampler is for rank {sampler.rank} of "
            f"{sampler.world} in process {rank} of {world}",
            hint="leave out rank and world, on every rank: they are torch.distributed's",
        )
    if len({of for *_, of in told}) > 1:
        raise RankDisagreement(
            "the EffectiveBatchSamplers of ranks deal different batches",
            hint="the same data, size, costs, seed, weights and speeds on every rank",
        )


def place(loader: Any, kept: dict[str, Any] | None, num_steps: int, *, anew: bool) -> None:
    """Put a sampler that is at its beginning where a run stands after that many steps.

    Args:
        loader: Of the run; nothing is done where its sampler is another one.
        kept: The state in the checkpoint. None: that of a trainer that was not attached, whose
            position is its number of steps.
        num_steps: Optimizer steps so far.
        anew: Whether to begin with the epoch, as `ignore_data_skip` says.
    """
    sampler = sampler_of(loader)
    if sampler is None or not num_steps:
        return
    if kept and is_scheduled(sampler):
        sampler.load_state_dict(kept)
        loader.batch_sampler.num_skipped = int(kept["consumed"] > kept["epoch_begin"])
        return
    num_skipped = num_steps % len(loader)  # as the trainer counts
    sampler.load_state_dict(kept if kept and not anew else sampler.state_dict())
    for _ in range(0 if kept and not anew else num_steps - num_skipped * anew):
        sampler.commit()
    loader.batch_sampler.num_skipped = 0 if anew else num_skipped
