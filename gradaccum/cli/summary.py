"""What `gradaccum train` tells: before the run on stderr what and why, after it the result."""

import contextlib
import json
import math
import platform
import statistics
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from gradaccum.causal import causal_lm
from gradaccum.cli.arguments import Arguments
from gradaccum.cli.ranks import IS_FIRST
from gradaccum.device import suppressing_out_of_memory
from gradaccum.live import padding, trained
from gradaccum.metrics import Line, finite
from gradaccum.noise import Advice, advise
from gradaccum.objective import length
from gradaccum.split import split
from gradaccum.types import Proof, counted

# Above this size the reference of the proof, one pass over the batch, takes its shortest examples.
PROOF_TOKENS = 32_768


def say(text: str) -> None:
    """Print a line for a person: on stderr, since stdout is for the result; the first rank does."""
    if IS_FIRST:
        print(text, file=sys.stderr, flush=True)


def describe(trainer: Any, arguments: Arguments, output: Path, resume: str | None) -> None:
    """Say what will run and why, before it does."""
    model, accumulation = trainer.model, trainer.accumulation
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    dtype = str(next(p for p in model.parameters() if p.requires_grad).dtype)[len("torch.") :]
    device = trainer.args.device
    say(
        f"model     {arguments.model.model_name_or_path}: {type(model).__name__}, {trained:,} of "
        f"{total:,} parameters trained, {dtype}, on {device}"
    )
    rows = list(islice(iter(trainer.train_dataset), 20 * accumulation.effective_batch_size))
    lengths = [length(row) for row in rows]
    count = (
        len(trainer.train_dataset) if isinstance(trainer.train_dataset, datasets.Dataset) else None
    )
    source = (
        f"Python {platform.python_version()}" if arguments.script.dataset_name == "embedded" else ""
    )
    say(
        f"data      {arguments.script.dataset_name}{f' ({source})' if source else ''}: "
        f"{counted(count, 'example') if count is not None else 'a stream'}, "
        f"mean {statistics.fmean(lengths):,.0f} and longest {max(lengths):,} tokens "
        f"in the first {len(lengths):,}"
    )
    say(f"batch     {_batch_line(trainer, rows, resume)}")
    if resume is not None:
        say(f"resume    {resume}")
    say(f"output    {output}")


def _batch_line(trainer: Any, rows: list[Any], resume: str | None) -> str:
    """Say how an effective batch is cut, from the first batches of the data."""
    accumulation = trainer.accumulation
    size, budget = accumulation.effective_batch_size, accumulation.cut.budget
    schedule = accumulation.schedule
    text = f"effective batch {size:,}"
    if not schedule.is_constant:
        lr = "" if schedule.lr == "none" else f", learning rate {schedule.lr}"
        beta2 = ", beta2 too" if schedule.beta2 else ""
        text = f"effective batch {schedule}{lr}{beta2}; at first {size:,}"
    if trainer.args.world_size > 1:
        text += f" on {trainer.args.world_size} ranks"
    if budget is None:
        known = "as in the checkpoint" if resume else "measured at the first step"
        text += f"; how large micro-batches are is {known}"
    else:
        windows = [rows[i : i + size] for i in range(0, len(rows), size)]
        windows = [window for window in windows if len(window) == size] or windows
        mean = statistics.fmean(len(split(window, causal_lm(), budget)) for window in windows)
        text += f" = about {counted(round(mean), 'micro-batch')} of up to {budget} (--budget)"
    if len(rows) < size:
        text += f"; each step takes the {counted(len(rows), 'example')} that there are"
    return text


def advice(trainer: Any) -> Advice | None:
    """Return what the noise scale says about the effective batch; None where it is not known."""
    noise = trainer.accumulation.watch.noise
    found = noise.estimate if noise is not None else None
    if found is None:
        return None
    optimizer = trainer.accumulation.optimizer
    betas = optimizer.param_groups[0].get("betas") if optimizer is not None else None
    return advise(
        found,
        trainer.accumulation.effective_batch_size,
        learning_rate=trainer.args.learning_rate,
        beta2=betas[1] if betas else None,
    )


