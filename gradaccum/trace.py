"""Watch one effective batch run, whoever runs it, and put everything back afterwards.

What is seen comes from documented hooks: before each gradient is added into `.grad` (on the graph's
node for that, so that `torch.autograd.grad` is not taken for it), before every optimizer step, and
before the forward of modules. Hooks after accumulation would be refused by `Accumulator`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from gradaccum.restore import Owners
from gradaccum.state import undisturbed

# Values of each parameter that are looked at inside a window, where whole copies cost too much.
SAMPLE = 4096
# Where torch.nn.functional refuses to normalise, for a batch of one row.
TOO_FEW = "Expected more than 1 value per channel"


@dataclass(slots=True)
class Trace:
    """Hold what was seen while one effective batch ran.

    Args:
        gradients: Of each trainable parameter before the first optimizer step, or at the end;
            None where there is none.
        num_backwards: Backward passes that added into `.grad`.
        steps: For each optimizer step, after how many backward passes it came.
        scheduler_steps: Steps of the busiest learning rate scheduler.
        changed: Backward passes before which `.grad` was not what had been added up, each with
            the factor between the two and their relative difference.
        moved: Whether weights had changed before the first optimizer step.
        left: Whether gradients were left at the end, after an optimizer step.
        sum_dtypes: The dtypes in which several gradients were added.
        batch_norms: Modules that normalised by the statistics of a micro-batch.
        too_few: What torch raised where these had one value a channel, which ended the run.
        rescaled: The one factor between what was taken and what had been added up: a clip, an
            unscaling or a division after the last backward.
        autocast: The dtype of autocast in the forward; None without.
    """

    gradients: list[Tensor | None] = field(default_factory=list)
    num_backwards: int = 0
    steps: list[int] = field(default_factory=list)
    scheduler_steps: int = 0
    changed: dict[int, tuple[float, float]] = field(default_factory=dict)
    moved: bool = False
    left: bool = False
    sum_dtypes: set[torch.dtype] = field(default_factory=set)
    batch_norms: set[str] = field(default_factory=set)
    too_few: ValueError | None = None
    rescaled: float = 1.0
    autocast: torch.dtype | None = None


class Watch:
    """Run effective batches of one model as if they had not run; costs what `Owners` costs.

    Args:
        model: Its trainable parameters are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._owners = Owners(list(model.parameters()))

    def run(self, work: Callable[[], object], *, keep_gradients: bool = False) -> Trace:
        """Run `work` from cleared gradients and return what was seen.

        Args:
            work: Leaves gradients in `.grad`, or steps an optimizer.
            keep_gradients: Begin with the gradients that the run before left.
        """
        if not keep_gradients:
            for p in self.parameters:
                p.grad = None
        trace = Trace()
        with self._owners.restored(), undisturbed(self.model):
            recorder = Recorder(self.model, self._owners, trace)
            try:
                with recorder.attached():
                    work()
            except ValueError as error:
                if not trace.batch_norms or TOO_FEW not in str(error):
                    raise
                trace.too_few = error
            recorder.finish()
        return trace


