"""The flags of `gradaccum train`: TRL's own dataclasses and parser, and a few flags of ours."""

import difflib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from gradaccum.errors import BadInput
from gradaccum.memory.auto import AUTO
from gradaccum.memory.cap import parsed
from gradaccum.schedule import POWERS, BatchSchedule
from gradaccum.types import Budget

# What `gradaccum train` without a model uses instead of the defaults of TRL.
EMBEDDED_DEFAULTS = {
    "effective_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_steps": 25,
    "gradient_checkpointing": False,
}


@dataclass
class AccumulationArguments:
    """The flags that are gradaccum's own."""

    effective_batch_size: int | None = field(
        default=None, metadata={"help": "Examples in one optimizer step; any number of at least 1."}
    )
    effective_batch_schedule: str | None = field(
        default=None,
        metadata={
            "help": 'Sizes and the steps from which they hold: "32:0,64:10k,128:50k"; by samples '
            'or tokens: "32:0,64:1M samples"; as a ramp: "32..256 by 32 over 1M samples".'
        },
    )
    lr_rule: str = field(
        default="none",
        metadata={
            "help": "What the learning rate is multiplied by, with a schedule: none, linear (size "
            "/ first size) or sqrt (its root).",
            "choices": list(POWERS),
        },
    )
    beta2_rule: bool = field(
        default=False,
        metadata={"help": "With a schedule: take beta2 to the power of size / first size."},
    )
    budget: str | None = field(
        default="auto",
        metadata={"help": 'Largest micro-batch: "8192" (padded tokens), "4 examples", or "auto".'},
    )
    memory: str | None = field(
        default=None,
        metadata={"help": 'What there is for it: "20GiB", or a fraction of the device, as 0.8.'},
    )
    json: bool = field(default=False, metadata={"help": "Print the summary as JSON on stdout."})


@dataclass(frozen=True, slots=True)
class Arguments:
    """All flags, checked.

    Args:
        effective_batch_size: The largest, where there is a schedule.
        given: Names of the flags that the user gave, on the command line or in the file.
    """

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    effective_batch_size: int
    schedule: BatchSchedule | None
    budget: Budget | Literal["auto"]
    memory: str | None
    json: bool
    given: frozenset[str]


class _Parser(TrlParser):
    """Report a wrong flag as BadInput instead of printing 300 flags."""

    def error(self, message: str) -> NoReturn:
        hint = "gradaccum train --help-all"
        found = re.fullmatch(r"argument (--\w+)\S*: (.*)", message, re.DOTALL)
        if found is None:
            raise BadInput(message, hint=hint)
        flag, cause = found.groups()
        choice = re.match(r"invalid choice: '(.*)' \(choose from (.*)\)", cause, re.DOTALL)
        if choice is not None:
            known = re.findall(r"[\w.-]+", choice[2])
            near = difflib.get_close_matches(choice[1], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known[:12])}, ..."
            cause = f"there is no {choice[1]!r}"
        elif cause == "expected one argument":
            cause = "no value follows"
            hint = f"{flag}=VALUE, with = where the value begins with -"
        raise BadInput(f"{flag}: {cause}", hint=hint)


def parse(words: list[str], *, others: Iterable[str] = ()) -> Arguments | None:
    """Return the checked flags; None where all of them were asked for and printed.

    Args:
        words: The command line.
        others: Flags that the command takes itself, to be suggested where one is misspelt.

    Raises:
        BadInput: A flag is unknown, has no or a wrong value, or contradicts another.
    """
    dataclasses: Any = [ScriptArguments, SFTConfig, ModelConfig, AccumulationArguments]
    parser = _Parser(
        dataclasses,
        prog="gradaccum train",
        allow_abbrev=False,
        add_help=False,
    )
    flags = {option for action in parser._actions for option in action.option_strings}
    if "--help-all" in words:
        parser.print_help(sys.stdout)
        return None
    words = [part for word in words for part in _config_apart(word)]
    given = _given(words)
    _refuse_bad_json(words)
    parser.set_defaults(model_name_or_path="embedded", dataset_name="embedded")
    if "model_name_or_path" not in given:
        parser.set_defaults(**EMBEDDED_DEFAULTS)
    if "logging_steps" not in given:
        parser.set_defaults(logging_steps=1)
    if not torch.accelerator.is_available():
        # TRL's defaults are for GPUs: most CPUs are slow at bf16, and there is nothing to pin for.
        parser.set_defaults(bf16=False, dataloader_pin_memory=False)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            parser.set_defaults(use_cpu=True)  # else each rank would train a model of its own
    try:
        script, training, model, own, unknown = parser.parse_args_and_config(
            words, return_remaining_strings=True
        )
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(" ".join(str(error).split())) from error  # some messages are lists
    unknown = [word for word in unknown if word.startswith("-")] or unknown
    _refuse_unknown(unknown, flags.union(others))
    _refuse_values(training)
    schedule = _schedule(own, given)
    size = (
        _effective_batch_size(own.effective_batch_size, training, given)
        if schedule is None
        else schedule.largest
    )
    budget = _budget(own.budget)
    if own.memory is not None and budget != AUTO:
        raise BadInput(
            f"--memory {own.memory} is for --budget auto, and --budget {own.budget} is given",
            hint="leave out one of them",
        )
    if own.memory is not None:
        parsed(own.memory)  # now, and not once the model is built
    return Arguments(script, training, model, size, schedule, budget, own.memory, own.json, given)


