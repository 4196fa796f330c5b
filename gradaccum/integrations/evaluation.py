"""An evaluation loss that does not depend on how large the batches are that evaluate.

Tested with transformers 5.17 and 5.23. The trainer takes a mean of batch means, weighed by rows;
here each batch is weighed by what its loss is a mean over.
"""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from gradaccum.batch import Listed
from gradaccum.errors import GradaccumError
from gradaccum.integrations.accumulation import Accumulation
from gradaccum.measured import Measured
from gradaccum.trees import count_rows

logger = logging.getLogger(__name__)
NUM_EXAMPLES = 16  # that tell how a loss is reduced where none was trained


class Evaluated(Trainer):
    """Weigh the losses of evaluated batches; a part of `hf.Attached`."""

    accumulation: Accumulation
    _measured: Callable[[nn.Module], Measured]
    _evaluated: list[tuple[Tensor, float | None]]  # loss and weight of each batch

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # The trainer's mean of batch means depends on how large its batches are.
        self._evaluated = []
        self._look_at(dataloader)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        key, weights = f"{metric_key_prefix}_loss", [weight for _, weight in self._evaluated]
        if output.metrics and key in output.metrics and weights:
            if None in weights or not sum(filter(None, weights)):
                logger.warning(
                    f"{key} is a mean of batch means, and depends on per_device_eval_batch_size: "
                    "the loss of this model is not known to be a mean over one count"
                )
            else:
                losses = torch.stack([loss for loss, _ in self._evaluated]).double().tolist()
                pairs = [(x, w) for x, w in zip(losses, weights, strict=True) if w]
                total = math.fsum(w for _, w in pairs)
                output.metrics[key] = sum(x * w for x, w in pairs) / total
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kept = copy.copy(inputs)  # compute_loss pops from it
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if output[0] is not None:
            loss = output[0].detach().mean()
            self._evaluated.append((loss, self._eval_weight(kept)))
        return output

    def _look_at(self, dataloader: DataLoader) -> None:
        """Find out what the loss is a mean over if no training has; of a stream it is not told."""
        accumulation, data = self.accumulation, dataloader.dataset
        trained = accumulation.measured
        if trained is not None and trained.contract is not None:
            accumulation.evaluating = trained
        if accumulation.evaluating is not None or not has_length(data):
            return
        model = self.model
        assert isinstance(model, nn.Module), "a trainer has a model"
        found = accumulation.evaluating = self._measured(model)
        rows = [data[i] for i in range(min(NUM_EXAMPLES, len(data)))]  # pyright: ignore
        was_training = model.training
        model.eval()
        try:
            found.look_at(model, Listed(rows, dataloader.collate_fn))
        except GradaccumError as error:
            logger.warning(f"how the loss is reduced is not known: {error.args[0]}")
        finally:
            model.train(was_training)

    def _eval_weight(self, inputs: Any) -> float | None:
        """Return what the loss of an evaluated batch is a mean over; None if that is not known."""
        found = self.accumulation.evaluating
        return None if found is None else found.mean_weight(inputs, count_rows(inputs, 1))
