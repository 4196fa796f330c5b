"""The statistics of a benchmark: medians and spreads, and ratios within each round."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradaccum.bench.race import Outcome, Turn


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and the greatest."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """What a benchmark says of one contender; None where it was not measured.

    Args:
        seconds: Of a step, over the rounds.
        rate: Trained tokens a second; steps a second of a worker that trains none.
        speed: `rate` over that of the base in the same round.
        padding: Share of the tokens that went through the model and are padding.
        peak_bytes: Memory beyond what was held before the first step.
        answer: What the worker answered.
        failure: What it said when it died.
    """

    name: str
    seconds: Spread | None
    rate: Spread | None
    speed: Spread | None
    padding: float | None
    peak_bytes: int | None
    answer: Any
    failure: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the row as what `json.dumps` takes."""
        return asdict(self)


def rows(outcomes: Sequence[Outcome], base: str) -> list[Row]:
    """Return a row for each outcome, with speeds against the contender `base`."""
    bases = next(outcome for outcome in outcomes if outcome.name == base).turns
    return [_row(outcome, bases) for outcome in outcomes]


def _row(outcome: Outcome, bases: Sequence[Turn | None]) -> Row:
    turns = [turn for turn in outcome.turns if turn is not None]
    pairs = zip(outcome.turns, bases, strict=True)
    peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
    padded = sum(turn.padded for turn in turns)
    return Row(
        outcome.name,
        seconds=spread(statistics.fmean(turn.seconds) for turn in turns),
        rate=spread(turn.rate for turn in turns),
        speed=spread(turn.rate / other.rate for turn, other in pairs if turn and other),
        padding=1 - sum(turn.useful for turn in turns) / padded if padded else None,
        peak_bytes=max(peaks, default=None),
        answer=outcome.answer,
        failure=outcome.failure.message if outcome.failure else None,
    )


def spread(values: Iterable[float]) -> Spread | None:
    """Return median, least and greatest of some numbers; None of none.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        Spread(median=2.0, least=1.0, most=3.0)
    """
    found = [value for value in values if math.isfinite(value)]
    return Spread(statistics.median(found), min(found), max(found)) if found else None
