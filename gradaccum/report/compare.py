"""Whether runs trained one trajectory, and where they part; and what was asked differently.

Rounding alone makes two runs of the same thing drift apart: a step turns a difference of the
parameters into a larger one, so it grows, often exponentially, and no fixed tolerance is right at
all steps. What rounding does not do is jump. So a step is where two runs part if

    the data differ     examples, trained tokens or useful tokens of the step are other counts
    one is not finite   and the other is
    the loss jumps      |a - b| / max(|a|, |b|) > JUMP * max(unit, the largest such before)

and else they are the same within rounding, as long as half of the digits hold (the difference is
at most the square root of the unit), and have drifted apart after it. `unit` is what the loss is
rounded to: the machine epsilon of the arithmetic; in 16 bits and TF32, where it is a mean over W
tokens that are rounded on their own, epsilon / (8 sqrt(W)). A drift cannot be told from a cause so
small that it acts as rounding does, such as a learning rate that differs by 0.01%: what was asked
tells that.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gradaccum.report.read import Run, number
from gradaccum.types import amount, counted

JUMP = 32
EPSILONS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
EPSILONS["tf32"] = EPSILONS["float16"]
# What counts the data of a step, and what each run has to have the same of.
DATA = {
    "num_examples": "examples",
    "weight": "trained tokens",
    "useful_tokens": "useful tokens",
}
# What acts on a step without being seen in its loss.
CAUSES = {"effective_batch_size": "effective batch", "learning_rate": "learning rate"}
SAME, ROUNDING, DRIFT, PART, APART = "same", "rounding", "drift", "part", "nothing in common"
# How what was asked acts on what is trained.
CHANGES, ROUNDS, NEITHER = "can change what is trained", "changes rounding", "changes nothing"
ONLY_ROUNDS = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "padding_free", "tf32", "torch_compile", "use_liger_kernel",
    "auto_find_batch_size", "ddp_bucket_cap_mb", "attn_implementation",
}  # fmt: skip
ONLY_LOGS = (
    "output_dir", "logging_", "save_", "eval_", "report_to", "run_name", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "disable_tqdm", "hub_", "push_to_hub", "resume_from_checkpoint", "do_eval", "do_train",
    "per_device_eval_batch_size", "log_level", "ignore_data_skip", "load_best_model_at_end",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tell how the trajectory of a run stands to that of the first.

    Args:
        kind: "same", "rounding", "drift", "part" or "nothing in common".
        step: Where they part or drift apart; else the last that both have.
        num_common: Steps that both have.
        largest: Largest relative difference of the loss: before they part, or at all.
        sentence: All of it in words.
        apart: (step, relative difference of the loss) of each step that both know it of.
        bounds: (step, up to where a difference is no jump) likewise.
    """

    kind: str
    step: int | None
    num_common: int
    largest: float
    sentence: str
    apart: tuple[tuple[int, float], ...] = ()
    bounds: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """Name what was asked of runs in different ways.

    Args:
        name: As run.json has it.
        values: One a run, in words; "" where a run does not tell.
        effect: Whether it can change what is trained.
    """

    name: str
    values: tuple[str, ...]
    effect: str


def compare(first: Run, other: Run) -> Comparison:
    """Say whether two runs trained the same trajectory, or where they part."""
    at = {step: i for i, step in enumerate(other.steps)}
    pairs = [(i, at[step], step) for i, step in enumerate(first.steps) if step in at]
    if not pairs:
        return Comparison(APART, None, 0, math.nan, "they have no step in common")
    if not first.known("loss") or not other.known("loss"):
        return Comparison(APART, None, len(pairs), math.nan, "one of them has no loss")
    return _Walk(first, other, pairs).told()


