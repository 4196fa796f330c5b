"""Problems whose gradient noise scale is known in closed form.

An example has n tokens, n between 1 and `most`, all equally likely. Of a token, the gradient at the
parameters p, shape (d,), is known in law, so that with an example's gradient sum G_k, its weight
n_k and the mean gradient of a token m,

    tr Σ / |G|² = E |G_k - n_k m|² / (E n)² |m|²

`within` is E |g - m|² of a token's gradient g given its example, `between` E |u|² of what all
tokens of an example have in common.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradaccum.engine import Accumulator
from gradaccum.objective import Objective
from gradaccum.types import Budget


@dataclass(frozen=True)
class Problem:
    """Draw examples around an optimum at zero, and know their noise scale.

    Args:
        name: For a table.
        dim: d, the number of parameters.
        distance: |p|, which for the quadratic is |m|.
        most: Tokens of the longest example.
        common: Standard deviation, in each direction, of what an example's tokens share.
        kind: "quadratic": loss |p - x|² / 2, x normal. "regression": (x p - e)² / 2, x standard
            normal, e normal with standard deviation `error`.
        error: As said.
    """

    name: str
    dim: int
    distance: float
    most: int = 1
    common: float = 0.0
    kind: str = "quadratic"
    error: float = 1.0

    @property
    def uneven(self) -> float:
        """Return E n² / (E n)²."""
        return 2 * (2 * self.most + 1) / 3 / (self.most + 1)

    @property
    def scale(self) -> float:
        """Return the noise scale, in examples."""
        mean = (self.most + 1) / 2
        square = self.uneven * mean**2
        if self.kind == "quadratic":
            within, between = self.dim, self.dim * self.common**2
        else:
            # g = x (x p - e): E |g|² = (d + 2) |p|² + d e², and m = p.
            within = (self.dim + 1) * self.distance**2 + self.dim * self.error**2
            between = 0.0
        return (mean * within + square * between) / mean**2 / self.distance**2

    def model(self) -> "Parameters":
        return Parameters(self.dim, self.distance)

    def objective(self) -> Objective:
        return Objective(
            loss=self._loss,
            weight=lambda micro: float(micro["mask"].sum()),
            size=lambda example: len(example["x"]),
            unit="tokens",
        )

    def batch(self, num: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Draw examples."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        batch = []
        for _ in range(num):
            length = int(torch.randint(1, self.most + 1, (1,), generator=generator))
            x = normal(length, self.dim) + self.common * normal(self.dim)
            batch.append({"x": x, "e": self.error * normal(length)})
        return batch

    def _loss(self, model: "Parameters", micro: dict[str, Tensor]) -> Tensor:
        if self.kind == "quadratic":
            loss = (model.p - micro["x"]).square().sum(-1) / 2
        else:
            loss = (micro["x"] @ model.p - micro["e"]).square() / 2
        return (loss * micro["mask"]).sum()


class Parameters(nn.Module):
    """Hold one vector.

    Args:
        dim: Of it.
        length: Of it.
    """

    def __init__(self, dim: int, length: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((dim,), length / math.sqrt(dim), dtype=torch.float64))


def padded(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate: x of shape (rows, tokens, d), e and mask of shape (rows, tokens)."""
    longest = max(len(example["x"]) for example in examples)
    columns = {"x": [], "e": [], "mask": []}
    for example in examples:
        length = len(example["x"])
        for name, values in (example | {"mask": torch.ones(length, dtype=torch.float64)}).items():
            rest = values.new_zeros(longest - length, *values.shape[1:])
            columns[name].append(torch.cat([values, rest]))
    return {name: torch.stack(rows) for name, rows in columns.items()}


def accumulator(problem: Problem, tokens: int = 24) -> Accumulator:
    """Return one that cuts into several padded micro-batches, sorted by length."""
    budget = Budget(tokens=tokens)
    return Accumulator(problem.model(), problem.objective(), budget=budget, collate=padded)


PROBLEMS = (
    Problem("quadratic", 50, 1.0),
    Problem("quadratic, ragged", 50, 1.0, most=8),
    Problem("quadratic, ragged, tokens alike", 50, 0.5, most=8, common=0.5),
    Problem("quadratic, many directions", 400, 1.0, most=8, common=0.3),
    Problem("quadratic, few directions", 8, 1.0, most=8, common=0.5),
    Problem("regression", 30, 1.0, kind="regression", error=2.0),
    Problem("regression, ragged", 30, 0.5, most=8, kind="regression"),
)
