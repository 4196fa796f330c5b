"""The share of each rank of a trainer's effective batches: balanced, disjoint, the same data.

Tested with accelerate 1.15. The trainer's own sampler yields the effective batches, the same ones
on any number of ranks, and each rank reads its share of them. accelerate would shard batches by
rank instead: it repeats examples where they are uneven (`even_batches`), and after a resume in a
later epoch its loaders of several ranks read the data of another (`set_epoch` stops at a wrapper).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from gradaccum.errors import BadInput, RankDisagreement
from gradaccum.sampler import deal


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

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            costs = [self._costs[i] for i in batch] if self._costs else [1.0] * len(batch)
            yield [batch[i] for i in deal(costs, self._world)[self._rank]]


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
        if isinstance(loader.dataset, IterableDataset):
            _refuse_split(loader.dataset)
            loader.collate_fn = partial(_of_share, loader.collate_fn, costs, rank, world)
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
