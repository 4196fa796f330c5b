"""Values that pass between the layers: Budget, Micro, Step. All frozen.

`size` is what an example costs in memory, `weight` what it counts in the denominator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gradaccum.errors import BadInput

GIB = 2**30
IGNORE_INDEX = -100  # the label that torch's cross entropy skips


def counted(num: int, noun: str) -> str:
    """Return "1 step", "2,048 steps" or "37 micro-batches"."""
    plural = "" if num == 1 else "es" if noun.endswith("ch") else "s"
    return f"{num:,} {noun}{plural}"


def amount(num_bytes: float) -> str:
    """Return "18.7 GiB", or "42.5 MiB" where that is more telling."""
    is_large = num_bytes >= GIB / 10
    return (
        f"{num_bytes / GIB:.{1 if num_bytes >= GIB else 2}f} GiB"
        if is_large
        else (f"{num_bytes / 2**20:.1f} MiB")
    )


@dataclass(frozen=True, slots=True)
class Budget:
    """Bound the size of one micro-batch.

    A micro-batch of rows i costs `len(rows) * max(size_i)`, as padding makes it; with
    `causal_lm()` that is its padded tokens. Where both bounds are given, both hold.

    Args:
        tokens: The largest padded size, in the unit of the objective's `size`.
        examples: The largest number of examples (rows).

    Raises:
        BadInput: Neither bound is given, or one is not a whole number of at least 1.

    Example:
        >>> Budget(tokens=16_384)
        Budget(tokens=16384, examples=None)
    """

    tokens: int | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and self.examples is None:
            raise BadInput(
                "a budget needs a bound, and neither tokens nor examples is given",
                hint="Budget(tokens=16_384) or Budget(examples=4)",
            )
        for name, bound in (("tokens", self.tokens), ("examples", self.examples)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise BadInput(f"Budget({name}={bound!r}) is not a whole number")
            if bound is not None and bound < 1:
                raise BadInput(f"Budget({name}={bound}) is below 1")

    def within(self, limit: "Budget | None") -> "Budget":
        """Return the budget with the smaller of both bounds, where two are given."""
        if limit is None:
            return self
        tokens = [n for n in (self.tokens, limit.tokens) if n is not None]
        examples = [n for n in (self.examples, limit.examples) if n is not None]
        return Budget(min(tokens, default=None), min(examples, default=None))

    def __str__(self) -> str:
        bounds = ((self.tokens, "token"), (self.examples, "example"))
        return " and ".join(counted(bound, noun) for bound, noun in bounds if bound is not None)


class Micro(NamedTuple):
    """Name the examples of one micro-batch by their positions in the effective batch.

    Args:
        examples: Positions in the effective batch.
        size: As it runs: number of examples times the largest size; packed, their sum, in which
            what examples begin with alike counts once.
        useful: Sum of the sizes, without padding.
    """

    examples: tuple[int, ...]
    size: int
    useful: int


class Share(NamedTuple):
    """Count what one rank has of an effective batch.

    Args:
        num_micros: Micro-batches.
        num_examples: Examples.
        padded: Size of all micro-batches as they run: with padding, without what they share.
        useful: Size of all examples without padding.
    """

    num_micros: int
    num_examples: int
    padded: int
    useful: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """Tell how a step went on after it ran out of memory: from its beginning, in smaller parts.

    Args:
        micro: What did not fit.
        limit: The budget that holds from then on.
        error: What the device said, its first line.
        seconds: What was lost: from the step's beginning until then.
    """

    micro: Micro
    limit: Budget
    error: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"out of memory at {counted(len(self.micro.examples), 'example')} of size "
            f"{self.micro.size:,}: the step runs again from its beginning in micro-batches of up "
            f"to {self.limit}; the gradient is the same ({self.error})"
        )


class Squares(NamedTuple):
    """Tell how long a step's gradient is beside what its examples add to it.

    Args:
        gradient: |g|², the squared norm of the gradient of the effective batch.
        examples: Sum over its examples of the squared norm of what each adds to g; an unbiased
            estimate from parts of the batch that were drawn at random.
        weights: The same sum of the examples' shares of the weight: at least 1 / examples, and more
            where their weights differ. Of several terms: as if all weighed the same.
        num_examples: Of the effective batch.
    """

    gradient: float
    examples: float
    weights: float
    num_examples: int


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Tell what one `Accumulator.backward` did.

    `loss`, `terms`, `seconds`, `squares` and `nonfinite` wait for the device on first use; the
    others are known on the host. Print it for a line that says it all.

    Args:
        micros: How the effective batch was cut, or this rank's share of it, in the order in which
            it ran.
        shares: What each rank had of it, this process being rank `rank`; one without ranks.
        rank: Of this process.
        rates: What each rank did in the step before, in useful size a second of its own; 0 where it
            is not known: in the first step, without examples, and where ranks run in lock-step
            (`sync` "each" and "once"). For `EffectiveBatchSampler.rebalance`.
        sync: How the ranks added their gradients; empty without ranks.
        weights: Weight of the whole effective batch, by term; None where the loss reports it.
        unit: What the weight counts.
        peak_bytes: Peak memory of the process on the model's device so far.
        total_bytes: Memory of that device.
        num_graphs: What `torch.compile` has compiled in this step: forwards with their backwards,
            and one more for each break in them. Nothing after the first steps, if all is well.
        names: The terms of the loss.
        loss_tensor: The loss, shape (), on the device; handing it on does not wait.
        recoveries: How often, and how, it ran out of memory before it fitted.
    """

    micros: tuple[Micro, ...]
    shares: tuple[Share, ...]
    rank: int
    rates: tuple[float, ...]
    sync: str
    weights: dict[str, float] | None
    unit: str
    peak_bytes: int
    total_bytes: int
    num_graphs: int
    names: tuple[str, ...]
    loss_tensor: Any = field(repr=False)
    recoveries: tuple[Recovery, ...]
    # On the host, complete once `_wait` has returned: this rank's shares of the loss, shape
    # (micro-batches run, terms), and the sums over all ranks, shape (terms,).
    _losses: Any = field(repr=False)
    _sums: Any = field(repr=False)
    _ran: tuple[int, ...] = field(repr=False)
    _late_weight: Any = field(repr=False)
    _squares: Any = field(repr=False)  # shape (3,), or None
    _took: Callable[[], float] = field(repr=False)
    _wait: Any = field(repr=False)  # a `device.Lap`

    @property
    def terms(self) -> dict[str, float]:
        """Return the loss of the effective batch, term by term."""
        self._wait()
        if len(self.shares) > 1:
            return dict(zip(self.names, self._sums.tolist(), strict=True))
        columns = zip(*self._losses.tolist(), strict=True) if len(self._ran) else ()
        return dict.fromkeys(self.names, 0.0) | {
            name: math.fsum(c) if all(map(math.isfinite, c)) else sum(c)
            for name, c in zip(self.names, columns, strict=False)
        }

    @property
    def loss(self) -> float:
        """Return the loss of the effective batch: what one pass over all of it would report."""
        return sum(self.terms.values())

    @property
    def weight(self) -> float | dict[str, float]:
        """Return what the loss was divided by; by term where there are several."""
        if self.weights is None:
            self._wait()
            return float(self._late_weight)
        return next(iter(self.weights.values())) if len(self.weights) == 1 else self.weights

    @property
    def nonfinite(self) -> list[Micro]:
        """Return this rank's micro-batches whose loss was infinite or not a number."""
        self._wait()
        rows = self._losses.isfinite().all(dim=-1).tolist() if len(self._ran) else []
        return [self.micros[i] for i, ok in zip(self._ran, rows, strict=True) if not ok]

    @property
    def is_over(self) -> bool:
        """Tell, without waiting, whether the device is done with it, so that nothing here waits."""
        return self._wait.is_over

    @property
    def squares(self) -> Squares | None:
        """Return what `NoiseScale` learns from this step; None where nothing was measured."""
        if self._squares is None:
            return None
        self._wait()
        gradient, examples, weights = self._squares.tolist()
        return Squares(gradient, examples, weights, self.num_examples)

    @property
    def seconds(self) -> float:
        """Return the seconds of this rank from the first forward to the last backward."""
        return self._took()

    @property
    def num_micros(self) -> int:
        """Return the number of micro-batches, on all ranks."""
        return sum(share.num_micros for share in self.shares)

    @property
    def num_examples(self) -> int:
        """Return the number of examples in the effective batch."""
        return sum(share.num_examples for share in self.shares)

    @property
    def padded(self) -> int:
        """Return the size of all micro-batches as they run, padding and sharing included."""
        return sum(share.padded for share in self.shares)

    @property
    def useful(self) -> int:
        """Return the size of all examples without padding."""
        return sum(share.useful for share in self.shares)

    def __str__(self) -> str:
        weight = self.weight
        total = sum(weight.values()) if isinstance(weight, dict) else weight
        micros = counted(self.num_micros, "micro-batch")
        if len(self.shares) > 1:
            micros += f" on {len(self.shares)} ranks"
        parts = [f"loss {self.loss:.4f}", f"{total:,.0f} {self.unit} in {micros}"]
        if not total:
            parts.append(f"no {self.unit}: the gradients are zero")
        parts += [f"compiled {counted(self.num_graphs, 'graph')}"] if self.num_graphs else []
        parts += [f"out of memory, now {recovery.limit}" for recovery in self.recoveries[-1:]]
        parts += [f"not finite: examples {list(micro.examples)}" for micro in self.nonfinite]
        if self.total_bytes:
            parts.append(f"peak {self.peak_bytes / GIB:.1f} of {self.total_bytes / GIB:.1f} GiB")
        return " | ".join(parts)


@dataclass(frozen=True, slots=True)
class Proof:
    """Tell how far an accumulated gradient is from that of one pass over the same examples.

    Args:
        relative_error: ||g - g_full|| / ||g_full||.
        floor: What rounding alone causes: the same for two full passes with their rows in opposite
            order, or storing the gradients in their dtype, whichever is more.
        num_examples: Examples compared.
        num_micros: Micro-batches into which they were cut.
    """

    relative_error: float
    floor: float
    num_examples: int
    num_micros: int

    def __str__(self) -> str:
        return (
            f"{counted(self.num_examples, 'example')}, "
            f"{counted(self.num_micros, 'micro-batch')} accumulated against one full batch: "
            f"relative gradient error {self.relative_error:.1e} "
            f"(rounding alone: {self.floor:.1e})"
        )
