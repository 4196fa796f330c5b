"""The metrics file: one JSON object a line, one line a step. What it holds is in `docs/metrics.md`.

It is the single source of what is shown while a run goes on and of what is reported after it.
"""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from gradaccum.noise import Noise
from gradaccum.types import Step

SCHEMA = 1  # a reader refuses a newer one; fields may be added without another number
MOST_MICROS = 512  # of which each is written down

Line = dict[str, Any]


def line(step: Step, noise: Noise | None = None) -> Line:
    """Return what a step tells by itself, under the names of the metrics file.

    It waits for the device if that has not finished the step.
    """
    found: Line = {
        "schema": SCHEMA,
        "time": round(time.time(), 3),
        "loss": step.loss,
        "weight": step.weight,
        "unit": step.unit,
        "num_examples": step.num_examples,
        "num_micros": step.num_micros,
        "num_recoveries": len(step.recoveries),
        "padded_tokens": step.padded,
        "useful_tokens": step.useful,
        "compute_seconds": round(step.seconds, 4),
        "recovery_seconds": round(sum(recovery.seconds for recovery in step.recoveries), 4),
        "peak_bytes": step.peak_bytes,
        "total_bytes": step.total_bytes,
        "num_graphs": step.num_graphs,
        "events": events(step),
    }
    if len(step.names) > 1:
        found["terms"] = step.terms
    if len(step.micros) <= MOST_MICROS:
        found["micros"] = [(len(m.examples), m.size, m.useful) for m in step.micros]
    if len(step.shares) > 1:
        found["ranks"] = step.shares
    if noise is not None:
        found["noise"] = dataclasses.asdict(noise)
    return found


def events(step: Step) -> list[str]:
    """Say in plain words what was out of the ordinary."""
    weight = step.weight
    found = [str(recovery) for recovery in step.recoveries]
    for micro in step.nonfinite:
        found.append(f"the loss was not finite: examples {list(micro.examples)} of the batch")
    if not (sum(weight.values()) if isinstance(weight, dict) else weight):
        found.append(f"no {step.unit} in this step: the gradients are zero")
    return found


class MetricsFile:
    """Append lines to a file; on resume drop those of steps after the checkpoint.

    Args:
        path: Is made when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def resume(self, num_steps: int) -> Line:
        """Keep the lines of the first steps, and return the last of them, empty without any."""
        if not self.path.exists():
            return {}
        kept: list[str] = []
        last: Line = {}
        for text in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # cut off by a kill
                found = json.loads(text)
                if found["step"] <= num_steps:
                    kept.append(text)
                    last = found
        rewrite(self.path, "".join(f"{text}\n" for text in kept))
        return last

    def write(self, found: Line) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(found), allow_nan=False) + "\n")


def rewrite(path: Path, text: str) -> None:
    """Write a file as a whole: a kill leaves what was there before."""
    aside = path.with_suffix(".writing")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def finite(value: Any) -> Any:
    """Return the same with null for numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value
