"""Compare the budget that is chosen with every other one, run for real.

python benchmarks/choose.py --out benchmarks/results/choose.json

Two models: the embedded default on its real, ragged data, and an encoder on rows of equal length.
Each budget of the grid runs the same effective batches, interleaved, one round after the other. The
machine's speed drifts, so what counts is a budget's share of the time of its round, in the median
over rounds. "lost" is how much slower the chosen one is than the best.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from common import device, publish, seconds_now

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # nothing is remembered from before

import gradaccum
from gradaccum.cli import embedded
from gradaccum.types import Budget

SIZE = 32


def ragged() -> tuple[Any, Any, list[Any]]:
    """Return model, objective and effective batches of the embedded example."""
    pairs = embedded.functions(600)
    tokenizer = embedded.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    rows = []
    for pair in pairs[: 2 * SIZE]:
        ids = tokenizer(pair["prompt"] + pair["completion"])["input_ids"][:1024]
        rows.append({"input_ids": ids, "labels": ids})
    batches = [rows[i : i + SIZE] for i in range(0, len(rows), SIZE)]
    return embedded.model(tokenizer).train().to(device()), gradaccum.causal_lm(), batches


def even() -> tuple[Any, Any, list[Any]]:
    """Return model, objective and effective batches of an encoder with rows of 128 tokens."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    batches = [
        [{"input_ids": torch.randint(1, 8192, (128,)).tolist(), "labels": i % 3} for i in range(64)]
        for _ in range(2)
    ]
    objective = gradaccum.from_mean(weight="rows", size=lambda example: len(example["input_ids"]))
    return hf.BertForSequenceClassification(config).train().to(device()), objective, batches


def compared(make: Any, rounds: int) -> dict[str, Any]:
    model, objective, batches = make()
    collate = None
    if make is even:
        collate = lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}  # noqa: E731
    begin = seconds_now()
    auto = gradaccum.Accumulator(model, objective, collate=collate)
    auto.backward(batches[0])
    found, first = auto.found, seconds_now() - begin
    model.zero_grad()
    begin = seconds_now()
    auto.backward(batches[0])
    planning = first - (seconds_now() - begin)
    model.zero_grad()
    longest = max(len(row["input_ids"]) for batch in batches for row in batch)
    grid = [2**n for n in range(6, 14 if device().type == "cpu" else 17)]
    budgets = sorted({*grid, found.budget.tokens})
    engines = {
        tokens: gradaccum.Accumulator(
            model, objective, budget=Budget(tokens=tokens), collate=collate
        )
        for tokens in budgets
    }
    for engine in engines.values():  # whether micro-batches run packed is looked at in its first
        engine.backward(batches[0])
        model.zero_grad()
    shares: dict[int, list[float]] = {tokens: [] for tokens in budgets}
    for _ in range(rounds):
        seconds: dict[int, float] = {}
        for tokens, engine in engines.items():
            begin = seconds_now()
            for batch in batches:
                engine.backward(batch)
                model.zero_grad()
            seconds[tokens] = seconds_now() - begin
        for tokens, spent in seconds.items():
            shares[tokens].append(spent / statistics.mean(seconds.values()))
        print(make.__name__, seconds, file=sys.stderr)
    time = {tokens: statistics.median(found) for tokens, found in shares.items()}
    best = min(time, key=time.__getitem__)
    return {
        "longest": longest,
        "time_by_tokens": {tokens: round(time[tokens] / time[best], 3) for tokens in budgets},
        "spread_by_tokens": {
            tokens: round((max(found) - min(found)) / time[best], 3)
            for tokens, found in shares.items()
        },
        "best_tokens": best,
        "chosen_tokens": found.budget.tokens,
        "lost": round(time[found.budget.tokens] / time[best] - 1, 4),
        "micro_batches_measured": found.num_probes,
        "planning_seconds": round(planning, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out")
    args = parser.parse_args()
    figures = {make.__name__: compared(make, args.rounds) for make in (ragged, even)}
    publish(figures, args.out, hf)


if __name__ == "__main__":
    main()
