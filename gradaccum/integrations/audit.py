"""Run one step of a transformers Trainer for an audit, stopped before its optimizer steps.

Tested with transformers 5.23. The trainer's own `train()` runs on a shallow copy, with copies of
its arguments, metrics and accelerator, without its callbacks, and on the given examples in their
order. The copy stops where the gradients are complete, so nothing is stepped, logged or saved.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from gradaccum.audit import SUM_OF_MEANS, UNSEEN, Subject, chunks
from gradaccum.batch import Listed
from gradaccum.contract import Contract
from gradaccum.device import suppressing_out_of_memory
from gradaccum.errors import BadInput, GradaccumError
from gradaccum.integrations import accumulation
from gradaccum.integrations.accumulation import SameBatch
from gradaccum.integrations.hf import Attached, attach
from gradaccum.measured import Measured
from gradaccum.restore import gradients_aside
from gradaccum.schedule import BatchSchedule
from gradaccum.state import undisturbed
from gradaccum.trees import widened
from gradaccum.types import Budget
from gradaccum.weights import Cut

NUM_EXAMPLES = 8
EVAL_SIZES = (1, 3)  # rows a batch; 8 examples leave a short last one
OWN, MODELS = "its own full batch", "the model's own loss of the full batch"
Step = Callable[..., Any]  # (trainer, model, inputs, count) -> loss


class _Complete(Exception):
    """Stop `train()` where the gradients of its first step are complete."""


class _Stop(TrainerCallback):
    """Stop before the optimizer steps, after what the trainer does to the gradients."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise _Complete


