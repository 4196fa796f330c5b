"""What an audit finds: one Verdict with its comparisons and named diagnoses. All frozen."""

import dataclasses
import json
import math
from dataclasses import dataclass

from gradaccum.types import counted


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Name one cause of a wrong gradient.

    Args:
        name: The short name that tests and scripts look for, such as "mean of means".
        message: One sentence with the figures.
        remedy: What to change.
    """

    name: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}\n  remedy: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compare the gradient g of one cut into micro-batches with that of the full batch, f.

    Args:
        sizes: Examples in each micro-batch.
        relative_error: ||g - f|| / ||f||; infinite where g is not finite.
        norm_ratio: ||g|| / ||f||.
        signed_residual: <g - f, f> / <f, f>: a wrong denominator is a drift along f.
        worst: The modules with the largest relative error of their own gradient, at most three.
    """

    sizes: tuple[int, ...]
    relative_error: float
    norm_ratio: float
    signed_residual: float
    worst: tuple[tuple[str, float], ...]

    @property
    def cut(self) -> str:
        """Return the cut as "8 x 1", or "2+2+2+1" where the sizes differ."""
        if len(set(self.sizes)) == 1:
            return f"{len(self.sizes)} x {self.sizes[0]}"
        shown = [str(size) for size in self.sizes]
        return "+".join(shown if len(shown) <= 6 else [*shown[:2], "...", *shown[-2:]])


@dataclass(frozen=True, slots=True)
class Verdict:
    """Tell whether an accumulation loop leaves the gradient of the full batch.

    Args:
        subject: What was audited.
        reference: What its gradients were compared with.
        num_examples: Examples in the effective batch.
        comparisons: One for each cut.
        floor: The relative error that rounding alone causes.
        tolerance: The largest relative error that passes, a multiple of the floor.
        diagnoses: What is wrong; empty where nothing was found.
        notes: What is not wrong and yet worth knowing, such as dropout that was switched off.
        num_passes: Passes over the effective batch that the audit took, forward and backward.
    """

    subject: str
    reference: str
    num_examples: int
    comparisons: tuple[Comparison, ...]
    floor: float
    tolerance: float
    diagnoses: tuple[Diagnosis, ...]
    notes: tuple[str, ...]
    num_passes: float

    @property
    def exact(self) -> bool:
        """Return whether every cut is within the tolerance and nothing wrong was found."""
        is_near = all(c.relative_error <= self.tolerance for c in self.comparisons)
        return is_near and not self.diagnoses

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the diagnoses."""
        return tuple(diagnosis.name for diagnosis in self.diagnoses)

    def to_json(self) -> str:
        """Return the verdict as JSON; a figure that is not finite becomes null."""
        fields = dataclasses.asdict(self) | {"exact": self.exact}
        return json.dumps(_finite(fields), allow_nan=False)

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "NOT exact"
        lines = [
            f"{verdict}: {self.subject}, {counted(self.num_examples, 'example')} "
            f"against {self.reference}",
            "",
            f"  {'micro-batches':<16}{'error':>10}{'norm ratio':>12}{'residual':>11}  worst module",
        ]
        for c in self.comparisons:
            worst = ", ".join(f"{name} {error:.1e}" for name, error in c.worst[:1])
            lines.append(
                f"  {c.cut:<16}{c.relative_error:>10.1e}{c.norm_ratio:>12.6f}"
                f"{c.signed_residual:>+11.1e}  {worst}"
            )
        lines.append(
            f"  {'rounding alone':<16}{self.floor:>10.1e}  (passes up to {self.tolerance:.1e})"
        )
        lines += [f"\n{diagnosis}" for diagnosis in self.diagnoses]
        lines += [f"\nnote: {note}" for note in self.notes]
        return "\n".join(lines)


def _finite(value: object) -> object:
    """Return the value with null for every float that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
