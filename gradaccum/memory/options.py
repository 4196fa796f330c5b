"""Look at every way of running a step, forecast each, and confirm the best by a trace."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.memory import choose
from gradaccum.memory.cap import Cap
from gradaccum.memory.choose import Choice
from gradaccum.memory.forecast import Measured, Traced
from gradaccum.memory.machine import Machine
from gradaccum.memory.predict import Job, Operations, is_checkpointing
from gradaccum.memory.spread import Spread
from gradaccum.memory.tracker import CATEGORIES, GRADIENTS
from gradaccum.objective import Objective
from gradaccum.types import Budget, amount

CHECKPOINTED = 1.15  # times the work, at the least: 1.23 measured on a full model, more with LoRA
logger = logging.getLogger(__name__)


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
        sync: As of `Accumulator`, where the model is sharded; else None.
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
    sync: str | None
    peak_bytes: int
    categories: dict[str, int]
    seconds: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """Name the switches of a step."""

    checkpointing: bool
    chunk: int | None
    objective: Objective = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Hold an option and what it came from.

    Args:
        option: What it takes.
        choice: The same over the effective batches.
        setting: Its switches.
        spread: Over ranks.
        is_traced: It can be traced, so that it can be confirmed.
    """

    option: Option
    choice: Choice
    setting: Setting
    spread: Spread
    is_traced: bool


