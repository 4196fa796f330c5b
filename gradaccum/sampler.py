"""Deal effective batches to ranks: the same batches, whatever the number of ranks.

    sampler = EffectiveBatchSampler(dataset, 256, costs=lengths)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=list)
    for batch in loader:  # this rank's share of one effective batch, a list of examples
        accumulator.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        sampler.commit()

Here are the order of the examples, the shares, and the position in the data that a checkpoint
keeps. Nothing here communicates: every rank computes the same from the same arguments, which
therefore have to be the same on all ranks but for `rank`. Data without length or random access is
`stream.py`, who gets what of a batch `dealing.py`, and how a share is cut into micro-batches
`split.py`.
"""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from gradaccum.dealing import (
    MASK,
    deal,
    flag,
    hashes,
    mixed,
    number,
    numbers,
    relative,
    shifted,
    standing,
    upto,
    whole,
)
from gradaccum.errors import BadInput
from gradaccum.schedule import BatchSchedule
from gradaccum.types import counted

ORDER, COPIES = 0, 1  # what a hash is for: the two do not depend on each other


class Part(NamedTuple):
    """Name the order in force from a position on: the history of a run is a list of these."""

    seed: int
    shuffle: bool
    begin: int


class Place(NamedTuple):
    """Locate an effective batch: its epoch, that epoch's begin and end, and its own.

    Positions count the examples of all epochs, those that `drop_last` leaves out included. `done`
    is what the schedule counts, before the batch.
    """

    epoch: int
    begin: int
    end: int
    at: int
    over: int
    done: int


