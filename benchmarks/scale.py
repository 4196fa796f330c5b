"""Show how cost grows: a step with the effective batch, a sequence with its length, a split.

A step: functions of the standard library, a small model of their vocabulary, effective batches from
32 to 8,192, the same 2,048 examples over and over (each time without one more of their first
tokens, so that they do not begin alike); milliseconds a thousand trained tokens and the peak of
tensors beyond the model. Rounds are interleaved; smaller batches take several steps in their turn.

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
from gradaccum.memory.tracker import PARAMETERS, Tracker
from gradaccum.packing.plan import SHARED
from gradaccum.split import split

SIZES = (32, 128, 512, 2048, 8192)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BUDGET = gradaccum.Budget(tokens=1024)


def small(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def tokenized(num):
    pairs = embedded.functions(num)
    tokenizer = embedded.tokenizer(p["prompt"] + p["completion"] for p in pairs)
    # All tokens are trained, so that the largest micro-batches of all sizes have as many logits.
    rows = tokenizer([pair["prompt"] + pair["completion"] for pair in pairs])["input_ids"]
    rows = [row[:128] for row in rows if len(row) > 8][:2048]
    return [{"input_ids": row, "labels": row} for row in rows], len(tokenizer)


def stepping(model, rows, rounds):
    """Return the cost of a trained token at each size, and the peak of tensors."""
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=BUDGET)
    copies = range(SIZES[-1] // len(rows))
    most = [{name: row[name][copy:] for name in row} for copy in copies for row in rows]
    found = {size: [] for size in SIZES}
    accumulator.backward(most[:32]), model.zero_grad()
    for round_ in range(rounds):
        for size in SIZES if round_ % 2 else SIZES[::-1]:
            begin, weight = time.perf_counter(), 0.0
            # Each turn runs the same 2,048 examples, or all of the largest.
            for start in range(0, max(2048, size), size):
                weight += accumulator.backward(most[start : start + size]).weight
                model.zero_grad()
            found[size].append(1e6 * (time.perf_counter() - begin) / weight)
            print(round_, size, round(found[size][-1], 1), flush=True)
    peaks = {}
    for size in SIZES:
        tracker = Tracker()
        tracker.follow(model, None, ())
        try:
            with tracker:
                accumulator.backward(most[:size])
        finally:
            tracker.close()
        peaks[size] = tracker.peak_bytes - tracker.peak[PARAMETERS]
        model.zero_grad()
    base = statistics.median(found[SIZES[0]])
    return {
        size: {
            "ms_per_1000_trained_tokens": round(statistics.median(times), 2),
            "spread": [round(min(times), 2), round(max(times), 2)],
            "times_that_of_32": round(statistics.median(times) / base, 3),
            "peak_tensor_mib": round(peaks[size] / 2**20, 1),
        }
        for size, times in found.items()
    }


def lengthening(model, rounds):
    """Return the seconds of one sequence, and what a line and a square through them say."""
    accumulator = gradaccum.Accumulator(
        model, gradaccum.causal_lm(), budget=gradaccum.Budget(tokens=LENGTHS[-1])
    )
    times = {length: [] for length in LENGTHS}
    for round_ in range(rounds + 1):
        for length in LENGTHS:
            ids = torch.randint(3, 1000, (length,)).tolist()
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
    sizes, costs = list(steps), [row["ms_per_1000_trained_tokens"] for row in steps.values()]
    reach = [[cost - row["spread"][0], row["spread"][1] - cost]
             for cost, row in zip(costs, steps.values(), strict=True)]  # fmt: skip
    time_.errorbar(sizes, costs, yerr=list(zip(*reach, strict=True)), marker="o", capsize=3)
    time_.set(title="time of a trained token", ylabel="ms for 1,000", ylim=(0, None))
    peaks = {size: row["peak_tensor_mib"] for size, row in steps.items()}
    memory.plot(list(peaks), list(peaks.values()), marker="o")
    memory.set(title="memory beyond the model", ylabel="MiB of tensors", ylim=(0, None))
    for axes in (time_, memory):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="effective batch, examples", xticks=sizes, xticklabels=sizes)
    found = figures["one sequence of so many tokens"]
    length.plot(list(found), [row["seconds"] for row in found.values()], "o", label="measured")
    length.plot(list(found), [row["fitted"] for row in found.values()], label="a + bT + cT²")
    length.set(title="one long sequence", xlabel="tokens", ylabel="seconds", xscale="log")
    length.set(yscale="log")
    length.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    parser.add_argument("--plot", help="draw the curves into this file")
    options = parser.parse_args()
    rows, vocabulary = tokenized(2500)
    model = small(vocabulary)
    figures = {
        "split of 100,000 examples, 16,384 tokens": splitting(),
        "an epoch of 1,000,000 examples, 1,024 a step": epoch(),
        "one sequence of so many tokens": lengthening(model, options.rounds),
        "effective batch": stepping(model, rows, options.rounds),
    }
    publish(figures, options.out, transformers)
    if options.plot:
        draw(figures, options.plot)


if __name__ == "__main__":
    main()
