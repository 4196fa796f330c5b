"""The core: run an effective batch in micro-batches and leave the full batch's gradient.

    for micro in split(batch, objective, budget):        # largest first
        loss = objective.loss(model, collate(micro))     # a sum
        (loss / weight of the whole batch).backward()    # adds into .grad

The weight is counted on the host before the first forward. Nothing in the loop waits for the
device. If memory runs out, the step's gradients are dropped, what its forwards changed is put back,
and the whole effective batch runs again in smaller micro-batches. The optimizer step, clipping, the
scaler, the scheduler and logging are not here and never will be: they belong to whoever calls.
"""

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum import device as device_memory
from gradaccum.batch import Collate, HostBatch, as_batch
from gradaccum.errors import LESS_MEMORY, BadInput, CountMismatch, DoesNotFit, NotDecomposable
from gradaccum.objective import Objective, by_term, shares, sum_and_weight
from gradaccum.split import split
from gradaccum.state import Past, Random, accumulating, batch_norms
from gradaccum.trees import to_device
from gradaccum.types import Budget, Micro, Recovery, Step

KEPT = 2**20  # elements of buffers that are kept in each step, to be put back if it runs again
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Window:
    """Hold an effective batch that is cut, collated and counted, still on the host.

    Args:
        micros: The micro-batches, largest first.
        inputs: Their collated inputs, in the same order.
        losses: The loss of each, as in `Objective`.
        weights: Their weights by term; None where the loss reports its weight.
        totals: The weights of the whole effective batch by term.
        unit: What the weights count.
        host: The effective batch, to be cut again if a micro-batch does not fit.
        random: The random state before it was collated, and after.
    """

    micros: tuple[Micro, ...]
    inputs: tuple[Any, ...]
    losses: tuple[Callable[[nn.Module, Any], Any], ...]
    weights: tuple[dict[str, float], ...] | None
    totals: dict[str, float] | None
    unit: str
    host: HostBatch
    random: tuple[Random, Random]


