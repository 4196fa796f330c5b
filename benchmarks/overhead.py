"""Time `Accumulator.backward` against a hand-written loop over the very same micro-batches.

After each micro-batch of the accumulator, the loop runs the same one on a copy of the model, since
a machine that others use as well changes its speed within seconds. In every other round they change
models, since where one lies in memory can count for more than the difference. Both collate in the
time that is taken. The loop gets its micro-batches cut and its count for nothing; the accumulator
cuts and counts. The ratio is that of all that ours takes to all that the loop takes, the geometric
mean of two rounds; of these the median and its 95% interval. All of it runs in several processes,
which differ by more than their rounds do. The loop against itself shows what the measure is worth.

The same loops also run a model that costs next to nothing, where what the engine adds to a
micro-batch can be seen.

    python benchmarks/overhead.py --rounds 24 --out benchmarks/results/overhead.json
"""

import argparse
import copy
import math
import multiprocessing
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import publish
from torch import nn

import gradaccum
from gradaccum.batch import as_batch
from gradaccum.cli import embedded
from gradaccum.padding import pad_collate
from gradaccum.split import split

WORKLOADS = (
    FOUR_ROWS := "uniform, 32 x 128 tokens, 4 rows",
    ONE_ROW := "uniform, 32 x 128 tokens, 1 row",
    RAGGED := "ragged, 32 functions, 512 tokens",
    AGAINST_ITSELF := "the loop against itself, 32 x 128 tokens, 1 row",
    NOTHING := "next to nothing, 32 x 2 tokens, 1 row",
)


def by_hand(net, examples, count):
    inputs = pad_collate(examples)
    labels = inputs.pop("labels")[:, 1:].flatten()
    logits = net(**inputs).logits[:, :-1].flatten(0, 1)
    (F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count).backward()


class ByHand:
    """The loop in the accumulator's place."""

    def __init__(self, net, objective, budget, after_micro):
        self.net, self.objective, self.budget = net, objective, budget
        self.after_micro = after_micro

    def backward(self, batch):
        for micro in split(as_batch(batch, None), self.objective, self.budget):
            by_hand(self.net, [batch[i] for i in micro.examples], 1.0)
            self.after_micro(micro)


def measure(net, batch, budget, rounds, contender=gradaccum.Accumulator):
    nets, hand = (net, copy.deepcopy(net)), []
    objective = gradaccum.causal_lm()
    count = math.fsum(objective.weight(pad_collate([row])) for row in batch)

    def after(other):
        def between(micro):
            begin = time.perf_counter()
            by_hand(other, [batch[i] for i in micro.examples], count)
            hand.append(time.perf_counter() - begin)

        return between

    ours = [
        contender(one, objective, budget=budget, after_micro=after(other))
        for one, other in (nets, nets[::-1])
    ]
    ratios, each, added = [], [], []
    for round_ in range(-2, rounds):
        hand.clear()
        begin = time.perf_counter()
        ours[round_ % 2].backward(batch)
        took = time.perf_counter() - begin - sum(hand)
        for one in nets:
            one.zero_grad()
        if round_ >= 0:  # those before find out whether to pack
            ratios.append(took / sum(hand))
            each.append(sum(hand) / len(hand))
            added.append((took - sum(hand)) / len(hand))
    ratios = [(one * other) ** 0.5 for one, other in zip(ratios[::2], ratios[1::2], strict=True)]
    begin = time.perf_counter()
    gradaccum.Accumulator(net, objective, budget=budget).prepare(batch)
    return {
        "micro_batches": len(hand),
        "each": each,
        "ratios": ratios,
        "added": added,
        "prepare": time.perf_counter() - begin,
    }


def joined(found):
    """Return the figures of a workload from those of several processes."""
    ratios, each, added = (
        [value for one in found for value in one[name]] for name in ("ratios", "each", "added")
    )
    return {
        "micro_batches": found[0]["micro_batches"],
        "hand_written_milliseconds_each": round(1e3 * statistics.median(each), 3),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_interval": [round(q, 4) for q in interval_of_median(ratios)],
        "ratio_of_each_process": [round(statistics.median(one["ratios"]), 4) for one in found],
        "added_microseconds_per_micro_batch": round(1e6 * statistics.median(added)),
        "prepare_seconds": round(statistics.median(one["prepare"] for one in found), 5),
    }


def interval_of_median(values):
    """Return the 95% interval of the median, by order statistics."""
    ordered, margin = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(values) / 2 - margin), int(len(values) / 2 + margin)
    return ordered[max(0, low)], ordered[min(len(values) - 1, high)]


class Tiny(nn.Module):
    """Next to nothing to compute: 16 parameters of one number each."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(1) for _ in range(16))

    def forward(self, input_ids, attention_mask=None):
        logits = sum(self.weights[1:], self.weights[0]).expand(*input_ids.shape, 2)
        return SimpleNamespace(logits=logits)


def workload(name, rounds):
    """Measure the workload of this name in this process."""
    pairs = embedded.functions(400)
    tokenizer = embedded.tokenizer(p["prompt"] + p["completion"] for p in pairs)
    net = embedded.model(tokenizer)
    ids = tokenizer([p["prompt"] + p["completion"] for p in pairs])["input_ids"]
    ragged = [{"input_ids": row[:512], "labels": row[:512]} for row in ids[:32]]
    long = [token for row in ids for token in row]
    uniform = [
        {"input_ids": (part := long[128 * i : 128 * i + 128]), "labels": part} for i in range(32)
    ]
    few = [{"input_ids": [0, 1], "labels": [0, 1]}] * 32
    one, four = gradaccum.Budget(examples=1), gradaccum.Budget(examples=4)
    return {
        FOUR_ROWS: lambda: measure(net, uniform, four, rounds),
        ONE_ROW: lambda: measure(net, uniform, one, rounds),
        RAGGED: lambda: measure(net, ragged, gradaccum.Budget(tokens=512), rounds),
        AGAINST_ITSELF: lambda: measure(net, uniform, one, rounds, ByHand),
        NOTHING: lambda: measure(Tiny(), few, one, 10 * rounds),
    }[name]()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24, help="over all processes")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    rounds = options.rounds // options.processes
    asked = [(name, rounds) for name in WORKLOADS for _ in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(workload, asked, 1)
    figures = {
        name: joined([one for (given, _), one in zip(asked, found, strict=True) if given == name])
        for name in WORKLOADS
    }
    publish({"workloads": figures}, options.out)


if __name__ == "__main__":
    main()
