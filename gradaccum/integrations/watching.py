"""Watch an attached trainer: metrics in a file, a live view, the noise scale, and all of it logged.

    trainer = gradaccum.attach(SFTTrainer(...))
    trainer.add_callback(Watching(trainer))

The trainer's own reporting (TensorBoard, Weights & Biases, MLflow, ...) gets the figures as well,
under `gradaccum/...`, whenever it logs a loss.
"""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from gradaccum.errors import BadInput
from gradaccum.noise.scale import EVERY
from gradaccum.watch import Watch

SPENT = ("data", "prepare", "measuring")  # seconds that the trainer notes for each step


class Watching(TrainerCallback):
    """Write down and show each step of an attached trainer; on resume the file goes on as well.

    Args:
        trainer: Attached.
        folder: Where `metrics.jsonl` goes; by default the trainer's output directory.
        live: Whether to show anything.
        noise_every: Measure one step in so many for the gradient noise scale; None: leave it out.

    Raises:
        BadInput: The trainer is not attached.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        folder: str | Path | None = None,
        live: bool = True,
        noise_every: int | None = EVERY,
    ) -> None:
        if not hasattr(trainer, "accumulation"):
            raise BadInput("this trainer is not attached", hint="gradaccum.attach(trainer) first")
        self._accumulation: Any = trainer.accumulation
        self._trainer = trainer
        self._folder = Path(folder if folder is not None else trainer.args.output_dir)
        self._live, self._noise_every = live, noise_every
        self._step_begin = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watch = self._accumulation.watch = Watch(
            folder=self._folder,
            num_steps=state.max_steps,
            first_step=state.global_step,
            live=self._live,
            noise_every=self._noise_every,
            rank=args.process_index,
        )
        watch.samples = watch.samples or samples_after(self._trainer, state.global_step)
        self._size = self._accumulation.effective_batch_size

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._accumulation.watch.flush(waits=False)
        self._step_begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        accumulation, watch = self._accumulation, self._accumulation.watch
        step, spent = accumulation.last, accumulation.spent
        assert step is not None, "a step has just run"
        size, found, events = accumulation.effective_batch_size, accumulation.found, []
        if found is not None and state.global_step == watch.first_step + 1:
            events.append(f"budget found: {found}")
        if size != self._size:
            events.append(f"the effective batch is {size:,} examples from here on")
        self._size = size
        if self._trainer.accelerator.optimizer_step_was_skipped:
            events.append("the optimizer skipped this step: a gradient was not finite")
        watch.note(
            step,
            seconds=round(time.perf_counter() - self._step_begin + spent.get("data", 0.0), 4),
            optimizer_seconds=accumulation.optimizer_lap,
            effective_batch_size=size,
            cap_bytes=None if found is None else found.cap.stated_bytes,
            events=events,
            **{f"{name}_seconds": round(spent[name], 4) for name in SPENT if name in spent},
        )
        spent.clear()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and "train_runtime" not in logs:
            own = {k: v for k, v in logs.items() if k != "loss" and not k.startswith("gradaccum/")}
            self._accumulation.watch.add(**own)

    def on_save(self, *_: Any, **__: Any) -> None:
        self._accumulation.watch.flush()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._accumulation.watch.close()


def samples_after(trainer: Any, num_steps: int) -> int:
    """Return the samples of a trainer's first steps; the last of an epoch may take fewer."""
    accumulation = trainer.accumulation
    size = accumulation.effective_batch_size
    if accumulation.ends:  # by a schedule
        return accumulation.ends[num_steps]
    if not has_length(trainer.train_dataset):
        return num_steps * size
    epoch = len(trainer.train_dataset)
    if trainer.args.dataloader_drop_last:
        epoch -= epoch % size
    epochs, rest = divmod(num_steps, max(1, -(-epoch // size)))
    return epochs * epoch + rest * size
