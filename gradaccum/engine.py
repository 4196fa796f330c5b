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
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradaccum import device as device_memory
from gradaccum.batch import Collate, HostBatch, as_batch
from gradaccum.compiled import in_any_shape, is_compiled, num_graphs
from gradaccum.errors import (
    LESS_MEMORY,
    BadInput,
    CountMismatch,
    DoesNotFit,
    NotDecomposable,
    PeerFailed,
    RankDisagreement,
)
from gradaccum.objective import Objective, by_term, shares, sum_and_weight, unweighted
from gradaccum.packing.plan import Layout
from gradaccum.parts import drawn, square_norm, sums_of_squares
from gradaccum.split import split_parts
from gradaccum.state import Past, Random, accumulating, batch_norms
from gradaccum.sync.alone import AGAIN, Alone, Hearing, Message, OtherQuestions
from gradaccum.sync.choose import is_sharded, module_of, num_ranks, ranks_of
from gradaccum.sync.replicated import digest, warn_of_same
from gradaccum.trees import to_device
from gradaccum.types import Budget, Micro, Recovery, Share, Step

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
        hearing: Says and hears what there is to say about it.
        heard: What ranks said when it was counted.
        parts: For each part that was drawn, how many micro-batches and examples there are up to its
            end; None where the batch is not in parts.
    """

    micros: tuple[Micro, ...]
    inputs: tuple[Any, ...]
    losses: tuple[Callable[[nn.Module, Any], Any], ...]
    weights: tuple[dict[str, float], ...] | None
    totals: dict[str, float] | None
    unit: str
    host: HostBatch
    random: tuple[Random, Random]
    hearing: Hearing
    heard: Sequence[Message] = ()
    parts: tuple[tuple[int, int], ...] | None = None

    @property
    def share(self) -> Share:
        """Return what this rank has of the effective batch."""
        padded, useful = sum(m.size for m in self.micros), sum(m.useful for m in self.micros)
        return Share(len(self.micros), len(self.host), padded, useful)


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
            With a `layout`, micro-batches run without padding, and cost the sum of their sizes.
        collate: Turns a list of examples into a micro-batch; `pad_collate` if not given.
        accumulate_dtype: Keep the sum at least this wide; None: in each parameter's own dtype.
        grad_dtype: Hand over gradients in this dtype, and leave `p.grad_dtype` at it; None: in
            what `p.grad_dtype` says already, the parameter's own dtype unless somebody set it.
        backward: Runs the backward pass of one scaled loss, for those who wrap it:
            `lambda loss: scaler.scale(loss).backward()`, `accelerator.backward`.
        after_micro: Is called with each `Micro` once it is queued on the device.
        sync: How a model that `fully_shard` has sharded is accumulated: with gradients reduced in
            "each" micro-batch (least memory), or "once" per step, or with its parameters on
            "hold", gathered once per step (least communication; ranks restart alone). None: "hold"
            where there is memory for it, else "each".

    Attributes:
        parts: Where set, steps run in parts that are drawn by these numbers, and measure
            `Step.squares`; for `NoiseScale`.

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
        sync: Literal["each", "once", "hold"] | None = None,
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
        self.layout: Layout | None = None
        self.parts: tuple[int, ...] | None = None
        self._collate = collate
        self._accumulate_dtype = accumulate_dtype
        self._grad_dtype = grad_dtype
        self._backward = backward
        self._after_micro = after_micro
        self._sync = sync
        self._last: Step | None = None
        self._running: Micro | None = None
        self._ranks: Alone | None = None
        self._hearing: Hearing | None = None  # of the step that is being prepared
        self._is_first = True  # step of these ranks, in which they compare their examples

    @property
    def ranks(self) -> Alone:
        """Return who trains the model together; found at the first step, by all ranks at once."""
        if self._ranks is None or self._ranks.world != num_ranks():
            found = ranks_of(self.model, self._sync)
            found.require_same(self.model)  # if they differ, it is asked again
            self._ranks, self._is_first = found, True
        return self._ranks

    def prepare(self, batch: Any) -> Window:
        """Cut, collate and count an effective batch on the host; `backward` takes the result.

        Each example is collated once, so a collator that draws random numbers draws them once. On
        several ranks this is a rank's share, which `backward` counts again, with all others.

        Raises:
            BadInput: The batch is empty or a weight is negative or not finite.
        """
        hearing = self._hearing or Hearing(Alone())
        before = Random()
        host = as_batch(
            batch, self._collate, trim=self.objective.trim, may_be_empty=num_ranks() > 1
        )
        shared = self.layout.shared if self.layout is not None else None
        budget = self.budget.within(self.limit)
        parts = [range(len(host))] if self.parts is None else drawn(len(host), *self.parts)
        cut = split_parts(host, parts, self.objective, budget, shared=shared)
        micros = [micro for part in cut for micro in part]
        inputs = tuple(self.objective.ready(host.take(micro.examples)) for micro in micros)
        window = Window(
            tuple(micros), inputs, (), None, None, "", host, (before, Random()), hearing
        )
        if self.parts is not None:
            ends = zip(accumulate(map(len, cut)), accumulate(map(len, parts)), strict=True)
            window = dataclasses.replace(window, parts=tuple(ends))
        return self._counted(window, hearing)

    def _counted(self, window: Window, hearing: Hearing) -> Window:
        """Return the window with its losses and weights, and those of all ranks in sum."""
        objective, micros, inputs = self.objective, window.micros, window.inputs
        losses, unit = (objective.loss,) * len(micros), objective.unit
        share, weights, totals = window.share, None, None

        def exchange(message: Message, num_runs: int = len(micros)) -> list[Message]:
            is_own = hearing.ranks.restarts_alone  # else the time of a window is that of all
            rate = self._rate() if is_own and hearing.ranks.world > 1 else 0.0
            own = {"share": share, "num_runs": num_runs, "rate": rate}
            if self._is_first and hearing.ranks.world > 1:
                own["examples"] = digest(inputs)
            return hearing.exchange(message | own)

        if objective.resolve is not None:
            if is_sharded(self.model):
                raise BadInput(
                    "this loss is measured by forwards that each rank runs on its own, and the "
                    "model is sharded by fully_shard, whose forwards take all ranks",
                    hint='causal_lm(), or from_mean(loss, weight="tokens")',
                )
            _refuse_coupled(self.model, len(micros))
            losses, weights, totals, unit = objective.resolve(
                module_of(self.model), window.host, list(micros), inputs, exchange
            )
            self._running = micros[0] if micros else None
        elif objective.weight is None:
            exchange({})
        else:
            weights = tuple(by_term(objective.weight(part)) for part in inputs)
            self._running = micros[0] if micros else None
            names = {name: None for weight in weights for name in weight}
            if any(weight.keys() != names.keys() for weight in weights):
                raise CountMismatch(
                    f"the weight of some micro-batches lacks one of the terms {sorted(names)}",
                    hint="return every term for every micro-batch, 0 where it does not occur",
                )
            own = {name: math.fsum(weight[name] for weight in weights) for name in names}
            totals = _summed(exchange({"weights": own}, sum(any(w.values()) for w in weights)))
        return dataclasses.replace(
            window,
            losses=losses,
            weights=weights,
            totals=totals,
            unit=unit,
            hearing=hearing,
            heard=hearing.last,
        )

    def exchange(self, message: Message) -> list[Message]:
        """Say a message to all ranks while they prepare a batch; return those of all, in order.

        For losses that need figures of the whole effective batch. Every rank has to call it equally
        often in a step, so not for each micro-batch, of which ranks have different numbers.
        Elsewhere than in what `backward` calls, this rank is alone.

        Args:
            message: What JSON can hold; under other keys than "failed".
        """
        return (self._hearing or Hearing(Alone())).exchange(message)

    def backward(self, batch: Any) -> Step:
        """Fill `.grad` with the gradient of the effective batch.

        Whatever fails, the gradients of this window are dropped: never half a batch. If memory
        runs out, random state and buffers are put back and the whole batch runs again, in
        micro-batches of half the size that failed: bit for bit what they give at once.

        On several ranks (torch.distributed is initialised) each calls this with its share of the
        effective batch, which may be empty, and finds the gradient of the whole. A rank that runs
        out of memory runs its share again while the others wait.

        Args:
            batch: A list of examples on the host, a collated batch, what `prepare` returned, or a
                function that returns that, which is called again after memory ran out.

        Raises:
            BadInput: Gradients of an unfinished step are still there; the batch is empty.
            CountMismatch: `loss` and `weight` name different terms.
            DoesNotFit: Memory ran out at a single example.
            NotDecomposable: There are several micro-batches, and BatchNorm is in training mode or
                a hook waits for accumulated gradients.
            PeerFailed: Another rank raised one of these, or is gone.
            RankDisagreement: The ranks have different models or losses.
        """
        ranks = self.ranks
        try:
            past, recoveries = Past(self.model, largest=KEPT), list[Recovery]()
        except Exception as error:
            ranks.fail(error)
            raise
        hearing = Hearing(ranks)
        while True:
            said, is_first, began = "", True, time.perf_counter()
            try:
                step = self._attempt(batch, hearing)
                self._last = dataclasses.replace(step, recoveries=tuple(recoveries))
                self._is_first = False
                return self._last
            except (PeerFailed, RankDisagreement):
                raise
            except OtherQuestions as asked:
                is_first = asked.is_first
            except Exception as error:
                if self._running is None or not device_memory.is_out_of_memory(error):
                    try:
                        ranks.abandon()
                    finally:
                        ranks.fail(error)
                    raise
                said = (str(error) or type(error).__name__).splitlines()[0]
                device_memory.let_go(error)
            # Only out here has the traceback let go of the activations.
            try:
                is_eased = ranks.abandon() if said else False
                past.restore()
                if isinstance(batch, Window):
                    batch = functools.partial(self._prepare_again, batch, past.random)
                device_memory.release(next(self.model.parameters()).device)
                if said and not is_eased:
                    assert self._running is not None, "memory ran out in it"
                    recovery = self._shrink(self._running, said)
                    seconds = time.perf_counter() - began
                    recoveries.append(dataclasses.replace(recovery, seconds=seconds))
                    logger.warning(str(recoveries[-1]))
            except Exception as error:
                ranks.fail(error)
                raise
            if said and ranks.restarts_alone:
                hearing.again()
                continue
            if is_first:
                ranks.exchange({AGAIN: True})
            hearing = Hearing(ranks)

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
            holds_more = self._sync in ("once", "hold")
            hint = f"sync='each', or {LESS_MEMORY}" if holds_more else LESS_MEMORY
            raise DoesNotFit(
                f"example {failed.examples[0]} of the effective batch, of size {failed.size:,}, "
                f"does not fit into memory by itself: {said}",
                hint=hint,
            )
        is_by_size = self.budget.tokens is not None and failed.size > 1
        half = Budget(tokens=failed.size // 2) if is_by_size else Budget(examples=num // 2)
        self.limit = half.within(self.limit)
        return Recovery(failed, self.limit, said)

    def attempt(self, batch: Any) -> Step:
        """Do as `backward` does, once and by this rank alone: if memory runs out, that is raised.

        Raises:
            Exception: As `backward`, without `DoesNotFit`.
        """
        if is_sharded(self.model):
            raise BadInput(
                "a rank cannot run micro-batches by itself, to measure or verify, of a model that "
                "is sharded by fully_shard",
                hint="state a Budget(tokens=...), and verify the model before it is sharded",
            )
        return self._attempt(batch, Hearing(Alone()))

    def _attempt(self, batch: Any, hearing: Hearing) -> Step:
        ranks = hearing.ranks
        parameters = ranks.parameters(self.model)
        if not parameters:
            raise BadInput("the model has no parameter that requires a gradient")
        _require_cleared(parameters, ranks)
        window = self._window(batch, hearing)
        heard = window.heard
        given = [Share(*said["share"]) for said in heard]
        if not any(share.num_examples for share in given):
            raise BadInput("the effective batch has no examples")
        if ranks.rank == 0:
            warn_of_same([said.get("examples", "") for said in heard])
        _refuse_coupled(self.model, sum(share.num_micros for share in given))
        device = parameters[0].device
        stop, graphs = device_memory.stopwatch(device), num_graphs()
        names = tuple(window.totals or ("loss",))
        attention = nullcontext()
        if self.layout is not None or _is_ragged(window.micros):
            attention = device_memory.attending_any_shape(device)
        with accumulating(parameters, self._accumulate_dtype, self._grad_dtype):
            num_fillers = ranks.begin(parameters, [said["num_runs"] for said in heard])
            with attention:
                ran, losses, reported, norms = self._run(window, parameters, ranks, num_fillers)
            took = stop()
            self._warn_of_last()  # only now: it waits for that step, and the device has work again
            losses = torch.stack(losses) if losses else torch.zeros(0, device=device)
            losses = losses.view(-1, len(names))
            # What is left to do takes no part of the batch.
            self._running = window.micros[0] if window.micros else None
            used, shares = _ended(parameters, ranks, window)
            if ranks.world > 1:
                self._running = None  # the others go on: it is too late to run again alone
            wide = torch.float32 if device.type == "mps" else torch.float64
            late = torch.stack(reported).sum() if reported else torch.zeros((), device=device)
            squares = None
            own = [losses.sum(0), late[None]]
            if window.parts is not None:
                weights = _weighed(window, reported, device)
                own.append(sums_of_squares(norms, weights, window.parts))
            sums = ranks.reduce(parameters, used, torch.cat([part.to(wide) for part in own]))
            sums, late, found = sums[: len(names)], sums[len(names)], sums[len(names) + 1 :]
            divisor = torch.where(late == 0, 1, late)
            if window.totals is None:
                sums, losses = sums / divisor, losses / divisor
                for p in parameters:
                    if p.grad is not None:
                        p.grad.div_(divisor)
            elif not any(window.totals.values()):
                warnings.warn(f"no {window.unit}: the gradients are zero", stacklevel=3)
                for p in parameters:
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
            if window.parts is not None:
                whole = square_norm([p.grad for p in parameters if p.grad is not None])
                over = divisor if window.totals is None else 1
                weight = divisor
                if window.totals is not None:
                    num = sum(share.num_examples for share in shares)
                    weight = num if len(names) > 1 else sum(window.totals.values())
                squares = torch.stack([whole, found[0] / over**2, found[1] / weight**2])
            total = sums.sum().to(losses.dtype)
            on_host = [x.to("cpu", non_blocking=True) for x in (losses, sums, late)]
        return Step(
            micros=window.micros,
            shares=shares,
            rank=ranks.rank,
            rates=tuple(said.get("rate", 0.0) for said in heard),
            sync=ranks.policy,
            weights=window.totals,
            unit=window.unit,
            peak_bytes=device_memory.peak_bytes(device),
            total_bytes=device_memory.total_bytes(device),
            num_graphs=num_graphs() - graphs,
            names=names,
            loss_tensor=total,
            recoveries=(),
            _losses=on_host[0],
            _sums=on_host[1],
            _ran=ran,
            _late_weight=on_host[2],
            _squares=None if squares is None else squares.to("cpu", non_blocking=True),
            _took=took,
            _wait=stop(),
        )

    def _window(self, batch: Any, hearing: Hearing) -> Window:
        """Return the window that is to run, counted with all ranks."""
        self._running, self._hearing = None, hearing
        try:
            window = batch() if callable(batch) else batch
            window = window if isinstance(window, Window) else self.prepare(window)
            if window.hearing.ranks is not hearing.ranks and hearing.ranks.world > 1:
                window = self._counted(window, hearing)  # it was prepared ahead, by this rank alone
            return window
        finally:
            self._hearing = None

    def _run(
        self, window: Window, parameters: list[nn.Parameter], ranks: Alone, num_fillers: int
    ) -> tuple[tuple[int, ...], list[Tensor], list[Tensor], list[Tensor]]:
        """Run every micro-batch forward and backward.

        Returns:
            Which micro-batches ran; their shares of the loss by term, one after the other, on the
            device; the weights that the losses reported; the squared norm after each part.
        """
        model, device = module_of(self.model), parameters[0].device
        ran: list[int] = []
        losses: list[Tensor] = []
        reported: list[Tensor] = []
        norms: list[Tensor] = []
        ends = {end for end, _ in window.parts or ()}
        filler = ranks.borrow(self._filler(window))
        running = self.layout.running if self.layout is not None else lambda *_: nullcontext()
        is_shaped = is_compiled(model)
        for i, (micro, inputs) in enumerate(zip(window.micros, window.inputs, strict=True)):
            self._running = micro
            # A micro-batch without weight adds zero; running it could add 0 * inf instead.
            if window.weights is None or any(window.weights[i].values()):
                moved = to_device(inputs, device)
                if is_shaped:
                    in_any_shape(moved)
                with ranks.micro(), running(inputs, moved):
                    losses += self._run_micro(window, i, moved, device, reported)
                ran.append(i)
            if self._after_micro is not None:
                self._after_micro(micro)
            if i + 1 in ends:
                norms.append(square_norm([p.grad for p in parameters if p.grad is not None]))
        for _ in range(num_fillers):
            with ranks.micro(is_filler=True):
                loss = unweighted(self.objective).loss(model, to_device(filler, device))
                with torch.autocast(device.type, enabled=False):
                    self._backward(loss)
        return tuple(ran), losses, reported, norms

    def _run_micro(
        self, window: Window, i: int, inputs: Any, device: torch.device, reported: list[Tensor]
    ) -> list[Tensor]:
        """Run one micro-batch; return its shares of the loss by term, and nothing of the graph.

        The graph goes while it is still in the caches, not in the forward that follows.
        """
        loss = window.losses[i](module_of(self.model), inputs)
        if window.weights is None or window.totals is None:
            part, weight = sum_and_weight(loss, device)
            parts = [part]
            reported.append(weight)
        else:
            parts = shares(loss, window.weights[i], window.totals)
        # Autocast is for forwards; its documentation advises against it in backward.
        with torch.autocast(device.type, enabled=False):
            self._backward(sum(parts[1:], parts[0]))
        return [part.detach().to(device) for part in parts]

    def _filler(self, window: Window) -> Any:
        """Return the inputs of the smallest micro-batch that has a weight, None without one."""
        weights = window.weights or [{"loss": 1.0}] * len(window.micros)
        pairs = zip(window.inputs, weights, strict=True)
        return next((x for x, weight in reversed(list(pairs)) if any(weight.values())), None)

    def _rate(self) -> float:
        """Return the useful size a second of the last step, once the device is done with it."""
        useful = self._last.shares[self._last.rank].useful if self._last is not None else 0
        return useful / max(self._last.seconds, 1e-9) if self._last is not None else 0.0

    def _warn_of_last(self) -> None:
        """Warn if the loss of the step before this one was not finite."""
        for micro in self._last.nonfinite if self._last is not None else ():
            warnings.warn(
                f"the loss of the last step was not finite: examples {list(micro.examples)} of "
                f"the effective batch, a micro-batch of size {micro.size:,}",
                stacklevel=4,
            )


def _require_cleared(parameters: list[nn.Parameter], ranks: Alone) -> None:
    """Drop gradients that are zero; refuse others. Only looking at zeros waits for the device."""
    found = [ranks.local(p.grad) for p in parameters if p.grad is not None]
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


def _summed(heard: list[Message]) -> dict[str, float]:
    """Return the weights of all ranks in sum, by term."""
    given = [said["weights"] for said in heard if said["weights"]]
    names = {name: None for weights in given for name in weights}
    if any(weights.keys() != names.keys() for weights in given):
        raise RankDisagreement(f"the weights of some ranks lack one of the terms {sorted(names)}")
    return {name: math.fsum(weights[name] for weights in given) for name in names}


def _weighed(window: Window, reported: list[Tensor], device: torch.device) -> Tensor:
    """Return the weight of each micro-batch; of several terms, how many examples it has."""
    if reported:
        return torch.stack(reported)
    is_one = window.totals is not None and len(window.totals) == 1
    given = zip(window.micros, window.weights or (), strict=True)
    return torch.tensor(
        [sum(weight.values()) if is_one else len(micro.examples) for micro, weight in given],
        dtype=torch.float32,
        device=device,
    )


def _ended(
    parameters: list[nn.Parameter], ranks: Alone, window: Window
) -> tuple[list[bool], tuple[Share, ...]]:
    """Say that this rank is done; return of which parameters any rank has a gradient, and shares.

    Raises:
        OtherQuestions: A rank asks to run all again.
    """
    if ranks.world > 1 and any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise BadInput("sparse gradients are not added over ranks", hint="Embedding(sparse=False)")
    own = sum(1 << i for i, is_held in enumerate(ranks.holds(parameters)) if is_held)
    layout = ranks.layout if window.parts is None else f"{ranks.layout} and squares"
    heard = ranks.exchange({"grads": f"{own:x}", "share": window.share, "layout": layout})
    if any(AGAIN in said for said in heard):
        raise OtherQuestions(is_first=False)
    layouts = dict.fromkeys(said["layout"] for said in heard)
    if len(layouts) > 1:
        raise RankDisagreement(
            f"the gradients of ranks do not fit together: {'; '.join(layouts)}",
            hint="train the same parameters on every rank, with the same accumulate_dtype",
        )
    found = functools.reduce(int.__or__, (int(said["grads"], 16) for said in heard))
    used = [bool(found >> i & 1) for i in range(len(parameters))]
    for p, is_used in zip(parameters, used, strict=True):
        if not is_used:
            p.grad = None
    return used, tuple(Share(*said["share"]) for said in heard)


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
            hint="put these modules in eval mode, use GroupNorm, or, on one rank, a budget for the "
            "whole batch",
        )
