"""An evaluation loss that does not depend on how large the batches are that evaluate.

Tested with transformers 5.17 and 5.23. The trainer takes a mean of batch means, weighed by rows;
here each batch is weighed by what its loss is a mean over. On several ranks the trainer fills the
last batches up with examples it has had already; here they count once.
"""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from gradaccum.batch import Collated, Listed
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
    _aside: Callable[..., AbstractContextManager[None]]
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
        key, losses = f"{metric_key_prefix}_loss", [loss for loss, _ in self._evaluated]
        values = torch.stack(losses).double().tolist() if losses else []
        pairs = [(x, w) for x, (_, w) in zip(values, self._evaluated, strict=True)]
        if self.accelerator.num_processes > 1:
            pairs = gather_object(pairs)
        if output.metrics and key in output.metrics and pairs:
            total = math.fsum(weight or 0.0 for _, weight in pairs)
            if None in [weight for _, weight in pairs] or not total:
                logger.warning(
                    f"{key} is a mean of batch means, and depends on per_device_eval_batch_size: "
                    "the loss of this model is not known to be a mean over one count"
                )
            else:
                output.metrics[key] = sum(x * w for x, w in pairs if w) / total
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kept = copy.copy(inputs)  # compute_loss pops from it
        output = loss, _, _ = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        num_rows = count_rows(kept, 1)
        own = self._num_own(num_rows)
        if loss is not None and 0 < own < num_rows:
            rows = Collated(kept, trim=False).take(range(own))
            kept = copy.copy(rows)
            with self._aside(model, dropout=True):
                loss, _, _ = super().prediction_step(model, rows, True, ignore_keys)
        if loss is not None and own:
            self._evaluated.append((loss.detach().mean(), self._eval_weight(kept)))
        return output

    def _num_own(self, num_rows: int) -> int:
        """Return how many rows of this batch no rank has had before."""
        accelerator, state = self.accelerator, self.accelerator.gradient_state
        if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
            return num_rows
        return min(num_rows, max(0, state.remainder - accelerator.process_index * num_rows))

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
