"""Show how cost grows: a step with the effective batch, a sequence with its length, a split.

A step: rows of 128 bytes of the standard library's functions, a small model of bytes, effective
batches from 32 to 8,192; milliseconds a thousand trained tokens and the peak of tensors beyond the
model. The machine's speed drifts within seconds by more than what is looked for, so that steps of
the smallest size are taken between the micro-batches of the others, and compared with them: the
median of these ratios, the least and the most. Smaller batches take several steps in their turn.

    python benchmarks/scale.py --rounds 5 --out benchmarks/results/scale.json --plot docs/scale.png
"""

import argparse
import random
import statistics
import time

import torch
import transformers
from common import publish
from transformers import LlamaConfig, LlamaForCausalLM

import gradaccum
from gradaccum.cli import embedded
from gradaccum.memory.tracker import INPUTS, PARAMETERS, Tracker
from gradaccum.packing.plan import SHARED
from gradaccum.split import split

SIZES = (32, 128, 512, 2048, 8192)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BUDGET = gradaccum.Budget(tokens=1024)
TURN = 2048  # examples that a turn runs at least


def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def stepping(rounds):
    """Return the cost of a trained token beside that in steps of the smallest size, and the peak.

    While a step runs, every so many examples another model takes a step of the smallest size.
    """
    texts = ["".join(pair.values()).encode() for pair in embedded.functions(4500)]
    # All tokens are trained, so that the largest micro-batches of all sizes have as many logits.
    rows = [list(text[i : i + 128]) for text in texts for i in range(0, len(text) - 127, 128)]
    most = [{"input_ids": row, "labels": row} for row in rows[: SIZES[-1]]]
    assert len(most) == SIZES[-1]
    base = SIZES[0]
    beside = gradaccum.Accumulator(small(), gradaccum.causal_lm(), budget=BUDGET)
    num, costs_beside = 0, []

    def step(accumulator, examples):
        weight = accumulator.backward(examples).weight
        accumulator.model.zero_grad()
        return weight

    def between(micro):
        nonlocal num
        num += len(micro.examples)
        while num >= base:
            num -= base
            begin = time.perf_counter()
            weight = step(beside, most[:base])
            costs_beside.append((time.perf_counter() - begin, weight))

    model = small()
    accumulator = gradaccum.Accumulator(
        model, gradaccum.causal_lm(), budget=BUDGET, after_micro=between
    )
    step(accumulator, most[:base])
    costs, ratios = {size: [] for size in SIZES}, {size: [] for size in SIZES}
    for round_ in range(rounds):
        for size in SIZES if round_ % 2 else SIZES[::-1]:
            costs_beside.clear()
            begin = time.perf_counter()
            starts = range(0, max(TURN, size), size)
            weight = sum(step(accumulator, most[start : start + size]) for start in starts)
            seconds = time.perf_counter() - begin
            taken, weight_beside = map(sum, zip(*costs_beside, strict=True))
            costs[size].append(1e6 * (seconds - taken) / weight)
            ratios[size].append((seconds - taken) / weight / (taken / weight_beside))
            print(round_, size, round(costs[size][-1], 1), round(ratios[size][-1], 4), flush=True)
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=BUDGET)
    peaks = {}
    for size in SIZES:
        tracker, window = Tracker(), accumulator.prepare(most[:size])
        tracker.follow(model, None, window.inputs)
        try:
            with tracker:
                accumulator.backward(window)
        finally:
            tracker.close()
        inputs = tracker.peak[INPUTS]
        peaks[size] = (tracker.peak_bytes - tracker.peak[PARAMETERS] - inputs, inputs)
        model.zero_grad()
    return {
        size: {
            "ms_per_1000_trained_tokens": round(statistics.median(times), 2),
            "times_that_of_32": with_spread(ratios[size]),
            "peak_tensor_mib": round(peaks[size][0] / 2**20, 1),
            "inputs_mib": round(peaks[size][1] / 2**20, 1),
        }
        for size, times in costs.items()
    }


def with_spread(ratios):
    return [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]


def lengthening(model, rounds):
    """Return the seconds of one sequence, and what a line and a square through them say."""
    accumulator = gradaccum.Accumulator(
        model, gradaccum.causal_lm(), budget=gradaccum.Budget(tokens=LENGTHS[-1])
    )
    times = {length: [] for length in LENGTHS}
    for round_ in range(rounds + 1):
        for length in LENGTHS:
            ids = torch.randint(3, 256, (length,)).tolist()
            begin = time.perf_counter()
            accumulator.backward([{"input_ids": ids, "labels": ids}])
            if round_:
                times[length].append(time.perf_counter() - begin)
            model.zero_grad()
    medians = {length: statistics.median(t) for length, t in times.items()}
    features = torch.tensor([[1.0, n, n**2] for n in LENGTHS], dtype=torch.float64)
    scale = features.amax(0)
    target = torch.tensor(list(medians.values()), dtype=torch.float64)[:, None]
    weights = 1 / target  # relative errors
    solved = torch.linalg.lstsq(features / scale * weights, target * weights).solution
    fitted = (features / scale @ solved)[:, 0].tolist()
    return {
        length: {"seconds": round(medians[length], 4), "fitted": round(value, 4)}
        for length, value in zip(LENGTHS, fitted, strict=True)
    }