class Search:
    """Look at every setting and every size of micro-batch.

    Args:
        job: What one step is.
        spread: Of the model over ranks; the plan is for one of them.
        drawn: Its shares of effective batches, the worst last.
        budgets: To choose from, the smallest first.
        cap: What memory there is.
        machine: Whose time is told.
        checkpointing: Only this; None: on and off, where the model can be switched.
    """

    def __init__(
        self,
        job: Job,
        spread: Spread,
        drawn: list[list[int]],
        budgets: list[Budget],
        cap: Cap,
        machine: Machine,
        checkpointing: bool | None,
    ) -> None:
        self._job, self._spread, self._drawn, self._budgets = job, spread, drawn, budgets
        self._cap, self._machine, self._wanted = cap, machine, checkpointing
        self._failed: BaseException | None = None
        self.notes: list[str] = []

    def candidates(self) -> list[Candidate]:
        """Return all of them, by settings and then by size.

        Raises:
            BadInput: The model cannot be traced and has no values, or fails on the inputs.
        """
        found: list[Candidate] = []
        is_left_out = False
        for setting in self._switches():
            if self._is_slower(setting, found):
                is_left_out = is_left_out or setting.checkpointing
                continue
            forecast = self._forecast(setting)
            if forecast is not None:
                for spread in self._spread.ways():
                    found += self._sizes(setting, spread, forecast)
        if not found:
            assert self._failed is not None, "one setting is tried at least"
            raise BadInput(
                f"{type(self._job.model).__name__} cannot be traced without its values: "
                f"{_first_line(self._failed)}",
                hint="a model that does not depend on values can be planned in shards"
                if self._spread.shard_ranks > 1
                else "give the model with its weights: it is then measured, as budget='auto' does",
            ) from self._failed
        if is_left_out:
            self.notes.append(
                "checkpointing on computes more and was not looked at: with it off, micro-batches "
                "that are as fast as any fit"
            )
        if self._failed is not None:
            self.notes.append(
                "what could not be traced without values was measured on three short micro-batches "
                f"{'on this CPU ' if not torch.cuda.is_available() else ''}if there are weights, "
                f"else left out: {_first_line(self._failed)}"
            )
        return found

    def _forecast(self, setting: Setting) -> Traced | Measured | None:
        """Return the forecast of a setting; None if there is none without values."""
        logger.info(
            "tracing with checkpointing %s%s",
            "on" if setting.checkpointing else "off",
            f" and the loss in chunks of {setting.chunk:,}" if setting.chunk else "",
        )
        job, sizes = self._with(setting), [size for window in self._drawn for size in window]
        try:
            is_whole = self._spread.shard_ranks == 1
            return Traced(job, sizes, self._machine, self._cap.num_bytes if is_whole else None)
        except Exception as error:
            if isinstance(error, BadInput) and setting.objective is not self._job.objective:
                return None  # the head of this model cannot be chunked
            self._failed = error
        if any(p.is_meta for p in job.model.parameters()) or self._spread.shard_ranks > 1:
            return None
        try:
            return Measured(job, sizes)
        except Exception as error:
            raise BadInput(
                f"{type(job.model).__name__} fails on the inputs of the plan: {_first_line(error)}",
                hint="plan(model, objective, examples=...) says what it is trained on",
            ) from error

    def _sizes(
        self, setting: Setting, spread: Spread, forecast: Traced | Measured
    ) -> Iterator[Candidate]:
        """Yield what each budget gives; of those that give the same, the first."""
        is_traced, last = isinstance(forecast, Traced), None
        if isinstance(forecast, Traced):
            forecast = forecast.placed(spread)
        for budget in self._budgets[: 1 if forecast.is_hopeless else None]:
            choice = choose.weigh(budget, self._drawn, forecast)
            if last is not None and dataclasses.replace(last, budget=budget) == choice:
                continue
            last = choice
            option = self._option(choice, setting, spread, forecast)
            beside = option.peak_bytes - option.categories[GRADIENTS]
            is_whole = is_traced and choice.most_micros == 1
            if is_whole and not option.fits and beside <= self._cap.num_bytes:
                option = self._traced(option, setting, spread, 1)  # it finds no gradients
                choice = dataclasses.replace(choice, peak_bytes=option.peak_bytes)
            yield Candidate(option, choice, setting, spread, is_traced)

    def _is_slower(self, setting: Setting, found: list[Candidate]) -> bool:
        """Tell whether a setting, which computes more, is slower than what has been found to fit.

        It is no faster than the fastest so far were, if all of these fitted.
        """
        fitting = [one.option.seconds for one in found if one.option.fits]
        if not fitting:
            return False
        least = min(one.option.seconds for one in found)
        more = CHECKPOINTED if setting.checkpointing and not found[0].setting.checkpointing else 1.0
        return min(fitting) <= choose.AS_FAST * more * least

    def confirmed(self, found: Sequence[Candidate]) -> tuple[Option, list[Option]]:
        """Choose, and trace the very micro-batch that takes most; choose again if that is more.

        Returns:
            What is chosen, and all options, with what was traced where it was read off before.

        Raises:
            DoesNotFit: Nothing does; the numbers are told.
        """
        options = [candidate.option for candidate in found]
        left = [i for i, option in enumerate(options) if option.fits]
        while left:
            choices = [found[i].choice for i in left]
            best = choose.best(choices, self._cap.num_bytes)
            i = left[next(i for i, choice in enumerate(choices) if choice is best)]
            if found[i].is_traced:
                one, num_micros = found[i], 1 if found[i].choice.most_micros == 1 else 2
                options[i] = self._traced(options[i], one.setting, one.spread, num_micros)
            if options[i].fits:
                return options[i], options
            left.remove(i)
        least = min(options, key=lambda option: option.peak_bytes)
        raise DoesNotFit(
            f"one micro-batch of {least.rows} x {least.length:,} tokens takes at least "
            f"{amount(least.peak_bytes)} ({_listed(least.categories)}), and there are "
            f"{amount(self._cap.num_bytes)} for tensors of the {amount(self._cap.stated_bytes)}",
            hint="shorter examples (max_length), LoRA, an 8-bit or paged optimizer, a smaller "
            "dtype, or more memory",
        )

    def _traced(self, option: Option, setting: Setting, spread: Spread, num: int) -> Option:
        """Return the option with what a trace of its largest micro-batch takes, of so many."""
        job = dataclasses.replace(self._with(setting), num_micros=num)
        taken = Operations(job, option.rows, option.length).placed(spread).categories()
        peak = sum(taken.values())
        fits = peak <= self._cap.num_bytes
        return dataclasses.replace(option, peak_bytes=peak, categories=taken, fits=fits)

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

    def _option(
        self, choice: Choice, setting: Setting, spread: Spread, forecast: "Traced | Measured"
    ) -> Option:
        return Option(
            choice.budget,
            choice.rows,
            choice.length,
            max(1, round(choice.num_micros)),
            setting.checkpointing,
            setting.chunk,
            spread.sync,
            choice.peak_bytes,
            forecast.categories(choice.rows, choice.length),
            choice.seconds + forecast.seconds_after,
            choice.peak_bytes <= self._cap.num_bytes,
        )


def _listed(categories: dict[str, int]) -> str:
    parts = sorted(((categories.get(name, 0), name) for name in CATEGORIES), reverse=True)
    return ", ".join(f"{name} {amount(num)}" for num, name in parts[:3] if num)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]
