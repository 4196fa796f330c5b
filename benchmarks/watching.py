"""Measure what watching a run costs: metrics, live view and noise scale, alone and together.

python benchmarks/watching.py --rounds 9 --out benchmarks/results/watching.json

One model, one process. In each round every way of watching runs the same effective batches, one
way after the other, in an order that moves on from round to round; the ratios are to the same steps
unwatched within the round. The terminal that the live view draws on is a real pseudo terminal.
"""

import argparse
import os
import pty
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
from common import publish

import gradaccum
from gradaccum.cli import embedded
from gradaccum.noise.scale import EVERY
from gradaccum.watch import Watch

WAYS = {
    "metrics": {"is_written": True, "live": False, "noise_every": None},
    "live view": {"is_written": False, "live": True, "noise_every": None},
    "noise scale": {"is_written": False, "live": False, "noise_every": EVERY},
    "together": {"is_written": True, "live": True, "noise_every": EVERY},
}
TURN = EVERY  # steps: one of them is measured for the noise scale


def terminal():
    """Return a stream to a pseudo terminal that somebody reads."""
    leader, follower = pty.openpty()

    def drain():
        while os.read(leader, 65536):
            pass

    threading.Thread(target=drain, daemon=True).start()
    return os.fdopen(follower, "w")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--out")
    args = parser.parse_args()
    pairs = embedded.functions()
    tokenizer = embedded.tokenizer([pair["prompt"] + pair["completion"] for pair in pairs])
    model = embedded.model(tokenizer, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    rows = []
    for pair in pairs[: 32 * TURN]:
        ids = tokenizer(pair["prompt"] + pair["completion"])["input_ids"][:512]
        rows.append({"input_ids": ids, "labels": list(ids)})
    batches = [rows[i : i + 32] for i in range(0, len(rows), 32)]
    objective = gradaccum.causal_lm()
    budget = gradaccum.Budget(tokens=args.tokens)
    accumulator = gradaccum.Accumulator(model, objective, budget=budget)
    accumulator.backward(batches[0])
    model.zero_grad()
    shown, plain = terminal(), sys.stderr
    os.environ["TERM"] = "xterm-256color"
    num_steps = TURN * (args.rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        watches = {}
        sys.stderr = shown
        for name, way in WAYS.items():
            where = Path(folder) / name if way["is_written"] else None
            watches[name] = Watch(
                None, where, num_steps=num_steps, live=way["live"], noise_every=way["noise_every"]
            )
            watches[name].follow(accumulator)
            accumulator.parts = None

        def turn(watch):
            """Return the seconds of the steps of one turn."""
            sys.stderr = shown
            begin = time.perf_counter()
            if watch is not None and watch.noise is not None:
                watch.noise._draw()
            for batch in batches:
                step = accumulator.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
                if watch is None:
                    step.loss  # noqa: B018  everybody looks at it
                else:
                    watch.step(step, learning_rate=0.0)
            spent = time.perf_counter() - begin
            accumulator.parts = None
            sys.stderr = plain
            return spent

        names = [None, *WAYS]
        found = {name: [] for name in names}
        for i in range(args.rounds + 1):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                spent = turn(watches.get(name))
                if i:  # the first warms up
                    found[name].append(spent)
            print(f"round {i}: {[round(found[n][-1], 2) for n in names if i]}", file=plain)
    ratios = {
        name: [one / other for one, other in zip(found[name], found[None], strict=True)]
        for name in WAYS
    }
    figures = {
        "step_seconds": median(found[None]) / TURN,
        "ratios": {
            name: {"median": median(values), "quartiles": quantiles(values, n=4)[::2]}
            for name, values in ratios.items()
        },
        "rounds": args.rounds,
    }
    publish(figures, args.out, transformers)


if __name__ == "__main__":
    main()