class Accumulator:
    """Leave in `.grad` what one pass over the whole effective batch would have left.

    Parameters of 16 bits are accumulated in `accumulate_dtype`: 4 bytes a parameter while the
    window runs, instead of 2. At its end each gradient is handed over in the parameter's own
    dtype, rounded once (2 bytes a parameter again, one tensor at a time). With
    `grad_dtype=torch.float32` it stays in float32 (4 bytes a parameter until it is cleared), for
    optimizers that take it: SGD, Adafactor, Adagrad, RMSprop, Muon; AdamW and fused SGD refuse.

    Dropout draws other masks for other splits, as it does for other seeds. BatchNorm in training
    mode has no exact accumulation and is refused, unless one micro-batch holds the whole batch.

    In a batch that is collated already, every tensor whose first dimension is the number of rows
    is sliced. Constants (class weights, prototypes) belong in the objective, not the batch.

    Args:
        model: Any module that holds all parameters to train, those of a loss as well. Frozen,
            tied and unused parameters are fine.
        objective: What is minimised, see `Objective`.
        budget: How large one micro-batch may be. May be set anew between two calls. Once memory
            has run out, `limit` holds as well: half of what did not fit, until it is set to None.
        collate: Turns a list of examples into a micro-batch; `pad_collate` if not given.
        accumulate_dtype: Keep the sum at least this wide; None: in each parameter's own dtype.
        grad_dtype: Hand over gradients in this dtype, and leave `p.grad_dtype` at it; None: in
            what `p.grad_dtype` says already, the parameter's own dtype unless somebody set it.
        backward: Runs the backward pass of one scaled loss, for those who wrap it:
            `lambda loss: scaler.scale(loss).backward()`, `accelerator.backward`.
        after_micro: Is called with each `Micro` once it is queued on the device.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> objective = Objective(
        ...     loss=lambda model, micro: (model(micro["x"]) - micro["y"]).square().sum(),
        ...     weight=lambda micro: len(micro["y"]),
        ...     unit="rows",
        ... )
        >>> accumulator = Accumulator(model, objective, budget=Budget(examples=2))
        >>> step = accumulator.backward({"x": torch.ones(5, 3), "y": torch.zeros(5, 1)})
        >>> step.num_micros, step.weight, model.weight.grad.shape
        (3, 5.0, torch.Size([1, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        budget: Budget,
        collate: Collate | None = None,
        accumulate_dtype: torch.dtype | None = torch.float32,
        grad_dtype: torch.dtype | None = None,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        after_micro: Callable[[Micro], None] | None = None,
    ) -> None:
        for given, kind in ((objective, Objective), (budget, Budget)):
            if not isinstance(given, kind):
                raise BadInput(f"{given!r} is no gradaccum.{kind.__name__}")
        for name, dtype in (("accumulate_dtype", accumulate_dtype), ("grad_dtype", grad_dtype)):
            if dtype is not None and not isinstance(dtype, torch.dtype):
                raise BadInput(f"{name}={dtype!r} is no torch.dtype", hint=f"{name}=torch.float32")
        if grad_dtype is not None and accumulate_dtype is None:
            raise BadInput(f"grad_dtype={grad_dtype} needs an accumulate_dtype to be summed in")
        self.model = model
        self.objective = objective
        self.budget = budget
        self.limit: Budget | None = None
        self._collate = collate
        self._accumulate_dtype = accumulate_dtype
        self._grad_dtype = grad_dtype
        self._backward = backward
        self._after_micro = after_micro
        self._last: Step | None = None
        self._running: Micro | None = None

    def prepare(self, batch: Any) -> Window:
        """Cut, collate and count an effective batch on the host; `backward` takes the result.

        Each example is collated once, so a collator that draws random numbers draws them once.

        Raises:
            BadInput: The batch is empty or a weight is negative or not finite.
        """
        before = Random()
        host: HostBatch = as_batch(batch, self._collate, trim=self.objective.trim)
        micros = split(host, self.objective, self.budget.within(self.limit))
        inputs = tuple(host.take(micro.examples) for micro in micros)
        losses, unit = (self.objective.loss,) * len(micros), self.objective.unit
        if self.objective.resolve is not None:
            _refuse_coupled(self.model, len(micros))
            losses, weights, unit = self.objective.resolve(self.model, host, micros, inputs)
        elif self.objective.weight is None:
            drawn = before, Random()
            return Window(tuple(micros), inputs, losses, None, None, unit, host, drawn)
        else:
            weights = tuple(by_term(self.objective.weight(part)) for part in inputs)
        self._running = micros[0]
        names = {name: None for weight in weights for name in weight}
        if any(weight.keys() != names.keys() for weight in weights):
            raise CountMismatch(
                f"the weight of some micro-batches lacks one of the terms {sorted(names)}",
                hint="return every term for every micro-batch, 0 where it does not occur",
            )
        totals = {name: math.fsum(weight[name] for weight in weights) for name in names}
        drawn = before, Random()
        return Window(tuple(micros), inputs, losses, weights, totals, unit, host, drawn)

    def backward(self, batch: Any) -> Step:
        """Fill `.grad` with the gradient of the effective batch.

        Whatever fails, the gradients of this window are dropped: never half a batch. If memory
        runs out, random state and buffers are put back and the whole batch runs again, in
        micro-batches of half the size that failed: bit for bit what they give at once.

        Args:
            batch: A list of examples on the host, a collated batch, what `prepare` returned, or a
                function that returns that, which is called again after memory ran out.

        Raises:
            BadInput: Gradients of an unfinished step are still there; the batch is empty; there
                is more than one process.
            CountMismatch: `loss` and `weight` name different terms.
            DoesNotFit: Memory ran out at a single example.
            NotDecomposable: There are several micro-batches, and BatchNorm is in training mode or
                a hook waits for accumulated gradients.
        """
        self._warn_of_last()
        past, recoveries = Past(self.model, largest=KEPT), list[Recovery]()
        while True:
            self._running = None
            try:
                self._last = dataclasses.replace(self.attempt(batch), recoveries=tuple(recoveries))
                return self._last
            except Exception as error:
                if self._running is None or not device_memory.is_out_of_memory(error):
                    raise
                said = (str(error) or type(error).__name__).splitlines()[0]
                device_memory.let_go(error)
            # Only out here has the traceback let go of the activations.
            past.restore()
            if isinstance(batch, Window):
                batch = functools.partial(self._prepare_again, batch, past.random)
            device_memory.release(next(self.model.parameters()).device)
            recoveries.append(self._shrink(self._running, said))
            logger.warning(str(recoveries[-1]))

    def _prepare_again(self, window: Window, now: Random) -> Window:
        """Cut it anew by the random state of the first time; go on with what came between."""
        before, after = window.random
        before.restore()
        again = self.prepare(window.host)
        if now != after:
            now.restore()
        return again

    def _shrink(self, failed: Micro, said: str) -> Recovery:
        """Halve the budget from what did not fit."""
        num = len(failed.examples)
        if num == 1:
            raise DoesNotFit(
                f"example {failed.examples[0]} of the effective batch, of size {failed.size:,}, "
                f"does not fit into memory by itself: {said}",
                hint=LESS_MEMORY,
            )
        is_by_size = self.budget.tokens is not None and failed.size > 1
        half = Budget(tokens=failed.size // 2) if is_by_size else Budget(examples=num // 2)
        self.limit = half.within(self.limit)
        return Recovery(failed, self.limit, said)

    def attempt(self, batch: Any) -> Step:
        """Do as `backward` does, once: if memory runs out, that error is raised.

        Raises:
            Exception: As `backward`, without `DoesNotFit`.
        """
        _refuse_ranks()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise BadInput("the model has no parameter that requires a gradient")
        _require_cleared(parameters)
        window = batch() if callable(batch) else batch
        window = window if isinstance(window, Window) else self.prepare(window)
        device = parameters[0].device
        _refuse_coupled(self.model, len(window.micros))
        stop = device_memory.stopwatch(device)
        late = None
        attention = nullcontext()
        if _is_ragged(window.micros):
            attention = device_memory.attending_any_shape(device)
        with accumulating(parameters, self._accumulate_dtype, self._grad_dtype):
            with attention:
                ran, losses, reported = self._run(window, device)
            self._running = window.micros[0]  # what is left to do takes no part of the batch
            if window.totals is None:
                late = torch.stack(reported).sum()
                divisor = torch.where(late == 0, 1, late)
                losses = losses / divisor
                for p in parameters:
                    if p.grad is not None:
                        p.grad.div_(divisor)
            elif not any(window.totals.values()):
                warnings.warn(f"no {window.unit}: the gradients are zero", stacklevel=3)
                for p in parameters:
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            total, on_host = losses.sum(), losses.to("cpu", non_blocking=True)
            late = None if late is None else late.to("cpu", non_blocking=True)
        return Step(
            micros=window.micros,
            weights=window.totals,
            unit=window.unit,
            peak_bytes=device_memory.peak_bytes(device),
            total_bytes=device_memory.total_bytes(device),
            names=tuple(window.totals or ("loss",)),
            loss_tensor=total,
            recoveries=(),
            _losses=on_host,
            _ran=ran,
            _late_weight=late,
            _wait=stop(),
        )

    def _run(
        self, window: Window, device: torch.device
    ) -> tuple[tuple[int, ...], Tensor, list[Tensor]]:
        """Run every micro-batch forward and backward.

        Returns:
            Which micro-batches ran; their share of the loss, shape (ran, terms), on the device;
            the weights that the losses reported.
        """
        ran: list[int] = []
        losses: list[Tensor] = []
        reported: list[Tensor] = []
        for i, (micro, inputs) in enumerate(zip(window.micros, window.inputs, strict=True)):
            self._running = micro
            # A micro-batch without weight adds zero; running it could add 0 * inf instead.
            if window.weights is None or any(window.weights[i].values()):
                loss = window.losses[i](self.model, to_device(inputs, device))
                if window.weights is None or window.totals is None:
                    part, weight = sum_and_weight(loss, device)
                    parts = [part]
                    reported.append(weight)
                else:
                    parts = shares(loss, window.weights[i], window.totals)
                # Autocast is for forwards; its documentation advises against it in backward.
                with torch.autocast(device.type, enabled=False):
                    self._backward(sum(parts[1:], parts[0]))
                losses.append(torch.stack([part.detach().to(device) for part in parts]))
                ran.append(i)
            if self._after_micro is not None:
                self._after_micro(micro)
        return tuple(ran), torch.stack(losses) if losses else torch.zeros(0, 1), reported

    def _warn_of_last(self) -> None:
        """Warn if the last step's loss was not finite; by now the device has long computed it."""
        step, self._last = self._last, None
        for micro in step.nonfinite if step is not None else ():
            warnings.warn(
                f"the loss of the last step was not finite: examples {list(micro.examples)} of "
                f"the effective batch, a micro-batch of size {micro.size:,}",
                stacklevel=3,
            )