def epoch():
    """Return the seconds that it takes to draw, share out and cut all of a million examples."""
    draw = random.Random(0)
    lengths = [min(8192, int(draw.lognormvariate(5, 1)) + 1) for _ in range(1_000_000)]
    begin = time.perf_counter()
    sampler = gradaccum.EffectiveBatchSampler(len(lengths), 1024, costs=lengths, rank=0, world=8)
    shares = list(sampler)
    drawn = time.perf_counter() - begin
    objective = gradaccum.Objective(lambda *_: None, None, size=lengths.__getitem__)
    begin = time.perf_counter()
    budget = gradaccum.Budget(tokens=16_384)
    micros = sum(len(split(share, objective, budget)) for share in shares)
    return {
        "steps": len(shares),
        "seconds_to_draw_and_share_out_over_8_ranks": round(drawn, 2),
        "seconds_to_cut_the_shares_of_a_rank": round(time.perf_counter() - begin, 2),
        "micro_batches_of_a_rank": micros,
    }


def splitting():
    draw = random.Random(0)
    lengths = [min(8192, int(draw.lognormvariate(5, 1)) + 1) for _ in range(100_000)]
    kinds = {"padded": (None, 0), "packed": (SHARED, 0), "packed, 300 tokens alike": (SHARED, 300)}
    found = {}
    for kind, (shared, alike) in kinds.items():
        common = list(range(alike))
        rows = [{"input_ids": common + [i] * length} for i, length in enumerate(lengths)]
        budget = gradaccum.Budget(tokens=16_384)
        begin = time.perf_counter()
        micros = split(rows, gradaccum.causal_lm(), budget, shared=shared)
        found[kind] = {
            "seconds": round(time.perf_counter() - begin, 2),
            "micro_batches": len(micros),
            "least_possible": -(-sum(lengths) // (16_384 - alike)),
        }
    return found


def draw(figures, path):
    """Draw the three curves, and what they would be by their tokens alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    time_, memory, length = figure.subplots(1, 3)
    steps = figures["effective batch"]
    sizes, ratios = list(steps), [row["times_that_of_32"] for row in steps.values()]
    reach = [(middle - least, most - middle) for middle, least, most in ratios]
    middles = [middle for middle, _, _ in ratios]
    time_.errorbar(sizes, middles, yerr=list(zip(*reach, strict=True)), marker="o", capsize=3)
    time_.set(title="time of a trained token", ylabel="times that of 32", ylim=(0, None))
    peaks = {size: row["peak_tensor_mib"] for size, row in steps.items()}
    inputs = [row["inputs_mib"] for row in steps.values()]
    memory.plot(list(peaks), list(peaks.values()), marker="o", label="beyond the model")
    memory.plot(list(peaks), inputs, marker="o", linestyle=":", label="inputs, on the host")
    memory.set(title="memory", ylabel="MiB of tensors", ylim=(0, None))
    memory.legend()
    for axes in (time_, memory):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="effective batch, examples", xticks=sizes, xticklabels=sizes)
    found = figures["one sequence of so many tokens"]
    found = {int(tokens): row for tokens, row in found.items()}
    length.plot(list(found), [row["seconds"] for row in found.values()], "o", label="measured")
    length.plot(list(found), [row["fitted"] for row in found.values()], label="a + bT + cT²")
    length.set(title="one long sequence", xlabel="tokens", ylabel="seconds", xscale="log")
    length.set(yscale="log", xticks=list(found), xticklabels=list(found))
    length.minorticks_off()
    length.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    parser.add_argument("--plot", help="draw the curves into this file")
    options = parser.parse_args()
    model = small()
    figures = {
        "split of 100,000 examples, 16,384 tokens": splitting(),
        "an epoch of 1,000,000 examples, 1,024 a step": epoch(),
        "one sequence of so many tokens": lengthening(model, options.rounds),
        "effective batch": stepping(options.rounds),
    }
    publish(figures, options.out, transformers)
    if options.plot:
        draw(figures, options.plot)


if __name__ == "__main__":
    main()
