"""How many examples a step takes, as a function of how far a run is: batch-size schedules.

    schedule = BatchSchedule.parse("32:0,64:10k,128:50k")  # 32, from step 10,000 on 64, then 128
    sampler = EffectiveBatchSampler(data, schedule)

Here are the stages, their spelling, and what learning rate and beta2 make of another size. Who
counts how far a run is: `sampler.py`, which keeps it in checkpoints.
"""

import bisect
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from gradaccum.errors import BadInput
from gradaccum.types import counted

Unit = Literal["steps", "samples", "tokens"]
Rule = Literal["none", "linear", "sqrt"]
UNITS = ("steps", "samples", "tokens")
POWERS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}  # of size / first size
SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
SPELLING = '"32:0,64:10k,128:50k", "32:0,64:1M samples" or "32..256 by 32 over 1M samples"'
RAMP = re.compile(r"(\d+)\.\.(\d+) by (\d+) over (\S+)")


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Give the effective batch size as a function of what a run has done.

        size = size of the last stage that begins at or before what has been done

    What has been done are optimizer steps, samples, or tokens (the costs of the sampler), before
    the step in question: a stage by samples begins with the first step that finds as many consumed.
    `str()` gives the spelling that `parse` reads.

    Args:
        stages: Pairs of a size, in examples, and where it begins; the first at 0, then ascending.
        unit: What the beginnings count. "samples" are positions in the data: what `drop_last`
            leaves out counts.
        lr: The learning rate of a step, as a multiple of what the scheduler says: "none": 1;
            "linear": size / first size; "sqrt": its root.
        beta2: Take beta2 to the power of size / first size, so that the second moments of Adam
            average over as many examples as before (Marek et al. 2025,
            https://arxiv.org/abs/2507.07101). Adam's bias correction takes the beta2 of the step.

    Raises:
        BadInput: An argument is wrong.

    Example:
        >>> schedule = BatchSchedule(((32, 0), (64, 10_000)), lr="sqrt")
        >>> str(schedule), schedule.size_at(9_999), schedule.size_at(10_000)
        ('32:0,64:10k', 32, 64)
    """

    stages: tuple[tuple[int, int], ...]
    unit: Unit = "steps"
    lr: Rule = "none"
    beta2: bool = False

    def __post_init__(self) -> None:
        try:
            stages = tuple((size, begin) for size, begin in self.stages)
        except (TypeError, ValueError) as error:
            raise BadInput(f"stages={self.stages!r:.80} are no pairs of size and begin") from error
        object.__setattr__(self, "stages", stages)
        wrong = [n for pair in stages for n in pair if type(n) is not int]
        if not stages or wrong:
            raise BadInput(f"stages={stages!r:.80} are no pairs of two whole numbers")
        if min(size for size, _ in stages) < 1:
            raise BadInput(f"the schedule {self} has a size below 1")
        if stages[0][1] != 0:
            raise BadInput(
                f"the schedule {self} begins at {stages[0][1]:,}, and no size is given before",
                hint=f"the first stage begins at 0: {stages[0][0]}:0",
            )
        for (_, before), (size, begin) in itertools.pairwise(stages):
            if begin <= before:
                raise BadInput(
                    f"the schedule {self} has {size} from {begin:,} on, which is not after "
                    f"{before:,}",
                    hint="stages in the order in which they begin",
                )
        for name, value, known in (("unit", self.unit, UNITS), ("lr", self.lr, tuple(POWERS))):
            if value not in known:
                raise BadInput(f"{name}={value!r:.40} is none of {', '.join(known)}")
        if not isinstance(self.beta2, bool):
            raise BadInput(f"beta2={self.beta2!r:.40} is not True or False")

    @classmethod
    def of(cls, value: Any) -> "BatchSchedule":
        """Return what was given as an effective batch size: a number, a spelling or a schedule.

        A number alone is the size of each step, and asks for nothing to be counted.

        Raises:
            BadInput: It is none of them.
        """
        if isinstance(value, BatchSchedule):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if type(value) is not int or value < 1:
            raise BadInput(
                f"effective_batch_size is {value!r:.60}, not a whole number of at least 1, nor a "
                "schedule"
            )
        return cls(((value, 0),), "samples")

    @classmethod
    def parse(cls, text: str, *, lr: Rule = "none", beta2: bool = False) -> "BatchSchedule":
        """Read "32:0,64:10k,128:50k", in steps, or with " samples" or " tokens" after it.

        "32..256 by 32 over 1M samples" is `ramp(32, 256, by=32, over=1_000_000)`. k, M and G are
        powers of 1,000.

        Raises:
            BadInput: It is no schedule.
        """
        words, unit = " ".join(text.split()), "steps"
        for name in UNITS:
            if words.endswith(f" {name}"):
                words, unit = words.removesuffix(f" {name}"), name
        ramp = RAMP.fullmatch(words)
        if ramp is not None:
            start, stop, by = map(int, ramp.groups()[:3])
            made = cls.ramp(start, stop, by=by, over=_number(ramp[4], text))
            return cls(made.stages, cast(Unit, unit), lr, beta2)
        stages = []
        for part in words.replace(", ", ",").split(","):
            size, colon, begin = part.partition(":")
            if not colon:
                raise _no_schedule(text, f"{part!r} is no size with its begin")
            stages.append((_number(size, text), _number(begin, text)))
        return cls(tuple(stages), cast(Unit, unit), lr, beta2)

    @classmethod
    def ramp(
        cls,
        start: int,
        stop: int,
        *,
        by: int,
        over: int,
        unit: Unit = "samples",
        lr: Rule = "none",
        beta2: bool = False,
    ) -> "BatchSchedule":
        """Grow from one size to another in equal parts, as Megatron-LM's --rampup-batch-size.

            size = start + by * floor(done / (over / ((stop - start) / by)))     until done >= over

        Args:
            start: Size of the first step.
            stop: Size once `over` is done.
            by: What a stage has more than the one before; divides `stop - start`.
            over: What is done when `stop` is reached, in `unit`.
            unit: As in the constructor.
            lr: As in the constructor.
            beta2: As in the constructor.

        Raises:
            BadInput: An argument is wrong.

        Example:
            >>> str(BatchSchedule.ramp(16, 64, by=16, over=1000))
            '16:0,32:334,48:667,64:1k samples'
        """
        for name, value in (("start", start), ("stop", stop), ("by", by), ("over", over)):
            if type(value) is not int or value < 1:
                raise BadInput(f"{name}={value!r:.40} is not a whole number of at least 1")
        num, rest = divmod(stop - start, by)
        if num < 1 or rest:
            raise BadInput(f"from {start} to {stop} is no whole number of times {by}")
        if over < num:
            raise BadInput(f"{counted(num, 'stage')} do not fit into {over:,} {unit}")
        begins = [-(-over * i // num) for i in range(num + 1)]
        return cls(tuple((start + by * i, b) for i, b in enumerate(begins)), unit, lr, beta2)

    @property
    def first(self) -> int:
        """Return the size of the first step, which the rules for lr and beta2 relate to."""
        return self.stages[0][0]

    @property
    def largest(self) -> int:
        """Return the largest size."""
        return max(size for size, _ in self.stages)

    @property
    def is_constant(self) -> bool:
        """Tell whether every step has the same size."""
        return len(self.stages) == 1

    def size_at(self, done: int) -> int:
        """Return the size of the step that begins when so much has been done."""
        return self.stages[bisect.bisect_right(self.stages, done, key=lambda s: s[1]) - 1][0]

    def is_final(self, done: int) -> bool:
        """Tell whether the size stays as it is from there on."""
        return done >= self.stages[-1][1]

    def lr_factor(self, size: int) -> float:
        """Return by what the learning rate of a step of this size is multiplied."""
        return (size / self.first) ** POWERS[self.lr]

    @contextmanager
    def scaled(self, optimizer: Any, size: int) -> Iterator[None]:
        """Have an optimizer's step inside take the learning rate and beta2 of this size.

        They are put back after it: schedulers and checkpoints see those of the first size.

            with schedule.scaled(optimizer, sampler.effective_batch_size):
                optimizer.step()

        Args:
            optimizer: With `param_groups`, as those of torch.
            size: Of the effective batch; not that of an epoch's last one, if that is shorter.

        Raises:
            BadInput: It has no learning rate or no betas, and a rule is for them.
        """
        groups, factor = optimizer.param_groups, self.lr_factor(size)
        asked = {"lr": self.lr != "none", "betas": self.beta2}
        for name, is_asked in asked.items():
            if is_asked and any(group.get(name) is None for group in groups):
                raise BadInput(
                    f"{type(optimizer).__name__} has no {name}, and the schedule has a rule for it",
                    hint='lr="none"' if name == "lr" else "beta2=False",
                )
        names = [name for name, is_asked in asked.items() if is_asked]
        kept = [{name: group[name] for name in names} for group in groups]
        try:
            for group in groups:
                if self.lr != "none":
                    group["lr"] = group["lr"] * factor
                if self.beta2:
                    beta1, beta2, *others = group["betas"]
                    group["betas"] = (beta1, beta2 ** (size / self.first), *others)
            yield
        finally:
            for group, before in zip(groups, kept, strict=True):
                group.update(before)

    def __str__(self) -> str:
        stages = ",".join(f"{size}:{_spelled(begin)}" for size, begin in self.stages)
        return stages if self.unit == "steps" else f"{stages} {self.unit}"


def _number(text: str, whole: str) -> int:
    """Read "10k", "1.5M" or "4000"."""
    found = re.fullmatch(r"\s*(\d[\d_]*)(?:\.(\d+))?([kMG]?)\s*", text)
    if found is None:
        raise _no_schedule(whole, f"{text!r} is no whole number")
    digits, fraction, factor = found[1], found[2] or "", SUFFIXES[found[3]]
    value, rest = divmod(int(digits + fraction) * factor, 10 ** len(fraction))
    if rest:
        raise _no_schedule(whole, f"{text!r} is no whole number")
    return value


def _no_schedule(text: str, why: str) -> BadInput:
    return BadInput(f"{text!r} is no schedule of effective_batch_size: {why}", hint=SPELLING)


def _spelled(num: int) -> str:
    """Return "10k" for 10,000: the shortest of the spellings."""
    exact = [(suffix, n) for suffix, n in SUFFIXES.items() if num and num % n == 0]
    suffix, factor = exact[-1] if exact else ("", 1)
    return f"{num // factor}{suffix}"