def totals(path: Path, first_step: int) -> dict[str, Any]:
    """Return sums over the lines of a metrics file after a step, and the losses at its ends."""
    lines: list[Line] = []
    with contextlib.suppress(FileNotFoundError):  # there was no step
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["step"] > first_step]
    losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]
    edge = max(1, min(5, len(losses) // 2))
    return {
        "steps": len(lines),
        "samples": sum(line["num_examples"] for line in lines),
        "trained_tokens": round(sum(trained(line) for line in lines)),
        "tokens": sum(line["useful_tokens"] for line in lines),
        "padded": sum(line["padded_tokens"] for line in lines),
        "seconds": sum(line["seconds"] for line in lines),
        "loss_before": statistics.fmean(losses[:edge]) if losses else None,
        "loss_after": statistics.fmean(losses[-edge:]) if losses else None,
        "is_finite": all(map(math.isfinite, losses)),
    }


def summarise(
    trainer: Any, arguments: Arguments, output: Path, found: dict[str, Any], proof: Proof | None
) -> None:
    """Print the result on stdout."""
    found, is_finite = dict(found), found["is_finite"]
    measured = trainer.accumulation.watch.noise
    noise = measured.estimate if measured is not None else None
    del found["is_finite"]
    edge = max(1, min(5, found["steps"] // 2))
    adapter = (output / "adapter_config.json").is_file()
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    package = "peft" if adapter else "transformers"
    summary = {
        "step": trainer.state.global_step,
        "effective_batch_size": trainer.accumulation.effective_batch_size,
        **found,
        "tokens_per_second": found["tokens"] / max(found["seconds"], 1e-9),
        "padding": 1 - found["tokens"] / max(1, found["padded"]),
        "noise": None if noise is None else finite(asdict(noise)),
        "proof": None if proof is None else asdict(proof),
        "output_dir": str(output),
    }
    if arguments.json:
        print(json.dumps(summary))
        return
    print(
        f"trained   {counted(found['steps'], 'step')}, {counted(found['samples'], 'sample')}, "
        f"{found['trained_tokens']:,} trained of {found['tokens']:,} tokens "
        f"in {found['seconds']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s), "
        f"{padding({'useful_tokens': found['tokens'], 'padded_tokens': found['padded']})}"
    )
    if found["steps"]:
        print(
            f"loss      {summary['loss_before']:.4f} -> {summary['loss_after']:.4f} "
            f"({'' if edge == 1 else 'means of '}the first and the last "
            f"{'step' if edge == 1 else counted(edge, 'step')})"
        )
    if not is_finite:
        print("          the loss is not finite: what was saved is of no use; metrics.jsonl tells")
        print("          since when (lower --learning_rate, or resume from before)")
    said = advice(trainer)
    if said is not None:
        print(f"noise     {said.summary}")
    print(f"proof     {proof or 'skipped: the full batch does not fit into memory at once'}")
    print(f"saved     {output}, metrics in {output / 'metrics.jsonl'}")
    print(f"load it   from {package} import {loader}")
    print(f'          model = {loader}.from_pretrained("{output}")')
    print("          from transformers import AutoTokenizer")
    print(f'          tokenizer = AutoTokenizer.from_pretrained("{output}")')


def prove(trainer: Any) -> Proof | None:
    """Prove the gradient on the first batch; on its shortest examples if all is much at once.

    On several ranks all have to call it, and the first proves that of its share.
    """
    batch = next(iter(trainer.get_train_dataloader())).examples
    if not IS_FIRST:
        return None
    batch = sorted(batch, key=length)
    while len(batch) > 1 and len(batch) * length(batch[-1]) > PROOF_TOKENS:
        batch.pop()
    with suppressing_out_of_memory():
        return trainer.proof(batch)
    return None
