"""Say before a run what fits, what is fastest, and choose it.

No weights and no device are needed: a step is traced on a twin of the model that holds no data.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradaccum.batch import Collate, as_batch
from gradaccum.causal import causal_lm
from gradaccum.errors import BadInput, DoesNotFit, NotDecomposable
from gradaccum.memory import choose
from gradaccum.memory.cap import Cap, cap_of, held_bytes
from gradaccum.memory.forecast import beyond_tensors, is_small
from gradaccum.memory.machine import GPU, Machine, measure
from gradaccum.memory.options import Option, Search
from gradaccum.memory.predict import Job, needs_whole
from gradaccum.memory.recipes import MakeOptimizer, optimizer_of
from gradaccum.memory.spread import Spread, spread_of
from gradaccum.objective import Objective
from gradaccum.types import Budget, amount, counted

LENGTH = 1024  # tokens of each example where nothing else is said, as TRL's max_length


@dataclass(frozen=True, slots=True)
class Plan:
    """Tell how an effective batch is best run. Print it for a sentence.

    Args:
        effective_batch: Examples in one step, of all ranks.
        spread: Of the model over ranks, as chosen. All else is told of the rank that has most.
        longest: Tokens of the longest example.
        chosen: Of the options within 2% of the fastest that fits, the one of least memory.
        options: All that were looked at, by settings and then by size.
        cap: What memory there is.
        machine: Whose speed ranks the options; only if `is_here` do its seconds mean something.
        assumptions: What was taken for granted.

    Example:
        >>> objective = causal_lm(chunk=plan.chosen.chunk)  # doctest: +SKIP
        >>> Accumulator(model, objective, budget=plan.budget)  # doctest: +SKIP
    """

    effective_batch: int
    spread: Spread
    longest: int
    chosen: Option
    options: tuple[Option, ...]
    cap: Cap
    machine: Machine
    assumptions: tuple[str, ...] = field(repr=False)

    @property
    def budget(self) -> Budget:
        """Return the largest micro-batch, as `Accumulator` and `attach` take it."""
        return self.chosen.budget

    def __str__(self) -> str:
        one = self.chosen
        is_even = one.budget.examples is not None
        size = f"{one.rows} x {one.length:,} tokens" if is_even else f"up to {one.budget}"
        about = "" if is_even else "about "
        place, each = amount(self.cap.stated_bytes), ""
        if self.spread.ranks > 1:
            place, each = f"{self.spread.ranks:,} ranks of {place}", " on each"
        text = (
            f"effective batch {self.effective_batch:,} on {place}: {about}"
            f"{counted(one.num_micros, 'micro-batch')} of {size}{each}, "
            f"{amount(one.peak_bytes)}, checkpointing {'on' if one.checkpointing else 'off'}"
        )
        if one.chunk is not None:
            text += f", loss in chunks of {one.chunk:,}"
        if self.spread.ranks > 1:
            text += f"; {self.spread}"
        if self.machine.is_here:
            text += f"; about {one.seconds:.2g} s a step"
        return text


def plan(
    model: Any,
    objective: Objective | None = None,
    *,
    effective_batch: int,
    ranks: int = 1,
    shard_ranks: int = 1,
    memory: str | float | None = None,
    optimizer: str | MakeOptimizer = "adamw",
    lengths: int | Sequence[int] = LENGTH,
    examples: Sequence[Any] | None = None,
    collate: Collate | None = None,
    checkpointing: bool | None = None,
    autocast: torch.dtype | None = None,
    device: str | None = None,
    assumptions: Sequence[str] = (),
) -> Plan:
    """Plan an effective batch: predict memory and time of every way to run it, and choose.

    Args:
        model: A module, real or on the meta device, or a configuration of transformers, whose
            causal language model it then is, in float32. It is traced in training mode and left
            as it is.
        objective: What is minimised; `causal_lm()` if not given.
        effective_batch: Examples in one step, at least 1, of all ranks together.
        ranks: That train the model; the plan is for the one with the largest share.
        shard_ranks: That hold one copy of the model together, by `fully_shard` with each layer as
            one group: `ranks` (FSDP2), a divisor of it (HSDP), or 1 (each holds all of it).
        memory: What there is for each rank: "20GiB", bytes, or a fraction of the device; by default
            what is available.
        optimizer: A name of transformers' `optim` ("adamw_torch_fused", "adamw_8bit", ...), or a
            function of the parameters.
        lengths: Tokens of each example, or one number for all.
        examples: Instead of lengths, examples of the data, whatever they are.
        collate: Makes a micro-batch of examples, as for `Accumulator`.
        checkpointing: Whether activations are computed again in backward; None: as is best, where
            the model can switch it.
        autocast: The dtype of autocast, if forwards run under it.
        device: "cpu" or "cuda"; by default what this machine has. It need not be here if `memory`
            is given.
        assumptions: What the caller has taken for granted, to be told with the plan.

    Raises:
        BadInput: An argument is wrong; the model cannot be traced and has no weights to measure.
        DoesNotFit: Nothing does; the numbers are told.

    Example:
        >>> from transformers import LlamaConfig  # doctest: +SKIP
        >>> print(plan(LlamaConfig(), effective_batch=64, memory="24GiB"))  # doctest: +SKIP
    """
    is_whole = isinstance(effective_batch, int) and not isinstance(effective_batch, bool)
    if not is_whole or effective_batch < 1:
        raise BadInput(f"effective_batch={effective_batch!r} is not a whole number of at least 1")
    place = torch.device(device or _device_here())
    if place.type not in ("cpu", "cuda"):
        raise BadInput(
            f"a plan is for cpu or cuda, and the device is {place.type}",
            hint='device="cuda", memory="24GiB" plans for a GPU that is elsewhere',
        )
    objective = objective or causal_lm()
    sizes, inputs = _inputs(lengths, examples, collate, objective)
    make, assumed = optimizer_of(optimizer)
    built = _module(model)
    spread = spread_of(built, ranks, shard_ranks, place)
    held = held_bytes(built) // shard_ranks
    cap = cap_of(memory, place, held_bytes=held if place.type == "cpu" else 0)
    if held > cap.num_bytes:
        raise DoesNotFit(
            f"the parameters alone take {amount(held)}, and there are {amount(cap.num_bytes)} for "
            f"tensors of the {amount(cap.stated_bytes)}",
            hint="a smaller dtype (bfloat16), 4-bit weights with LoRA, or more memory",
        )
    if place.type == "cuda":
        make = _as_on_cuda(make)
    here = place.type == "cpu" or torch.accelerator.is_available()
    floats = (p.dtype for p in built.parameters() if p.is_floating_point())
    dtype = autocast or next(floats, torch.float32)
    machine = measure(place, dtype) if here else GPU.get(dtype, GPU[torch.float32])
    whole, share = needs_whole(built), -(-effective_batch // ranks)
    if whole and ranks > 1:
        raise NotDecomposable(
            "BatchNorm in training mode normalises by what each rank has, not by the whole batch",
            hint="GroupNorm, or BatchNorm in eval mode",
        )
    job = Job(
        built,
        objective,
        make,
        inputs,
        padded=len(set(sizes)) > 1,
        autocast=autocast,
        as_cuda=place.type == "cuda",
        num_micros=1 if whole or share == 1 else 2,
    )
    if place.type == "cuda" and here and is_small(built):
        with contextlib.suppress(Exception):  # what cannot be traced is told below
            cap = cap_of(memory, place, beyond_bytes=beyond_tensors(job, max(sizes)))
    drawn = choose.windows(sizes, share)
    budgets = choose.budgets(sizes, share)
    if whole:
        budgets = [Budget(examples=effective_batch)]
    search = Search(job, spread, drawn, budgets, cap, machine, checkpointing)
    chosen, options = search.confirmed(search.candidates())
    texts = [*cap.assumptions, assumed, *assumptions, *search.notes]
    if place.type == "cuda":
        texts.append(
            "counted from their sources: blocks of 512 bytes, and what flash attention's backward "
            "takes for itself"
        )
    spread = dataclasses.replace(spread, sync=chosen.sync)
    if ranks > 1:
        sent = {"micro-batch": spread.micro_bytes, "step": spread.step_bytes}
        told = [f"{amount(num)} in each {name}" for name, num in sent.items() if num]
        texts.append(
            f"a rank sends {amount(spread.link)} a second (assumed), and computes meanwhile: "
            f"{' and '.join(told)}"
        )
    if shard_ranks > 1:
        texts.append(
            "each layer is one group of fully_shard, gathered in the dtype of its parameters (a "
            "MixedPrecisionPolicy is not counted), and two are whole at a time: 5% too little to "
            "13% too much, measured on 2 ranks with 6 layers"
        )
    if whole:
        texts.append("BatchNorm in training mode needs the whole batch in one micro-batch")
    if not machine.is_here:
        texts.append(f"times are relative: those of {machine.name}, by what operations take")
    texts = tuple(filter(None, texts))
    return Plan(effective_batch, spread, max(sizes), chosen, tuple(options), cap, machine, texts)


def _inputs(
    lengths: int | Sequence[int],
    examples: Sequence[Any] | None,
    collate: Collate | None,
    objective: Objective,
) -> tuple[list[int], Callable[[int, int], Any]]:
    """Return the size of each example, and how to make inputs of some rows of one length."""
    if examples is not None:
        host = as_batch(examples, collate, trim=objective.trim)
        sizes = [objective.size(example) for example in host]

        def take(rows: int, length: int) -> Any:
            near = min(range(len(sizes)), key=lambda i: abs(sizes[i] - length))
            return host.take([near] * rows)

        return sizes, take
    found = [lengths] if isinstance(lengths, int) else list(lengths)
    if not found or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in found):
        raise BadInput(
            f"lengths={lengths!r:.80} are not whole numbers of at least 2",
            hint="lengths=2048, or the tokens of each example",
        )
    ragged = len(set(found)) > 1

    def make(rows: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(rows, length, dtype=torch.long)
        made = {"input_ids": ids, "labels": ids.clone()}
        if ragged and rows > 1:
            made["attention_mask"] = torch.ones_like(ids)
            made["attention_mask"][-1, -1] = 0  # without any padding models drop the mask
        return made

    return found, make


def _module(given: Any) -> nn.Module:
    """Return what is to be traced: the module itself, or a model of the configuration."""
    if isinstance(given, nn.Module):
        return given
    if not hasattr(given, "to_dict"):
        raise BadInput(
            f"plan takes a module or a configuration of transformers, not {type(given).__name__}"
        )
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(given, dtype=torch.float32)
    except ValueError as error:
        raise BadInput(
            f"{type(given).__name__} is of no causal language model: {str(error).split('.')[0]}",
            hint="build the model on the meta device: with torch.device('meta'): Model(config)",
        ) from error
    built.config.use_cache = False
    return built.train()


def _as_on_cuda(make: MakeOptimizer) -> MakeOptimizer:
    """Return the optimizer as CUDA runs it: many tensors at once, unless it is fused."""
    if not isinstance(make, functools.partial):
        return make
    is_plain = make.func.__module__.startswith("torch.optim") and not make.keywords.get("fused")
    return functools.partial(make, foreach=True) if is_plain else make


def _device_here() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type
