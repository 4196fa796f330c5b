"""Put back what running a foreign loop changes: weights, optimizers, schedulers, gradients.

Random state, buffers and attributes of modules are `state.undisturbed`'s.
"""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Owners:
    """Hold the optimizers and schedulers of some parameters, and the state they are in now.

    Costs a copy of the weights on the host, and one of an optimizer's state once it steps.

    Args:
        parameters: Those of the model.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._owned = {id(p) for p in parameters}
        self.optimizers = [o for o in _alive(Optimizer) if self.owns(o)]
        self.schedulers = [s for s in _alive(LRScheduler) if s.optimizer in self.optimizers]
        self._weights = [p.detach().to("cpu", copy=True) for p in parameters]
        self._groups = [[_without_params(g) for g in o.param_groups] for o in self.optimizers]
        self._progress = [copy.deepcopy(s.state_dict()) for s in self.schedulers]

    def owns(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer steps one of the parameters."""
        return any(id(p) in self._owned for g in optimizer.param_groups for p in g["params"])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back on leaving."""
        states: dict[int, dict[Any, Any]] = {}

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if id(optimizer) not in states and self.owns(optimizer):
                states[id(optimizer)] = _copied_state(optimizer)

        handle = register_optimizer_step_pre_hook(before_step)
        try:
            yield
        finally:
            handle.remove()
            self._restore(states)

    def _restore(self, states: dict[int, dict[Any, Any]]) -> None:
        for p, weight in zip(self.parameters, self._weights, strict=True):
            p.data.copy_(weight)
        for optimizer, saved in zip(self.optimizers, self._groups, strict=True):
            for group, values in zip(optimizer.param_groups, saved, strict=True):
                group.update(values)
            if id(optimizer) in states:
                optimizer.state.clear()
                optimizer.state.update(states[id(optimizer)])
        for scheduler, state in zip(self.schedulers, self._progress, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))


def dropping(model: nn.Module) -> list[str]:
    """Return the names of the modules that drop values, by themselves or through `F.dropout`."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if any(
            type(rate) is float
            and rate > 0
            and (key.endswith("dropout") or (key == "p" and isinstance(module, _DropoutNd)))
            for key, rate in vars(module).items()
        )
    ]


@contextmanager
def gradients_aside(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Put the gradients that are there aside, and back on leaving."""
    before = [p.grad for p in parameters]
    try:
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def _copied_state(optimizer: Optimizer) -> dict[Any, Any]:
    """Copy the state of each parameter; the parameters stay the keys."""
    return {
        p: {
            key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for key, value in state.items()
        }
        for p, state in optimizer.state.items()
    }


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in group.items()
        if key != "params"
    }


def _alive(kind: type) -> list[Any]:
    """Return all objects of a kind: a loop holds its optimizer where nobody can ask for it."""
    return [o for o in gc.get_objects() if issubclass(type(o), kind) and hasattr(o, "__dict__")]
