"""Attach exact accumulation to a LightningModule with automatic optimization.

Tested with lightning 2.6. One batch of the train loader is one step: `training_step` is run on
micro-batches of it, forward and backward, and the gradient of the whole batch is there when
Lightning's own backward would have run. So `trainer.global_step`, schedulers, clipping, precision
plugins, callbacks, loggers and checkpoints are right because there is nothing to repair.

Not here: more than one device, sharding strategies, manual optimization, `accumulate_grad_batches`
beside it, a `training_step` that fetches its own batches. All are refused.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from gradaccum.batch import Collate
from gradaccum.engine import Window
from gradaccum.errors import BadInput
from gradaccum.integrations.lightning_logs import Logged, Metrics, joined, metrics_kept
from gradaccum.measured import Measured, from_mean, quiet
from gradaccum.memory.auto import AUTO, Accumulator
from gradaccum.objective import Number, length
from gradaccum.optimizers import materialize
from gradaccum.types import Budget, Micro, Step

T = TypeVar("T", bound=LightningModule)
LOG = inspect.signature(LightningModule.log)


class Accumulation:
    """Hold what an attached module accumulates with: `module.accumulation`.

    Args:
        accumulator: Runs the micro-batches.
        measured: How the loss is reduced, where that is not given.
    """

    def __init__(self, accumulator: Accumulator, measured: Measured) -> None:
        self.accumulator = accumulator
        self.measured = measured
        self.last: Step | None = None
        self.batch_idx = 0
        self.gradients: list[Tensor | None] = []
        self.num_ran = 0
        self.window: Window | None = None
        self.logged: dict[str, list[Logged]] | None = None  # None: no window runs

    @contextmanager
    def collecting(self) -> Iterator[dict[str, list[Logged]]]:
        """Collect what is logged inside, by name."""
        before, self.logged = self.logged, {}
        try:
            yield self.logged
        finally:
            self.logged = before


class Attached(LightningModule):
    """Override the documented hooks of LightningModule; mixed in before the user's own class."""

    accumulation: Accumulation

    def on_train_start(self) -> None:
        super().on_train_start()
        for optimizer in self.trainer.optimizers:
            materialize(optimizer)  # its first step should not be the first to ask for memory
            self.accumulation.accumulator.optimizer = optimizer

    def on_train_epoch_start(self) -> None:  # GradientAccumulationScheduler has set its number
        _refuse_trainer(self)
        is_full = torch.get_float32_matmul_precision() == "highest"
        self.accumulation.measured.is_low = not (
            is_full and self.trainer.precision in ("32-true", "64-true")
        )
        super().on_train_epoch_start()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        # Micro-batches go to the device in their turn. Where a hook changes whole batches there
        # (mixes images, say), it gets them as before.
        if self.trainer.training and not _changes_on_device(self):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        accumulation = self.accumulation
        accumulation.batch_idx = batch_idx
        self._clear(batch_idx)
        metrics = Metrics(self)
        with accumulation.collecting() as logged:

            def begin() -> Window:  # again, after memory ran out: what was counted then goes
                metrics.restore()
                logged.clear()
                accumulation.num_ran = 0
                accumulation.window = accumulation.accumulator.prepare(batch)
                return accumulation.window

            step = accumulation.last = accumulation.accumulator.backward(begin)
        window, accumulation.window = accumulation.window, None
        assert window is not None, "begun above"
        # Lightning calls zero_grad between training_step and backward.
        accumulation.gradients = [p.grad for p in self.parameters()]
        self.zero_grad()
        for name, entries in logged.items():
            value, options = joined(entries, window)
            self.log(name, value, **options)
        return step.loss_tensor

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        gradients, self.accumulation.gradients = self.accumulation.gradients, []
        for p, grad in zip(self.parameters(), gradients, strict=True):
            p.grad = grad

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        accumulation = self.accumulation
        if accumulation.logged is None:
            super().log(name, value, *args, **kwargs)
            return
        options = dict(LOG.bind(self, name, value, *args, **kwargs).arguments)
        for key in ("self", "name", "value"):
            del options[key]
        if isinstance(value, Metric):
            of_micro = value._forward_cache
        else:
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=torch.get_default_dtype(), device=self.device)
            of_micro = value = value.detach().squeeze()
        entry = Logged(value, of_micro, accumulation.num_ran, options)
        accumulation.logged.setdefault(name, []).append(entry)

    def _clear(self, batch_idx: int) -> None:
        """Clear the last step's gradients as the user does, and all that no optimizer holds."""
        optimizer = self.trainer.optimizers[0]
        self.optimizer_zero_grad(self.current_epoch, batch_idx, optimizer)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for p in self.parameters():
            if p not in held:
                p.grad = None

    def _micro_loss(self, micro: Any) -> Tensor:
        """Return the loss of the user's own training_step for one micro-batch."""
        if not _changes_on_device(self):  # tensors are there; objects with a `to` of their own
            micro = super().transfer_batch_to_device(micro, self.device, 0)
        own = super().training_step
        takes_index = is_param_in_hook_signature(own, "batch_idx", min_args=2)
        given = (micro, self.accumulation.batch_idx) if takes_index else (micro,)
        output = own(*given)
        if isinstance(output, Mapping):
            extras = sorted(output.keys() - {"loss"})
            if extras:
                warnings.warn(
                    f"training_step returns {', '.join(extras)} for each micro-batch; callbacks "
                    "get the loss of the effective batch alone",
                    stacklevel=2,
                )
            output = output.get("loss")
        if not isinstance(output, Tensor):
            raise BadInput(
                f"training_step returned {type(output).__name__} and no loss for a micro-batch, "
                "and a step cannot be skipped in part",
                hint="leave such examples out in the loader",
            )
        return output

    @contextmanager
    def _aside(self, model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
        """Run what does not belong to the training; what it logs is dropped."""
        collecting = self.accumulation.collecting()
        with collecting, metrics_kept(self), quiet(model, dropout=dropout):
            yield

    def _micro_backward(self, loss: Tensor) -> None:
        # Of mixed precision in 16 bits; what it scales here its optimizer step unscales.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        super().backward(loss if scaler is None else scaler.scale(loss))

    def _after_micro(self, micro: Micro) -> None:
        self.accumulation.num_ran += 1


def attach(
    module: T,
    *,
    budget: Budget | Literal["auto"] = AUTO,
    memory: str | float | None = None,
    collate: Collate | None = None,
    weight: str | Callable[[Any], Number] | None = None,
    size: Callable[[Any], int] = length,
) -> T:
    """Make a LightningModule accumulate exactly; return the same object.

    Its class, hooks, `training_step`, logging and optimizers stay. Let the train loader yield whole
    effective batches, collated or as lists of examples, and leave `accumulate_grad_batches` at 1.

    Args:
        module: With automatic optimization; its `training_step` returns the loss.
        budget: How large one micro-batch may be; "auto": found by three short micro-batches of the
            first batch, see `gradaccum.Accumulator`.
        memory: What there is for "auto": "20GiB", bytes, or a fraction of the device; by default
            what is available.
        collate: Turns a list of examples into a micro-batch, where the loader yields lists.
        weight: What the loss is a mean over, as in `from_mean`; None: it is measured.
        size: Maps one example to its cost in memory.

    Raises:
        BadInput: The module is attached already, optimizes manually or fetches its own batches;
            or, when training starts, the trainer accumulates too or runs on several devices.
        NotDecomposable: At the first step, when the loss has no exact accumulation.

    Example:
        >>> module = attach(MyModule())  # doctest: +SKIP
        >>> Trainer(max_epochs=3).fit(module, loader)  # doctest: +SKIP
    """
    if not isinstance(module, LightningModule):
        raise BadInput(f"attach takes a LightningModule, not {type(module).__name__}")
    if isinstance(module, Attached):
        raise BadInput("this module is attached already")
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise BadInput("training_step(dataloader_iter) fetches batches itself, so none can be cut")
    own = type(module)
    attached = type(own.__name__, (Attached, own), {"__module__": own.__module__})
    module.__class__ = attached  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(module, Attached)
    measured = Measured(
        lambda module, micro, _: _micro_loss(module, copy.copy(micro)),
        name=f"the loss of {own.__name__}",
        takes_count=False,
        aside=module._aside,
    )
    objective = measured.objective(size=size)
    if weight is not None:
        objective = from_mean(_micro_loss, weight=weight, size=size)
    accumulator = Accumulator(
        module,
        objective,
        budget=budget,
        memory=memory,
        aside=module._aside,
        collate=collate,
        backward=module._micro_backward,
        after_micro=module._after_micro,
    )
    module.accumulation = Accumulation(accumulator, measured)
    return module


def _micro_loss(module: nn.Module, micro: Any) -> Tensor:
    assert isinstance(module, Attached)
    return module._micro_loss(micro)  # of the module given: a copy has an accumulator of its own


def _refuse_trainer(module: Attached) -> None:
    trainer = module.trainer
    if not module.automatic_optimization:
        raise BadInput(
            "with manual optimization training_step runs backward and the optimizer itself",
            hint="call gradaccum.Accumulator there, with backward=self.manual_backward",
        )
    if trainer.accumulate_grad_batches != 1:
        raise BadInput(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} divides each loss by "
            f"{trainer.accumulate_grad_batches}, and one batch of the loader is one step already",
            hint="leave it at 1, and let the loader yield whole effective batches",
        )
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise BadInput(
            f"attach runs on one device so far, and this trainer uses {trainer.world_size} with "
            f"{type(trainer.strategy).__name__}",
            hint='Trainer(devices=1, strategy="auto")',
        )
    if "training_step" in vars(module):
        raise BadInput(
            "training_step was replaced on the module itself, as compiling it does, and would run "
            "on the whole batch",
            hint="compile a submodule instead: self.net = torch.compile(self.net)",
        )


def _changes_on_device(module: LightningModule) -> bool:
    """Tell whether a hook of the user changes batches once they are on the device."""
    data = getattr(module.trainer, "datamodule", None)
    owners = [owner for owner in (module, data) if owner is not None]
    return any(is_overridden("on_after_batch_transfer", owner) for owner in owners)
