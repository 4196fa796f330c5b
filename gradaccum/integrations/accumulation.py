"""What an attached trainer carries: examples through the loader, budget, batch size, last step."""

from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from gradaccum.batch import HostBatch
from gradaccum.contract import Counter
from gradaccum.engine import Accumulator, Window
from gradaccum.errors import BadInput
from gradaccum.objective import length
from gradaccum.types import Budget, Step

# A CPU runs micro-batches of 512 tokens as fast as larger ones (benchmarks/results/attach.json),
# so more rows at once would only pad and take memory. An accelerator has no such small knee.
CPU_TOKENS = 512


class Examples:
    """Carry the examples of an effective batch through the loader, on the host as they are.

    accelerate moves lists, dicts and tensors to the device as soon as they leave the loader. It
    passes this by, so that device memory does not grow with the effective batch.
    """

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples


class Accumulation:
    """Hold what an attached trainer accumulates with: `trainer.accumulation`.

    Args:
        effective_batch_size: Examples in one step.
        budget: Fixed budget; None: follow `rows`, see `budget_for`.
        rows: Rows that fit into memory at once, by the trainer's own arguments.
        device: Where the trainer runs.
    """

    def __init__(
        self, effective_batch_size: int, budget: Budget | None, rows: int, device: torch.device
    ) -> None:
        self.effective_batch_size = effective_batch_size
        self.budget = budget
        self.rows = rows
        self.device = device
        self.last: Step | None = None
        self.window: Window | None = None
        self.counters: tuple[Counter, ...] | None = None
        self.accumulator: Accumulator | None = None

    def budget_for(self, batch: HostBatch) -> Budget:
        """Return the budget; by default what `rows` of the longest example take with padding.

        That is the most that a stock micro-batch of `rows` would take with this batch, so nothing
        needs more memory than the trainer's own arguments already ask for. On the CPU it is at
        most 512 tokens, since more at once is not faster there.
        """
        if self.budget is not None:
            return self.budget
        tokens = self.rows * max(1, *map(length, batch))
        return Budget(tokens=min(tokens, CPU_TOKENS) if self.device.type == "cpu" else tokens)


class SameBatch(TrainerCallback, ExportableState):
    """Keep the effective batch size in checkpoints, and refuse to resume with another one.

    A resumed trainer skips as many batches as it has made steps, so batches of another size would
    skip examples or repeat them.
    """

    def __init__(self) -> None:
        self.effective_batch_size: int | None = None  # not known before a run begins

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"effective_batch_size": self.effective_batch_size}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        size, kept = (
            args.per_device_train_batch_size,
            cast(dict[str, Any], state.stateful_callbacks),
        )
        entry = kept.get(type(self).__name__, self.state())
        saved = entry["attributes"]["effective_batch_size"]
        self.effective_batch_size = size
        kept[type(self).__name__] = self.state()
        if args.ignore_data_skip or not state.global_step:
            return
        if saved is None:  # a checkpoint of a trainer that was not attached tells its epoch
            loader = given.get("train_dataloader")
            is_sized = (
                has_length(getattr(loader, "dataset", None)) and not args.dataloader_drop_last
            )
            steps = (state.epoch or 0) * len(loader) if loader is not None and is_sized else 0
            # Its epoch counts micro-batches, of which the last step may have fewer.
            is_same = not steps or -1e-6 < steps - state.global_step < 1 - 1e-6
            saved = "another number of"
        else:
            is_same = saved == size
        if not is_same:
            raise BadInput(
                f"the checkpoint was made with an effective batch of {saved} examples, and this "
                f"run has {size}: it would skip examples or repeat them",
                hint="resume with the same number, or set ignore_data_skip to begin the data anew",
            )
