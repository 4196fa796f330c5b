"""What rounding alone does to a trajectory, and what a cause does: what `compare` judges by.

Pairs of runs of a small transformer, which differ in how each batch is cut (rounding alone) or in
one cause. Of each pair: the largest factor by which the relative difference of the loss exceeded
the larger of the unit and what it had been before; `gradaccum report` calls more than JUMP a jump.

    python benchmarks/trajectories.py --out benchmarks/results/trajectories.json
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import publish
from torch import nn
from torch.nn import functional as F

from gradaccum.report.compare import JUMP, compare
from gradaccum.report.read import Run

VOCABULARY, WIDTH, LENGTH, BATCH = 64, 48, 24, 32


class Small(nn.Module):
    """Two layers of a causal transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(self.tokens(ids) + self.places.weight, mask, is_causal=True))


def data() -> torch.Tensor:
    """Return sequences of a random Markov chain, shape (examples, LENGTH + 1)."""
    draw = torch.Generator().manual_seed(0)
    chances = (2 * torch.randn(VOCABULARY, VOCABULARY, generator=draw)).softmax(-1)
    columns = [torch.randint(VOCABULARY, (4096, 1), generator=draw)]
    for _ in range(LENGTH):
        columns.append(torch.multinomial(chances[columns[-1][:, 0]], 1, generator=draw))
    return torch.cat(columns, 1)


def trained(
    steps: int, *, cut: int = BATCH, rate: float = 1e-3, sgd: bool = False, seed: int = 0,
    bf16: bool = False,
) -> Run:  # fmt: skip
    """Train and return the run."""
    torch.manual_seed(seed)
    model, examples = Small(), data()
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=rate, **({"momentum": 0.9} if sgd else {}))
    losses: list[float | None] = []
    for step in range(steps):
        begin = step * BATCH % len(examples)
        loss = 0.0
        for rows in examples[begin : begin + BATCH].split(cut):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(rows[:, :-1])
            total = F.cross_entropy(
                logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            )
            part = total / (BATCH * LENGTH)
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    columns = {"loss": losses, "weight": [float(BATCH * LENGTH)] * steps}
    about: dict[str, Any] = {"model": {"dtype": "float32"}, "settings": {"bf16": bf16}}
    return Run("run", Path("."), about, list(range(1, steps + 1)), columns)


def judged(name: str, first: Run, other: Run) -> dict[str, Any]:
    """Return how a pair compares, and by how much its difference ever jumped."""
    found = compare(first, other)
    apart = dict(found.apart)
    ratios = [JUMP * apart[step] / bound for step, bound in found.bounds]
    return {
        "pair": name,
        "kind": found.kind,
        "step": found.step,
        "largest_jump": max(ratios),
        "largest_difference": max(apart.values()),
        "median_difference": statistics.median(apart.values()),
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--steps", type=int, default=200)
    words.add_argument("--out")
    asked = words.parse_args()
    steps = asked.steps
    rounding, causes = [], []
    for name, kept in (
        ("AdamW 1e-3", {}),
        ("AdamW 5e-3", {"rate": 5e-3}),
        ("AdamW 2e-2", {"rate": 2e-2}),
        ("SGD 0.1", {"rate": 0.1, "sgd": True}),
        ("SGD 1.0", {"rate": 1.0, "sgd": True}),
        ("AdamW 1e-3, bf16", {"bf16": True}),
        ("AdamW 5e-3, bf16", {"rate": 5e-3, "bf16": True}),
    ):
        whole = trained(steps, **kept)
        for cut in (16, 4):
            other = trained(steps, cut=cut, **kept)
            rounding.append(judged(f"{name}, {BATCH} against {cut} rows at a time", whole, other))
        if kept in ({}, {"bf16": True}):
            for cause, changed in (
                ("learning rate 0.01% higher", {"rate": 1.0001e-3}),
                ("learning rate 1% higher", {"rate": 1.01e-3}),
                ("learning rate twice as high", {"rate": 2e-3}),
                ("another seed", {"seed": 1}),
            ):
                causes.append(judged(f"{name}, {cause}", whole, trained(steps, **kept | changed)))
    publish({"steps": steps, "jump": JUMP, "rounding": rounding, "causes": causes}, asked.out)


if __name__ == "__main__":
    main()
