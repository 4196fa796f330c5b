"""Say before a run what fits, what is fastest, and choose it.

No weights and no device are needed: a step is traced on a twin of the model that holds no data.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gradaccum.batch import Collate, as_batch
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.measured import quiet
from gradaccum.memory import choose
from gradaccum.memory.cap import Cap, cap_of
from gradaccum.memory.choose import Choice
from gradaccum.memory.machine import GPU, Machine, measure
from gradaccum.memory.predict import Envelope, Job, Operations, is_large, switch, trace
from gradaccum.memory.probe import Probed, shapes
from gradaccum.memory.probe import measure as measure_probes
from gradaccum.memory.recipes import FourBit, MakeOptimizer, optimizer_of
from gradaccum.memory.tracker import (
    ACTIVATIONS,
    AFTER,
    CATEGORIES,
    INPUTS,
    STATE,
    TEMPORARIES,
    Tracker,
)
from gradaccum.objective import Objective, causal_lm
from gradaccum.optimizers import materialize
from gradaccum.types import GIB, Budget, counted

CHECKPOINTED = 1.15  # times the work, at the least: 1.23 measured on a full model, more with LoRA
MIDDLE = 0.6  # the part of the examples that are shorter than a row of middle length
PASSING = (ACTIVATIONS, TEMPORARIES, INPUTS)
SMALL = 2**30  # bytes of parameters, up to which a model is run to time it
LENGTH = 1024  # tokens of each example where nothing else is said, as TRL's max_length


@dataclass(frozen=True, slots=True)
class Option:
    """Tell what one way of running an effective batch takes.

    Args:
        budget: The largest micro-batch.
        rows: Examples of the micro-batch that takes the most memory.
        length: Its tokens a row.
        num_micros: Micro-batches of an effective batch, rounded.
        checkpointing: Activations are computed again in backward.
        chunk: Positions whose logits are held at a time; None: all.
        peak_bytes: What tensors of the step take at its peak.
        categories: The same by what they are for.
        seconds: Of a step, on `Plan.machine`.
        fits: It is within the cap.
    """

    budget: Budget
    rows: int
    length: int
    num_micros: int
    checkpointing: bool
    chunk: int | None
    peak_bytes: int
    categories: dict[str, int]
    seconds: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Tell how an effective batch is best run. Print it for a sentence.

    Args:
        effective_batch: Examples in one step.
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
        text = (
            f"effective batch {self.effective_batch:,} on {_gib(self.cap.stated_bytes)}: {about}"
            f"{counted(one.num_micros, 'micro-batch')} of {size}, "
            f"{_gib(one.peak_bytes)}, checkpointing {'on' if one.checkpointing else 'off'}"
        )
        if one.chunk is not None:
            text += f", loss in chunks of {one.chunk:,}"
        if self.machine.is_here:
            text += f"; about {one.seconds:.2g} s a step"
        return text


@dataclass(frozen=True, slots=True)
class Setting:
    """Name the switches of a step."""

    checkpointing: bool
    chunk: int | None
    objective: Objective = field(repr=False, compare=False)


def plan(
    model: Any,
    objective: Objective | None = None,
    *,
    effective_batch: int,
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
        effective_batch: Examples in one step, at least 1.
        memory: What there is: "20GiB", bytes, or a fraction of the device; by default what is
            available.
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
        BadInput: An argument is wrong; the model cannot be traced.
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
        raise BadInput(f"device={device!r} is neither cpu nor cuda")
    objective = objective or causal_lm()
    sizes, inputs = _inputs(lengths, examples, collate, objective)
    make, assumed = optimizer_of(optimizer)
    built = _module(model)
    held = sum(p.numel() * p.element_size() for p in built.parameters())
    cap = cap_of(memory, place, held_bytes=held if place.type == "cpu" else 0)
    if held > cap.num_bytes:
        raise DoesNotFit(
            f"the parameters alone take {_gib(held)}, and there are {_gib(cap.num_bytes)} for "
            f"tensors of the {_gib(cap.stated_bytes)}",
            hint="a smaller dtype (bfloat16), 4-bit weights with LoRA, or more memory",
        )
    if place.type == "cuda":
        make = _as_on_cuda(make)
    here = place.type == "cpu" or torch.accelerator.is_available()
    dtype = autocast or next(built.parameters()).dtype
    machine = measure(place, dtype) if here else GPU.get(dtype, GPU[torch.float32])
    job = Job(built, objective, make, inputs, len(set(sizes)) > 1, autocast, place.type == "cuda")
    drawn = choose.windows(sizes, effective_batch)
    found = _Options(job, drawn, effective_batch, cap, machine, checkpointing)
    options = found.all()
    chosen = found.confirmed(options)
    texts = [*cap.assumptions, assumed, *assumptions, *found.notes]
    if not machine.is_here:
        texts.append(f"times are relative: those of {machine.name}, by what operations take")
    return Plan(effective_batch, chosen, tuple(options), cap, machine, tuple(filter(None, texts)))


class _Options:
    """Look at every setting and every size of micro-batch."""

    def __init__(
        self,
        job: Job,
        drawn: list[list[int]],
        effective_batch: int,
        cap: Cap,
        machine: Machine,
        checkpointing: bool | None,
    ) -> None:
        self._job, self._drawn, self._size = job, drawn, effective_batch
        self._cap, self._machine, self._wanted = cap, machine, checkpointing
        self.notes: list[str] = []
        self._settings: dict[int, Setting] = {}
        self._untraced: set[Setting] = set()
        self._has_values = not any(p.is_meta for p in job.model.parameters())
        self._choices: dict[int, Choice] = {}

    def all(self) -> list[Option]:
        """Return every option, by settings and then by size."""
        found: list[Option] = []
        failed: BaseException | None = None
        sizes = [size for window in self._drawn for size in window]
        for setting in self._switches():
            if self._is_slower(setting, found):
                continue
            try:
                forecast = Traced(self._with(setting), sizes, self._machine, self._cap.num_bytes)
            except Exception as error:
                if isinstance(error, BadInput) and setting.objective is not self._job.objective:
                    continue  # the head of this model cannot be chunked
                failed = error
                if not self._has_values:
                    continue
                forecast = Measured(self._with(setting), sizes)
                self._untraced.add(setting)
            choices: list[Choice] = []
            budgets = choose.budgets(sizes, self._size)
            for budget in budgets[: 1 if forecast.is_hopeless else None]:
                choice = choose.weigh(budget, self._drawn, forecast)
                if not choices or dataclasses.replace(choices[-1], budget=budget) != choice:
                    choices.append(choice)
            for choice in choices:
                option = self._option(choice, setting, forecast)
                self._settings[id(option)], self._choices[id(option)] = setting, choice
                found.append(option)
        if not found:
            assert failed is not None, "one setting is tried at least"
            raise BadInput(
                f"{type(self._job.model).__name__} cannot be traced without its values: "
                f"{_first_line(failed)}",
                hint="give the model with its weights: it is then measured, as budget='auto' does",
            ) from failed
        if failed is not None:
            self.notes.append(
                "what could not be traced without values was measured on three short micro-batches "
                f"if there are weights, else left out: {_first_line(failed)}"
            )
        return found

    def _is_slower(self, setting: Setting, found: list[Option]) -> bool:
        """Tell whether a setting, which computes more, is slower than what has been found to fit.

        It is no faster than the fastest so far were, if all of these fitted.
        """
        fitting = [option.seconds for option in found if option.fits]
        if not fitting:
            return False
        least = min(option.seconds for option in found)
        more = CHECKPOINTED if setting.checkpointing and not found[0].checkpointing else 1.0
        return min(fitting) <= choose.AS_FAST * more * least

    def confirmed(self, options: list[Option]) -> Option:
        """Choose, and trace the very micro-batch that takes most; choose again if that is more."""
        left = [option for option in options if option.fits]
        while left:
            choices = [self._choices[id(option)] for option in left]
            best = choose.best(choices, self._cap.num_bytes)
            option = left[next(i for i, choice in enumerate(choices) if choice is best)]
            setting = self._settings[id(option)]
            if setting in self._untraced:
                return option
            num_micros = 1 if option.num_micros == 1 else 2
            traced = trace(
                self._with(setting),
                option.rows,
                option.length,
                num_micros=num_micros,
                is_short=num_micros == 2 and is_large(self._job.model),
            )
            if traced.peak_bytes <= self._cap.num_bytes:
                return dataclasses.replace(
                    option, peak_bytes=traced.peak_bytes, categories=dict(traced.peak)
                )
            left.remove(option)
        least = min(options, key=lambda option: option.peak_bytes)
        raise DoesNotFit(
            f"one micro-batch of {least.rows} x {least.length:,} tokens takes at least "
            f"{_gib(least.peak_bytes)} ({_listed(least.categories)}), and there are "
            f"{_gib(self._cap.num_bytes)} for tensors of the {_gib(self._cap.stated_bytes)}",
            hint="shorter examples (max_length), LoRA, an 8-bit or paged optimizer, a smaller "
            "dtype, or more memory",
        )

    def _switches(self) -> Iterator[Setting]:
        can_switch = hasattr(self._job.model, "gradient_checkpointing_enable")
        is_on = bool(getattr(self._job.model, "is_gradient_checkpointing", False))
        states = [is_on]
        if can_switch:
            states = [False, True] if self._wanted is None else [self._wanted]
        elif self._wanted not in (None, is_on):
            self.notes.append("the model has no switch for checkpointing, and stays as it is")
        for is_on in states:
            yield Setting(is_on, None, self._job.objective)
            if self._job.objective.leaner is not None:
                leaner = self._job.objective.leaner
                yield Setting(is_on, leaner.chunk, leaner)

    def _with(self, setting: Setting) -> Job:
        return dataclasses.replace(
            self._job, objective=setting.objective, checkpointing=setting.checkpointing
        )

    def _option(self, choice: Choice, setting: Setting, forecast: "Traced | Measured") -> Option:
        return Option(
            choice.budget,
            choice.rows,
            choice.length,
            max(1, round(choice.num_micros)),
            setting.checkpointing,
            setting.chunk,
            choice.peak_bytes,
            forecast.categories(choice.rows, choice.length),
            choice.seconds + forecast.seconds_after,
            choice.peak_bytes <= self._cap.num_bytes,
        )


class Traced:
    """Forecast from traces of the longest rows, of rows of middle length, and of one row alone.

    Shorter rows count by their tokens, as rows of the next longer trace: a little too much. One
    row alone has no padding, and with it no mask. The time of a small model on the machine at hand
    is measured instead.

    Args:
        job: What one step is.
        lengths: Of the examples.
        machine: Whose time is told.
        cap_bytes: If one row of a large model takes more, nothing else is traced.
    """

    def __init__(self, job: Job, lengths: Sequence[int], machine: Machine, cap_bytes: int) -> None:
        ordered = sorted(lengths)
        longest, middle = ordered[-1], ordered[int(MIDDLE * len(ordered))]
        kinds = [middle, longest] if 2 * middle < longest else [longest]
        is_first = job.padded or is_large(job.model)
        self._alone = Operations(job, 1, longest) if is_first else None
        most = sum(self._alone.categories().values()) if self._alone is not None else 0
        self.is_hopeless = is_large(job.model) and most > cap_bytes
        one = None if job.padded else self._alone
        self._envelopes = (
            [] if self.is_hopeless else [Envelope(job, length, one) for length in kinds]
        )
        self._longest = longest
        after = self._envelopes[0].after if self._alone is None else self._alone.costs(AFTER)
        self.seconds_after = machine.seconds(*after)
        self._seconds = functools.cache(lambda of, rows: of.seconds(rows, machine))
        self._peak = functools.cache(lambda of, rows: of.peak_bytes(rows))
        self._probed = _probed(job, lengths) if machine.is_here and _is_small(job.model) else None
        if self._alone is not None:
            self._seconds_alone = machine.seconds(*self._alone.costs(1))

    def seconds(self, rows: int, length: int) -> float:
        """Return the time of a micro-batch, forward and backward."""
        if self._probed is not None:
            return self._probed.seconds(rows, length)
        if rows == 1 and self._alone is not None:
            return self._seconds_alone * length / self._longest
        return self._seconds(*self._beside(rows, length))

    def peak_bytes(self, rows: int, length: int) -> int:
        """Return what a step with such micro-batches takes at its peak."""
        if rows == 1 and self._alone is not None:
            return sum(self.categories(rows, length).values())
        return self._peak(*self._beside(rows, length))

    def categories(self, rows: int, length: int) -> dict[str, int]:
        """Return the same by category."""
        if rows > 1 or self._alone is None:
            envelope, share = self._beside(rows, length)
            return envelope.categories(share)
        found = self._alone.categories()
        return found | {name: found[name] * length // self._longest for name in PASSING}

    def _beside(self, rows: int, length: int) -> tuple[Envelope, float]:
        envelope = next(e for e in self._envelopes if e.length >= length)
        return envelope, rows * length / envelope.length


def _is_small(model: nn.Module) -> bool:
    """Tell whether the model can be made here with random weights and run a few times."""
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return held < SMALL and not any(isinstance(m, FourBit) for m in model.modules())


class Measured:
    """Forecast from three short micro-batches, where a model cannot be traced.

    Args:
        job: What one step is; its model has values.
        lengths: Of the examples.
    """

    seconds_after, is_hopeless = 0.0, False

    def __init__(self, job: Job, lengths: Sequence[int]) -> None:
        self._probed, model = _probed(job, lengths), copy.deepcopy(job.model)
        optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
        materialize(optimizer)
        state = tree_leaves(list(optimizer.state.values()))
        self._state = sum(t.nbytes for t in state if isinstance(t, torch.Tensor))
        self.seconds = self._probed.seconds

    def peak_bytes(self, rows: int, length: int) -> int:
        """Return what a step with such micro-batches takes at its peak."""
        return self._probed.peak_bytes(rows, length) + self._state

    def categories(self, rows: int, length: int) -> dict[str, int]:
        """Return the same; of what was measured it is not known what it was for."""
        taken = self._probed.peak_bytes(rows, length)
        return dict.fromkeys(CATEGORIES, 0) | {ACTIVATIONS: taken, STATE: self._state}


def _probed(job: Job, lengths: Sequence[int]) -> Probed:
    """Return what three short micro-batches take, with random weights if there are none."""
    device = torch.device("cuda" if job.as_cuda else "cpu")
    model = copy.deepcopy(job.model)
    with torch.random.fork_rng():
        if next(model.parameters()).is_meta:
            model.to_empty(device=device)
            with torch.no_grad():
                for t in (*model.parameters(), *model.buffers()):
                    t.normal_(0, 0.02) if t.is_floating_point() else t.zero_()
        model.to(device).train()
        switch(model, job.checkpointing)
        engine = job.accumulator(model, Tracker())
        given = {shape: functools.partial(job.inputs, *shape) for shape in shapes(lengths, device)}
        return measure_probes(engine, given, device, quiet)[0]


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
    """Return what is to be traced: a copy in training mode, that shares the parameters."""
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


def _listed(categories: dict[str, int]) -> str:
    parts = sorted(((categories.get(name, 0), name) for name in CATEGORIES), reverse=True)
    return ", ".join(f"{name} {_gib(num)}" for num, name in parts[:3] if num)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
