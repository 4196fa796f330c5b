"""A trainer whose effective batch size follows a schedule: its sampler, steps, epochs and rules.

Tested with transformers 5.17 and 5.23. The trainer takes it that every epoch has as many batches.
By a schedule they differ, so that here the number of steps is counted batch by batch, what is left
of an epoch is asked of the sampler, and epochs end where the sampler's do.
"""

from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gradaccum.errors import BadInput
from gradaccum.integrations.accumulation import Accumulation, SameBatch, lengths_of
from gradaccum.integrations.positions import is_scheduled, sampler_of
from gradaccum.sampler import EffectiveBatchSampler


class Scheduled(Trainer):
    """Follow the schedule of the effective batch size; a part of `hf.Attached`."""

    accumulation: Accumulation

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        accumulation, args = self.accumulation, self.args
        if accumulation.schedule.is_constant or not accumulation.is_stated:
            return super()._get_train_sampler(train_dataset)
        name = f"{type(self).__name__}._get_train_sampler"
        if not super()._get_train_sampler.__module__.startswith(("transformers.", "trl.")):
            own = super()._get_train_sampler(train_dataset)
            if isinstance(own, EffectiveBatchSampler):
                return own
            raise BadInput(
                f"{name} returns {type(own).__name__}, whose order a schedule does not follow",
                hint="an EffectiveBatchSampler with this schedule, or no sampler of your own",
            )
        if args.train_sampling_strategy not in ("random", "sequential"):
            raise BadInput(
                f"train_sampling_strategy={args.train_sampling_strategy!r} makes batches of one "
                "size, and there is a schedule",
                hint="leave it out: shares and micro-batches are balanced anyway",
            )
        if accumulation.made is None:
            data: Any = self.train_dataset if train_dataset is None else train_dataset
            accumulation.made = EffectiveBatchSampler(
                data,
                accumulation.schedule,
                costs=lengths_of(data) or None,
                shuffle=args.train_sampling_strategy == "random",
                seed=args.seed if args.data_seed is None else args.data_seed,
                drop_last=args.dataloader_drop_last,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
            )
        return accumulation.made

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int | None, int]:
        found = super().set_initial_training_values(args, dataloader)
        sampler, accumulation = sampler_of(dataloader), self.accumulation
        if sampler is None or not is_scheduled(sampler):
            return found
        num_steps = args.max_steps if args.max_steps > 0 else 0
        num_steps = num_steps or max(1, sampler.num_batches(args.num_train_epochs))
        accumulation.ends = [0]
        epoch = sampler.epoch
        for place in islice(sampler.places(), num_steps):
            accumulation.ends.append(accumulation.ends[-1] + place.over - place.at)
            epoch = place.epoch
        # No epoch has more batches than the run has steps: it ends where its loader does.
        num_epochs, size = epoch + 1 - sampler.epoch, sampler.effective_batch_size
        ends = accumulation.ends[-1]
        return num_epochs, num_steps, found[2], ends, size, num_steps, num_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        kept: Any = self.state.stateful_callbacks
        accumulation, entry = self.accumulation, kept.get(SameBatch.__name__, {})
        position = entry.get("attributes", {}).get("position")
        if not accumulation.ends or not self.state.global_step or not position:
            return found
        # One batch is skipped, an empty one, where a run goes on inside of an epoch.
        is_inside = position["consumed"] > position["epoch_begin"]
        return position["epoch"] - accumulation.first_epoch, int(is_inside)

    def _get_learning_rate(self) -> float:
        accumulation = self.accumulation
        factor = accumulation.schedule.lr_factor(accumulation.effective_batch_size)
        return super()._get_learning_rate() * factor


class Epochs(TrainerCallback):
    """Have the trainer's state tell the epoch by examples, where epochs differ in batches.

    Args:
        accumulation: Of the attached trainer.
    """

    def __init__(self, accumulation: Accumulation) -> None:
        self._accumulation = accumulation

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        sampler = self._accumulation.sampler
        if sampler is None or not is_scheduled(sampler):
            return
        place = next(sampler.places())
        part = (place.at - place.begin) / (place.end - place.begin)
        state.epoch = place.epoch - self._accumulation.first_epoch + part
