"""The record of a run, `run.json`: what was asked, what was run, and what came of it."""

import dataclasses
import json
import platform
import shlex
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

import gradaccum
from gradaccum.cli.arguments import Arguments
from gradaccum.metrics import SCHEMA, finite, rewrite
from gradaccum.noise import Advice, Noise
from gradaccum.types import Proof

NAME = "run.json"
# Settings that decide what is learnt, told even where they are the default.
TOLD = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1",
    "adam_beta2", "max_grad_norm", "max_length", "packing", "gradient_checkpointing", "bf16",
)  # fmt: skip

Record = dict[str, Any]


def begin(trainer: Any, arguments: Arguments, words: list[str], resume: str | None) -> Record:
    """Return what is known before the first step; on resume that of the run's beginning stays.

    Args:
        words: The command line.
        resume: The checkpoint from which it goes on.
    """
    args, accumulation = trainer.args, trainer.accumulation
    before = {} if resume is None else read(Path(args.output_dir))
    names = dict.fromkeys((*TOLD, *sorted(arguments.given)))
    settings = {name: _plain(getattr(args, name)) for name in names if hasattr(args, name)}
    budget = accumulation.cut.budget
    record: Record = {
        "schema": SCHEMA,
        "command": f"gradaccum train {shlex.join(words)}".strip(),
        "began": time.time(),
        "ended": None,
        "status": "running",
        "resumed": [],
        "versions": {
            "gradaccum": gradaccum.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "python": platform.python_version(),
        },
        "device": _device(args.device),
        "world": args.world_size,
        "model": _model(trainer.model, str(arguments.model.model_name_or_path)),
        "data": {"name": arguments.script.dataset_name, "num_examples": _num(trainer)},
        "effective_batch_size": accumulation.effective_batch_size,
        "schedule": None if accumulation.schedule.is_constant else str(accumulation.schedule),
        "num_steps": args.max_steps if args.max_steps > 0 else None,
        "seed": args.seed,
        "settings": settings,
        "budget": None if budget is None else _bounds(budget) | {"is_stated": True, "why": ""},
        "memory": {"cap_bytes": None, "predicted_bytes": None},
        "proof": None,
        "noise": None,
    }
    if before:
        for name in ("command", "began"):
            record[name] = before.get(name, record[name])
        step = Path(str(resume)).name.partition("-")[2]
        again = {"step": int(step or 0), "time": time.time(), "checkpoint": resume}
        record["resumed"] = [*before.get("resumed", []), again]
    return record


def end(
    record: Record, trainer: Any, status: str, proof: Proof | None, advice: Advice | None
) -> Record:
    """Return the record with what the run has found."""
    found, watch = trainer.accumulation.found, trainer.accumulation.watch
    record = record | {
        "ended": time.time(),
        "status": status,
        "num_steps": trainer.state.max_steps,
        "proof": None if proof is None else dataclasses.asdict(proof),
    }
    if found is not None:
        record["budget"] = _bounds(found.budget) | {"is_stated": False, "why": str(found)}
        predicted = found.choice.peak_bytes if found.choice is not None else None
        record["memory"] = {"cap_bytes": found.cap.stated_bytes, "predicted_bytes": predicted}
    noise = watch.noise.estimate if watch is not None and watch.noise is not None else None
    if isinstance(noise, Noise):
        record["noise"] = dataclasses.asdict(noise) | {"advice": str(advice)}
    return record


def read(output: Path) -> Record:
    """Return what a run has recorded so far; nothing where that is damaged."""
    try:
        found = json.loads((output / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(value: Any, path: Path) -> None:
    """Write JSON to a file."""
    rewrite(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def _bounds(budget: Any) -> Record:
    return {"tokens": budget.tokens, "examples": budget.examples}


def _model(model: Any, name: str) -> Record:
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "name": name,
        "class": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained": sum(p.numel() for p in trained),
        "dtype": str(trained[0].dtype)[len("torch.") :],
    }


def _num(trainer: Any) -> int | None:
    return len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"


def _plain(value: Any) -> Any:
    """Return what JSON can hold."""
    value = getattr(value, "value", value)  # of an enum
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
