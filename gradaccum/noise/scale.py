"""The gradient noise scale: how many examples an effective batch needs before more buy little.

    noise = NoiseScale(accumulator)
    for batch in loader:
        step = accumulator.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        noise.update(step)
    print(noise.estimate)  # noise scale about 900 examples (700 to 1,250)

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162): with G the
mean gradient of all data and Σ the covariance of an example's, the "simple" noise scale is
tr Σ / |G|². Their estimators compare the gradients of two batch sizes. Here the one is that of the
effective batch and the other 1: `parts.py` finds the sum of the examples' squares from random parts
of the batch. An example's gradient is the sum of its tokens' over the mean weight of an example, so
that ragged examples count by what they weigh in the loss.

On several ranks each measures its own share, and two numbers more are added with the gradients.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from gradaccum.engine import Accumulator
from gradaccum.errors import BadInput
from gradaccum.sync.choose import is_sharded
from gradaccum.types import Squares, Step, counted

EVERY = 10  # steps, of which one is measured; that one takes longer, having more micro-batches
CONFIDENCE = 0.95
LEAST = 5  # measured steps, before which nothing is said


@dataclass(frozen=True, slots=True)
class Noise:
    """Hold an estimate of the noise scale. Print it for a sentence.

    Args:
        scale: tr Σ / |G|², in examples; None where it has no upper bound yet, since the estimate of
            |G|² is not told from zero.
        low: Lower end of the 95% interval.
        high: Its upper end; infinite where there is none.
        gradient_squared: |G|², averaged.
        variance: tr Σ of one example, averaged.
        num_steps: How many steps were measured.
    """

    scale: float | None
    low: float
    high: float
    gradient_squared: float
    variance: float
    num_steps: int

    def __str__(self) -> str:
        if self.scale is None and not self.low:
            return f"noise scale not known after {counted(self.num_steps, 'measured step')}"
        if self.scale is None:
            return f"noise scale above {about(self.low)} examples"
        bounds = f"{about(self.low)} to {about(self.high)}"
        return f"noise scale about {about(self.scale)} examples ({bounds})"


class NoiseScale:
    """Estimate the noise scale from what accumulation computes anyway.

    Every few steps the accumulator runs its effective batch in four parts drawn at random, the same
    examples to the same gradient, in another order: equal up to rounding. No gradient is stored
    twice; what it costs is a norm of the gradients after each part, and the micro-batches that
    parts may add where an effective batch has few.

    Averages are exponential, over measured steps. The interval is Fieller's for a ratio of two
    means (1954), with the variances of the steps as they were seen, so that it also says when the
    noise drowns |G|². It tells the error of the averages, and not that the noise scale moves during
    training.

    Under a `GradScaler` both |G|² and tr Σ are in its units; their ratio is not concerned.

    Args:
        accumulator: Its `parts` are set from here.
        every: Measure one step in so many.
        decay: What the average keeps of itself at each measured step.

    Raises:
        BadInput: An argument is wrong; the model is sharded by `fully_shard`, so that no rank has
            the gradient of its share.
    """

    def __init__(
        self, accumulator: Accumulator, *, every: int = EVERY, decay: float = 0.95
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise BadInput(f"every={every!r} is not a whole number of at least 1")
        if not 0 < decay <= 1:
            raise BadInput(f"decay={decay!r} is not above 0 and up to 1")
        if is_sharded(accumulator.model):
            raise BadInput(
                "the noise scale is measured on the gradient of each rank's share, and the model "
                "is sharded by fully_shard, whose ranks hold parts of all gradients",
                hint="measure it on replicas (DDP), or on one rank with a smaller model",
            )
        self._accumulator = accumulator
        self._every, self._decay = every, decay
        self._num_steps = 0
        self._moments = _Moments()
        self._waiting: Step | None = None
        self._draw()

    def update(self, step: Step) -> None:
        """Take a step that the accumulator has run.

        It is read when the next one comes, or the estimate is asked for, so that nothing waits for
        the device here.
        """
        self._read()
        self._waiting = step
        self._num_steps += 1
        self._draw()

    @property
    def estimate(self) -> Noise | None:
        """Return the noise scale; None before 5 steps were measured."""
        self._read()
        return self._moments.estimate()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not stopped, as JSON holds it."""
        self._read()
        return {"num_steps": self._num_steps, "moments": self._moments.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken."""
        self._num_steps, self._waiting = state["num_steps"], None
        self._moments = _Moments(*state["moments"])
        self._draw()

    def _draw(self) -> None:
        """Let the next step be measured if it is its turn; the first is busy with other things."""
        is_due = (self._num_steps + 1) % self._every == 0
        self._accumulator.parts = (self._num_steps,) if is_due else None

    def _read(self) -> None:
        step, self._waiting = self._waiting, None
        squares = step.squares if step is not None else None
        if squares is not None and squares.num_examples > 1 and all(map(math.isfinite, squares)):
            self._moments.add(squares, self._decay)


class _Moments:
    """Average, with weights that decay, x = |g|² - Σ|g_k|² and y = tr Σ, and their squares.

    Args:
        kept: What `state` returned.
    """

    def __init__(self, *kept: float) -> None:
        # Steps; sums of weights and of their squares; spread of example weights; x, y, xx, xy, yy.
        self._kept = list(kept) or [0] + [0.0] * 8

    def state(self) -> list[float]:
        return list(self._kept)

    def add(self, squares: Squares, decay: float) -> None:
        num, total, squared, spread, *sums = self._kept
        total, squared = total * decay + 1, squared * decay**2 + 1
        # N Σ w_k² / W² = 1 + the squared coefficient of variation of an example's weight. A single
        # step tells it badly, and it divides.
        spread = spread * decay + squares.num_examples * squares.weights
        uneven = max(1.0, spread / total)
        pairs = max(1e-3, 1 - uneven / squares.num_examples)
        x = (squares.gradient - squares.examples) / pairs
        y = squares.num_examples * squares.examples - uneven * x
        sums = [s * decay + v for s, v in zip(sums, (x, y, x * x, x * y, y * y), strict=True)]
        self._kept = [num + 1, total, squared, spread, *sums]

    def estimate(self) -> Noise | None:
        num, total, squared, _, *sums = self._kept
        if num < LEAST:
            return None
        x, y, xx, xy, yy = (s / total for s in sums)
        enough = total**2 / squared  # steps of equal weight that would be as good
        share = 1 / (enough - 1)
        of_x, of_xy, of_y = (share * v for v in (xx - x * x, xy - x * y, yy - y * y))
        low, high = fieller(x, y, of_x, of_xy, of_y, quantile(CONFIDENCE, enough - 1))
        scale = None if math.isinf(high) else max(0.0, y / x)
        return Noise(scale, low, high, x, y, int(num))


def fieller(
    x: float, y: float, of_x: float, of_xy: float, of_y: float, times: float
) -> tuple[float, float]:
    """Return the interval of y / x, both above 0, from two means and their covariance.

    It holds the ratios r with (y - r x)² <= t² Var(y - r x). Where x is not told from 0 it has no
    upper end.

    Args:
        x: Mean of the denominator.
        y: Mean of the numerator.
        of_x: Variance of x.
        of_xy: Covariance.
        of_y: Variance of y.
        times: t, the quantile.

    Example:
        >>> fieller(2.0, 6.0, 0.0, 0.0, 0.25, 2.0)
        (2.5, 3.5)
    """
    a, b, c = (x * x - times**2 * of_x, x * y - times**2 * of_xy, y * y - times**2 * of_y)
    root = b * b - a * c
    if a > 0:
        width = math.sqrt(max(0.0, root))
        return max(0.0, (b - width) / a), max(0.0, (b + width) / a)
    # a <= 0: all ratios, or all but those between the roots.
    return max(0.0, (b - math.sqrt(root)) / a if root > 0 and a < 0 else 0.0), math.inf


def quantile(confidence: float, freedom: float) -> float:
    """Return the two-sided quantile of Student's t, within 1% from 3 degrees of freedom on.

    Abramowitz and Stegun 1964, 26.7.5.

    Example:
        >>> round(quantile(0.95, 10), 2)
        2.23
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def about(number: float) -> str:
    """Return a number to two digits: an estimate has no more.

    Example:
        >>> about(1234.5), about(67.8), about(0.321)
        ('1,200', '68', '0.3')
    """
    if number < 10:
        return f"{number:.1f}"
    digits = int(math.log10(number)) - 1
    return f"{round(number / 10**digits) * 10**digits:,.0f}"