class EffectiveBatchSampler(Sampler[list[int]]):
    """Yield this rank's share of each effective batch, as a list of indices that may be empty.

    The effective batches are a function of the seed and the number of examples consumed:

        order = examples of the epoch, sorted by hash(seed, epoch, example)
        size  = schedule.size_at(steps, samples or tokens so far)     or one number
        batch = order[consumed : consumed + size]                     an epoch's last may be short
        share = deal(costs of batch, world)[rank]

    The world size only decides who computes which example. It may change at any step, and so may
    the effective batch size, the seed and `shuffle`: what is left of the epoch is used once each.

    `commit()` after each optimizer step advances the position, which is all that `state_dict()`
    keeps. What a loader has read ahead does not count. A pass (one `iter()`) begins at the
    position and ends with the epoch. Without any `commit()` a pass that was read to its end moves
    on to the next epoch; it then has to be made on all ranks or on none.

    Args:
        data: The data set, or its number of examples.
        effective_batch_size: Examples of one optimizer step, on all ranks; or a `BatchSchedule`, or
            its spelling: "32:0,64:10k". One by tokens takes `costs` as these.
        costs: What each example costs to compute, in any unit (tokens, seconds), or a function of
            the index, which is asked for each example of each effective batch on each rank. None:
            all the same. It decides the shares and so has to be the same on all ranks.
        shuffle: Sort by hash; otherwise the order of the data.
        seed: Any whole number.
        weights: How often each example occurs in an epoch: `floor(w)` times, and once more with
            probability `w - floor(w)`, decided anew each epoch. "Once each" is then said of these
            copies, and the length of an epoch may differ from the next one's.
        drop_last: Leave out what does not fill an effective batch at the end of an epoch. If the
            size has changed within the epoch, that is what does not fill one of the new size.
        rank: Default: torch.distributed's, or that of torchrun's environment, or 0.
        world: Number of ranks; given together with `rank`.
        speeds: How fast the ranks are relative to each other, one number above 0 for each, which
            is rounded to percents of the fastest. None: all the same.

    Raises:
        BadInput: An argument is wrong.

    Example:
        >>> sampler = EffectiveBatchSampler(10, 4, costs=range(10), rank=0, world=2)
        >>> sampler.batch(0), sampler.shares(0)
        ([7, 2, 3, 5], [[7, 2], [5, 3]])
        >>> [len(sampler.batch(consumed)) for consumed in (0, 4, 8, 10)]
        [4, 4, 2, 4]
    """

    def __init__(
        self,
        data: Sized | int,
        effective_batch_size: int | str | BatchSchedule,
        *,
        costs: Sequence[float] | Tensor | Callable[[int], float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        weights: Sequence[float] | Tensor | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world: int | None = None,
        speeds: Sequence[float] | None = None,
    ) -> None:
        # Not super().__init__(): beside a sampler of another framework it would be that one's.
        num = len(data) if isinstance(data, Sized) else data
        self.num_examples = whole("the number of examples", num, 1)
        self.schedule = BatchSchedule.of(effective_batch_size)
        self.seed, self.shuffle = whole("seed", seed, None), flag("shuffle", shuffle)
        self.drop_last = flag("drop_last", drop_last)
        self.rank, self.world = standing(rank, world)
        self._ask = costs if callable(costs) else None
        self._costs = None if callable(costs) or costs is None else numbers("costs", costs, num)
        self._tokens = self._as_tokens() if self.schedule.unit == "tokens" else None
        self._speeds = [(0, relative(speeds, self.world))]
        self._weigh(weights)
        self._history = [Part(self.seed, self.shuffle, 0)]
        self._lengths: dict[int, int] = {}  # of epochs, where they differ
        self._cached: tuple[Place, Tensor] | None = None
        self._totals: Tensor | None = None  # tokens of the cached epoch before each position
        self._pass: _Pass | None = None  # the latest
        self._read = 0  # the position up to which any pass has read
        self._num_moves = 0
        self._is_committed = self._is_loaded = False
        self._origin = self._place = self._fitted(0, 0, 0, 0)

    def _as_tokens(self) -> Tensor:
        """Return the costs as numbers of tokens, int64, shape (examples,)."""
        if self._costs is None:
            raise BadInput(
                f"the schedule {self.schedule} counts tokens, and costs do not tell those of each "
                "example",
                hint="costs=[the number of tokens of each example], or a schedule by samples",
            )
        tokens = self._costs.long()
        if bool((tokens != self._costs).any()):
            raise BadInput(
                f"the schedule {self.schedule} counts tokens, and costs are no whole numbers"
            )
        return tokens

    def _weigh(self, weights: Sequence[float] | Tensor | None) -> None:
        self._fraction = self._copies = self._digest = None
        least, expected = self.num_examples, float(self.num_examples)
        if weights is not None:
            given = numbers("weights", weights, self.num_examples)
            self._copies = given.floor().long()
            self._fraction = given - self._copies
            keys = hashes(upto(len(given)), COPIES)
            self._digest = f"{int(mixed(given.view(torch.int64) ^ keys).sum()) & MASK:016x}"
            least, expected = int(self._copies.sum()), float(given.sum())
            self._fraction = self._fraction if bool(self._fraction.any()) else None
        self._least = least  # the length of every epoch, or what the fractions add to
        need = self.schedule.largest if self.drop_last else 1
        if expected < need:
            raise BadInput(
                f"an epoch has {expected:g} examples, and drop_last leaves out what does not fill "
                f"an effective batch of {need:,}"
                if self.drop_last
                else f"the weights sum to {expected:g}: an epoch would have no example",
                hint="drop_last=False, or a smaller effective_batch_size" if self.drop_last else "",
            )

    @property
    def effective_batch_size(self) -> int:
        """Return the size of the effective batch at the position, by the schedule."""
        return self.schedule.size_at(self._place.done)

    @property
    def consumed(self) -> int:
        """Return the position: examples consumed, or left out by `drop_last`, in all epochs."""
        return self._place.at

    @property
    def epoch(self) -> int:
        """Return the epoch of the position; at the end of one it is the next."""
        return self._place.epoch

    def __len__(self) -> int:
        """Return the number of effective batches of the pass that is read, or of the next one.

        That is a whole epoch, or its rest where a pass begins inside it. It stays the same
        during the pass, until the last batch is committed.
        """
        current = self._pass
        if current is None or self._place.at >= current.end or current.num_moves < self._num_moves:
            return self._num_batches(self._place)
        return current.num_batches

    def __iter__(self) -> "Iterator[list[int]]":
        return _Pass(self)

    def num_batches(self, epochs: float) -> int:
        """Return how many effective batches so many epochs have, from the position on.

        That is what a schedule of the learning rate takes as its number of steps. Of half an epoch
        it is half of its batches, rounded up.
        """
        number("epochs", epochs)
        first = self._place.epoch
        read = itertools.takewhile(lambda place: place.epoch - first < epochs, self.places())
        num_of = Counter(place.epoch - first for place in read)
        return sum(math.ceil(min(epochs - epoch, 1) * num) for epoch, num in num_of.items())

    def places(self) -> Iterator[Place]:
        """Yield where effective batches are from the position on, without end; nothing is read."""
        place = self._place
        while True:
            yield place
            place = self._next(place)

    def batch(self, consumed: int) -> list[int]:
        """Return the indices of the effective batch that begins after that many examples.

        Raises:
            BadInput: By a schedule of steps or tokens none does, or the position is before the one
                that was loaded.
        """
        return self._batch(self._locate(whole("consumed", consumed, 0))).tolist()

    def shares(self, consumed: int) -> list[list[int]]:
        """Return every rank's share of the effective batch that begins after that many examples.

        Shares are sorted by cost, the largest first: the order in which `split` runs them.
        """
        return self._shares(self._locate(whole("consumed", consumed, 0)))

    def commit(self) -> None:
        """Count the effective batch at the position as consumed: after `optimizer.step()`.

        Raises:
            BadInput: There is a pass, and it has not read that far.
        """
        if self._pass is not None and self._read <= self._place.at:
            raise BadInput(
                f"commit() at {self._place.at:,} consumed examples, and no more have been read",
                hint="commit() once for each effective batch, after its optimizer step",
            )
        self._place = self._next(self._place)
        self._is_committed = True

    @property
    def has_equal_epochs(self) -> bool:
        """Tell whether each epoch has as many examples: without weights, or with whole ones."""
        return self._fraction is None

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the position is kept by `commit()` or was loaded.

        Frameworks call this with a count of their own, which begins at 0 after a restart. It moves
        a sampler only while nothing was ever committed or loaded; otherwise it does nothing.
        """
        whole("epoch", epoch, 0)
        is_over = self._pass is not None and self._pass.is_over
        if self._is_committed or self._is_loaded or (epoch == self.epoch and not is_over):
            return
        place = self._origin
        if self._fraction is None:
            place = self._locate(epoch * self._least)
        while place.epoch < epoch:
            place = self._next(place)
        self._move(place)

    def rebalance(self, speeds: Sequence[float], *, at: int | None = None, ahead: int = 32) -> int:
        """Let the shares follow other speeds, from a batch on that no rank has read yet.

        The effective batches stay as they are. All ranks call this after the same step and with
        the same numbers: gather what each has measured first. Checkpoints hold no speeds; after
        `load_state_dict()` the latest hold everywhere.

        Args:
            speeds: As in the constructor.
            at: The position from which they hold. Default: `ahead` effective batches on.
            ahead: More than a loader reads ahead: `num_workers * prefetch_factor`, and one.

        Returns:
            The position from which they hold.

        Raises:
            BadInput: A number is wrong, or the batch at that position has already been read.
        """
        given = relative(speeds, self.world)
        place = self._place
        for _ in range(whole("ahead", ahead, 0)):
            place = self._next(place)
        begin = place.at if at is None else whole("at", at, 0)
        if begin < max(self._read, self._place.at):
            raise BadInput(
                f"speeds would hold from {begin:,} examples on, and {self._read:,} have already "
                f"been read ({self._place.at:,} are committed)",
                hint="read less far ahead (num_workers, prefetch_factor), or pass a larger ahead",
            )
        self._speeds = [entry for entry in self._speeds if entry[0] < begin]
        self._speeds.append((begin, given))
        return begin

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it means, in numbers that JSON can hold.

        There is no rank, world size or batch size in it. By a schedule of steps or tokens there is
        their number so far.
        """
        return self._state(self._place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken.

        If seed or `shuffle` are others than the state's, what is left of its epoch comes in the
        order of this sampler. Its size or schedule holds from there on.

        Raises:
            BadInput: The state is of other data, weights or `drop_last`, or does not tell what the
                schedule counts.
        """
        try:
            history = [Part(int(s), bool(x), int(b)) for s, x, b in state["history"]]
            epoch, begin, at = (int(state[key]) for key in ("epoch", "epoch_begin", "consumed"))
            found = state["examples"], state["weights"], state["drop_last"]
            unit = self.schedule.unit
            done = at if unit == "samples" else int(state.get(unit, -1))
            if not history or history[0].begin or not 0 <= begin <= at or epoch < 0:
                raise ValueError(f"{history=}, {epoch=}, epoch_begin={begin}, consumed={at}")
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"this is not the state of an EffectiveBatchSampler: {error}") from error
        own = self.num_examples, self._digest, self.drop_last
        for name, saved, mine in zip(("examples", "weights", "drop_last"), found, own, strict=True):
            if saved != mine:
                raise BadInput(
                    f"the state was saved with {name}={saved!r}, and this sampler has {mine!r}",
                    hint="resume with the same data, weights and drop_last",
                )
        if done < 0:
            raise BadInput(
                f"the schedule {self.schedule} counts {unit}, and the state does not tell how many "
                "there were",
                hint="a schedule in the unit of that run, or by samples",
            )
        self._history = history
        self._lengths.clear()
        if history[-1][:2] != (self.seed, self.shuffle):
            kept = [part for part in history if part.begin < at]
            self._history = [*kept, Part(self.seed, self.shuffle, at)]
        self._speeds = [(0, self._speeds[-1][1])]
        self._is_loaded = True
        self._is_committed = bool(state.get("is_committed", True))
        self._cached = None
        self._origin = self._fitted(epoch, begin, at, done)
        self._move(self._origin)

    def _state(self, place: Place) -> dict[str, Any]:
        unit = self.schedule.unit
        return ({} if unit == "samples" else {unit: place.done}) | {
            "consumed": place.at,
            "epoch": place.epoch,
            "epoch_begin": place.begin,
            "history": [list(part) for part in self._history],
            "examples": self.num_examples,
            "weights": self._digest,
            "drop_last": self.drop_last,
            "is_committed": self._is_committed,
        }

    def _move(self, place: Place) -> None:
        self._place = place
        self._pass, self._read = None, self._place.at
        self._num_moves += 1

    def _enter(self, reading: "_Pass") -> Place:
        """Begin a pass: at the position, or in the next epoch after one that nobody committed."""
        last = self._pass
        if last is not None and last.is_over and last.begin == self._place.at < last.end:
            if self._is_committed:
                raise BadInput(
                    f"{counted(last.num_batches, 'effective batch')} were read, to the end of the "
                    "epoch, and none of them was committed",
                    hint="commit() after each optimizer step; to read them again: "
                    "sampler.load_state_dict(sampler.state_dict())",
                )
            self._place = self._locate(last.end)
        self._pass = reading
        return self._place

    def _locate(self, consumed: int) -> Place:
        """Find the effective batch that begins there; what `drop_last` leaves out has none."""
        if self.schedule.unit == "samples":
            epoch, begin = 0, 0
            if self._fraction is None:
                epoch = consumed // self._least
                begin = epoch * self._least
            elif consumed >= self._place.begin:  # a shortcut: lengths of earlier epochs take time
                epoch, begin = self._place[:2]
            return self._fitted(epoch, begin, consumed, 0)
        place = self._place if self._place.at <= consumed else self._origin
        while place.at < consumed:
            over, place = place.over, self._next(place)
            if over <= consumed <= place.at:
                return place
        if place.at > consumed:
            raise BadInput(
                f"by the schedule {self.schedule} no effective batch that is known begins after "
                f"{consumed:,} examples",
                hint="one before it can be skipped by commit()",
            )
        return place

    def _fitted(self, epoch: int, begin: int, at: int, done: int) -> Place:
        """Return the effective batch there, or in the next epoch where nothing is left for it."""
        while True:
            end = begin + self._length(epoch, begin)
            done = at if self.schedule.unit == "samples" else done
            size = self.schedule.size_at(done)
            if end - at >= (size if self.drop_last else 1):
                return Place(epoch, begin, end, at, min(at + size, end), done)
            epoch, begin, at = epoch + 1, end, max(at, end)

    def _next(self, place: Place) -> Place:
        done = place.done
        if self.schedule.unit == "steps":
            done += 1
        elif self._tokens is not None:
            self._order(place)
            assert self._totals is not None, "cached with the order"
            first, last = self._totals[[place.at - place.begin, place.over - place.begin]].tolist()
            done += last - first
        return self._fitted(place.epoch, place.begin, place.over, done)

    def _num_batches(self, place: Place) -> int:
        epoch, num = place.epoch, 0
        while not self.schedule.is_final(place.done) and place.epoch == epoch:
            num, place = num + 1, self._next(place)
        if place.epoch != epoch:
            return num
        left, size = place.end - place.at, self.schedule.size_at(place.done)
        return num + (left if self.drop_last else left + size - 1) // size

    def _length(self, epoch: int, begin: int) -> int:
        if self._fraction is None:
            return self._least
        if epoch not in self._lengths:
            self._lengths[epoch] = int(self._num_copies(epoch, begin).sum())
        return self._lengths[epoch]

    def _num_copies(self, epoch: int, begin: int) -> Tensor:
        """Return how often each example occurs, by the seed with which the epoch began."""
        assert self._copies is not None, "only asked where there are weights"
        if self._fraction is None:
            return self._copies
        seed = self._ruling(begin).seed
        keys = hashes(upto(self.num_examples), COPIES, seed, epoch)
        return self._copies + (shifted(keys, 11) * 2.0**-53 < self._fraction)

    def _ruling(self, at: int) -> Part:
        return next(part for part in reversed(self._history) if part.begin <= at)

    def _order(self, place: Place) -> Tensor:
        """Return the indices of an epoch in their order, shape (length of the epoch,).

        Where the order was changed inside the epoch, what was left then is sorted anew.
        """
        if self._cached is None or self._cached[0][:2] != place[:2]:
            ids = upto(self.num_examples)  # of copies: copy * num_examples + index
            if self._copies is not None:
                num = self._num_copies(place.epoch, place.begin)
                index = ids.repeat_interleave(num)
                copy = upto(len(index)) - (num.cumsum(0) - num)[index]
                ids = copy * self.num_examples + index
            changes = [part for part in self._history if place.begin < part.begin < place.end]
            for seed, shuffle, at in (self._ruling(place.begin), *changes):
                done = max(at - place.begin, 0)
                rest = ids[done:]
                keys = hashes(rest, ORDER, seed, place.epoch) if shuffle else rest
                ids = torch.cat([ids[:done], rest[keys.argsort(stable=True)]])
            self._cached = place, ids % self.num_examples
            if self._tokens is not None:
                each = self._tokens[self._cached[1]]
                self._totals = torch.cat([each.new_zeros(1), each.cumsum(0)])
        return self._cached[1]

    def _batch(self, place: Place) -> Tensor:
        return self._order(place)[place.at - place.begin : place.over - place.begin]

    def _shares(self, place: Place) -> list[list[int]]:
        batch = self._batch(place)
        indices = batch.tolist()
        if self._ask is not None:
            costs = [number(f"the cost of example {i}", self._ask(i)) for i in indices]
        else:
            costs = [1.0] * len(indices) if self._costs is None else self._costs[batch].tolist()
        current = bisect.bisect_right(self._speeds, place.at, key=lambda entry: entry[0]) - 1
        dealt = deal(costs, self.world, self._speeds[current][1])
        return [[indices[i] for i in share] for share in dealt]


class _Pass(Iterator[list[int]]):
    """Read an epoch from the position to its end.

    torchdata's StatefulDataLoader saves this beside the sampler. What that loader means by its
    state is what it has yielded, not what was committed, and this restores both to it. With its
    `snapshot_every_n_steps` above 1 it restores less and reads on by itself: then do not commit(),
    and change neither batch size nor seed.
    """

    def __init__(self, sampler: EffectiveBatchSampler) -> None:
        self._sampler = sampler
        self._begin()

    def _begin(self) -> None:
        self.is_over = False
        self._next = self._sampler._enter(self)
        self.begin, self.end = self._next.at, self._next.end
        self.num_batches = self._sampler._num_batches(self._next)
        self.num_moves = self._sampler._num_moves

    @property
    def at(self) -> int:
        """Return the position of the next batch."""
        return self._next.at

    def __next__(self) -> list[int]:
        if self.num_moves < self._sampler._num_moves:
            raise BadInput(
                f"the sampler was moved to {self._sampler.consumed:,} consumed examples while an "
                f"iterator was reading at {self.at:,}",
                hint="load a state, or set the epoch, before iter(loader)",
            )
        if self.at >= self.end:
            self.is_over = True
            raise StopIteration
        share = self._sampler._shares(self._next)[self._sampler.rank]
        self._next = self._sampler._next(self._next)
        self._sampler._read = max(self._sampler._read, self.at)
        return share

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self._sampler._state(self._next), "is_over": self.at >= self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state["sampler"])
        self._begin()
        if state["is_over"]:
            self.end = self.at
