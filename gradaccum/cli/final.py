"""The model at the end of a run: in the output directory whole, or known not to be."""

import shutil
from pathlib import Path
from typing import Any

from gradaccum.integrations.saving import ASIDE, STATE, flush
from gradaccum.integrations.swap import replaced

LAST = "training_args.bin"  # of the files of a model: it is there when all others are
CARD = "README.md"  # which peft adds to


def is_written(output: Path, checkpoint: Path) -> bool:
    """Tell whether the model was written after this checkpoint, the last of the run."""
    last = output / LAST
    return last.is_file() and last.stat().st_mtime_ns >= (checkpoint / STATE).stat().st_mtime_ns


def write(trainer: Any, output: Path) -> None:
    """Write the model aside and give its files their names, LAST after all others."""
    aside = output / ASIDE / "final"
    if trainer.args.should_save:
        aside.mkdir(parents=True, exist_ok=True)
        if (output / CARD).is_file():
            shutil.copy(output / CARD, aside)
    trainer.save_model(str(aside), _internal_call=True)  # internal: nothing is pushed yet
    if trainer.args.should_save:
        files = [path for path in aside.rglob("*") if path.is_file() and path != aside / LAST]
        for path in (*files, aside / LAST):
            flush(path)
        (output / LAST).unlink(missing_ok=True)
        for path in files:
            final = output / path.relative_to(aside)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)
        flush(output)
        (aside / LAST).replace(output / LAST)
        shutil.rmtree(aside.parent)
    if trainer.args.push_to_hub:
        with replaced(trainer, "save_model", lambda *_, **__: None):  # it just was
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
