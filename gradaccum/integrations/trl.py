"""What TRL's trainers keep besides the loss: metrics, offloading, SFT's head, KTO's baseline.

Tested with trl 1.16. Their `compute_loss` appends metrics to `_metrics` (in the experimental
trainers `_stored_metrics`) for every micro-batch and logs the mean of those means, so that a
micro-batch of 10 tokens counts as much as one of 1,000. Here they are weighed by what the loss is
weighed by, which for SFT is what one pass over the effective batch gives. Dies when TRL weighs them
itself.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy
from trl import KTOTrainer, SFTTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils
from trl.trainer.utils import use_adapter

from gradaccum import measures
from gradaccum.batch import Listed
from gradaccum.causal import TRAINED, causal_lm
from gradaccum.device import is_out_of_memory
from gradaccum.engine import Window
from gradaccum.integrations.accumulation import Examples
from gradaccum.integrations.hf import COMPUTED, Attached
from gradaccum.integrations.swap import replaced
from gradaccum.memory.layout import SAMPLE, different
from gradaccum.objective import length, shifted_tokens
from gradaccum.sync.choose import module_of
from gradaccum.types import Micro

PLAIN = causal_lm()
BOOKS = ("_metrics", "_stored_metrics")
TOKENS = "_total_train_tokens"


class AttachedTRL(Attached):
    """Add to `Attached` what `training_step` and `compute_loss` of TRL's trainers keep."""

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._start = self._lengths(), getattr(self, TOKENS, None)
        with ExitStack() as self._attempt:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._join_metrics()
        return loss

    def _prepare(self, model: nn.Module, given: Examples) -> Window:
        if self.is_in_train:
            self._begin()
        return super()._prepare(model, given)

    def _begin(self) -> None:
        """Begin a step, or begin it again: what an attempt that ran out of memory left goes."""
        self._attempt.close()
        lengths, tokens = self._start
        for name, values in self._books().items():
            del values[lengths.get(name, 0) :]
        if tokens is not None:
            setattr(self, TOKENS, tokens)
        # Weight of each micro-batch run so far, and how many entries each metric had after it.
        self._marks: list[tuple[float, dict[str, int]]] = [(0.0, lengths)]
        # Entering it drops what is offloaded.
        self._attempt.enter_context(
            getattr(self, "maybe_activation_offload_context", nullcontext())
        )

    def _after_micro(self, micro: Micro) -> None:
        super()._after_micro(micro)
        window = self.accumulation.window
        if self.is_in_train and window is not None and window.weights is not None:
            weight = sum(window.weights[window.micros.index(micro)].values())
            self._marks.append((weight, self._lengths()))

    def _books(self) -> dict[str, list[float]]:
        return next(getattr(self, name) for name in BOOKS if name in vars(self))["train"]

    def _lengths(self) -> dict[str, int]:
        return {name: len(values) for name, values in self._books().items()}

    def _join_metrics(self) -> None:
        """Replace this window's entries of each metric by one: their weighted mean, least, most.

        Over all ranks; each has gathered its own alone.
        """
        books, lengths = self._books(), self._marks[0][1]
        own = {name: self._of_window(name, values) for name, values in books.items()}
        tokens = getattr(self, TOKENS, 0) - (self._start[1] or 0)
        accumulator = self.accumulation.accumulator
        assert accumulator is not None, "it has just run"
        ranks = accumulator.ranks
        heard = ranks.exchange({"metrics": own, "tokens": tokens})
        for name in dict.fromkeys(name for said in heard for name in said["metrics"]):
            pairs = [pair for said in heard for pair in said["metrics"].get(name, ())]
            if name == "num_tokens" or not pairs or len(own.get(name, pairs)) == len(pairs) == 1:
                continue
            if name.startswith(("min_", "max_")):
                joined = (min if name.startswith("min_") else max)(value for value, _ in pairs)
            else:
                joined = sum(value * weight for value, weight in pairs) / sum(w for _, w in pairs)
            books.setdefault(name, [])[lengths.get(name, 0) :] = [joined]
        if ranks.world > 1 and hasattr(self, TOKENS):
            total = (self._start[1] or 0) + sum(said["tokens"] for said in heard)
            setattr(self, TOKENS, total)
            books["num_tokens"] = [total]  # a running total, not a mean

    def _of_window(self, name: str, values: list[float]) -> list[tuple[float, float]]:
        """Return the values of a metric in this window, with their weights."""
        end = self._marks[0][1].get(name, 0)
        own: list[tuple[float, float]] = []
        for weight, lengths in self._marks[1:]:
            own += [(value, weight) for value in values[end : lengths.get(name, 0)] if weight]
            end = lengths.get(name, 0)
        return own

    @contextmanager
    def _aside(self, model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
        names = [name for name in (*BOOKS, TOKENS) if name in vars(self)]
        kept = {name: copy.deepcopy(getattr(self, name)) for name in names}
        try:
            with super()._aside(model, dropout=dropout):
                yield
        finally:
            vars(self).update(kept)


class AttachedSFT(AttachedTRL):
    """Take the plain token loss where that of `SFTTrainer` is the same, but for its metrics.

    Its entropy and accuracy take another pass over the logits. They are for the log, so that only
    steps that are logged compute them. Whether the plain loss is the same, value and gradient, is
    measured on two rows at the first step. A `compute_loss` of the user's is left alone.
    """

    _is_plain: bool | None = None  # None: not measured yet

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._is_plain = None
        return super().train(*args, **kwargs)

    def _ready(self, inputs: Any) -> Any:
        return PLAIN.ready(inputs)

    def _prepare(self, model: nn.Module, given: Examples) -> Window:
        if self._is_plain is None and self.is_in_train and len(given.examples) > 1:
            self._is_plain = self._is_own_trl() and not self._unlike(model, given.examples)
        window = super()._prepare(model, given)
        if self._runs_plain():
            tokens = sum(_num_tokens(inputs) for inputs in window.inputs)
            setattr(self, TOKENS, getattr(self, TOKENS) + tokens)
            self._books()["num_tokens"] = [getattr(self, TOKENS)]
        return window

    def _loss(self, model: nn.Module, inputs: Any, count: Tensor | None) -> Tensor:
        if count is not None and self._runs_plain():
            return self._plain_loss(model, inputs, count)
        inputs = {key: value for key, value in inputs.items() if key != TRAINED}
        with _trained_positions_only(self.args.device):
            return super()._loss(model, inputs, count)

    def _plain_loss(self, model: nn.Module, inputs: Any, count: Tensor) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return PLAIN.loss(model, {**inputs, "use_cache": False}) / count

    def _runs_plain(self) -> bool:
        """Tell whether this step does without metrics."""
        args, step = self.args, self.state.global_step + 1
        every = self.accumulation.metrics_every or max(1, self.state.logging_steps)
        # Not by where the run ends: one that is resumed computes each step as if it had gone on.
        is_logged = step % every == 0 or (args.logging_first_step and step == 1)
        is_by_steps = args.logging_strategy == IntervalStrategy.STEPS
        return bool(self._is_plain) and self.is_in_train and is_by_steps and not is_logged

    def _is_own_trl(self) -> bool:
        is_replaced = "compute_loss" in vars(self) or self.compute_loss_func is not None
        return not is_replaced and type(self).compute_loss.__module__.startswith("trl.")

    def _unlike(self, model: nn.Module, examples: list[Any]) -> str:
        """Return by what the plain loss differs from the trainer's, or ""."""
        order = sorted(range(len(examples)), key=lambda i: length(examples[i]))
        rows = [order[len(order) // 4], order[len(order) // 2]]
        batch = Listed(examples, self.data_collator).settled(rows)
        unwrapped = module_of(model)

        def ran(loss: Any, chosen: list[int]) -> tuple[list[Tensor], float]:
            inputs, values = batch.take(chosen), []

            def run() -> None:
                count = shifted_tokens(inputs).to(self.args.device).clamp(min=1)
                value = loss(unwrapped, inputs, count)
                value.backward()
                values.append(value.item())

            return measures.gradients(unwrapped, run, most=SAMPLE), values[0]

        with self._aside(model):
            expected, value = ran(self._loss, [0, 1])
            turned, _ = ran(self._loss, [1, 0])
            try:
                found, plain = ran(self._plain_loss, [0, 1])
            except Exception as error:
                unwrapped.zero_grad()
                if is_out_of_memory(error):
                    raise
                return f"it fails ({error})"
        if abs(plain - value) > 1e-3 * abs(value):
            return f"the loss is {plain} and not {value}"
        computed = COMPUTED.get(self.accelerator.mixed_precision)
        return different(unwrapped, found, expected, [turned], computed)


class AttachedKTO(AttachedTRL, KTOTrainer):
    """Take the baseline of KTO over the whole effective batch.

    Its loss compares each row with an estimate of the KL divergence, a mean without gradient over
    the rows of the batch, so that micro-batches would each have their own. It needs forwards of
    other inputs than the loss; those of the whole window run first, and are not run again.
    """

    _baseline: Tensor | None = None  # None: TRL's own, of the batch at hand

    def _prepare(self, model: nn.Module, given: Examples) -> Window:
        self._baseline = torch.zeros((), device=self.args.device)  # any constant is measured alike
        window = super()._prepare(model, given)
        if self.calculate_KL:
            self._baseline = None
            found = [self._log_ratios(model, self._prepare_inputs(x)) for x in window.inputs]
            self._baseline = self._mean_of_all(torch.cat(found) if found else torch.zeros(0))
        return window

    def _mean_of_all(self, ratios: Tensor) -> Tensor:
        """Return the mean over the effective batch, on all ranks, of this rank's values."""
        accumulator = self.accumulation.accumulator
        if self.accelerator.num_processes == 1 or accumulator is None:
            return ratios.mean()
        told = {"sum": ratios.double().sum().item(), "num": len(ratios)}
        heard = accumulator.exchange(told)
        mean = sum(said["sum"] for said in heard) / sum(said["num"] for said in heard)
        return torch.tensor(mean, dtype=torch.float32, device=self.args.device)

    def _log_ratios(self, model: nn.Module, batch: Any) -> Tensor:
        """Return log p / p_ref of the unrelated completions, shape (rows,)."""
        policy: Any = super()._compute_kl_logps(model, batch)
        if self.precompute_ref_logps:
            return policy - batch["ref_KL_logps"]
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        own: Any = self.accelerator.unwrap_model(self.model)
        adapter, reference = nullcontext(), self.ref_model
        if reference is None:
            reference = self.model
            adapter = use_adapter(own, adapter_name="ref" if "ref" in own.peft_config else None)
        with disable_gradient_checkpointing(own, checkpointing), adapter:
            return policy - super()._compute_kl_logps(reference, batch)

    def _compute_kl_logps(self, model: nn.Module, batch: Any) -> Tensor | None:
        if self._baseline is None or not self.calculate_KL:
            return super()._compute_kl_logps(model, batch)
        # Asked of the policy first and then of the reference, whose difference is taken.
        self._of_policy = not getattr(self, "_of_policy", False) or self.precompute_ref_logps
        known = (
            batch["ref_KL_logps"] if self.precompute_ref_logps else torch.zeros(len(batch["label"]))
        )
        return known.to(self._baseline) + (self._baseline if self._of_policy else 0.0)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._baseline = None
        return super().prediction_step(*args, **kwargs)


def mixin(trainer: Trainer) -> type[Attached]:
    """Return what is to be mixed into a trainer of TRL; `Attached` where nothing more is needed."""
    for own, found in ((SFTTrainer, AttachedSFT), (KTOTrainer, AttachedKTO)):
        if isinstance(trainer, own):
            return found
    return AttachedTRL if any(name in vars(trainer) for name in BOOKS) else Attached


def _num_tokens(inputs: Any) -> int:
    """Count tokens as `SFTTrainer` does."""
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return inputs["position_ids"].shape[1]


def _trained_positions_only(device: torch.device) -> AbstractContextManager[None]:
    """Let TRL's loss head score only the positions that are trained, as it does on CUDA.

    Elsewhere it scores prompts and padding too and drops the result, for compilers that want fixed
    shapes (`_fused_forward` in trl/trainer/utils.py). On a CPU that is a quarter of a step.
    """
    if device.type != "cpu" or not hasattr(utils, "_use_triton"):
        return nullcontext()
    return replaced(utils, "_use_triton", lambda device: True)