def _require_cleared(parameters: list[nn.Parameter]) -> None:
    """Drop gradients that are zero; refuse others. Only looking at zeros waits for the device."""
    found = [p.grad for p in parameters if p.grad is not None]
    left = [grad.coalesce().values() if grad.is_sparse else grad for grad in found]
    if left and torch.nn.utils.get_total_norm(left) != 0:
        raise BadInput(
            f"{len(left)} parameters still hold gradients of an unfinished step",
            hint="call optimizer.step() and optimizer.zero_grad() after each backward(batch)",
        )
    for p in parameters:
        p.grad = None


def _is_ragged(micros: tuple[Micro, ...]) -> bool:
    """Tell whether examples differ in size, so that micro-batches differ in shape."""
    is_padded = any(micro.size != micro.useful for micro in micros)
    return is_padded or len({micro.size // len(micro.examples) for micro in micros}) > 1


def _refuse_ranks() -> None:
    """Refuse to leave the gradient of one rank's share, or as many reductions as micro-batches."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        if world > 1:
            raise BadInput(f"an Accumulator runs on one process so far, and this is one of {world}")


def _refuse_coupled(model: nn.Module, num_micros: int) -> None:
    """Refuse what would see each micro-batch where it should see the whole batch."""
    if num_micros == 1:
        return
    for name, p in model.named_parameters():
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise NotDecomposable(
                f"a hook on {name} runs whenever a gradient is accumulated (an optimizer that "
                f"steps inside backward?), at each of the {num_micros} micro-batches",
                hint="remove it, and step once after backward(batch)",
            )
    found = batch_norms(model)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise NotDecomposable(
            f"BatchNorm in training mode ({', '.join(found[:3])}{more}) normalises each of the "
            f"{num_micros} micro-batches by its own statistics, not by those of the batch",
            hint="put these modules in eval mode, use GroupNorm, or a budget for the whole batch",
        )
