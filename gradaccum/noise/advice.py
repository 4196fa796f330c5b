"""What a noise scale says about an effective batch size, in words, with its limits.

McCandlish et al. 2018: to reach a loss takes S = S_min (1 + B_noise / B) steps and
E = E_min (1 + B / B_noise) examples, so that at B = B_noise both are twice the least.
"""

import math
from dataclasses import dataclass

from gradaccum.noise.scale import Noise, about

LIMITS = (
    "The noise scale is of this moment and grows as the loss falls; it supposes a learning rate "
    "tuned at each batch size. It can underestimate the batch up to which steps are saved (Merrill "
    "et al. 2025, arXiv:2505.23971): gradaccum.noise.branch measures that.",
    "More accumulation takes no fewer examples, so on one device it saves no time. Small batches "
    "train as well if beta2 keeps its half-life in examples, beta2' = beta2 ** (B' / B) (Marek et "
    "al. 2025, arXiv:2507.07101): accumulate for a batch that you need, not for its own sake.",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what goes with another effective batch size, as the rules say, to be tried.

    Args:
        effective_batch_size: Examples.
        num_steps: Steps to the same loss, times those of now, as the noise scale predicts.
        num_examples: Examples to the same loss, times those of now.
        learning_rate: By the square root of the size, for Adam and its kin; None: not known.
        linear_learning_rate: In proportion to the size, for SGD.
        beta2: With the half-life in examples of now; None: not known, or no Adam.
    """

    effective_batch_size: int
    num_steps: float
    num_examples: float
    learning_rate: float | None
    linear_learning_rate: float | None
    beta2: float | None

    def __str__(self) -> str:
        parts = [
            f"effective batch {self.effective_batch_size:,}: {self.num_steps:.2f} times the steps, "
            f"{self.num_examples:.2f} times the examples"
        ]
        if self.learning_rate is not None:
            parts.append(
                f"learning rate {self.learning_rate:.2g} (SGD: {self.linear_learning_rate:.2g})"
            )
        if self.beta2 is not None:
            parts.append(f"beta2 {self.beta2:.6g}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Advice:
    """Hold what is said. Print it for all of it.

    Args:
        summary: The answer, in a sentence or two.
        settings: Half and twice the effective batch size, with the settings that match.
        limits: What it supposes, and what speaks against more accumulation.
    """

    summary: str
    settings: tuple[Settings, ...]
    limits: tuple[str, ...] = LIMITS

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(str, self.settings), *self.limits])


def advise(
    noise: Noise | None,
    effective_batch_size: int,
    *,
    learning_rate: float | None = None,
    beta2: float | None = None,
) -> Advice:
    """Say whether a larger or a smaller effective batch would pay, by the noise scale.

    Nothing is changed by it.

    Args:
        noise: What `NoiseScale.estimate` returned.
        effective_batch_size: Examples in one optimizer step.
        learning_rate: Of now.
        beta2: Of Adam, now.

    Example:
        >>> noise = Noise(900.0, 700.0, 1100.0, 1.0, 900.0, 40)
        >>> print(advise(noise, 32).settings[1])
        effective batch 64: 0.52 times the steps, 1.03 times the examples
    """
    size = effective_batch_size
    begin = f"effective batch {size:,}; "
    if noise is None:
        return Advice(f"{begin}noise scale not known: too few steps were measured.", ())
    begin += str(noise)
    scale = noise.scale if noise.scale is not None else noise.low
    if noise.scale is None and not noise.low:
        return Advice(f"{begin}: their differences drown it; more steps will tell.", ())
    saved = _saved(scale, size)
    bounds = f"{_saved(noise.low, size):.2f} to {_saved(noise.high, size):.2f}"
    examples = _examples(scale, size, 2 * size)
    doubling = (
        f"doubling the batch should cut the steps by about {saved:.2g} ({bounds}) and take "
        f"{examples:.2f} times the examples"
    )
    if noise.scale is None:
        text = f"{doubling} at most; where more buys little cannot be told yet."
    elif noise.high <= size:
        fewer = _examples(scale, size, max(1, size // 2))
        text = (
            f"the batch is above it: {doubling}; half the batch should reach the same loss with "
            f"{fewer:.2f} times the examples."
        )
    else:
        text = f"{doubling}; beyond about {about(scale)} more accumulation buys little."
    others = [size // 2, 2 * size] if size > 1 else [2 * size]
    settings = tuple(
        Settings(
            other,
            _saved(scale, size, other) ** -1,
            _examples(scale, size, other),
            None if learning_rate is None else learning_rate * math.sqrt(other / size),
            None if learning_rate is None else learning_rate * other / size,
            None if beta2 is None else beta2 ** (other / size),
        )
        for other in others
    )
    return Advice(f"{begin}: {text}", settings)


def _saved(scale: float, size: int, other: int | None = None) -> float:
    """Return by how much another size (twice) cuts the steps to the same loss."""
    other = 2 * size if other is None else other
    return other / size if math.isinf(scale) else (1 + scale / size) / (1 + scale / other)


def _examples(scale: float, size: int, other: int) -> float:
    """Return how many times the examples another size takes to the same loss."""
    return (other + scale) / (size + scale)
