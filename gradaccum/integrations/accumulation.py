"""What an attached trainer carries: how a step is cut, its examples, the last step."""

import contextlib
import dataclasses
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from gradaccum.batch import Collate, Listed
from gradaccum.causal import causal_lm
from gradaccum.device import Lap, is_out_of_memory, stopwatch
from gradaccum.engine import Accumulator, Window
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.integrations.positions import is_scheduled, place, sampler_of
from gradaccum.integrations.saving import changes, settings_of
from gradaccum.measured import Measured, restored
from gradaccum.memory.auto import Found
from gradaccum.objective import length
from gradaccum.optimizers import materialize
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.schedule import BatchSchedule
from gradaccum.split import split
from gradaccum.types import Budget, Step
from gradaccum.watch import Watch

# A CPU runs micro-batches of 512 tokens as fast as larger ones (docs/log.md), so more rows at once
# would only pad and take memory. An accelerator has no such small knee.
CPU_TOKENS = 512
LESS_STATE = (
    "an optimizer with a smaller state (optim='adamw_8bit', 'paged_adamw_8bit', 'adafactor'), or "
    "fewer trained parameters (LoRA)"
)


class Cut:
    """Say how large a micro-batch may be, to the trainer and to the loader's workers.

    Args:
        budget: Fixed budget; None: follow `rows` until one is set.
        rows: Rows that fit into memory at once, by the trainer's own arguments.
        on_cpu: Whether the trainer runs on the CPU.
    """

    def __init__(self, budget: Budget | None, rows: int, on_cpu: bool) -> None:
        self.rows = rows
        self._on_cpu = on_cpu
        # Workers are there before a budget is found, and read it here; 0 is no bound.
        self._bounds = torch.zeros(2, dtype=torch.long).share_memory_()
        self._shared = torch.full((), -1, dtype=torch.long).share_memory_()
        self.set(budget)

    @property
    def budget(self) -> Budget | None:
        """Return the budget that is set."""
        return Budget(*self.bounds) if self.bounds is not None else None

    @property
    def bounds(self) -> list[int | None] | None:
        """Return its tokens and examples, as checkpoints keep them."""
        bounds = [bound or None for bound in self._bounds.tolist()]
        return bounds if any(bounds) else None

    @property
    def shared(self) -> int | None:
        """Return how many common tokens run once, as `split` takes it; None: padded."""
        shared = int(self._shared)
        return shared if shared >= 0 else None

    @shared.setter
    def shared(self, shared: int | None) -> None:
        self._shared.fill_(-1 if shared is None else shared)

    def set(self, budget: Budget | None) -> None:
        """Set the budget of the batches that follow."""
        bounds = (budget.tokens, budget.examples) if budget is not None else (None, None)
        self._bounds.copy_(torch.tensor([bound or 0 for bound in bounds]))

    def budget_for(self, examples: Sequence[Any]) -> Budget:
        """Return the budget; before one is set, what `rows` of the longest example take.

        That is the most that a stock micro-batch of `rows` would take with this batch. Where an
        example holds more than tokens (pixels, sound), it is also at most `rows` examples. On the
        CPU it is at most 512 tokens.
        """
        budget = self.budget
        if budget is not None or not examples:
            return budget or Budget(examples=self.rows)
        tokens = self.rows * max(map(length, examples))
        is_text = all(map(_is_text, examples))
        return Budget(
            tokens=min(tokens, CPU_TOKENS) if self._on_cpu else tokens,
            examples=None if is_text else self.rows,
        )


def _is_text(example: Any) -> bool:
    """Tell whether all that an example holds is numbers, text and flat lists of numbers."""
    return isinstance(example, Mapping) and all(map(_is_flat, example.values()))


