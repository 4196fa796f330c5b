"""Check the advice for once: train at 8 to 256 examples a step to the same loss, and compare.

python benchmarks/advice.py --out benchmarks/results/advice.json --plot docs/advice.png

A small Llama on the functions of the standard library (AdamW, the first tokens of each). At every
effective batch size three learning rates around those of the rule (the square root of the size,
beta2 with the same half-life in examples) are tried, and the best one is run with more seeds. The
goal is the loss on examples held out that the best run at 32 has after `--examples`. Each run
measures its noise scale; what the advice says of the doubled batch then is held against what the
runs at the doubled batch took.
"""

import argparse
import itertools
import math
import multiprocessing
import sys
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
import transformers
from common import publish
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

import gradaccum
from gradaccum.cli import embedded
from gradaccum.noise import Noise, NoiseScale, advise

SIZES = (8, 16, 32, 64, 128, 256)
BASE, RATE, BETA2 = 32, 4e-3, 0.999  # at 32 examples a step
FACTORS = (0.5, 1.0, 2.0)  # of the learning rate
HELD_OUT, LONGEST, VOCABULARY = 192, 64, 1024
EVERY = 256  # examples, between two looks at those held out; a step, where that has more
WARM_UP = 1024  # examples


@dataclass
class Run:
    """Hold what a run is and what it took."""

    size: int
    rate: float
    seed: int
    goal: float
    most: int
    curve: list[tuple[int, float]] = field(default_factory=list)  # examples, loss held out
    scales: list[tuple[int, float | None]] = field(default_factory=list)  # examples, noise scale
    noise: Noise | None = None
    reached: float | None = None  # examples, between the two looks


