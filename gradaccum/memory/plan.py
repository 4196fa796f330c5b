"""Say before a run what fits, what is fastest, and choose it.

No weights and no device are needed: a step is traced on a twin of the model that holds no data.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradaccum.batch import Collate, as_batch
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.memory import choose
from gradaccum.memory.cap import Cap, cap_of, held_bytes
from gradaccum.memory.choose import Choice
from gradaccum.memory.forecast import Measured, Traced, beyond_tensors, is_small
from gradaccum.memory.machine import GPU, Machine, measure
from gradaccum.memory.predict import Job, is_checkpointing, is_large, needs_whole, trace
from gradaccum.memory.recipes import MakeOptimizer, optimizer_of
from gradaccum.memory.tracker import CATEGORIES, GRADIENTS
from gradaccum.objective import Objective, causal_lm
from gradaccum.types import Budget, amount, counted

logger = logging.getLogger(__name__)
CHECKPOINTED = 1.15  # times the work, at the least: 1.23 measured on a full model, more with LoRA
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
        text = (
            f"effective batch {self.effective_batch:,} on {amount(self.cap.stated_bytes)}: {about}"
            f"{counted(one.num_micros, 'micro-batch')} of {size}, "
            f"{amount(one.peak_bytes)}, checkpointing {'on' if one.checkpointing else 'off'}"
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
    held = held_bytes(built)
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
    whole = needs_whole(built)
    job = Job(
        built,
        objective,
        make,
        inputs,
        padded=len(set(sizes)) > 1,
        autocast=autocast,
        as_cuda=place.type == "cuda",
        num_micros=1 if whole or effective_batch == 1 else 2,
    )
    if place.type == "cuda" and here and is_small(built):
        with contextlib.suppress(Exception):  # what cannot be traced is told below
            cap = cap_of(memory, place, beyond_bytes=beyond_tensors(job, max(sizes)))
    drawn = choose.windows(sizes, effective_batch)
    budgets = choose.budgets(sizes, effective_batch)
    if whole:
        budgets = [Budget(examples=effective_batch)]
    found = _Options(job, drawn, budgets, cap, machine, checkpointing)
    options = found.all()
    chosen = found.confirmed(options)
    texts = [*cap.assumptions, assumed, *assumptions, *found.notes]
    if whole:
        texts.append("BatchNorm in training mode needs the whole batch in one micro-batch")
    if not machine.is_here:
        texts.append(f"times are relative: those of {machine.name}, by what operations take")
    texts = tuple(filter(None, texts))
    return Plan(effective_batch, max(sizes), chosen, tuple(options), cap, machine, texts)


class _Options:
    """Look at every setting and every size of micro-batch."""

    def __init__(
        self,
        job: Job,
        drawn: list[list[int]],
        budgets: list[Budget],
        cap: Cap,
        machine: Machine,
        checkpointing: bool | None,
    ) -> None:
        self._job, self._drawn, self._budgets = job, drawn, budgets
        self._cap, self._machine, self._wanted = cap, machine, checkpointing
        self.notes: list[str] = []
        self._settings: dict[int, Setting] = {}
        self._untraced: set[Setting] = set()
        self._has_values = not any(p.is_meta for p in job.model.parameters())
        self._choices: dict[int, Choice] = {}

    def all(self) -> list[Option]:
        """Return every option, by settings and then by size."""
        found: list[Option] = []
        skipped: list[Setting] = []
        failed: BaseException | None = None
        sizes = [size for window in self._drawn for size in window]
        for setting in self._switches():
            if self._is_slower(setting, found):
                skipped.append(setting)
                continue
            logger.info(
                "tracing with checkpointing %s%s",
                "on" if setting.checkpointing else "off",
                f" and the loss in chunks of {setting.chunk:,}" if setting.chunk else "",
            )
            try:
                forecast = Traced(self._with(setting), sizes, self._machine, self._cap.num_bytes)
            except Exception as error:
                if isinstance(error, BadInput) and setting.objective is not self._job.objective:
                    continue  # the head of this model cannot be chunked
                failed = error
                if not self._has_values:
                    continue
                try:
                    forecast = Measured(self._with(setting), sizes)
                except Exception as wrong:
                    raise BadInput(
                        f"{type(self._job.model).__name__} fails on the inputs of the plan: "
                        f"{_first_line(wrong)}",
                        hint="plan(model, objective, examples=...) says what it is trained on",
                    ) from wrong
                self._untraced.add(setting)
            choices: list[Choice] = []
            for budget in self._budgets[: 1 if forecast.is_hopeless else None]:
                choice = choose.weigh(budget, self._drawn, forecast)
                if not choices or dataclasses.replace(choices[-1], budget=budget) != choice:
                    choices.append(choice)
            for choice in choices:
                option = self._option(choice, setting, forecast)
                beside = option.peak_bytes - option.categories[GRADIENTS]
                is_whole = choice.most_micros == 1 and setting not in self._untraced
                if is_whole and not option.fits and beside <= self._cap.num_bytes:
                    option = self._traced(option, setting, 1)  # it finds no gradients
                    choice = dataclasses.replace(choice, peak_bytes=option.peak_bytes)
                self._settings[id(option)], self._choices[id(option)] = setting, choice
                found.append(option)
        if not found:
            assert failed is not None, "one setting is tried at least"
            raise BadInput(
                f"{type(self._job.model).__name__} cannot be traced without its values: "
                f"{_first_line(failed)}",
                hint="give the model with its weights: it is then measured, as budget='auto' does",
            ) from failed
        if skipped and any(setting.checkpointing for setting in skipped):
            self.notes.append(
                "checkpointing on computes more and was not looked at: with it off, micro-batches "
                "that are as fast as any fit"
            )
        if failed is not None:
            self.notes.append(
                "what could not be traced without values was measured on three short micro-batches "
                f"{'on this CPU ' if not torch.cuda.is_available() else ''}if there are weights, "
                f"else left out: {_first_line(failed)}"
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
        """Choose, and trace the very micro-batch that takes most; choose again if that is more.

        What was traced takes the place of what was read off in `options`.
        """
        left = [option for option in options if option.fits]
        while left:
            choices = [self._choices[id(option)] for option in left]
            best = choose.best(choices, self._cap.num_bytes)
            option = left[next(i for i, choice in enumerate(choices) if choice is best)]
            setting = self._settings[id(option)]
            if setting in self._untraced:
                return option
            is_whole = self._choices[id(option)].most_micros == 1
            found = self._traced(option, setting, 1 if is_whole else 2)
            options[next(i for i, other in enumerate(options) if other is option)] = found
            if found.fits:
                return found
            left.remove(option)
        least = min(options, key=lambda option: option.peak_bytes)
        raise DoesNotFit(
            f"one micro-batch of {least.rows} x {least.length:,} tokens takes at least "
            f"{amount(least.peak_bytes)} ({_listed(least.categories)}), and there are "
            f"{amount(self._cap.num_bytes)} for tensors of the {amount(self._cap.stated_bytes)}",
            hint="shorter examples (max_length), LoRA, an 8-bit or paged optimizer, a smaller "
            "dtype, or more memory",
        )

    def _traced(self, option: Option, setting: Setting, num_micros: int) -> Option:
        """Return the option with what a trace of its largest micro-batch takes."""
        traced = trace(
            self._with(setting),
            option.rows,
            option.length,
            num_micros=num_micros,
            is_short=num_micros == 2 and is_large(self._job.model),
        )
        return dataclasses.replace(
            option,
            peak_bytes=traced.peak_bytes,
            categories=dict(traced.peak),
            fits=traced.peak_bytes <= self._cap.num_bytes,
        )

    def _switches(self) -> Iterator[Setting]:
        can_switch = hasattr(self._job.model, "gradient_checkpointing_enable")
        is_on = bool(is_checkpointing(self._job.model))
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


def _listed(categories: dict[str, int]) -> str:
    parts = sorted(((categories.get(name, 0), name) for name in CATEGORIES), reverse=True)
    return ", ".join(f"{name} {amount(num)}" for num, name in parts[:3] if num)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]