def _config_apart(word: str) -> list[str]:
    """Return --config=FILE as the two words that TRL's parser knows."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _given(words: list[str]) -> frozenset[str]:
    """Return the names of the flags on the command line and in the file behind --config."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    if "--config" in words:
        index = words.index("--config") + 1
        if index == len(words):
            raise BadInput("--config needs a file", hint="gradaccum train --config run.yaml")
        try:
            with open(words[index], encoding="utf-8") as file:
                flags = yaml.safe_load(file)
        except OSError as error:
            raise BadInput(f"--config {words[index]}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}: " if mark is not None else ""
            cause = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise BadInput(f"--config {words[index]} is no YAML: {where}{cause}") from error
        if not isinstance(flags, dict) or not flags:
            raise BadInput(
                f"--config {words[index]} holds no flags", hint="one a line, as max_steps: 100"
            )
        names |= set(map(str, flags))
    return frozenset(names)


def _refuse_unknown(unknown: Iterable[str], flags: set[str]) -> None:
    for word in unknown:
        if not word.startswith("-"):
            raise BadInput(
                f"{word!r} is no flag and belongs to none",
                hint=f"--dataset_name {word}"
                if Path(word).exists()
                else 'quote values with spaces: --budget "4 examples"',
            )
        name = word.split("=")[0]
        near = difflib.get_close_matches(name, sorted(flags), n=1)
        raise BadInput(
            f"there is no flag {name}",
            hint=f"did you mean {near[0]}?"
            if near
            else "gradaccum train --help-all lists them all",
        )


def _refuse_bad_json(words: list[str]) -> None:
    """Name the flag whose JSON is wrong; the parser would only say where."""
    apart = [part for word in words for part in word.split("=", 1)]
    for flag, value in itertools.pairwise(apart):
        if flag.endswith(("_kwargs", "_config")) and value.startswith("{"):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                raise BadInput(
                    f"{flag} {value} is no JSON: {error.msg} at character {error.pos + 1}",
                    hint=f"""{flag} '{{"name": 1}}'""",
                ) from error


def _refuse_values(training: SFTConfig) -> None:
    """Refuse values that transformers takes and that then train nothing, or another batch."""
    for name, value in vars(training).items():
        is_float = isinstance(value, float) and name != "max_grad_norm"  # inf: measured, not cut
        if is_float and not math.isfinite(value):
            raise BadInput(f"--{name} {value} is not finite")
    if training.max_length is not None and training.max_length < 2:
        raise BadInput(
            f"--max_length {training.max_length} leaves no token to predict",
            hint="leave it out for 1,024 tokens",
        )
    if training.max_steps == 0 or training.max_steps < -1:
        raise BadInput(
            f"--max_steps {training.max_steps} is below 1",
            hint="leave it out, or set it to -1, to train --num_train_epochs",
        )
    if training.max_steps == -1 and training.num_train_epochs <= 0:
        raise BadInput(f"--num_train_epochs {training.num_train_epochs} is not above 0")
    if training.auto_find_batch_size:
        raise BadInput(
            "--auto_find_batch_size shrinks the effective batch and starts over on changed weights",
            hint="leave it out; --budget says how large a micro-batch may be",
        )


def _schedule(own: AccumulationArguments, given: frozenset[str]) -> BatchSchedule | None:
    if own.effective_batch_schedule is None:
        for name, is_asked in (("lr_rule", own.lr_rule != "none"), ("beta2_rule", own.beta2_rule)):
            if is_asked:
                raise BadInput(
                    f"--{name} is for sizes that change, and there is no schedule",
                    hint='--effective_batch_schedule "32:0,64:10k"',
                )
        return None
    for name in ("effective_batch_size", "gradient_accumulation_steps"):
        if name in given:
            raise BadInput(
                f"--effective_batch_schedule {own.effective_batch_schedule!r} says how large the "
                f"effective batch is, and so does --{name}",
                hint="leave out one of them",
            )
    rule: Any = own.lr_rule
    return BatchSchedule.parse(own.effective_batch_schedule, lr=rule, beta2=own.beta2_rule)


def _effective_batch_size(stated: int | None, training: SFTConfig, given: frozenset[str]) -> int:
    per_device, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    world = training.world_size
    if per_device < 1 or steps < 1:
        raise BadInput(
            f"--per_device_train_batch_size {per_device} and --gradient_accumulation_steps {steps} "
            "have to be at least 1"
        )
    meant = per_device * steps * world
    if stated is None:
        return meant
    if stated < 1:
        raise BadInput(f"--effective_batch_size {stated} is below 1")
    # A resumed run keeps the size that it began with, on any number of ranks.
    is_resumed = "resume_from_checkpoint" in given
    if "gradient_accumulation_steps" in given and stated != meant and not is_resumed:
        if "effective_batch_size" not in given:
            return meant
        ranks = f" x {world} ranks" if world > 1 else ""
        raise BadInput(
            f"--effective_batch_size {stated} contradicts {per_device} rows x {steps} steps"
            f"{ranks} = {meant}",
            hint="leave out --gradient_accumulation_steps: it follows from the effective batch",
        )
    return stated


def _budget(text: str | None) -> Budget | Literal["auto"]:
    """Read "8192", "8192 tokens", "4 examples" or "auto"."""
    if text is None or text == AUTO:
        return AUTO
    number, _, unit = str(text).replace("_", "").replace(",", "").partition(" ")
    unit = unit.removesuffix("s")
    if not number.isdecimal() or unit not in ("", "token", "example") or int(number) < 1:
        raise BadInput(
            f"--budget {text!r} is neither auto nor a number of tokens or of examples",
            hint='--budget 8192 or --budget "4 examples"',
        )
    return Budget(examples=int(number)) if unit == "example" else Budget(tokens=int(number))