class _Contract(SameBatch):
    """Keep a contract over several runs: it is of one loss, and measuring it takes its time."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextmanager
def trainer_subject(trainer: Trainer, examples: Sequence[Any] | None) -> Iterator[Subject]:
    """Yield a trainer as something that can be audited; on leaving it is as it was.

    Args:
        trainer: Attached or not.
        examples: As its data set yields them; None: the first eight of its data.

    Raises:
        BadInput: The trainer runs on several processes or devices, or has no examples.
    """
    args, model = trainer.args, trainer.model
    if args.world_size > 1 or args.n_gpu > 1:
        raise BadInput(
            f"a trainer is verified on one process and one device, and this one uses "
            f"{max(args.world_size, args.n_gpu)}",
            hint="make one device visible with CUDA_VISIBLE_DEVICES=0",
        )
    assert isinstance(model, nn.Module), "a trainer has a model"
    if examples is None and trainer.train_dataset is None:
        raise BadInput("the trainer has no train_dataset", hint="pass a list of examples as batch")
    chosen = _first(trainer.train_dataset) if examples is None else examples
    if not isinstance(chosen, (list, tuple)) or not chosen:
        raise BadInput(f"a trainer is verified on a list of examples, not {type(chosen).__name__}")
    is_attached, is_models = isinstance(trainer, Attached), _is_models_loss(trainer)
    contract = _Contract()
    with _undisturbed_beside(model):
        yield Subject(
            name=f"{'attached ' * is_attached}{type(trainer).__name__} of {_loss_name(trainer)}",
            model=model,
            num_examples=len(chosen),
            run=lambda cut: _train(trainer, chosen, cut, contract=contract),
            full=lambda rows: _one_pass(trainer, chosen, rows),
            reference=MODELS if is_models else OWN,
            take=lambda rows: trainer.data_collator([chosen[i] for i in rows]),
            alone=lambda model, rows: _alone(trainer, chosen, rows, model, contract),
            is_own=not is_models and not is_attached,
            unseen="" if is_models or is_attached else UNSEEN,
            undivided=_undivided(trainer, chosen),
            beside=lambda: _evaluated(trainer),
            remedy="" if is_attached else "trainer = gradaccum.attach(trainer)",
        )


def _first(data: Any) -> list[Any]:
    return [row for row, _ in zip(iter(data), range(NUM_EXAMPLES), strict=False)]


def _train(
    trainer: Trainer,
    examples: Sequence[Any],
    cut: Cut,
    *,
    step: Step | None = None,
    contract: "_Contract | None" = None,
) -> None:
    """Run one step of training on the rows of the cut, in their order.

    Args:
        trainer: Is not run itself, but a copy.
        examples: All examples.
        cut: Those of each micro-batch.
        step: Runs one micro-batch, instead of the trainer's own `training_step`; then a trainer
            that is attached runs as if it were not.
        contract: Keeps how the loss of an attached trainer is reduced from one cut to the next.
    """
    sizes = tuple(map(len, cut))
    if sizes != chunks(sum(sizes), sizes[0]):
        raise BadInput(
            f"a Trainer cannot make micro-batches of {sizes} rows",
            hint="all of one size, but for a smaller last one",
        )
    twin = _twin(trainer, [examples[i] for rows in cut for i in rows], sizes)
    if isinstance(twin, Attached) and step is None:
        _recut(twin, sizes, contract)
    if step is not None:
        twin.__class__ = _own_class(trainer)
        twin.training_step = functools.partial(step, twin)
    _run(twin)


def _alone(
    trainer: Trainer,
    examples: Sequence[Any],
    rows: Sequence[int],
    model: nn.Module,
    contract: "_Contract",
) -> None:
    """Run these examples one at a time as an attached trainer does, on a given model.

    Args:
        trainer: Is not run itself, but a copy, which is attached if the trainer is not.
        examples: All examples.
        rows: Those that run.
        model: That of the trainer, or a copy of it in float64.
        contract: As for `_train`.
    """
    sizes = (1,) * len(rows)
    twin = _twin(trainer, [examples[i] for i in rows], sizes)
    if not isinstance(twin, Attached):
        attach(twin)
    _recut(twin, sizes, contract)
    if model is not trainer.model:
        prepared = twin._prepare_inputs
        twin.model = twin.model_wrapped = model
        twin._prepare_inputs = lambda inputs: widened(prepared(inputs))
    _run(twin)


def _run(twin: Any) -> None:
    try:
        twin.train()
    except _Complete:
        return
    raise BadInput(f"{type(twin).__name__} made no optimizer step on its examples")


def _one_pass(trainer: Trainer, examples: Sequence[Any], rows: Sequence[int]) -> None:
    """Leave the gradient of the full batch: of the loss without a count where that is a mean."""

    def with_count(twin: Any, *args: Any) -> Tensor:
        return type(twin).training_step(twin, *args)

    def without_count(twin: Any, model: nn.Module, inputs: Any, *_: Any) -> Tensor:
        return type(twin).training_step(twin, model, inputs, None)

    step = without_count if _is_models_loss(trainer) else with_count
    _train(trainer, examples, (tuple(rows),), step=step)


def _twin(trainer: Trainer, rows: list[Any], sizes: tuple[int, ...]) -> Any:
    """Return a copy of the trainer that shares only the model, the collator and its code."""
    twin: Any = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if isinstance(value, (dict, list)):
            setattr(twin, name, _copied(value))
    args = twin.args = copy.copy(trainer.args)
    args.max_steps, args.max_grad_norm, args.eval_on_start = 1, 0.0, False
    args.dataloader_num_workers, args.dataloader_drop_last = 0, False
    args.ignore_data_skip, args.include_num_input_tokens_seen = True, "no"
    args.push_to_hub = args.dataloader_persistent_workers = False
    args.dataloader_prefetch_factor = None
    args.per_device_train_batch_size = twin._train_batch_size = sizes[0]
    args.gradient_accumulation_steps = len(sizes)
    twin.accelerator = _own_accelerator(trainer.accelerator)
    twin.model_init = twin.neftune_noise_alpha = None
    twin.optimizer = twin.lr_scheduler = None
    twin.control = TrainerControl()
    callbacks = [DefaultFlowCallback(), _Stop()]
    twin.callback_handler = CallbackHandler(
        callbacks, trainer.model, trainer.processing_class, None, None
    )
    twin.train_dataset = rows
    twin._get_train_sampler = lambda dataset=None: SequentialSampler(rows)
    return twin


def _own_accelerator(accelerator: Accelerator) -> Accelerator:
    """Return a copy that keeps what it prepares to itself, and does not collect garbage."""
    own: Any = copy.copy(accelerator)
    own._models, own._optimizers, own._schedulers, own._dataloaders = [], [], [], []
    own.free_memory = lambda *objects: objects
    return own


def _recut(twin: Any, sizes: tuple[int, ...], contract: "_Contract | None") -> None:
    """Let an attached trainer take all rows as one step, in micro-batches of this size."""
    twin.callback_handler.callbacks.append(contract or _Contract())
    own = twin.accumulation = copy.copy(twin.accumulation)
    own.sampler, own.schedule = None, BatchSchedule.of(sum(sizes))
    own.begin()
    own.cut = accumulation.Cut(Budget(examples=sizes[0]), own.cut.rows, on_cpu=True)
    twin.args.per_device_train_batch_size = twin._train_batch_size = sum(sizes)
    twin.args.gradient_accumulation_steps = 1


def _own_class(trainer: Trainer) -> type:
    """Return the class of a trainer before it was attached."""
    own = type(trainer)
    return own.__bases__[1] if issubclass(own, Attached) else own


def _copied(value: Any) -> Any:
    """Copy nested dicts and lists, such as metrics, but not what they hold."""
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update({key: _copied(item) for key, item in value.items()})
        return found
    return [_copied(item) for item in value] if type(value) is list else value


def _is_models_loss(trainer: Trainer) -> bool:
    """Tell whether the loss is the model's, or at least a framework's, and so has its own mean."""
    module = getattr(trainer.compute_loss, "__module__", "")
    return trainer.compute_loss_func is None and module.startswith(("transformers.", "trl."))


def _loss_name(trainer: Trainer) -> str:
    return type(trainer.accelerator.unwrap_model(trainer.model)).__name__


def _undivided(trainer: Trainer, examples: Sequence[Any]) -> str:
    """Say why the trainer does not divide, if it turns out that it does not."""
    if not _is_models_loss(trainer):
        return "its own loss is a mean, and the Trainer takes it for divided already"
    contract = _contract(trainer, examples)
    if not trainer.model_accepts_loss_kwargs or contract is None or contract.counted:
        return SUM_OF_MEANS
    return (
        f"`{_loss_name(trainer)}` returns {contract.first} and ignores `num_items_in_batch`, so "
        "the Trainer does not divide"
    )


def _contract(trainer: Trainer, examples: Sequence[Any]) -> Contract | None:
    """Measure how the loss of a trainer is reduced; None if it cannot be told."""
    found: list[Contract | None] = []

    def step(twin: Any, model: nn.Module, *_: Any) -> None:
        def loss(model: nn.Module, inputs: Any, count: float | None) -> Tensor:
            given = None if count is None else torch.tensor(count, device=twin.args.device)
            with twin.compute_loss_context_manager():
                inputs = twin._prepare_inputs(copy.copy(inputs))
                return twin.compute_loss(model, copy.copy(inputs), num_items_in_batch=given)

        measured = Measured(loss)
        with contextlib.suppress(GradaccumError):
            measured.look_at(model, Listed(examples, twin.data_collator))
        found.append(measured.contract)
        raise _Complete

    assert isinstance(trainer.model, nn.Module), "a trainer has a model"
    with gradients_aside(list(trainer.model.parameters())), undisturbed(trainer.model):
        _train(trainer, examples, ((0,),), step=step)
    return found[0]


def _evaluated(trainer: Trainer) -> str:
    """Say if the evaluation loss of the trainer's own data depends on how it is batched."""
    data: Any = trainer.eval_dataset
    if isinstance(data, dict):
        data = next(iter(data.values()), None)
    rows = [] if data is None else _first(data)
    if len(rows) < 2:
        return ""
    losses: list[float] = []
    with suppressing_out_of_memory():
        losses = [_eval_loss(trainer, rows, size) for size in EVAL_SIZES]
    if not losses:
        return ""
    one, more = losses
    is_low = trainer.args.bf16 or trainer.args.fp16 or _is_16_bit(trainer.model)
    if math.isnan(one) or math.isclose(one, more, rel_tol=1e-2 if is_low else 1e-5):
        return ""
    said = (
        f"the evaluation loss of {len(rows)} examples is {one:.4g} in batches of {EVAL_SIZES[0]} "
        f"and {more:.4g} in batches of {EVAL_SIZES[1]}: it depends on per_device_eval_batch_size, "
        "as a mean of batch means does"
    )
    if isinstance(trainer, Attached):
        return said
    return f"{said}; attached, each is weighed by what its loss is a mean over"


