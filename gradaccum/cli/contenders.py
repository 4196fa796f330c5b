"""The contenders of `gradaccum bench`: their names, and the process that runs one of them.

    python -m gradaccum.cli.contenders "stock 2x16" [flags of train]

It speaks through a `Stage`, and ends when its parent hangs up.
"""

import contextlib
import itertools
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from gradaccum.bench import Stage
from gradaccum.cli import reference, train
from gradaccum.cli.arguments import Arguments, parse
from gradaccum.cli.reference import Sequence
from gradaccum.cli.summary import say
from gradaccum.errors import BadInput, GradaccumError
from gradaccum.integrations.accumulation import Examples

OURS, LOOP, STOCK = "ours", "loop", "stock"
MODIFIERS = ("group_by_length", "batch_rebalance", "packing", "padding_free")


@dataclass(frozen=True, slots=True)
class Spec:
    """Say what a contender is: ours, a plain loop or TRL's trainer, these with rows x steps."""

    kind: str
    rows: int = 0
    steps: int = 0
    modifier: str = ""

    @property
    def name(self) -> str:
        shape = f"{self.rows}x{self.steps}" if self.rows else ""
        return " ".join(part for part in (self.kind, shape, self.modifier) if part)


def read(text: str, shape: tuple[int, int] = (1, 1)) -> Spec:
    """Return what a name means.

    Args:
        shape: Rows and steps of "stock" without them.

    Raises:
        BadInput: There is no such contender.

    Example:
        >>> read("stock 4x8 packing")
        Spec(kind='stock', rows=4, steps=8, modifier='packing')
    """
    kind, *rest = text.split() or [""]
    if kind in (OURS, LOOP) and not rest:
        return Spec(kind)
    if kind not in (LOOP, STOCK):
        _refuse(text)
    if rest and (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", rest[0])):
        shape, rest = (int(found[1]), int(found[2])), rest[1:]
    if len(rest) > 1 or (rest and (kind == LOOP or rest[0] not in MODIFIERS)):
        _refuse(text)
    return Spec(kind, *shape, *rest)


def _refuse(text: str) -> NoReturn:
    raise BadInput(
        f"there is no contender {text!r}",
        hint="ours, loop, stock, or as stock 2x16: rows x accumulation steps; after stock one of "
        + ", ".join(MODIFIERS),
    )


def defaults(arguments: Arguments) -> tuple[int, int]:
    """Return rows and steps of the stock trainer of these flags."""
    size, training, given = arguments.effective_batch_size, arguments.training, arguments.given
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    says_rows = "per_device_train_batch_size" in given
    says_steps = "gradient_accumulation_steps" in given
    if rows * steps == size and (says_rows or says_steps or "effective_batch_size" not in given):
        return rows, steps
    if says_rows and size % rows == 0:
        return rows, size // rows
    return (2, size // 2) if size % 2 == 0 else (1, size)


def main(words: list[str]) -> int:
    """Run one contender until its parent hangs up."""
    stage = Stage()  # first: whatever is printed from now on goes to stderr
    train._quiet()
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            spec, arguments = read(words[0]), parse(words[1:])
            assert arguments is not None, "the parent has parsed them before"
            _run(spec, arguments, stage, Path(folder))
    except GradaccumError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, BadInput) else 1
    return 0


def _run(spec: Spec, arguments: Arguments, stage: Stage, folder: Path) -> None:
    trainer = _built(spec, arguments, folder)
    watch = Watch(trainer, stage)
    set_seed(arguments.training.seed)  # building drew more numbers for one than for another
    stage.wait(trainer.args.device, {"gradient error": watch.error})
    if spec.kind == LOOP:
        _loop(trainer, watch, spec.rows or 1)
    else:
        watch.follow()
        trainer.train()


def _built(spec: Spec, arguments: Arguments, folder: Path) -> Any:
    """Build the trainer of the flags, attached for ours, and to draw examples for the loop."""
    training = arguments.training
    training.output_dir = str(folder)
    training.save_strategy, training.eval_strategy = SaveStrategy.NO, "no"
    training.report_to, training.push_to_hub, training.load_best_model_at_end = [], False, False
    set_seed(training.seed)  # adapters begin with random weights
    if spec.kind != STOCK:
        return train._trainer(arguments, folder)
    training.per_device_train_batch_size = spec.rows
    training.gradient_accumulation_steps = spec.steps
    if spec.modifier == "packing":
        training.packing = True
    elif spec.modifier not in ("", "padding_free"):
        training.train_sampling_strategy = spec.modifier
    trainer = train._sft(arguments, folder)
    return _padding_free(trainer, training) if spec.modifier == "padding_free" else trainer


def _padding_free(trainer: Any, training: Any) -> SFTTrainer:
    """Build it anew on its own data: TRL cuts at --max_length only where it also pads."""
    training.padding_free, training.max_length = True, None
    made = SFTTrainer(
        model=trainer.model,
        args=training,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    for callback in made.callback_handler.callbacks[:]:
        if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):
            made.remove_callback(callback)
    return made


class Watch(TrainerCallback):
    """See what goes into each step, and keep the first one with its gradient."""

    def __init__(self, trainer: Any, stage: Stage) -> None:
        self.trainer, self.stage = trainer, stage
        self._delivered: list[Any] = []
        self._padded = 0
        self._gradient: Tensor | None = None
        self._first: list[Sequence] = []
        self._why_not = reference.why_not(trainer)
        self._start = None if self._why_not else reference.pristine(trainer.model)
        trainer.model.get_input_embeddings().register_forward_pre_hook(self._count)
        self.is_on = False

    def _count(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        # Not where an attached trainer measures its loss: that is no training.
        if self.is_on or self.trainer.is_in_train:
            self._padded += inputs[0].shape[:2].numel()

    def deliver(self, inputs: Any) -> None:
        """Note what a step is to be taken on; it is looked at when the time has been taken."""
        self._delivered.append(list(inputs.examples) if isinstance(inputs, Examples) else inputs)

    def follow(self) -> None:
        """Watch the steps of the trainer."""
        trainer = self.trainer
        take, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        @wraps(take)
        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            self.deliver(inputs if isinstance(inputs, Examples) else dict(inputs))
            return take(model, inputs, *args, **kwargs)

        @wraps(clip)
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            self.keep_gradient()
            return clip(*args, **kwargs)

        trainer.training_step, trainer.accelerator.clip_grad_norm_ = training_step, clip_grad_norm_
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.keep_gradient()  # where nothing is clipped

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.done()

    def keep_gradient(self) -> None:
        """Keep the gradient of the first step."""
        if self._gradient is None and self._start is not None:
            self._gradient = reference.kept_gradient(self.trainer.model)

    def done(self) -> None:
        """End a step."""
        self.stage.stop()
        rows = [row for inputs in self._delivered for row in self._sequences(inputs)]
        self._first = self._first or rows
        padded, self._padded = self._padded, 0
        self._delivered.clear()
        self.stage.done(
            trained=sum(row.trained for row in rows),
            useful=sum(len(row.ids) for row in rows),
            padded=padded,
        )

    def _sequences(self, inputs: Any) -> Iterator[Sequence]:
        collate = self.trainer.data_collator
        for batch in [collate([e]) for e in inputs] if isinstance(inputs, list) else [inputs]:
            yield from reference.sequences(batch)

    def error(self, folder: str) -> dict[str, Any]:
        """Return the relative error of the first gradient, or why there is none."""
        trainer, start = self.trainer, self._start
        kinds = {p.dtype for p in trainer.model.parameters()}
        is_exact = kinds == {torch.float32} and trainer.accelerator.mixed_precision == "no"
        told = {"error": None, "why_not": self._why_not, "is_float32": is_exact}
        if start is None or self._gradient is None:
            return told
        work = sum(p.numel() for p in start.parameters()) * sum(len(r.ids) for r in self._first)
        if work > reference.MOST_WORK:
            return told | {"why_not": "a step in float64 would take too long"}
        self._start = None  # the reference changes it
        found = reference.error(self._gradient, start, self._first, Path(folder))
        return told | {"error": found}


def _loop(trainer: Any, watch: Watch, rows: int) -> None:
    """Train with the stock model and its stock loss, so many rows at a time."""
    args, model = trainer.args, trainer.model
    if trainer.accelerator.mixed_precision == "fp16":
        raise BadInput("the loop does not scale its loss as fp16 needs", hint="--bf16 true")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    model.train()
    watch.is_on = True
    optimizer = trainer.optimizer
    scheduler = trainer.create_scheduler(args.max_steps, optimizer)
    for examples in _batches(trainer):
        watch.deliver(examples)
        given = examples.examples
        parts = [given[i : i + rows] for i in range(0, len(given), rows)]
        batches = [trainer.data_collator(part) for part in parts]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        for batch in batches:
            inputs = trainer._prepare_inputs(batch)
            with trainer.accelerator.autocast():
                loss = model(**inputs, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
        watch.keep_gradient()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        watch.done()


def _batches(trainer: Any) -> Iterator[Examples]:
    """Yield the examples of one step after the other, as the attached trainer draws them."""
    loader = trainer.get_train_dataloader()
    for epoch in itertools.count():
        with contextlib.suppress(AttributeError):  # not all loaders have one
            loader.set_epoch(epoch)
        yield from loader


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
