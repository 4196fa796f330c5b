"""Interrupt a run whose effective batch grows, and see whether it ends in the same bits.

python benchmarks/schedule.py --out benchmarks/results/schedule.json

`gradaccum train` on the embedded default, with a step of 16 examples that becomes one of 64, and
both rules: the square root for the learning rate, beta2 by its half-life in examples. The run saves
each step. From some of these checkpoints it goes on in another process, in a folder of its own.
What is compared: weights, the optimizer's state, and the loss of each step.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import publish
from safetensors.torch import load_file

STEPS, CHANGE = 12, 6
FLAGS = [
    "--effective_batch_schedule", f"16:0,64:{CHANGE}", "--lr_rule", "sqrt", "--beta2_rule", "True",
    "--max_steps", str(STEPS), "--max_length", "256", "--save_strategy", "steps", "--save_steps",
    "1",
]  # fmt: skip


def train(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "gradaccum", "train", *words], check=True)


def end(folder: Path) -> dict[str, Any]:
    """Return what a run has come to."""
    last = folder / f"checkpoint-{STEPS}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True)["state"],
        "loss": {line["step"]: torch.tensor(line["loss"]) for line in lines if "step" in line},
        "sizes": [line["num_examples"] for line in lines if "step" in line],
    }


def difference(one: Any, other: Any) -> float:
    """Return the largest difference of two trees of tensors, over the keys of the second."""
    if isinstance(other, dict):
        assert other and other.keys() <= one.keys()
        return max(difference(one[key], value) for key, value in other.items())
    return float((one.double() - other.double()).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", type=int, nargs="+", default=[3, CHANGE, 9], help="steps")
    parser.add_argument("--out")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as work:
        whole = Path(work) / "whole"
        train(*FLAGS, "--output_dir", str(whole))
        expected = end(whole)
        for step in args.at:
            folder = Path(work) / f"from-{step}"
            shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
            train(*FLAGS, "--output_dir", str(folder), "--resume_from_checkpoint", "last")
            ended = end(folder)
            assert ended.pop("sizes") == expected["sizes"][step:]
            apart = {f"largest_difference_of_{k}": difference(expected[k], ended[k]) for k in ended}
            found.append({"interrupted_after": step, **apart})
    publish({"sizes": expected["sizes"], "resumed": found}, args.out, transformers)


if __name__ == "__main__":
    main()
