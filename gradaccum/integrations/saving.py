"""Checkpoints of a trainer that are there whole or not at all.

Tested with transformers 5.17 and 5.23. The trainer writes one file after the other into
`checkpoint-N`; a run that is killed meanwhile leaves a directory that it then resumes from. Here
they are written aside, flushed to the disk and renamed once all ranks are done.
"""

import os
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints

from gradaccum.integrations.swap import replaced

ASIDE = ".writing"  # in the output directory: what is being written, and what it will replace
STATE = "trainer_state.json"
# Arguments that alter what a run learns; how often it logs, saves or evaluates does not.
ALTERING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "seed", "data_seed", "label_smoothing_factor",
    "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last", "bf16", "fp16",
    "max_length", "packing", "completion_only_loss", "assistant_only_loss", "loss_type", "beta",
)  # fmt: skip


class Saved(Trainer):
    """Write checkpoints aside and rename them; a part of `hf.Attached`."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        aside, name = run / ASIDE, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        pushed: list[str] = []
        with (
            replaced(self, "_get_output_dir", lambda *_, **__: str(aside)),
            replaced(self, "_push_from_checkpoint", pushed.append),
        ):
            super()._save_checkpoint(model, trial)
        if self.state.best_global_step is not None:
            kept = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            is_there = kept.name == name or kept.is_dir()
            self.state.best_model_checkpoint = str(kept) if is_there else best
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / STATE))
        wait_for_all()
        if self.args.should_save:
            publish(aside / name, run / name)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        wait_for_all()
        if pushed:  # only now, since it goes on in the background
            self._push_from_checkpoint(str(run / name))


def publish(written: Path, final: Path) -> None:
    """Give a directory that is complete its final name, on the disk as well.

    One that has that name already is complete too, and stays until this is.
    """
    for path in (*written.rglob("*"), written):
        flush(path)
    before = written.with_name(f"{final.name}-before")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.rename(before)
    written.rename(final)
    flush(final.parent)
    shutil.rmtree(written.parent)


def sweep(run: Path) -> None:
    """Remove what a run left half-written when it was killed; put back what it had not replaced."""
    aside = run / ASIDE
    for before in aside.glob("*-before"):
        final = run / before.name.removesuffix("-before")
        if not final.exists():
            before.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the file system write a file or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wait_for_all() -> None:
    """Wait until all ranks are here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def settings_of(args: TrainingArguments, data: Any) -> dict[str, Any]:
    """Return what alters the trajectory of a run, as JSON holds it."""
    found = {name: getattr(args, name) for name in ALTERING if hasattr(args, name)}
    found["number of examples"] = len(data) if has_length(data) else None
    plain = (int, float, str, bool, type(None))
    return {
        name: x if isinstance(x, plain) and not isinstance(x, Enum) else str(x)
        for name, x in found.items()
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return "learning_rate was 0.1, is 0.2" for each setting that differs."""
    both = [name for name in before if name in now and before[name] != now[name]]
    return [f"{name} was {before[name]}, is {now[name]}" for name in both]
