"""Run directories that were never trained: the files of a run, by its schema."""

import json
import math
import random


def lines(num=25, *, seed=0, batch=32, change=None, nudge=0.0, start=0):
    """Return what a run of so many steps writes.

    Args:
        num: Steps.
        seed: Of the data and the noise.
        batch: The effective batch.
        change: (step, batch) from which on it is another.
        nudge: Relative difference of the loss that a first rounding made; it grows.
        start: Steps before the first.
    """
    told, samples, clock = [], start * batch, 1_790_000_000.0
    for step in range(start + 1, start + num + 1):
        draw = random.Random(seed * 1_000_003 + step)
        size = change[1] if change and step >= change[0] else batch
        samples += size
        lengths = sorted((draw.randint(20, 400) for _ in range(size)), reverse=True)
        micros = []
        while lengths:
            rows = min(len(lengths), max(1, 2048 // lengths[0]))
            micros.append([rows, rows * lengths[0], sum(lengths[:rows])])
            del lengths[:rows]
        useful, ran = sum(m[2] for m in micros), sum(m[1] for m in micros)
        parts = {
            "compute_seconds": ran / 4000,
            "prepare_seconds": 0.02 + (3.1 if step == 1 else 0),
            "data_seconds": 0.05,
            "optimizer_seconds": 0.06,
            "recovery_seconds": 0.9 if step == 7 else 0,
        }
        took = sum(parts.values()) + 0.04
        clock += took + (0.8 if step % 10 == 0 else 0.01)
        loss = 9 * math.exp(-step / 30) + 2.5 + draw.uniform(-0.1, 0.1)
        line = {
            "schema": 1, "step": step, "samples": samples, "time": clock,
            "loss": loss * (1 + nudge * 1.2 ** min(step, 60)), "weight": useful - size,
            "unit": "trained tokens", "effective_batch_size": size, "num_examples": size,
            "num_micros": len(micros), "padded_tokens": ran, "useful_tokens": useful,
            "micros": micros, "budget_tokens": 2048, "num_recoveries": int(step == 7),
            "seconds": took, **parts, "peak_bytes": 900_000_000 + 40_000_000 * min(step, 7),
            "total_bytes": 25 * 2**30, "cap_bytes": 2 * 2**30, "num_graphs": 0,
            "grad_norm": 2 / step**0.3 + draw.uniform(0, 0.2),
            "learning_rate": 1e-3 * min(1, step / 3), "epoch": samples / 6300,
            "noise": {
                "scale": 40.0 + 3 * step, "low": 20.0 + 2 * step,
                "high": None if step < 4 else 90.0 + 5 * step,
                "gradient_squared": 0.1, "variance": 4.0, "num_steps": step,
            },
        }  # fmt: skip
        if step % 10 == 0:
            line["eval_loss"] = loss + 0.1
        if step == 7:
            line["events"] = [
                "out of memory at 5 examples of size 2,000: the step ran again from its beginning "
                "in micro-batches of up to 1,024 tokens; the gradient is the same"
            ]
        told.append(line)
    return told


def about(num=25, *, batch=32, **changes):
    """Return what run.json says of such a run."""
    return {
        "schema": 1, "command": "gradaccum train --learning_rate 1e-3 --output_dir runs/a",
        "began": 1_789_999_990.0, "ended": 1_790_000_400.0, "status": "finished", "resumed": [],
        "versions": {"gradaccum": "0.1.0", "torch": "2.13.0", "trl": "1.16.0", "python": "3.11.7"},
        "device": "x86_64 CPU, 2 threads", "world": 1,
        "model": {"name": "embedded", "class": "LlamaForCausalLM", "num_parameters": 8_000_000,
                  "num_trained": 8_000_000, "dtype": "float32"},
        "data": {"name": "embedded", "num_examples": 6300, "mean_tokens": 227.0,
                 "longest_tokens": 1024},
        "effective_batch_size": batch, "schedule": None, "num_steps": num, "seed": 42,
        "settings": {"learning_rate": 1e-3, "optim": "adamw_torch_fused", "warmup_steps": 3},
        "budget": {"tokens": 2048, "examples": None, "is_stated": False,
                   "why": "about 7 micro-batches of up to 2,048 tokens (measured in 5.1 s)"},
        "memory": {"cap_bytes": 2 * 2**30, "predicted_bytes": 1_150_000_000},
        "proof": {"relative_error": 1.4e-07, "floor": 2e-07, "num_examples": 32, "num_micros": 7},
        "noise": {"scale": 115.0, "low": 70.0, "high": 215.0, "num_steps": num,
                  "advice": "The effective batch of 32 is below the noise scale: a larger one "
                            "would take fewer steps for about the same number of samples."},
    } | changes  # fmt: skip


def write(folder, told=None, asked=None, *, tail=""):
    """Write the files of a run and return its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    told = lines() if told is None else told
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in told)
    (folder / "metrics.jsonl").write_text(text + tail)
    if asked is not None:
        (folder / "run.json").write_text(json.dumps(asked))
    return folder