class Recorder:
    """Fill a Trace from hooks."""

    def __init__(self, model: nn.Module, owners: Owners, trace: Trace) -> None:
        self._model = model
        self._owners = owners
        self._parameters = [p for p in owners.parameters if p.requires_grad]
        self._trace = trace
        self._weights = {p: sample(p) for p in owners.parameters}
        self._counts = dict.fromkeys(self._parameters, 0)
        self._expected: dict[nn.Parameter, Tensor] = {}
        self._epochs = [s.last_epoch for s in owners.schedulers]
        self._is_paused = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hang the hooks up, and take them down."""
        # The nodes have to be held: a parameter only refers to its own as long as somebody does.
        nodes = {p: get_gradient_edge(p).node for p in self._parameters}
        handles = [node.register_prehook(self._hook(p)) for p, node in nodes.items()]
        handles.append(register_optimizer_step_pre_hook(self._on_step))
        for name, module in self._model.named_modules():
            # Each one, since autocast may begin inside the forward of the whole model.
            handles.append(module.register_forward_pre_hook(self._on_forward))
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(self._on_batch_norm(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """Take the gradients if no optimizer did, and count the schedulers' steps."""
        trace = self._trace
        if not trace.steps:
            self._take()
        trace.left = bool(trace.steps) and any(
            p.grad is not None and bool(p.grad.any()) for p in self._parameters
        )
        pairs = zip(self._owners.schedulers, self._epochs, strict=True)
        trace.scheduler_steps = max((s.last_epoch - epoch for s, epoch in pairs), default=0)

    def _hook(self, p: nn.Parameter) -> Callable[[tuple[Tensor, ...]], None]:
        def hook(incoming: tuple[Tensor, ...]) -> None:
            trace = self._trace
            if self._is_paused:
                return
            self._counts[p] += 1
            trace.num_backwards = max(trace.num_backwards, self._counts[p])
            self._look_at_sum(p)
            added = sample(incoming[0])
            if p.grad is not None:
                trace.sum_dtypes.add(p.grad.dtype)
                added = sample(p.grad).add_(added)
            self._expected[p] = added
            if not trace.steps and not torch.equal(sample(p), self._weights[p]):
                trace.moved = True

        return hook

    def _look_at_sum(self, p: nn.Parameter) -> None:
        """Note a gradient that is not what has been added up so far."""
        expected = self._expected.get(p)
        if expected is None or len(self._trace.steps):
            return  # after a step a new sum begins; steps inside a window are counted by themselves
        found = torch.zeros_like(expected) if p.grad is None else sample(p.grad)
        norm = expected.double().norm()
        off = (found.double() - expected.double()).norm()
        if norm > 0 and off > 8 * torch.finfo(expected.dtype).eps * norm:
            factor = (found.double() * expected.double()).sum() / norm.square()
            change = (factor.item(), (off / norm).item())
            self._trace.changed.setdefault(self._counts[p] - 1, change)

    def _on_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note a step; one that is given a closure (LBFGS, Lightning) runs a backward in it.

        What is noted is its first call. Others (line searches) are at other weights, and they are
        neither steps nor backward passes of the window.
        """
        if not self._owners.owns(optimizer):
            return None
        # A method called as Optimizer.step(self, closure) gets the optimizer first.
        given = next((arg for arg in args if arg is not optimizer and callable(arg)), None)
        closure = kwargs.get("closure", given)
        if closure is None:
            self._note_step()
            return None

        is_noted = False

        def noted() -> Any:
            nonlocal is_noted
            before, self._is_paused = self._is_paused, is_noted
            try:
                result = closure()
            finally:
                self._is_paused = before
            if not is_noted:
                self._note_step()
            is_noted = True
            return result

        own = tuple(noted if arg is closure else arg for arg in args)
        return own, kwargs | ({"closure": noted} if "closure" in kwargs else {})

    def _note_step(self) -> None:
        if not self._trace.steps:
            self._take()
        self._trace.steps.append(self._trace.num_backwards)

    def _take(self) -> None:
        self._trace.gradients = [
            None if p.grad is None else _host(p.grad) for p in self._parameters
        ]
        if not all(torch.equal(sample(p), weight) for p, weight in self._weights.items()):
            self._trace.moved = True
        self._trace.rescaled = self._factor()

    def _factor(self) -> float:
        """Return the one factor between `.grad` and what had been added up; 1 if there is none."""
        if any(p.grad is None for p in self._expected):
            return 1.0
        found = [sample(p.grad).double() for p in self._expected if p.grad is not None]
        added = [expected.double() for expected in self._expected.values()]
        square = sum((b * b).sum().item() for b in added)
        if not 0 < square < math.inf:
            return 1.0
        factor = sum((a * b).sum().item() for a, b in zip(found, added, strict=True)) / square
        off = sum((a - factor * b).square().sum().item() for a, b in zip(found, added, strict=True))
        eps = max(torch.finfo(expected.dtype).eps for expected in self._expected.values())
        is_one = factor > 0 and (off / square) ** 0.5 <= 8 * eps * factor
        return factor if is_one and abs(factor - 1) > 8 * eps else 1.0

    def _on_forward(self, module: nn.Module, args: Any) -> None:
        kind = self._parameters[0].device.type
        if torch.is_autocast_enabled(kind):
            self._trace.autocast = torch.get_autocast_dtype(kind)

    def _on_batch_norm(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if module.training or module.running_mean is None:
                self._trace.batch_norms.add(name)

        return hook


def sample(tensor: Tensor) -> Tensor:
    """Return a copy of evenly spaced values of a tensor, at most `SAMPLE`, in its own dtype."""
    tensor = tensor.detach()
    flat = (tensor.to_dense() if tensor.is_sparse else tensor).reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE) or 1].clone()


def _host(grad: Tensor) -> Tensor:
    grad = grad.detach()
    return (grad.to_dense() if grad.is_sparse else grad).to("cpu", torch.float64, copy=True)