def _is_flat(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return not value or isinstance(value[0], (int, float, str, dict))
    is_array = hasattr(value, "ndim")
    return value.ndim < 2 if is_array else isinstance(value, (int, float, str, type(None)))


def lengths_of(data: Any) -> list[int]:
    """Return the tokens of every row of a list or tokenized data set, as its column tells.

    Nothing of other data sets, whose rows it would take to read.
    """
    if isinstance(data, list):
        return list(map(length, data))
    if not isinstance(data, Dataset) or "input_ids" not in data.column_names:
        return []
    column: Any = data.with_format("arrow")[:]["input_ids"]
    return [n for chunk in column.chunks for n in chunk.value_lengths().to_pylist()]


class Examples:
    """Carry the examples of an effective batch through the loader, on the host as they are.

    accelerate moves lists, dicts and tensors to the device as soon as they leave the loader. It
    passes this by, so that device memory does not grow with the effective batch.

    Args:
        examples: As the data set yields them.
        ready: Micro-batches that a worker of the loader has collated.
    """

    def __init__(
        self, examples: list[Any], ready: Mapping[tuple[int, ...], Any] | None = None
    ) -> None:
        self.examples = examples
        self.ready = ready

    # From worker to trainer by value: torch would send each tensor as a file of its own, and those
    # of a large effective batch are more than a process may open.
    def __getstate__(self) -> bytes:
        return pickle.dumps((self.examples, self.ready))

    def __setstate__(self, state: bytes) -> None:
        self.examples, self.ready = pickle.loads(state)


def carry(examples: list[Any], *, collate: Collate, cut: Cut) -> Examples:
    """Collate for the loader: cut and collate in its workers, else only carry.

    In the main process collators have to wait until a resumed run has restored the random state.
    """
    if get_worker_info() is None:
        return Examples(examples)
    batch = Listed(examples, collate)
    # By length, as the trainer does.
    micros = split(batch, causal_lm(), cut.budget_for(examples), shared=cut.shared)
    return Examples(examples, {micro.examples: batch.take(micro.examples) for micro in micros})


class Accumulation:
    """Hold what an attached trainer accumulates with: `trainer.accumulation`.

    Args:
        schedule: Examples in one step; `effective_batch_size` is that of the current one.
        cut: How large a micro-batch may be.
        memory: What there is for micro-batches, if how large they are is to be found.
        is_stated: Whether the effective batch size was; else a sampler of the user's decides.
    """

    def __init__(
        self,
        schedule: BatchSchedule,
        cut: Cut,
        memory: str | float | None = None,
        *,
        is_stated: bool = True,
    ) -> None:
        self.schedule = schedule
        self.is_stated = is_stated
        self.cut = cut
        self.memory = memory
        self.found: Found | None = None
        self.may_checkpoint = False  # whether gradient checkpointing is to be chosen as well
        self.watch: Watch | None = None  # of a run, if somebody watches it
        self.metrics_every: int | None = None  # steps, for what takes another pass; None: as logged
        self.sampler: EffectiveBatchSampler | None = None  # if the loader of a run has one
        self.begin()

    def begin(self) -> None:
        """Forget the run before: another one may bring another model or another loss."""
        if self.sampler is not None:
            self.sampler.load_state_dict(self._began)  # as the trainer counts its steps anew
        self.effective_batch_size = self.schedule.first
        self.made: EffectiveBatchSampler | None = None  # for a schedule, where the user has none
        self.ends: list[int] = []  # by a schedule: samples of the run after so many steps
        self.scaled = contextlib.ExitStack()  # learning rate and beta2, while the optimizer steps
        self.last: Step | None = None
        self.window: Window | None = None
        self.measured: Measured | None = None
        self.evaluating: Measured | None = None  # where nothing has been trained yet
        self.accumulator: Accumulator | None = None
        self.optimizer: Any = None
        self.is_stepping = False  # the optimizer, just now
        self.optimizer_lap: Lap | None = None  # of its last step
        self.spent: dict[str, float] = {}  # seconds of the step that runs
        self.is_laid_out = False  # whether it is known if micro-batches run packed

    def read(self, sampler: EffectiveBatchSampler) -> None:
        """Begin a run that reads this sampler; another run with it will begin at the same place.

        Raises:
            BadInput: It is inside of an epoch, or its epochs differ in length: a trainer counts
                whole ones of one length.
        """
        if sampler is self.sampler:
            return
        if not sampler.has_equal_epochs and not is_scheduled(sampler):
            raise BadInput(
                "the sampler's weights are no whole numbers, so that its epochs differ in length, "
                "and a trainer takes as many batches of each as the first has",
                hint="weights of 0, 1, 2, ...; or a plain loop",
            )
        began = sampler.state_dict()
        if began["consumed"] != began["epoch_begin"]:
            raise BadInput(
                f"the sampler has consumed {began['consumed'] - began['epoch_begin']:,} examples "
                f"of epoch {began['epoch']}, and a trainer counts whole epochs",
                hint="train(resume_from_checkpoint=...) goes on inside of one",
            )
        self.sampler, self._began = sampler, began
        self.first_epoch: int = began["epoch"]


class OptimizerStep(TrainerCallback):
    """Make the optimizer's state before the first step; note when a step runs, and what it used.

    A step that runs out of memory cannot be run again, so that it should not be the first that
    asks for its state.

    Args:
        accumulation: Of the attached trainer.
    """

    def __init__(self, accumulation: Accumulation) -> None:
        self._accumulation = accumulation

    def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        inner, said = getattr(optimizer, "optimizer", optimizer), None  # inside of accelerate's
        self._accumulation.optimizer = inner
        try:
            materialize(inner)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()[0]
        if said is not None:
            raise DoesNotFit(
                f"the state of {type(inner).__name__} does not fit into memory: {said}",
                hint=LESS_STATE,
            )
        schedule = self._accumulation.schedule
        with schedule.scaled(inner, schedule.first):
            pass  # an optimizer that has no beta2 is told of before the first step

    def on_pre_optimizer_step(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        accumulation = self._accumulation
        scaled = accumulation.schedule.scaled(
            accumulation.optimizer, accumulation.effective_batch_size
        )
        accumulation.scaled.enter_context(scaled)
        accumulation.is_stepping = True
        self._stop = stopwatch(args.device)

    def on_optimizer_step(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        self._accumulation.optimizer_lap = self._stop()
        self._accumulation.is_stepping = False
        self._accumulation.scaled.close()
        sampler = sampler_of(train_dataloader)
        if sampler is not None:
            sampler.commit()


KEPT = (
    "effective_batch_size", "schedule", "contract", "budget", "checkpointing", "packed", "settings",
    "position", "noise",
)  # fmt: skip


class SameBatch(TrainerCallback, ExportableState):
    """Keep effective batch size, contract and budget in checkpoints; refuse to resume another size.

    A resumed trainer skips as many batches as it has made steps, so batches of another size would
    skip examples or repeat them. Other settings that alter what a run learns are named if they
    have changed. The position of an `EffectiveBatchSampler` is kept and restored.
    """

    def __init__(self) -> None:
        self.effective_batch_size: int | None = None  # not known before a run begins
        self.schedule: str | None = None  # if it is not one size
        self.contract: dict[str, Any] | None = None
        self.budget: list[int | None] | None = None  # that was found: a resumed run cuts alike
        self.checkpointing: bool | None = None  # that was chosen with it
        self.packed: bool | None = None  # whether micro-batches run without padding, if it is known
        self.settings: dict[str, Any] = {}
        self.position: dict[str, Any] | None = None  # of an EffectiveBatchSampler
        self.noise: dict[str, Any] | None = None  # of a NoiseScale

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {name: getattr(self, name) for name in KEPT}}

    def keep(self, measured: Measured) -> None:
        """Take the contract, so that a resumed run does not depend on its first batch for it."""
        if measured.contract is not None:
            self.contract = {"name": measured.name} | dataclasses.asdict(measured.contract)

    def restore(self, measured: Measured) -> None:
        """Give the contract back, if it is of the same loss."""
        if self.contract is not None and self.contract["name"] == measured.name:
            kept = {key: value for key, value in self.contract.items() if key != "name"}
            measured.contract = restored(kept)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        own = args.per_device_train_batch_size
        kept = cast(dict[str, Any], state.stateful_callbacks)
        entry = kept.get(type(self).__name__, self.state())
        saved = entry["attributes"]["effective_batch_size"]
        self.contract = entry["attributes"].get("contract") if state.global_step else None
        self.budget = entry["attributes"].get("budget") if state.global_step else None
        self.checkpointing = entry["attributes"].get("checkpointing")
        self.packed = entry["attributes"].get("packed") if state.global_step else None
        self.position = entry["attributes"].get("position") if state.global_step else None
        self.noise = entry["attributes"].get("noise") if state.global_step else None
        loader = given.get("train_dataloader")
        data, sampler = getattr(loader, "dataset", None), sampler_of(loader)
        before, self.settings = entry["attributes"].get("settings"), settings_of(args, data)
        own_order = f"EffectiveBatchSampler(seed={sampler.seed})" if sampler is not None else None
        self.settings["sampler"] = own_order
        self.effective_batch_size = own
        self.schedule = None
        if sampler is not None and is_scheduled(sampler):
            self.schedule = str(sampler.schedule)
            self.settings["lr_rule"] = sampler.schedule.lr
            self.settings["beta2_rule"] = sampler.schedule.beta2
        if state.global_step:
            self._require_schedule(entry["attributes"].get("schedule"), args)
            for change in changes(before or {}, self.settings):
                warnings.warn(f"not as in the checkpoint: {change}", stacklevel=2)
        kept[type(self).__name__] = self.state()
        is_skipping = bool(state.global_step) and not args.ignore_data_skip
        if is_skipping and saved is None and not _may_be(own, state, args, loader):
            saved = "another number of"
        if is_skipping and saved not in (None, own):
            raise BadInput(
                f"the checkpoint was made with an effective batch of {saved} examples, and this "
                f"run has {own}: it would skip examples or repeat them",
                hint="resume with the same number, or set ignore_data_skip to begin the data anew",
            )
        place(loader, self.position, state.global_step, anew=args.ignore_data_skip)

    def _require_schedule(self, saved: str | None, args: TrainingArguments) -> None:
        """Refuse another schedule: how many steps a run has would no longer be known."""
        if saved != self.schedule:
            raise BadInput(
                f"the checkpoint was made with {saved or 'one size'} as effective batch size, and "
                f"this run has {self.schedule or 'one size'}",
                hint="resume with the same schedule",
            )
        if self.schedule is not None and args.ignore_data_skip:
            raise BadInput(
                "ignore_data_skip begins the data anew, and the effective batch size follows what "
                "was read of them",
                hint="leave it out",
            )


def _may_be(own: int, state: TrainerState, args: TrainingArguments, loader: Any) -> bool:
    """Tell whether a checkpoint of a trainer that was not attached may have had batches of `own`.

    It tells the size of its micro-batches and its epoch, which counts them; the last step of an
    epoch may have had fewer. Of a stream nothing can be told.
    """
    if not has_length(getattr(loader, "dataset", None)) or own % (state.train_batch_size or 1):
        return False
    steps = (state.epoch or 0) * len(loader)
    return args.dataloader_drop_last or -1e-6 < steps - state.global_step < 1 - 1e-6
