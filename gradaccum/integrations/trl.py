"""What TRL's SFTTrainer keeps besides the loss: metrics of each micro-batch, offloading, its head.

Tested with trl 1.16. Its `compute_loss` appends the mean entropy and token accuracy of every
micro-batch to `_metrics` and logs the mean of those means, so that a micro-batch of 10 tokens
counts as much as one of 1,000. Here they are joined to what one pass over the effective batch
gives. Dies when TRL weighs them itself.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import utils

from gradaccum.integrations.hf import Attached, replaced


class AttachedSFT(Attached):
    """Add to `Attached` what SFTTrainer's own `training_step` and `compute_loss` keep."""

    _metrics: dict[str, dict[str, list[float]]]
    maybe_activation_offload_context: Any

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        begin = {name: len(values) for name, values in self._metrics["train"].items()}
        with self.maybe_activation_offload_context:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._join_metrics(begin)
        return loss

    def _loss(self, model: nn.Module, inputs: Any, count: Tensor | None) -> Tensor:
        with _trained_positions_only(self.args.device):
            return super()._loss(model, inputs, count)

    def _join_metrics(self, begin: dict[str, int]) -> None:
        """Replace this window's entries of each metric by their mean, weighted by tokens."""
        window = self.accumulation.window
        assert window is not None and window.weights is not None, "a step has just run"
        weights = [weight["loss"] for weight in window.weights if weight["loss"]]
        for name, values in self._metrics["train"].items():
            own = values[begin.get(name, 0) :]
            if name != "num_tokens" and len(own) == len(weights) > 1:
                pairs = zip(own, weights, strict=True)
                values[begin.get(name, 0) :] = [sum(v * w for v, w in pairs) / sum(weights)]

    @contextmanager
    def _aside(self, model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
        metrics, num_tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        try:
            with super()._aside(model, dropout=dropout):
                yield
        finally:
            self._metrics, self._total_train_tokens = metrics, num_tokens


def _trained_positions_only(device: torch.device) -> AbstractContextManager[None]:
    """Let TRL's loss head score only the positions that are trained, as it does on CUDA.

    Elsewhere it scores prompts and padding too and drops the result, for compilers that want fixed
    shapes (`_fused_forward` in trl/trainer/utils.py). On a CPU that is a quarter of a step.
    """
    if device.type != "cpu" or not hasattr(utils, "_use_triton"):
        return nullcontext()
    return replaced(utils, "_use_triton", lambda device: True)
