"""Measure what watching a run costs: metrics, live view and noise scale, alone and together.

python benchmarks/watching.py --steps 60 --out benchmarks/results/watching.json

One model, one process. Each effective batch runs in every way, one after the other, in an order
that moves on from batch to batch; ratios are to the same batch unwatched. Of the steps whose noise
scale is measured, one in ten is in a run: their cost counts by a tenth. Beside the ratios, which
the noise of the machine blurs: the time inside of `watch.step`, as a share of the step. The
terminal that the live view draws on is a real pseudo terminal.
"""

import argparse
import os
import pty
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from common import publish
from overhead import interval_of_median

import gradaccum
from gradaccum.cli import embedded
from gradaccum.noise.scale import EVERY
from gradaccum.watch import Watch

# What is written, shown, kept for the noise scale; whether the step is one that is measured for it.
WAYS = {
    "unwatched": (False, False, None, False),
    "metrics": (True, False, None, False),
    "live view": (False, True, None, False),
    "noise scale, measured step": (False, False, EVERY, True),
    "together": (True, True, EVERY, False),
    "together, measured step": (True, True, EVERY, True),
}


def terminal():
    """Return a stream to a pseudo terminal that somebody reads."""
    leader, follower = pty.openpty()

    def drain():
        while os.read(leader, 65536):
            pass

    threading.Thread(target=drain, daemon=True).start()
    return os.fdopen(follower, "w")


def batches(tokens, num):
    """Return a model and effective batches of 32 functions."""
    pairs = embedded.functions()
    tokenizer = embedded.tokenizer([pair["prompt"] + pair["completion"] for pair in pairs])
    rows = []
    for pair in pairs[: 32 * num]:
        ids = tokenizer(pair["prompt"] + pair["completion"])["input_ids"][:tokens]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return embedded.model(tokenizer), [rows[i : i + 32] for i in range(0, len(rows), 32)]


def told(ratios):
    """Return the median of ratios and its 95% interval."""
    return median(ratios), interval_of_median(ratios)


def mixed(usual, measured):
    """Return median and interval where one step in EVERY is a measured one."""
    (one, ends), (other, others) = usual, measured
    pairs = zip((one, *ends), (other, *others), strict=True)
    middle, *ends = (((EVERY - 1) * a + b) / EVERY for a, b in pairs)
    return middle, ends


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="effective batches")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--longest", type=int, default=256, help="tokens of an example")
    parser.add_argument("--out")
    args = parser.parse_args()
    model, given = batches(args.longest, args.steps + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    budget = gradaccum.Budget(tokens=args.tokens)
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=budget)
    shown, plain = terminal(), sys.stderr
    os.environ["TERM"] = "xterm-256color"
    took = {name: [] for name in WAYS}
    inside = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        sys.stderr = shown
        watches = {}
        for name, (is_written, is_live, every, _) in WAYS.items():
            where = Path(folder) / name if is_written else None
            watches[name] = Watch(
                None, where, num_steps=len(given), live=is_live, noise_every=every
            )
            watches[name].follow(accumulator)
        names = list(WAYS)
        for i, batch in enumerate(given):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                accumulator.parts = (i,) if WAYS[name][3] else None
                begin = time.perf_counter()
                step = accumulator.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
                middle = time.perf_counter()
                if name != "unwatched":
                    watches[name].step(step, learning_rate=0.0)
                end = time.perf_counter()
                if i >= 2:  # the first ones warm up, and find out whether to pack
                    took[name].append(end - begin)
                    inside[name].append((end - middle) / (middle - begin))
        sys.stderr = plain
    ratios = {
        name: told([a / b for a, b in zip(values, took["unwatched"], strict=True)])
        for name, values in took.items()
    }
    shares = {name: median(values) for name, values in inside.items()}
    ratios["noise scale"] = mixed((1.0, (1.0, 1.0)), ratios["noise scale, measured step"])
    usual, measured = ratios["together"], ratios["together, measured step"]
    ratios["together, one step in ten measured"] = mixed(usual, measured)
    figures = {
        "step_seconds": median(took["unwatched"]),
        "ratios": {k: {"median": m, "interval": list(ends)} for k, (m, ends) in ratios.items()},
        "share_of_the_step_inside_of_watch": shares,
    }
    publish(figures, args.out, transformers)


if __name__ == "__main__":
    main()
