"""Deal the effective batches of a stream to ranks: data without length or random access.

    loader = DataLoader(EffectiveBatchStream(data, 256, cost=len), batch_size=None)
    for batch in loader:  # this rank's share of one effective batch, a list of examples

Nothing here communicates: every rank reads the same, unless each has a stream of its own. Data with
random access is better served by `sampler.py`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from gradaccum.dealing import deal, flag, number, relative, standing, whole
from gradaccum.errors import BadInput
from gradaccum.schedule import BatchSchedule


class EffectiveBatchStream(IterableDataset[list[Any]]):
    """Yield this rank's share of each effective batch of a stream, as a list of examples.

        loader = DataLoader(EffectiveBatchStream(data, 256, cost=len), batch_size=None)

    For data without length or random access. Every rank reads all of the stream in the same order
    and keeps its share, so that the batches are the same on any number of ranks, and `world` and
    the size may change at any step. So does every worker of a loader, which yields each n-th
    batch: workers save what is done to an example after it is read, not the reading.

    `commit()`, the position and `set_epoch()` are as in `EffectiveBatchSampler`, but that a pass
    which nobody commits begins anew. Data that has a `set_epoch()` is told which pass it is. The
    examples before the position are read again; in the first pass the data's own `skip(n)` does it.

    With `is_sharded` each rank has a stream of its own (`datasets.distributed.
    split_dataset_by_node`) and takes `effective_batch_size // world` examples of it a step, the
    first ranks one more where there is a remainder. What then no longer holds: another number of
    ranks gives other batches, and the position cannot be carried over to it; shares are not
    balanced; ranks whose streams end early yield shorter and then empty lists, and what is left
    of longer streams after `num_batches` is not read. No rank can know of another's end without
    communication, which is why their number has to be given.

    Args:
        data: An iterable that begins anew with each `iter()`. It must not divide itself among the
            workers of a loader; those of `datasets` do and are refused with more than one worker.
        effective_batch_size: Examples of one optimizer step, on all ranks.
        cost: What an example costs to compute. None: all the same.
        drop_last: Leave out what does not fill an effective batch at the end.
        rank: As in `EffectiveBatchSampler`.
        world: As in `EffectiveBatchSampler`.
        speeds: As in `EffectiveBatchSampler`.
        is_sharded: `data` has the examples of this rank alone.
        num_batches: With `is_sharded`: the effective batches of a pass, the same on all ranks.

    Raises:
        BadInput: An argument is wrong.

    Example:
        >>> stream = EffectiveBatchStream(["aa", "b", "cccc"], 2, cost=len, rank=0, world=2)
        >>> list(stream)
        [['aa'], ['cccc']]
    """

    def __init__(
        self,
        data: Iterable[Any],
        effective_batch_size: int,
        *,
        cost: Callable[[Any], float] | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world: int | None = None,
        speeds: Sequence[float] | None = None,
        is_sharded: bool = False,
        num_batches: int | None = None,
    ) -> None:
        self.data, self.cost = data, cost
        if isinstance(effective_batch_size, str | BatchSchedule):
            raise BadInput(
                "a stream takes one effective_batch_size, and no schedule",
                hint="EffectiveBatchSampler, for data with a length",
            )
        size = whole("effective_batch_size", effective_batch_size, 1)
        self.effective_batch_size = size
        self.drop_last = flag("drop_last", drop_last)
        self.is_sharded = flag("is_sharded", is_sharded)
        self.rank, self.world = standing(rank, world)
        self.speeds = relative(speeds, self.world)
        if isinstance(data, Iterator):
            raise BadInput(f"{type(data).__name__} can be read only once", hint="pass an iterable")
        if is_sharded and (drop_last or cost is not None or speeds is not None):
            raise BadInput(
                "is_sharded=True takes no cost, speeds or drop_last: examples cannot move between "
                "ranks, which do not know of each other's end"
            )
        if is_sharded != (num_batches is not None):
            raise BadInput(
                f"is_sharded={is_sharded} and num_batches={num_batches}",
                hint="ranks that read streams of their own need a number at which all of them end, "
                "and only they do",
            )
        self.num_batches = None if num_batches is None else whole("num_batches", num_batches, 1)
        self._parts = [size]  # of one stream, or of each rank's
        if is_sharded:
            self._parts = [size // self.world + (r < size % self.world) for r in range(self.world)]
        self._own = self.rank if is_sharded else 0
        self._taken = [0] * len(self._parts)
        self._num_taken = self._epoch = 0
        self._is_kept = False
        self._reader = 0  # the worker process that has read this copy
        # The pass that a reader has read to its end, and where that is: in memory that is shared
        # with the workers of a loader, since they are the ones who read.
        self._ended = torch.full((2,), -1, device="cpu").share_memory_()

    @property
    def consumed(self) -> int:
        """Return the examples of the pass that have been consumed."""
        self._roll()
        return sum(self._taken)

    @property
    def epoch(self) -> int:
        """Return the number of passes that have been committed to their end."""
        self._roll()
        return self._epoch

    def __iter__(self) -> "Iterator[list[Any]]":
        return _Reading(self)

    def commit(self) -> None:
        """Count the next effective batch as consumed: after `optimizer.step()`."""
        self._roll()
        self._taken = [n + part for n, part in zip(self._taken, self._parts, strict=True)]
        self._num_taken += 1
        self._is_kept = True

    def set_epoch(self, epoch: int) -> None:
        """Set the pass, unless `commit()` keeps it; the data's own `set_epoch` is told of it."""
        whole("epoch", epoch, 0)
        if not self._is_kept:
            self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the position: examples consumed of the pass, and which pass it is."""
        self._roll()
        state = {
            "consumed": sum(self._taken),
            "epoch": self._epoch,
            "is_committed": self._is_kept,
        }
        if self.is_sharded:
            state |= {"shards": list(self._taken), "batches": self._num_taken}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken, on any number of ranks but with `is_sharded`.

        Raises:
            BadInput: The state is of streams that were sharded otherwise.
        """
        try:
            taken = [int(n) for n in state.get("shards", [state["consumed"]])]
            epoch, num_taken = int(state["epoch"]), int(state.get("batches", 0))
            if min(*taken, epoch, num_taken) < 0:
                raise ValueError(f"{state}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"this is not the state of an EffectiveBatchStream: {error}") from error
        if len(taken) != len(self._parts) or ("shards" in state) != self.is_sharded:
            raise BadInput(
                f"the state is of {_streams(len(taken), 'shards' in state)}, and this is one of "
                f"{_streams(len(self._parts), self.is_sharded)}",
                hint="streams that are sharded by rank resume on as many ranks",
            )
        self._taken, self._epoch, self._num_taken = taken, epoch, num_taken
        self._ended.fill_(-1)
        self._is_kept = bool(state.get("is_committed", True))

    def _roll(self) -> None:
        """Begin the next pass where one is committed to its end: beyond it, if that was short."""
        epoch, end = self._ended.tolist()
        # Who reads a later pass has seen this one committed; it may have been read to its end, too.
        is_read = epoch > self._epoch or (epoch == self._epoch and self._taken[0] >= end)
        if any(self._taken) and (self._num_taken == self.num_batches or is_read):
            self._taken = [0] * len(self._parts)
            self._num_taken = 0
            self._epoch += 1


class _Reading(Iterator[list[Any]]):
    """Read a stream from its position on; one worker of n yields each n-th effective batch."""

    def __init__(self, stream: EffectiveBatchStream) -> None:
        worker = get_worker_info()
        self._stream = stream
        self._worker, self._num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self._refusal: BadInput | None = None  # raised by next(): here it would kill the worker
        if self._num_workers > 1 and getattr(stream.data, "num_shards", None) is not None:
            self._refusal = BadInput(
                f"{type(stream.data).__name__} divides its examples among the workers of a loader "
                f"({self._num_workers}), and an effective batch needs all of them",
                hint="num_workers=1, or 0",
            )
        if worker and stream._reader == os.getpid():
            self._refusal = BadInput(
                "a persistent worker does not learn where the next pass of a stream begins",
                hint="persistent_workers=False",
            )
        stream._reader = os.getpid() if worker else 0
        stream._roll()
        self._open(stream._taken[stream._own], stream._num_taken)

    def _open(self, begin: int, turn: int) -> None:
        stream, data, left = self._stream, self._stream.data, begin
        skip, set_epoch = (getattr(data, name, None) for name in ("skip", "set_epoch"))
        if set_epoch is not None and (stream._is_kept or stream._epoch):
            set_epoch(stream._epoch)
        # That of `datasets` skips before it divides the data among ranks, and then no longer
        # shuffles by epoch: a state would be of other examples.
        if begin and skip and not (stream.is_sharded or (set_epoch and stream._epoch)):
            data, left = skip(begin), 0
        self._source = islice(iter(data), left, None)
        self._at = begin
        self._turn = self._first = turn

    def __next__(self) -> list[Any]:
        if self._refusal is not None:
            raise self._refusal
        stream = self._stream
        size = stream._parts[stream._own]
        while self._turn != stream.num_batches:
            rows = list(islice(self._source, size))
            if not stream.is_sharded and len(rows) < size:
                rows = [] if stream.drop_last else rows
                stream._ended[1] = self._at + len(rows)
                stream._ended[0] = stream._epoch
                if not rows:
                    break
            is_own = (self._turn - self._first) % self._num_workers == self._worker
            self._at += len(rows)
            self._turn += 1
            if is_own:
                return rows if stream.is_sharded else self._share(rows)
        raise StopIteration

    def _share(self, rows: list[Any]) -> list[Any]:
        stream = self._stream
        cost = stream.cost or (lambda row: 1.0)
        costs = [number("the cost of an example", cost(row)) for row in rows]
        return [rows[i] for i in deal(costs, stream.world, stream.speeds)[stream.rank]]

    def state_dict(self) -> dict[str, Any]:
        """Return what torchdata's StatefulDataLoader saves of each worker: how far it has read."""
        size = self._stream.effective_batch_size
        return {"at": self._at, "turn": self._turn, "first": self._first, "size": size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["size"] != self._stream.effective_batch_size:
            raise BadInput(
                f"the loader was saved with effective batches of {state['size']:,} examples, and "
                f"this stream has {self._stream.effective_batch_size:,}",
                hint="to change the size, resume from the stream's own state and a new loader",
            )
        self._open(state["at"], state["turn"])
        self._first = state["first"]


def _streams(num: int, is_sharded: bool) -> str:
    return f"{num} streams, sharded by rank" if is_sharded else "one stream"
