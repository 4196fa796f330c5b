"""One process: nobody to tell, nothing to add. The interface of all others."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

Message = dict[str, Any]
AGAIN = "again"  # what a rank says in place of the end of its window
DIVISORS = ("weights", "counts", "terms")  # of messages: what others divide by


class Alone:
    """Answer what the engine asks of the ranks of a job.

    A step has two collective moments. At its beginning ranks say what they have to add, at its end
    how it went; a rank that fails says so at either, and every rank raises. Only then gradients are
    added. In between there is no collective but those of the model's own sharding.

    Attributes:
        rank: Of this process.
        world: The number of ranks.
        policy: How gradients are added, in words.
        layout: What `reduce` is going to add, in words that have to be the same on all ranks.
        restarts_alone: Whether a rank that ran out of memory runs its share again by itself, while
            the others wait; else all do.
    """

    rank = 0
    world = 1
    policy = ""
    layout = ""
    restarts_alone = True

    def exchange(self, message: Message) -> list[Message]:
        """Say a message and return those of all ranks, in order.

        Args:
            message: What JSON can hold.

        Raises:
            PeerFailed: A rank said that it failed, or is gone.
        """
        return [message]

    def fail(self, error: BaseException) -> None:
        """Say, in place of the next message, that this rank goes no further."""

    def require_same(self, model: nn.Module) -> None:
        """Raise RankDisagreement if the ranks begin with different parameters."""

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return what is to be trained, as the optimizer has it."""
        return [p for p in model.parameters() if p.requires_grad]

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this rank has of a gradient."""
        return tensor

    def begin(self, parameters: Sequence[nn.Parameter], num_micros: Sequence[int]) -> int:
        """Begin a window; return how many micro-batches of no weight this rank has to run as well.

        What `reduce` needs is allocated here or in `holds`, so that nothing can fail there.

        Args:
            parameters: To be trained.
            num_micros: That each rank will run.
        """
        return 0

    def borrow(self, inputs: Any) -> Any:
        """Return collated inputs of some rank where None are given; others are kept.

        Collective. To be called between `begin` and the first micro-batch.

        Raises:
            OtherQuestions: A rank has failed in `begin`, and asks to run all again.
        """
        return inputs

    def micro(self, *, is_filler: bool = False) -> AbstractContextManager[None]:
        """Return what the forward and backward of one micro-batch run in.

        Args:
            is_filler: It is one of those that `begin` asked for; its gradients are thrown away.
        """
        return nullcontext()

    def holds(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """Return of which parameters this rank has a gradient, once all micro-batches have run."""
        return [p.grad is not None for p in parameters]

    def abandon(self) -> bool:
        """Leave nothing of a window that failed here: gradients, and peers that wait.

        Returns:
            Whether less will be held from now on, so that the budget may stay what it is.
        """
        return False

    def reduce(
        self, parameters: Sequence[nn.Parameter], used: Sequence[bool], extra: Tensor
    ) -> Tensor:
        """Add the gradients over all ranks, in place, and return the sum of `extra`.

        Args:
            parameters: With gradients; those of `used` that have none here count as zero.
            used: Whether any rank has a gradient of it.
            extra: Numbers of this rank, shape (n,), float64 where the device has it.
        """
        return extra


class Hearing:
    """Hold what was heard at the beginning of a step, to be heard again if it runs again alone.

    Args:
        ranks: With whom messages are exchanged.
    """

    def __init__(self, ranks: Alone) -> None:
        self.ranks = ranks
        self._heard: list[list[Message]] = []
        self._next = 0
        self._is_over = False

    def exchange(self, message: Message) -> list[Message]:
        """Exchange a message; or return what was heard when it was exchanged before.

        Raises:
            OtherQuestions: The step runs again, and asks more than it did at first, or counts other
                rows.
        """
        rank, heard = self.ranks.rank, self._heard
        if self._is_over:  # what is known by now is not asked again
            while self._next < len(heard) and heard[self._next][rank].keys() != message.keys():
                self._next += 1
        if self._next == len(heard):
            if self._is_over:
                raise OtherQuestions(is_first=True)
            self._heard.append(self.ranks.exchange(message))
        elif not all(_is_same(message.get(k), heard[self._next][rank].get(k)) for k in DIVISORS):
            raise OtherQuestions(is_first=True)  # a collator that draws for each micro-batch
        self._next += 1
        self.last[self.ranks.rank] = message
        return self.last

    @property
    def last(self) -> list[Message]:
        """Return the messages heard last."""
        return self._heard[self._next - 1]

    def again(self) -> None:
        """Hear the same from the beginning, and nothing new."""
        self._next, self._is_over = 0, True


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether what was counted is the same but for rounding, as far as both have counted."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_is_same(one[name], other[name]) for name in one.keys() & other.keys())
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or math.isclose(one, other, rel_tol=1e-6)
    return one is None or other is None or one == other


class OtherQuestions(Exception):
    """Ask that all ranks begin the step anew.

    Args:
        is_first: Whether it is this rank that asks, and not another.
    """

    def __init__(self, *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
