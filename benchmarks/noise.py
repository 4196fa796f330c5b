"""Measure the noise scale where it is known: its error, and how often its interval holds the truth.

python benchmarks/noise.py --out benchmarks/results/noise.json
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean, median

import torch
from common import publish

from gradaccum.noise import NoiseScale

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.quadratics import PROBLEMS, accumulator


def measured(problem, runs, steps, size):
    """Return the figures of a problem, over runs of so many measured steps."""
    errors, held, widths, tails = [], 0, [], [0, 0]
    sums = [0.0, 0.0]
    for seed in range(runs):
        engine, generator = accumulator(problem), torch.Generator().manual_seed(seed)
        noise = NoiseScale(engine, every=1, decay=1.0)
        for _ in range(steps):
            step = engine.backward(problem.batch(size, generator))
            engine.model.zero_grad()
            noise.update(step)
        found = noise.estimate
        held += found.low <= problem.scale <= found.high
        tails[0] += found.low > problem.scale
        tails[1] += found.high < problem.scale
        sums[0] += found.variance / runs
        sums[1] += found.gradient_squared / runs
        if found.scale is not None:
            errors.append(found.scale / problem.scale - 1)
            widths.append((found.high - found.low) / problem.scale)
    return {
        "problem": problem.name,
        "scale": problem.scale,
        "effective_batch": size,
        "steps": steps,
        "runs": runs,
        "pooled": sums[0] / sums[1],
        "pooled_error": sums[0] / sums[1] / problem.scale - 1,
        "variance_error": sums[0] / (problem.scale * problem.distance**2) - 1,
        "gradient_squared_error": sums[1] / problem.distance**2 - 1,
        "median_absolute_error": median(map(abs, errors)),
        "mean_error": fmean(errors),
        "median_width": median(widths),
        "unbounded": runs - len(errors),
        "covered": held / runs,
        "too_high": tails[0] / runs,
        "too_low": tails[1] / runs,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40, help="measured steps in each")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for problem in PROBLEMS:
        found.append(measured(problem, args.runs, args.steps, 32))
        print(found[-1], file=sys.stderr, flush=True)
    publish({"problems": found}, args.out)


if __name__ == "__main__":
    main()
