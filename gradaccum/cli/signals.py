"""How a run stops when it is told to."""

import os
import signal
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradaccum.cli.ranks import IS_FIRST
from gradaccum.integrations.accumulation import Accumulation


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
