"""What a run says while it runs, what it writes down, and how it stops when it is told to."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from gradaccum.cli.ranks import IS_FIRST
from gradaccum.integrations.accumulation import Accumulation
from gradaccum.types import GIB, Step, counted


class Samples:
    """Tell how many samples a number of steps takes; the last of an epoch may take fewer.

    Args:
        trainer: Attached, with its data set.
    """

    def __init__(self, trainer: Any) -> None:
        self._accumulation = trainer.accumulation
        self._size = trainer.accumulation.effective_batch_size
        is_sized = has_length(trainer.train_dataset)
        self._epoch = len(trainer.train_dataset) if is_sized else None
        if self._epoch is not None and trainer.args.dataloader_drop_last:
            self._epoch -= self._epoch % self._size

    def after(self, steps: int) -> int:
        """Return the samples of the first `steps` steps."""
        if self._accumulation.ends:  # by a schedule
            return self._accumulation.ends[steps]
        if not self._epoch:
            return steps * self._size
        epochs, rest = divmod(steps, -(-self._epoch // self._size))
        return epochs * self._epoch + rest * self._size


def padding_or_shared(useful: int, run: int) -> str:
    """Say how many of the tokens that ran were padding, or how many did not have to run.

    Example:
        >>> padding_or_shared(90, 100), padding_or_shared(100, 60)
        ('padding 10%', '40% of the tokens shared')
    """
    if run < useful:
        return f"{1 - run / useful:.0%} of the tokens shared"
    return f"padding {1 - useful / max(1, run):.0%}"


class Progress(TrainerCallback):
    """Show samples, tokens per second, loss, time left and peak memory on stderr.

    A bar where there is a terminal, else one line a step.
    """

    def __init__(self, accumulation: Accumulation, samples: Samples) -> None:
        self._accumulation = accumulation
        self._samples = samples
        self._bar: Any = None
        self._begin = self._step_begin = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._begin = time.perf_counter()
        self._first_step = state.global_step
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._samples.after(state.max_steps),
                initial=self._samples.after(state.global_step),
                unit=" samples",
                dynamic_ncols=True,
            )

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step_begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step, found = self._accumulation.last, self._accumulation.found
        assert step is not None, "a step has just run"
        planning = 0.0
        if found is not None and state.global_step == self._first_step + 1:
            tqdm.write(f"budget    {found}", file=sys.stderr)  # above the bar, where there is one
            planning = found.seconds
            self._begin += planning
        rate = step.useful / (time.perf_counter() - self._step_begin - planning)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"step {state.global_step}/{state.max_steps}, loss {step.loss:.4f}, "
                f"{rate:,.0f} tokens/s, peak {step.peak_bytes / GIB:.1f} GiB",
                refresh=False,
            )
            self._bar.update(step.num_examples)
            return
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._begin) / done * (state.max_steps - state.global_step)
        print(
            f"step {state.global_step}/{state.max_steps} | "
            f"{counted(self._samples.after(state.global_step), 'sample')} | {step} | "
            f"{padding_or_shared(step.useful, step.padded)} | {rate:,.0f} tokens/s | "
            f"{_clock(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class Metrics(TrainerCallback):
    """Write one JSON line a step, with what the trainer logged at that step.

    A line is written when the next step begins, so that the trainer's own figures (grad_norm,
    learning_rate, eval_loss) are in it. On resume, steps after the checkpoint are dropped.
    """

    def __init__(self, accumulation: Accumulation, samples: Samples, path: Path) -> None:
        self._accumulation = accumulation
        self._samples = samples
        self._path = path
        self._line: dict[str, Any] | None = None
        self.losses: list[float] = []
        self.totals = {
            "steps": 0, "samples": 0, "trained_tokens": 0, "tokens": 0, "padded": 0, "seconds": 0.0
        }  # fmt: skip
        self._step_begin = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off when the run was killed
                if json.loads(line)["step"] <= state.global_step:
                    kept.append(line)
        self._path.write_text("".join(line + "\n" for line in kept))

    @property
    def is_finite(self) -> bool:
        """Tell whether the loss of every step was a finite number."""
        return all(map(math.isfinite, self.losses))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._flush()
        self._step_begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step = self._accumulation.last
        assert step is not None, "a step has just run"
        seconds = time.perf_counter() - self._step_begin
        done = {"step": state.global_step, "samples": self._samples.after(state.global_step)}
        self._line = done | _figures(step, seconds)
        self.losses.append(step.loss)
        for name, value in (
            ("steps", 1),
            ("samples", step.num_examples),
            ("trained_tokens", round(sum((step.weights or {}).values()))),
            ("tokens", step.useful),
            ("padded", step.padded),
            ("seconds", seconds),
        ):
            self.totals[name] += value

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self._line is not None and logs is not None and "train_runtime" not in logs:
            self._line = {**logs, **self._line}

    def on_save(self, *_: Any, **__: Any) -> None:
        self._flush()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._line is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(self._line) + "\n")
        self._line = None


class Finished(Exception):
    """Say that a checkpoint has all steps already; transformers would take one more."""


class StopOnSignal(TrainerCallback):
    """Finish the step, save a checkpoint and stop at the first SIGINT or SIGTERM.

    A second signal, of either kind, interrupts at once. A signal to one rank stops all of them.

    Args:
        accumulation: Of the attached trainer.
    """

    def __init__(self, accumulation: Accumulation) -> None:
        self._accumulation = accumulation
        self.received: int | None = None  # by any rank, as all know at the end of a step
        self._received: int | None = None  # by this one
        self.stopped = False  # a signal after the last step stops nothing
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise Finished(f"{state.global_step} of {state.max_steps} steps")
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        accumulator = self._accumulation.accumulator
        assert accumulator is not None, "a step has just run"
        heard = accumulator.ranks.exchange({"signal": self._received})
        self.received = next((s["signal"] for s in heard if s["signal"] is not None), None)
        if self.received is not None and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is not None:
            raise KeyboardInterrupt(number)
        self._received = number
        if not IS_FIRST:
            return
        # Not print: the signal may come inside of one, and sys.stderr refuses a second.
        os.write(
            2,
            b"\nstopping after this step, to save a checkpoint "
            b"(once more: at once, without saving) ...\n",
        )


def _figures(step: Step, seconds: float) -> dict[str, Any]:
    return {
        "loss": step.loss,
        "weight": step.weight,
        "num_examples": step.num_examples,
        "num_micros": step.num_micros,
        "num_recoveries": len(step.recoveries),
        "padded_tokens": step.padded,
        "useful_tokens": step.useful,
        "seconds": round(seconds, 4),
        "peak_bytes": step.peak_bytes,
    }


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