def _is_16_bit(model: Any) -> bool:
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())


def _eval_loss(trainer: Trainer, rows: Any, size: int) -> float:
    twin = _twin(trainer, rows, (len(rows),))
    twin.args.per_device_eval_batch_size = size
    twin.args.fp16_full_eval = twin.args.bf16_full_eval = False  # they convert the model
    if isinstance(twin, Attached):
        twin.accumulation = copy.copy(twin.accumulation)
    assert isinstance(trainer.model, nn.Module), "a trainer has a model"
    modes = [(module, module.training) for module in trainer.model.modules()]
    try:
        with undisturbed(trainer.model):
            loader = twin.get_eval_dataloader(rows)
            metrics = twin.evaluation_loop(loader, "Evaluation", prediction_loss_only=True).metrics
    finally:
        for module, mode in modes:
            module.training = mode
    return (metrics or {}).get("eval_loss", math.nan)


@contextmanager
def _undisturbed_beside(model: nn.Module) -> Iterator[None]:
    """Put back what `undisturbed` leaves: attributes that are new, and accelerate's own state."""
    keys = {module: set(vars(module)) for module in model.modules()}
    state = GradientState()
    references, syncs = state.dataloader_references, state.sync_gradients
    try:
        yield
    finally:
        state.dataloader_references = references
        state._set_sync_gradients(syncs)
        for module, before in keys.items():
            for key in set(vars(module)) - before:
                del vars(module)[key]