def data() -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Return the examples to train on, and those held out."""
    texts = [pair["prompt"] + pair["completion"] for pair in embedded.functions()]
    tokenizer = embedded.tokenizer(texts, vocab_size=VOCABULARY)
    rows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:LONGEST]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows[HELD_OUT:], rows[:HELD_OUT]


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LONGEST,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trained(run: Run) -> Run:
    """Train until the goal is reached, or there were too many examples."""
    torch.set_num_threads(1)
    rows, held_out = data()
    net = model(run.seed)
    beta2 = BETA2 ** (run.size / BASE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=run.rate, betas=(0.9, beta2), fused=True)
    objective, budget = gradaccum.causal_lm(), gradaccum.Budget(tokens=4096)
    accumulator = gradaccum.Accumulator(net, objective, budget=budget)
    noise = NoiseScale(accumulator, every=max(1, 128 // run.size))
    judge = gradaccum.Accumulator(net, objective, budget=budget).prepare(held_out)
    sampler = gradaccum.EffectiveBatchSampler(
        rows, run.size, seed=run.seed, drop_last=True, rank=0, world=1
    )
    done, looked = 0, 0
    for place in sampler.places():
        batch = [rows[i] for i in sampler.batch(place.at)]
        step = accumulator.backward(batch)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        done += len(batch)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * min(1.0, done / WARM_UP)
        optimizer.step()
        optimizer.zero_grad()
        noise.update(step)
        if done - looked < EVERY:
            continue
        looked = done
        with torch.no_grad():
            parts = zip(judge.inputs, judge.losses, strict=True)
            loss = sum(float(loss(net, inputs)) for inputs, loss in parts)
        loss /= sum(judge.totals.values())
        run.noise = noise.estimate
        run.scales.append((done, None if run.noise is None else run.noise.scale))
        run.curve.append((done, loss))
        if loss <= run.goal:
            before, above = run.curve[-2] if len(run.curve) > 1 else (0, math.log(VOCABULARY))
            run.reached = before + (done - before) * (above - run.goal) / (above - loss)
            break
        if done >= run.most or not math.isfinite(loss):
            break
    print(
        f"{run.size} at {run.rate:.2g}, seed {run.seed}: {run.curve[-1][1]:.4f} after {done:,}, "
        f"{run.noise}",
        file=sys.stderr,
        flush=True,
    )
    return run


def cost(run: Run) -> float:
    """Return the examples to the goal; infinite where it was not reached."""
    return math.inf if run.reached is None else run.reached


def known(noise: Noise) -> float:
    """Return the noise scale, or what it is above."""
    return noise.low if noise.scale is None else noise.scale


def fitted(needed: dict[int, float]) -> tuple[float, float]:
    """Return E_min and the critical batch of E = E_min (1 + B / B_crit), by least log squares."""
    best = (math.inf, 0.0, 0.0)
    for i in range(601):
        critical = 10 ** (i / 100)  # 1 to a million
        logs = [math.log(n / (1 + size / critical)) for size, n in needed.items()]
        least = fmean(logs)
        best = min(best, (sum((x - least) ** 2 for x in logs), math.exp(least), critical))
    return best[1], best[2]


def compared(best: dict[int, list[Run]]) -> list[dict[str, Any]]:
    """Return for each size what it took, and what was measured and advised of twice the size."""
    found = []
    for size, runs in best.items():
        costs = [cost(run) for run in runs]
        noise = sorted((run.noise for run in runs if run.noise), key=known)[len(runs) // 2]
        advice = advise(noise, size, learning_rate=runs[0].rate)
        found.append(
            {
                "effective_batch": size,
                "learning_rate": runs[0].rate,
                "examples": median(costs),
                "examples_by_seed": costs,
                "steps": median(costs) / size,
                "noise_scale": noise.scale,
                "noise_scale_95": [noise.low, noise.high if noise.scale else None],
                "advice": advice.summary,
                "doubling_takes_predicted": advice.settings[-1].num_examples,
            }
        )
    for one, other in itertools.pairwise(found):
        one["doubling_takes_measured"] = other["examples"] / one["examples"]
    return found


def drawn(found: list[dict[str, Any]], path: str) -> None:
    """Draw examples and steps to the goal, as measured and as predicted at 32."""
    sizes = [each["effective_batch"] for each in found]
    base = next(each for each in found if each["effective_batch"] == BASE)
    scale = base["noise_scale"] or base["noise_scale_95"][0]
    told = [base["examples"] * (size + scale) / (BASE + scale) for size in sizes]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, per in zip(figure.subplots(1, 2), ("examples", "steps"), strict=True):
        over = [1 if per == "examples" else size for size in sizes]
        for size, each, by in zip(sizes, found, over, strict=True):
            costs = [cost / by for cost in each["examples_by_seed"]]
            axis.plot([size] * len(costs), costs, "o", color="#2563eb", alpha=0.4)
        axis.plot(sizes, [each[per] for each in found], color="#2563eb", label="measured")
        label = f"predicted at {BASE} (noise scale {scale:.0f})"
        values = [each / by for each, by in zip(told, over, strict=True)]
        axis.plot(sizes, values, "--", color="#d97706", label=label)
        axis.set(xscale="log", yscale="log", xlabel="effective batch, examples")
        axis.set_xticks(sizes, map(str, sizes))
        low, high = axis.get_ylim()
        levels = [n * 10**e for e in range(1, 7) for n in (1, 2, 5) if low < n * 10**e < high]
        axis.set_yticks(levels, [f"{level:,}" for level in levels])
        axis.minorticks_off()
        axis.set_title(f"{per} to the same loss")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=9600, help="of the run that sets the goal")
    parser.add_argument("--most", type=int, default=8, help="times as many are tried")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plot")
    parser.add_argument("--out")
    args = parser.parse_args()

    def asked(size: int, factor: float, seed: int, goal: float, times: int) -> Run:
        rate = RATE * factor * math.sqrt(size / BASE)
        return Run(size, rate, seed, goal, args.examples * times)

    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        firsts = pool.map(trained, [asked(BASE, f, 0, -1.0, 1) for f in FACTORS], 1)
        goal = min(run.curve[-1][1] for run in firsts)
        tried = [asked(size, f, 0, goal, args.most) for size in reversed(SIZES) for f in FACTORS]
        tried = pool.map(trained, tried, 1)
        chosen = {size: min((run for run in tried if run.size == size), key=cost) for size in SIZES}
        more = [
            Run(run.size, run.rate, seed, goal, args.examples * args.most)
            for run in reversed(chosen.values())
            for seed in range(1, args.seeds)
        ]
        more = pool.map(trained, more, 1)
    best = {s: [chosen[s], *(run for run in more if run.size == s)] for s in SIZES}
    found = compared(best)
    least, critical = fitted({each["effective_batch"]: each["examples"] for each in found})
    figures = {
        "goal": goal,
        "rates_tried": {
            size: {f"{run.rate:.3g}": run.reached for run in tried if run.size == size}
            for size in SIZES
        },
        "runs": found,
        "fitted_examples_least": least,
        "fitted_critical_batch": critical,
        "noise_scale_on_the_way": {
            size: runs[0].scales[:: max(1, len(runs[0].scales) // 12)]
            for size, runs in best.items()
        },
    }
    publish(figures, args.out, transformers)
    if args.plot:
        drawn(found, args.plot)


if __name__ == "__main__":
    main()