def unit_of(run: Run) -> tuple[float, str]:
    """Return to what the run's arithmetic rounds (relative), and what it is called."""
    settings = run.stated("settings")
    settings = settings if isinstance(settings, dict) else {}
    name = str(run.stated("model", "dtype") or "float32").removeprefix("torch.")
    for flag, low in (("tf32", "tf32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        name = low if settings.get(flag) is True and name != "float64" else name
    name = name if name in EPSILONS else "float32"
    return EPSILONS[name], name


class _Walk:
    """Go through the steps that two runs have in common, up to where they part."""

    def __init__(self, first: Run, other: Run, pairs: list[tuple[int, int, int]]) -> None:
        self._runs = first, other
        self._pairs = pairs
        self._columns = {
            name: (first.column(name), other.column(name))
            for name in ("loss", "grad_norm", *DATA, *CAUSES)
        }
        self._epsilon, self._dtype = max(unit_of(first), unit_of(other))
        self._apart: list[tuple[int, float]] = []
        self._bounds: list[tuple[int, float]] = []

    def told(self) -> Comparison:
        largest, drifted = 0.0, None
        parted: tuple[int, str, float] | None = None  # step, how, largest before
        for i, j, step in self._pairs:
            apart, unit = self._difference(i, j), self._unit(i)
            if math.isfinite(apart):
                self._apart.append((step, apart))
            if parted is not None:  # go on for the figure alone
                continue
            bound = JUMP * max(unit, largest)
            self._bounds.append((step, bound))
            how = self._other_data(i, j) or ("" if apart <= bound else self._losses(i, j))
            if how:
                parted = step, how, largest
                continue
            largest = max(largest, apart)
            if drifted is None and largest > math.sqrt(unit):
                drifted = step, math.sqrt(unit)
        if parted is not None:
            step, how, before = parted
            return self._comparison(PART, step, before, self._parts(step, how, before))
        if drifted is not None:
            return self._comparison(DRIFT, drifted[0], largest, self._drifts(*drifted, largest))
        kind = ROUNDING if largest else SAME
        return self._comparison(kind, self._pairs[-1][2], largest, self._holds(largest))

    def _comparison(self, kind: str, step: int, largest: float, sentence: str) -> Comparison:
        return Comparison(
            kind, step, len(self._pairs), largest, sentence + self._longer(),
            tuple(self._apart), tuple(self._bounds),
        )  # fmt: skip

    def _difference(self, i: int, j: int) -> float:
        a, b = self._at("loss", i, j)
        if a is None or b is None:
            return 0.0 if a is b else math.inf
        return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0

    def _unit(self, i: int) -> float:
        """Return what the loss of a step is rounded to."""
        weight = self._columns["weight"][0][i] or 1
        if self._epsilon <= EPSILONS["float32"]:
            return self._epsilon
        return max(EPSILONS["float32"], self._epsilon / (8 * math.sqrt(max(1, weight))))

    def _other_data(self, i: int, j: int) -> str:
        """Say which counts of a step differ; "" if none does."""
        for name, label in DATA.items():
            a, b = self._at(name, i, j)
            if a is not None and b is not None and a != b:
                unit = self._runs[0].unit if name == "weight" else ""
                return f"{a:,.0f} against {b:,.0f} {unit or label}, so the data are not the same"
        return ""

    def _losses(self, i: int, j: int) -> str:
        a, b = self._at("loss", i, j)
        words = ["not finite" if loss is None else loss for loss in (a, b)]
        if a is None or b is None:
            return "loss {} against {}".format(*words)
        return "loss {} against {}".format(*apart(a, b))

    def _at(self, name: str, i: int, j: int) -> tuple[float | None, float | None]:
        first, other = self._columns[name]
        return first[i], other[j]

    def _parts(self, step: int, how: str, before: float) -> str:
        earlier = sum(s < step for _, _, s in self._pairs)
        text = f"they part at step {step:,}: {how}"
        if earlier:
            text += (
                f"; before it they differ by at most {before:.1e}"
                if before
                else f"; before it they are the same to the last digit in "
                f"{'the one step' if earlier == 1 else f'all {earlier:,} steps'}"
            )
        return text + self._causes(step)

    def _causes(self, step: int) -> str:
        """Say which figures of the steps up to this one differ that act on it."""
        told = []
        for name, label in CAUSES.items():
            for i, j, s in self._pairs:
                a, b = self._at(name, i, j)
                if s > step:
                    break
                if a is None or b is None or math.isclose(a, b, rel_tol=1e-9):
                    continue
                when = "at that step" if s == step else f"since step {s:,}"
                told.append(f"{when} the {label} is {a:,.6g} against {b:,.6g}")
                break
        return "".join(f"; {text}" for text in told)

    def _drifts(self, step: int, half: float, largest: float) -> str:
        return (
            f"they drift apart without a jump, as rounding in {self._dtype} does: the relative "
            f"difference of the loss passes {half:.0e} at step {step:,} and reaches {largest:.1e}"
            + self._causes(self._pairs[-1][2])
        )

    def _holds(self, largest: float) -> str:
        num, last = len(self._pairs), self._pairs[-1][2]
        if largest:
            return (
                f"the same within rounding ({self._dtype}; largest relative difference of the loss "
                f"{largest:.1e}) up to step {last:,}"
            )
        text = "the same to the last digit in " + (
            f"the one step, {last:,}" if num == 1 else f"all {num:,} steps"
        )
        norms = [self._at("grad_norm", i, j) for i, j, _ in self._pairs]
        apart = max((abs(a - b) / max(a, b, 1e-300) for a, b in norms if a and b), default=0.0)
        return text + (f" (gradient norms differ by up to {apart:.1e})" if apart else "")

    def _longer(self) -> str:
        """Say how many steps one of them has that the other has not."""
        told = []
        for run in self._runs:
            alone = len(run.steps) - len(self._pairs)
            if alone:
                told.append(f"{run.name} has {counted(alone, 'step')} more")
        return "".join(f"; {text}" for text in told)


def apart(a: float, b: float) -> tuple[str, str]:
    """Return two numbers with as many digits as it takes to see their difference.

    Example:
        >>> apart(3.41211, 3.41878), apart(2.0, 2.0000001)
        (('3.4121', '3.4188'), ('2.00000000', '2.00000010'))
    """
    digits = 4
    while digits < 17 and f"{a:.{digits}f}"[:-1] == f"{b:.{digits}f}"[:-1]:
        digits += 1
    return f"{a:.{digits}f}", f"{b:.{digits}f}"


def differences(runs: list[Run]) -> list[Difference]:
    """Return what was asked of these runs in different ways, what can matter first."""
    asked = [dict(_asked(run)) for run in runs]
    names = dict.fromkeys(name for told in asked for name in told)
    found = []
    for name in names:
        values = tuple(told.get(name, "") for told in asked)
        # What a run without run.json does not tell is not known to differ.
        known = {value for value, run in zip(values, runs, strict=True) if value or run.about}
        if len(known) > 1:
            found.append(Difference(name, values, effect(name)))
    order = (CHANGES, ROUNDS, NEITHER)
    return sorted(found, key=lambda difference: order.index(difference.effect))


def effect(name: str) -> str:
    """Say whether what a name of run.json says can change what is trained.

    Example:
        >>> effect("settings.learning_rate"), effect("budget"), effect("settings.save_steps")
        ('can change what is trained', 'changes rounding', 'changes nothing')
    """
    section, _, setting = name.partition(".")
    if section in ("budget", "world", "device", "versions") or setting in ONLY_ROUNDS:
        return ROUNDS
    if (section == "settings" and setting.startswith(ONLY_LOGS)) or section in ("memory", "status"):
        return NEITHER
    return CHANGES


def explanation(first: Run, other: Run, found: Comparison) -> str:
    """Say what of what was asked explains that two runs part, or that they do not."""
    if not (dict(_asked(first)) and dict(_asked(other))):
        return "What was asked of them is not known: there is no run.json that tells."
    asked = differences([first, other])
    changes = [_words(d) for d in asked if d.effect == CHANGES]
    rounds = [_words(d) for d in asked if d.effect == ROUNDS]
    if found.kind in (PART, DRIFT, APART):
        if changes:
            return f"What was asked differs in {'; '.join(changes)}."
        if rounds:
            return (
                f"What was asked differs only in what changes rounding: {'; '.join(rounds)}. With "
                "dropout another cut draws other masks, which is more than rounding."
            )
        return "What was asked is the same in both, and so are versions and device."
    if changes:
        return f"That is although what was asked differs in {'; '.join(changes)}."
    return f"They differ in what changes rounding: {'; '.join(rounds)}." if rounds else ""


def _words(difference: Difference) -> str:
    a, b = (value or "not stated" for value in difference.values)
    return f"{difference.name.removeprefix('settings.')} {a} against {b}"


def _flags(command: str) -> Iterator[tuple[str, str]]:
    """Yield the flags of a command, for a run that does not tell its settings.

    Example:
        >>> list(_flags("gradaccum train --budget 768 --use_peft --seed=1"))
        [('budget', '768'), ('settings.use_peft', 'true'), ('settings.seed', '1')]
    """
    words = re.sub(r" --(\w+)=", r" --\1 ", f"{command} ").split(" --")[1:]
    for word in words:
        name, _, value = word.strip().partition(" ")
        prefix = "" if name in ("budget", "memory", "effective_batch_size") else "settings."
        yield f"{prefix}{name}", value.strip() or "true"


def _asked(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what run.json says was asked, by dotted names, in words."""
    for name in ("effective_batch_size", "schedule", "num_steps", "seed", "world", "device"):
        if (value := run.stated(name)) is not None:
            yield name, f"{value:,}" if number(value) is not None and name != "seed" else str(value)
    for section in ("model", "data", "settings", "versions"):
        inside = run.stated(section)
        for name, value in inside.items() if isinstance(inside, dict) else ():
            yield f"{section}.{name}", str(value)
    if not isinstance(run.stated("settings"), dict):
        yield from _flags(str(run.stated("command") or ""))
    budget = run.stated("budget")
    if isinstance(budget, dict):
        bounds = [f"{budget[n]:,} {n}" for n in ("tokens", "examples") if number(budget.get(n))]
        yield "budget", " and ".join(bounds) or "none"
    if (cap := number(run.stated("memory", "cap_bytes"))) is not None:
        yield "memory", amount(cap)
