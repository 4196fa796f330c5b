"""What `self.log` was given for each micro-batch, joined to what one pass would log.

Tested with lightning 2.6, torchmetrics 1.9.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gradaccum.engine import Window


@dataclass(frozen=True, slots=True)
class Logged:
    """Hold what `self.log` was given for one micro-batch.

    Args:
        value: Detached, or a metric of torchmetrics.
        of_micro: What is joined: the value, or the metric's value for this micro-batch alone.
        micro: Position of the micro-batch in the window.
        options: The other arguments.
    """

    value: Tensor | Metric
    of_micro: Tensor | None
    micro: int
    options: dict[str, Any]


def joined(entries: list[Logged], window: Window) -> tuple[Tensor | Metric, dict[str, Any]]:
    """Return value and options with which one pass over the effective batch would log.

    A mean is weighed by the `batch_size` that the user gave, else by the weight of the loss; sums
    are summed. The epoch's value of a metric of torchmetrics is its own; that of the step is the
    mean of its values, which is exact for metrics that are means.
    """
    options = dict(entries[0].options)
    stated = [n for n in (entry.options.get("batch_size") for entry in entries) if n is not None]
    if len(stated) == len(entries):
        weights = stated
    else:
        weights = [_weight(window, entry.micro) for entry in entries]
        stated = [len(micro.examples) for micro in window.micros]
    options["batch_size"] = sum(stated)
    value = entries[-1].value
    values = [entry.of_micro for entry in entries if entry.of_micro is not None]
    if len(values) < len(entries):  # of a metric that is only updated
        return value, options
    one = _join(torch.stack(values), weights, options.get("reduce_fx", "mean"))
    if isinstance(value, Metric):
        value._forward_cache = one
        return value, options
    return one, options


def _weight(window: Window, i: int) -> float:
    """Return what a micro-batch counts: in the loss's own weight, or in rows if there are more."""
    weights = window.weights[i] if window.weights is not None else {}
    return next(iter(weights.values())) if len(weights) == 1 else len(window.micros[i].examples)


def _join(values: Tensor, weights: list[float], reduce_fx: Any) -> Tensor:
    name = reduce_fx if isinstance(reduce_fx, str) else reduce_fx.__name__
    if name in ("sum", "min", "max"):
        return getattr(values, f"a{name}" if name != "sum" else name)(dim=0)
    if values.dtype not in (torch.float32, torch.float64):
        values = values.to(torch.get_default_dtype())
    total = sum(weights)
    return values.new_tensor([weight / total for weight in weights]) @ values


class Metrics:
    """Hold the counts of a module's torchmetrics; what they have listed is shared, not copied."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = [
            (metric, {key: _copied(value) for key, value in vars(metric).items()})
            for metric in module.modules()
            if isinstance(metric, Metric)
        ]

    def restore(self) -> None:
        """Put them back."""
        for metric, state in self._kept:
            vars(metric).update({key: _copied(value) for key, value in state.items()})


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if type(value) is list else value


@contextmanager
def metrics_kept(module: nn.Module) -> Iterator[None]:
    """Put the counts of torchmetrics back, on leaving, to what they were."""
    metrics = Metrics(module)
    try:
        yield
    finally:
        metrics.restore()
