"""Attach exact accumulation to a transformers Trainer, whatever its class.

Tested with transformers 5.17 and 5.23. One batch of the trainer's loader becomes one step: the
loader hands over the examples of the whole effective batch, `gradient_accumulation_steps` is 1,
and `training_step` cuts them and runs the trainer's own `compute_loss` on each micro-batch. So the
schedule, resume, the last partial batch and logging are right because there is nothing to repair.

On several ranks each reads its share (`shares.py`) and every gradient is the sum over all: the
wrapper of accelerate, DistributedDataParallel, is unwrapped and reduces nothing. Inside of a window
the trainer's own collectives (gathered metrics) are local, since ranks run different numbers of
micro-batches.

Not here: FSDP and DeepSpeed, and several devices in one process, which are refused. What TRL needs
besides is in `trl.py`.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, has_length

from gradaccum import measures
from gradaccum.batch import Listed
from gradaccum.device import is_out_of_memory
from gradaccum.engine import Accumulator, Window
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.integrations.accumulation import (
    LESS_STATE,
    Accumulation,
    Cut,
    Examples,
    OptimizerStep,
    SameBatch,
    carry,
    lengths_of,
)
from gradaccum.integrations.evaluation import Evaluated
from gradaccum.integrations.positions import sampler_of, take
from gradaccum.integrations.refusals import refuse
from gradaccum.integrations.saving import Saved, sweep, wait_for_all
from gradaccum.integrations.schedules import Epochs, Scheduled
from gradaccum.integrations.shares import Shares, preparing
from gradaccum.integrations.swap import replaced
from gradaccum.measured import Measured
from gradaccum.memory.auto import AUTO, check, find
from gradaccum.memory.layout import find_layout, packed_of
from gradaccum.memory.predict import switch
from gradaccum.objective import length
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.schedule import BatchSchedule
from gradaccum.state import undisturbed, without_dropout
from gradaccum.types import Budget, Micro, Proof

T = TypeVar("T", bound=Trainer)
COMPUTED = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the name of the mixed precision


class Attached(Scheduled, Evaluated, Saved):
    """Override the documented hooks of Trainer; mixed in before the trainer's own class."""

    # A loss may ask for it before the trainer has taken a step.
    current_gradient_accumulation_steps = 1

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.accumulation.begin()
        folder = str(self.args.output_dir)
        if self.args.should_save:
            sweep(Path(folder))
        wait_for_all()
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            if not (self.accumulation.is_stepping and is_out_of_memory(error)):
                raise
            said = str(error).splitlines()[0]
        finally:
            self.accumulation.window = None
            self.accumulation.scaled.close()
            if self.accumulation.watch is not None:
                self.accumulation.watch.close()
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        raise DoesNotFit(
            f"memory ran out in the optimizer's step {self.state.global_step + 1}, which is not "
            f"run again, since it may have updated some parameters: {said}",
            hint=f"{LESS_STATE}; {f'resume from {last}' if last else 'there is no checkpoint yet'}",
        )

    def get_train_dataloader(self) -> DataLoader:
        own = (self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps)
        first = self.accumulation.schedule.first
        if own != (first, 1):
            raise BadInput(
                f"since attach the arguments were changed to {own[0]} x {own[1]}, and a step takes "
                f"{first} examples",
                hint="attach(trainer, effective_batch_size=...) on a new trainer",
            )
        config = self.accelerator.dataloader_config
        carrying = functools.partial(carry, collate=self.data_collator, cut=self.accumulation.cut)
        accelerator, prepare = self.accelerator, self.accelerator.prepare_data_loader
        if accelerator.num_processes > 1:
            prepare = preparing(accelerator, lengths_of)
        # One process reads for itself; accelerate's dispatcher would try to concatenate examples.
        with (
            replaced(self, "data_collator", carrying),
            replaced(config, "dispatch_batches", False),
            replaced(accelerator, "prepare_data_loader", prepare),
        ):
            loader = super().get_train_dataloader()
        sampler = sampler_of(loader)
        if sampler is not None:
            self._read(loader, sampler)
        elif not self.accumulation.schedule.is_constant:
            raise BadInput(
                f"the train loader of {type(self).__name__} has no sampler that the schedule "
                f"{self.accumulation.schedule} could be read with",
                hint="data with a length, and get_train_dataloader as it is; or a loader with an "
                "EffectiveBatchSampler",
            )
        size = getattr(loader, "total_batch_size", getattr(loader, "batch_size", None))
        if size is not None and size != self.accumulation.schedule.first:
            raise BadInput(
                f"{type(self).__name__}.get_train_dataloader makes batches of {size} where a step "
                f"takes {self.accumulation.schedule.first} examples",
                hint="let it use batch_size=self.args.train_batch_size",
            )
        is_sized = has_length(getattr(loader, "dataset", None))
        if self.args.dataloader_drop_last and is_sized and not len(loader):
            raise BadInput(
                "dataloader_drop_last drops all of the data, which has fewer examples than the "
                f"effective batch of {self.accumulation.schedule.first}",
                hint="leave out dataloader_drop_last: a smaller last batch is exact too",
            )
        return loader

    def _read(self, loader: DataLoader, sampler: EffectiveBatchSampler) -> None:
        """Let a loader's batches be those of its sampler, and their size that of a step."""
        accumulation, schedule = self.accumulation, sampler.schedule
        if schedule != accumulation.schedule and accumulation.is_stated:
            both = schedule, accumulation.schedule
            own, stated = (each.first if each.is_constant else each for each in both)
            raise BadInput(
                f"the train loader's EffectiveBatchSampler makes batches of {own} where attach "
                f"was given effective_batch_size={stated}",
                hint="the same of both, or attach(trainer) alone",
            )
        if sampler is not accumulation.sampler:
            accumulation.effective_batch_size = schedule.first
        accumulation.schedule = schedule
        self.args.per_device_train_batch_size = self._train_batch_size = schedule.first
        take(loader, sampler, self.accelerator)
        if self.is_in_train:
            accumulation.read(sampler)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        # Nothing is collated here, so that on resume collators draw after the random state is
        # restored; and there is nothing to count before it is.
        begin = time.perf_counter()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.accumulation.spent["data"] = time.perf_counter() - begin
        return batches, None

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if not isinstance(inputs, Examples):
            raise BadInput(
                f"the train dataloader of {type(self).__name__} yields {type(inputs).__name__}, "
                "already collated, where gradaccum has to cut the examples first",
                hint="let it use collate_fn=self.data_collator",
            )
        model.train()
        switch = getattr(self.optimizer, "train", None)  # of schedule-free optimizers
        if callable(switch):
            switch()
        accumulation = self.accumulation
        if accumulation.sampler is not None:
            accumulation.effective_batch_size = accumulation.sampler.effective_batch_size
        prepare = functools.partial(self._prepare, model, inputs)
        with self._collecting_alone():
            accumulation.last = step = self._accumulator(model).backward(prepare)
        num = sum(share.num_examples for share in step.shares)
        if num > accumulation.effective_batch_size:
            raise BadInput(
                f"ranks have read {num} examples for an effective batch of "
                f"{accumulation.effective_batch_size}: the train loader does not share them out",
                hint="return self.accelerator.prepare(loader) from get_train_dataloader",
            )
        shares = getattr(self.callback_handler.train_dataloader, "batch_sampler", None)
        if isinstance(shares, Shares) and not self.args.full_determinism:
            shares.follow(step.rates)
        if step.recoveries and accumulation.cut.budget is not None:
            accumulation.cut.set(accumulation.cut.budget.within(step.recoveries[-1].limit))
        self._kept().budget = accumulation.cut.bounds
        inputs.examples.clear()  # as Python lists they take several times the memory
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return accumulation.last.loss_tensor.to(self.args.device)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        sampler = sampler_of(self.callback_handler.train_dataloader)
        kept, watch = self._kept(), self.accumulation.watch
        kept.position = None if sampler is None else sampler.state_dict()
        noise = watch.noise if watch is not None else None
        kept.noise = noise.state_dict() if noise is not None else None
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        watch = self.accumulation.watch
        if watch is not None and "loss" in logs:
            logs |= {f"gradaccum/{name}": value for name, value in watch.figures().items()}
        super().log(logs, *args, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.accumulation.effective_batch_size

    def floating_point_ops(self, inputs: Any) -> int:
        parts = self._parts(inputs)
        return sum(super(Attached, self).floating_point_ops(part) for part in parts)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        with self._collecting_alone():  # ranks have different numbers of micro-batches
            for part in self._parts(inputs):
                super()._track_num_input_tokens(part)
        own = self.state.num_input_tokens_seen - before
        if self.accelerator.num_processes > 1 and self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen = before + sum(gather_object([own]))

    @contextmanager
    def _collecting_alone(self) -> Iterator[None]:
        """Let what the trainer gathers inside be this rank's, as on one process."""
        if self.accelerator.num_processes == 1:
            yield
            return
        with contextlib.ExitStack() as stack:
            for name in ("gather", "gather_for_metrics", "reduce"):
                stack.enter_context(replaced(self.accelerator, name, _own))
            yield

    def _parts(self, inputs: Any) -> tuple[Any, ...]:
        """Return what the trainer counts after a step: its micro-batches; or any other inputs."""
        window = self.accumulation.window
        return window.inputs if isinstance(inputs, Examples) and window is not None else (inputs,)

    def proof(self, examples: list[Any]) -> Proof:
        """Compare the accumulated gradient of these examples with that of one pass over them.

        Dropout is off; the model, the random state and the metrics are as before afterwards.
        """
        model = self.model_wrapped
        assert isinstance(model, nn.Module), "a trainer has a model"
        accumulator = self._accumulator(model)
        if not isinstance(examples, list) or not examples:
            raise BadInput(f"proof takes a list of examples, not {type(examples).__name__}")
        with self._aside(model):
            batch = Listed(examples, self.data_collator)
            self._prepare(model, Examples(examples))  # measures the loss if no step has
            settled = batch.settled(range(len(examples)))
            accumulated = accumulator.prepare(settled)
            if len(accumulated.micros) == 1 < len(examples):  # that would compare it with itself
                accumulator.budget = Budget(examples=-(-len(examples) // 2))
                accumulated = accumulator.prepare(settled)
            accumulator.budget = Budget(examples=len(examples))
            full = accumulator.prepare(settled)
            turned = settled.take(full.micros[0].examples[::-1])
            turned_full = dataclasses.replace(full, inputs=(turned,))
            with replaced(accumulator, "layout", None):  # one pass as everybody runs it: padded
                expected, reordered = (
                    measures.gradients(model, functools.partial(accumulator.attempt, window))
                    for window in (full, turned_full)
                )
            found = measures.gradients(model, functools.partial(accumulator.attempt, accumulated))
            error = measures.relative_error(found, expected)
            reordered = measures.relative_error(reordered, expected)
            computed = COMPUTED.get(self.accelerator.mixed_precision)
            floor = max(reordered, measures.rounding(model, expected, computed))
        return Proof(error, floor, len(examples), len(accumulated.micros))

    def _prepare(self, model: nn.Module, given: Examples) -> Window:
        """Cut and count a batch, once it is known what the loss divides by."""
        accumulation, accumulator = self.accumulation, self._accumulator(model)
        accumulation.window = None  # the last one's inputs go before these are collated
        begin = time.perf_counter()
        self._lay_out(accumulator, given)
        if accumulation.cut.budget is None and self.is_in_train and given.examples:
            self._find(accumulator, given)
        accumulation.spent["measuring"] = time.perf_counter() - begin
        accumulator.budget = accumulation.cut.budget_for(given.examples)
        batch = Listed(given.examples, self.data_collator, given.ready)
        assert accumulation.measured is not None, "made with the accumulator"
        window = accumulation.window = accumulator.prepare(batch)
        self._kept().keep(accumulation.measured)
        accumulation.spent["prepare"] = time.perf_counter() - begin
        return window

    def _lay_out(self, accumulator: Accumulator, given: Examples) -> None:
        """Find out once whether micro-batches run packed: as before an interruption, or measured.

        On several ranks each may do as it likes: the gradients are the same.
        """
        accumulation, kept = self.accumulation, self._kept()
        if accumulation.is_laid_out or not self.is_in_train or len(given.examples) < 2:
            return
        if kept.packed is None:
            accumulator.budget = accumulation.cut.budget_for(given.examples)
            batch = Listed(given.examples, self.data_collator)
            accumulator.layout = find_layout(accumulator, batch, self._aside)
        elif kept.packed:
            accumulator.layout = packed_of(accumulator.model)
        accumulation.is_laid_out = True
        kept.packed = accumulator.layout is not None
        accumulation.cut.shared = accumulator.layout.shared if accumulator.layout else None

    def _find(self, accumulator: Accumulator, given: Examples) -> None:
        """Find the budget: that of the run before it was interrupted, or by measuring."""
        accumulation, kept = self.accumulation, self._kept()
        if kept.budget is not None:
            accumulation.cut.set(Budget(*kept.budget))
            if accumulation.may_checkpoint:
                switch(accumulator.model, kept.checkpointing)
            return
        sizes = lengths_of(self.train_dataset) or list(map(length, given.examples))
        found = accumulation.found = find(
            accumulator,
            Listed(given.examples, self.data_collator),
            sizes,
            accumulation.schedule.largest,
            memory=accumulation.memory,
            optimizer=accumulation.optimizer,
            aside=self._aside,
            name=f"{type(self).__name__} {getattr(self.args, 'loss_type', '')} "
            f"{self.accelerator.mixed_precision}",
            may_checkpoint=accumulation.may_checkpoint,
        )
        accumulation.cut.set(found.budget)
        kept.checkpointing = found.checkpointing

    def _kept(self) -> SameBatch:
        """Return the callback that checkpoints know; a resumed run may have made a new one."""
        callbacks = self.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, SameBatch))

    def _accumulator(self, model: nn.Module) -> Accumulator:
        """Return the accumulator of this model; a second `train()` may bring another one."""
        accumulation = self.accumulation
        current = accumulation.accumulator
        if current is None or current.model is not model:
            measured = accumulation.measured = self._measured(model)
            self._kept().restore(measured)
            current = accumulation.accumulator = Accumulator(
                model,
                dataclasses.replace(measured.objective(), ready=self._ready),
                budget=Budget(examples=1),  # set anew for each batch
                backward=self.accelerator.backward,
                after_micro=self._after_micro,
            )
            if accumulation.watch is not None:
                accumulation.watch.follow(current, self._kept().noise)
        return current

    def _measured(self, model: nn.Module) -> Measured:
        return Measured(
            self._counted_loss,
            name=f"the loss of {type(self.accelerator.unwrap_model(model)).__name__}",
            own_count=self._own_count if self._is_own_loss() else None,
            aside=self._aside,
            is_low=torch.get_float32_matmul_precision() != "highest",
        )

    def _counted_loss(self, model: nn.Module, inputs: Any, count: float | None) -> Tensor:
        if count is None and self._is_own_loss():
            count = self._own_count(inputs)
        given = None
        if count is not None:  # whole, as training passes it, so that it is compiled once
            whole = int(count) if float(count).is_integer() else count
            given = torch.full((), whole, device=self.args.device)  # without waiting for it
        return self._loss(model, copy.copy(inputs), given)  # a copy: compute_loss pops from it

    def _ready(self, inputs: Any) -> Any:
        """Add to collated inputs, on the host, what `_loss` would have to wait for."""
        return inputs

    def _loss(self, model: nn.Module, inputs: Any, count: Tensor | None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        assert isinstance(loss, Tensor), "without return_outputs it is the loss alone"
        return loss

    def _after_micro(self, micro: Micro) -> None:
        window = self.accumulation.window
        if self.is_in_train and window is not None and micro is not window.micros[-1]:
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)

    def _is_own_loss(self) -> bool:
        """Tell whether the loss is the user's code, which divides by what the trainer counts."""
        module = getattr(self.compute_loss, "__module__", "")
        accepts = self.model_accepts_loss_kwargs  # else a trainer passes no count to compute_loss
        overridden = not module.startswith(("transformers.", "trl.")) and accepts
        return self.compute_loss_func is not None or overridden

    def _own_count(self, inputs: Any) -> float | None:
        """Count what the trainer has its loss divided by; None where it finds no labels."""
        count = super().get_batch_samples(iter([inputs]), 1, torch.device("cpu"))[1]
        return None if count is None else float(count)

    @contextmanager
    def _aside(self, model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
        """Run what does not belong to the training, leaving no trace; without dropout if not so."""
        modes = contextlib.nullcontext() if dropout else without_dropout(model)
        alone = self._collecting_alone()
        with replaced(self, "is_in_train", False), alone, modes, undisturbed(model):
            yield


def attach(
    trainer: T,
    *,
    effective_batch_size: int | str | BatchSchedule | None = None,
    budget: Budget | Literal["auto"] = "auto",
    memory: str | float | None = None,
) -> T:
    """Make a Trainer accumulate exactly; return the same object.

    Its class, callbacks, collator, logging, checkpoints and `compute_loss` stay. Its arguments are
    copied, and the copy says what now happens: `per_device_train_batch_size` is the effective
    batch, `gradient_accumulation_steps` is 1, and a loss that is not finite is logged as it is.

    Args:
        trainer: A `transformers.Trainer` or any subclass, TRL's `SFTTrainer` among them.
        effective_batch_size: Examples in one step; by default that of the train loader's
            `EffectiveBatchSampler`, or else what the arguments mean, `per_device_train_batch_size *
            gradient_accumulation_steps` times the number of ranks. Any number of at least 1, or a
            `BatchSchedule`, or its spelling: "32:0,64:10k". By a schedule the data come in the
            order of an `EffectiveBatchSampler(seed=data_seed or seed)`, and the number of steps is
            that of the batches in `num_train_epochs`.
        budget: How large a micro-batch may be. "auto": the smallest that is as fast as any that
            fits, measured by three short micro-batches at the first step and remembered on disk;
            a resumed run keeps it.
        memory: What there is for "auto": "20GiB", bytes, or a fraction of the device; by default
            what is available.

    Raises:
        BadInput: An argument is wrong, the trainer is attached already, or runs on several devices
            in one process or with FSDP or DeepSpeed.
        NotDecomposable: At the first step, when the loss turns out not to be a sum over its
            examples divided by `num_items_in_batch`; or at once, for what is known not to be.

    Example:
        >>> trainer = gradaccum.attach(SFTTrainer(model, args=SFTConfig(...)))  # doctest: +SKIP
    """
    if not isinstance(trainer, Trainer):
        raise BadInput(f"attach takes a transformers.Trainer, not {type(trainer).__name__}")
    if isinstance(trainer, Attached):
        raise BadInput("this trainer is attached already")
    args = trainer.args
    size = effective_batch_size
    if size is None:
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    schedule = BatchSchedule.of(size)
    if budget != AUTO and not isinstance(budget, Budget):
        raise BadInput(
            f"budget={budget!r} is neither a gradaccum.Budget nor 'auto'",
            hint="budget=gradaccum.Budget(tokens=8192)",
        )
    check(memory, budget == AUTO, args.device)
    refuse(trainer)
    given = budget if isinstance(budget, Budget) else None
    cut = Cut(given, args.train_batch_size, args.device.type == "cpu")
    is_stated = effective_batch_size is not None
    accumulation = Accumulation(schedule, cut, memory, is_stated=is_stated)
    trainer.accumulation = accumulation  # pyright: ignore[reportAttributeAccessIssue]
    trainer.callback_handler.callbacks.insert(0, Epochs(accumulation))  # others read what it says
    trainer.add_callback(SameBatch())
    trainer.add_callback(OptimizerStep(accumulation))
    if getattr(trainer, "_unsloth_settles_eager_fallbacks", False):
        unsloth = importlib.import_module("gradaccum.integrations.unsloth")
        trainer.add_callback(unsloth.SettleFallbacks())
    trainer.args = copy.copy(args)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = schedule.first
    trainer.args.gradient_accumulation_steps = 1
    trainer.args.average_tokens_across_devices = False  # it multiplies by the number of ranks
    trainer.args.logging_nan_inf_filter = False
    own = type(trainer)
    mixin = Attached
    if any(base.__module__.startswith("trl.") for base in own.__mro__):
        mixin = importlib.import_module("gradaccum.integrations.trl").mixin(trainer)
    trainer.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})
    return trainer


def _own(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value
