"""Measure what being able to recover costs in a step that does not have to.

python benchmarks/recovery.py --out benchmarks/results/recovery.json

What a step adds is that random state, buffers and attributes are noted before it. Steps with and
without it run in pairs, in random order; beside the median of their ratios stands the time of the
noting itself, taken inside these steps, where caches are cold.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers as hf
from common import device, publish, seconds_now

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradaccum
from gradaccum import engine
from gradaccum.state import Past


def llama(width: int, layers: int, vocab: int) -> Any:
    config = hf.LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).train().to(device())


class Nothing:
    """Stand in for what is noted."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


class Timed(Past):
    """Note, and how long that took."""

    seconds: ClassVar[list[float]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        super().__init__(*args, **kwargs)
        self.seconds.append(time.perf_counter() - begin)


def compared(model: Any, rows: int, length: int, rounds: int) -> dict[str, float]:
    examples = [{"input_ids": ids, "labels": ids} for ids in [[7] * length] * rows]
    accumulator = engine.Accumulator(
        model, gradaccum.causal_lm(), budget=gradaccum.Budget(tokens=512)
    )
    ratios, alone = [], []
    Timed.seconds.clear()
    for _ in range(rounds):
        spent: dict[Any, float] = {}
        for kind in random.sample([Timed, Nothing], 2):
            engine.Past = kind
            begin = seconds_now()
            accumulator.backward(examples)
            spent[kind] = seconds_now() - begin
            model.zero_grad()
        ratios.append(spent[Timed] / spent[Nothing])
        alone.append(spent[Nothing])
    engine.Past = Past
    step, noting = statistics.median(alone), statistics.median(Timed.seconds)
    return {
        "step_seconds": round(step, 4),
        "median_ratio": round(statistics.median(ratios), 4),
        "noting_seconds": round(noting, 6),
        "noting_share": round(noting / step, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    publish(
        {
            "embedded default, 32 x 128 tokens": compared(
                llama(256, 4, 8192), 32, 128, args.rounds
            ),
            "26 million parameters, 16 x 128 tokens": compared(
                llama(512, 6, 8192), 16, 128, args.rounds
            ),
            "one short micro-batch of 64 tokens": compared(
                llama(256, 4, 8192), 1, 64, 20 * args.rounds
            ),
        },
        args.out,
        hf,
    )


if __name__ == "__main__":
    main()
