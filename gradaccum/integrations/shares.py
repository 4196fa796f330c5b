"""The share of each rank of a trainer's effective batches: balanced, disjoint, the same data.

Tested with accelerate 1.15. The trainer's own sampler yields the effective batches, the same ones
on any number of ranks, and each rank reads its share of them. accelerate would shard batches by
rank instead: it repeats examples where they are uneven (`even_batches`), and after a resume in a
later epoch its loaders of several ranks read the data of another (`set_epoch` stops at a wrapper).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from statistics import median
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from gradaccum.dealing import deal, relative
from gradaccum.errors import BadInput, RankDisagreement
from gradaccum.integrations.positions import Positioned
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.stream import EffectiveBatchStream

logger = logging.getLogger(__name__)

Speeds = list[float] | None
# Equal ranks differed by up to 3.2 in a step and 1.39 in the median of 16, but not by 1.25 in two
# rounds of 16 one after the other (docs/log.md): noise changes nothing. A rank that is slower by
# 1.25 costs two ranks a ninth of a step, many a fifth.
STEPS, FACTOR = 16, 1.25


class Shares(BatchSampler):
    """Yield this rank's share of each effective batch.

    Args:
        sampler: Yields examples, the same on every rank.
        batch_size: Of the effective batch.
        drop_last: Whether a smaller last one is left out.
        costs: Of each example of the data set; empty: all the same.
        rank: Of this process.
        world: Number of ranks.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool,
        *,
        costs: Sequence[float],
        rank: int,
        world: int,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._costs = costs
        self._rank, self._world = rank, world
        self._rates: list[Sequence[float]] = []  # of the latest steps
        self._num_read = 0  # batches of the pass
        self._speeds: list[tuple[int, Speeds]] = [(0, None)]  # and the batch from which they hold

    def __iter__(self) -> Iterator[list[int]]:
        self._speeds = [(0, self._speeds[-1][1])]
        for at, batch in enumerate(super().__iter__()):
            self._num_read = at + 1
            costs = [self._costs[i] for i in batch] if self._costs else [1.0] * len(batch)
            speeds = next(speeds for begin, speeds in reversed(self._speeds) if begin <= at)
            yield [batch[i] for i in deal(costs, self._world, speeds)[self._rank]]

    def follow(self, rates: Sequence[float]) -> None:
        """Let the shares follow how fast ranks are, where they differ by more than `FACTOR`.

        All ranks call this after each step and with the same numbers. They judge by the medians of
        the last two rounds of `STEPS` steps, each by itself and both together, and deal by it from
        a batch on that none of them has read.

        Args:
            rates: What each rank did in a second; 0 where it is not known.
        """
        if min(rates) > 0:
            self._rates.append(rates)
        if len(self._rates) < 2 * STEPS:
            return
        rounds = self._rates[:STEPS], self._rates[STEPS:], self._rates
        medians = [[median(of_rank) for of_rank in zip(*rates, strict=True)] for rates in rounds]
        found, now = medians[-1], self._speeds[-1][1] or [1.0] * self._world
        changes = [[r / speed for r, speed in zip(each, now, strict=True)] for each in medians]
        del self._rates[:STEPS]
        if min(map(_spread, changes)) <= FACTOR:
            return
        self._rates.clear()
        speeds = relative(found, self._world) if _spread(found) > FACTOR else None
        told: list[tuple[int, Speeds]] = gather_object([(self._num_read, speeds)])
        if any(other != speeds for _, other in told):
            raise RankDisagreement(f"ranks would deal by different speeds: {told}")
        begin = max(read for read, _ in told)
        self._speeds.append((begin, speeds))
        if self._rank == 0:
            logger.warning(
                f"ranks differ in speed: {speeds}, relative to the fastest. Shares follow it; "
                "effective batches stay as they are"
                if speeds
                else "ranks are about as fast as each other again, and so are their shares"
            )


def preparing(
    accelerator: Accelerator, costs: Callable[[Any], Sequence[float]]
) -> Callable[..., DataLoader]:
    """Return what takes the place of `accelerator.prepare_data_loader` for a train loader.

    Args:
        accelerator: Of the trainer.
        costs: Returns the cost of each example of a data set or of a list; nothing where it does
            not tell.
    """
    rank, world = accelerator.process_index, accelerator.num_processes

    def prepare(loader: DataLoader, *args: Any, **kwargs: Any) -> DataLoader:
        own = loader.batch_sampler
        if isinstance(loader.dataset, EffectiveBatchStream):
            raise BadInput(
                "an EffectiveBatchStream yields this rank's share already, and a trainer does not "
                "keep its position",
                hint="give the trainer the stream's data: its batches are shared out; or write a "
                "plain loop",
            )
        if isinstance(loader.dataset, IterableDataset):
            _refuse_split(loader.dataset)
            loader.collate_fn = partial(_of_share, loader.collate_fn, costs, rank, world)
        elif isinstance(own, EffectiveBatchSampler | Positioned):
            pass  # its batches are this rank's share
        elif type(own) is not BatchSampler:
            raise BadInput(
                f"the train loader's batches come from {type(own).__name__}, and on {world} ranks "
                "only those of a sampler can be shared out",
                hint="leave out train_sampling_strategy: shares are balanced anyway",
            )
        else:
            # A loader refuses another one by assignment, and accelerate takes it from here.
            vars(loader)["batch_sampler"] = Shares(
                own.sampler,
                own.batch_size,
                own.drop_last,
                costs=costs(loader.dataset),
                rank=rank,
                world=world,
            )
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            rng_types=[],
            dispatch_batches=False,
            use_seedable_sampler=True,  # else the order would follow each rank's random state
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        _require_same_order(prepared, rank)
        return prepared

    return prepare


def _of_share(
    collate: Callable[[list[Any]], Any],
    costs: Callable[[Any], Sequence[float]],
    rank: int,
    world: int,
    examples: list[Any],
) -> Any:
    """Collate this rank's share of an effective batch that every rank has read."""
    return collate([examples[i] for i in deal(costs(examples), world)[rank]])


def _spread(values: list[float]) -> float:
    return max(values) / min(values)


def _require_same_order(loader: DataLoader, rank: int) -> None:
    """Raise RankDisagreement where ranks would share out different batches."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    own = getattr(sampler, "initial_seed", None), getattr(loader.batch_sampler, "batch_size", None)
    number = len(sampler) if isinstance(sampler, Sized) else None
    told: list[Any] = gather_object([(*own, number)])
    if len(set(told)) > 1:
        raise RankDisagreement(
            "ranks shuffle their data differently: seed, effective batch and number of examples "
            f"are {told[0]} on rank 0 and {next(t for t in told if t != told[0])} on another",
            hint="the same seed, data_seed and data set on every rank",
        )


def _refuse_split(data: Any) -> None:
    split = getattr(data, "_distributed", None)
    if split is not None and split.world_size > 1:
        raise BadInput(
            f"the stream is split by rank already ({split.rank} of {split.world_size})",
            hint="leave split_dataset_by_node out: each rank reads the stream and keeps its share",
        )
