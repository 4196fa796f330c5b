"""`gradaccum verify`: audit the trainer of the flags, or a loop named as module:function.

The verdict goes to stdout, everything else to stderr. Exit codes: 0 exact, 1 not, 2 wrong usage.
"""

import importlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from gradaccum.errors import BadInput, MissingExtra
from gradaccum.verdict import Verdict
from gradaccum.verify import verify

NUM_EXAMPLES = 8  # of the effective batch: what is wrong at eight examples is wrong at 8,000


def run(words: list[str]) -> int:
    """Verify what the words name, print the verdict and return the exit code."""
    as_json = "--json" in words
    rest = [word for word in words if word != "--json"]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        begin = time.perf_counter()
        is_named = bool(rest) and ":" in rest[0] and not rest[0].startswith("-")
        verdict = _of_function(rest[0], rest[1:]) if is_named else _of_flags(rest)
        seconds = time.perf_counter() - begin
    _say(f"{verdict.num_passes:.1f} passes over {verdict.num_examples} examples in {seconds:.1f} s")
    print(verdict.to_json() if as_json else verdict)
    return 0 if verdict.exact else 1


def _of_function(name: str, words: list[str]) -> Verdict:
    """Verify the loop, model and batch that a function returns."""
    if words:
        raise BadInput(f"{words[0]!r} does not go with {name}", hint=f"gradaccum verify {name}")
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise BadInput(
            f"there is no module {module_name!r}", hint="run it where the module can be imported"
        ) from error
    except AttributeError as error:
        raise BadInput(f"the module {module_name!r} has no {function_name!r}") from error
    finally:
        sys.path.remove(os.getcwd())
    found = function() if callable(function) else function
    if not isinstance(found, tuple) or len(found) != 3:
        raise BadInput(
            f"{name} returns {type(found).__name__}, and has to return (loop, model, batch)",
            hint="(trainer, None, None) for a Trainer",
        )
    _say(f"verify    {name}")
    return verify(*found)


def _of_flags(words: list[str]) -> Verdict:
    """Verify the SFTTrainer that `gradaccum train` would run with these flags, or the stock one."""
    is_stock = "--stock" in words
    words = [word for word in words if word != "--stock"]
    try:
        from gradaccum.cli import train
        from gradaccum.cli.arguments import parse
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"gradaccum verify needs the package {error.name!r}, which is not installed",
            hint='pip install "gradaccum[hf]"',
        ) from error
    train._quiet()
    arguments = parse(words)
    if arguments is None:
        raise BadInput("verify takes the flags of train", hint="gradaccum train --help-all")
    with tempfile.TemporaryDirectory() as folder:  # nothing is trained, so nothing is kept
        arguments.training.output_dir = folder
        trainer = train._trainer(arguments, Path(folder))
        if is_stock:
            trainer = _stock(trainer, arguments)
        size = min(arguments.effective_batch_size, NUM_EXAMPLES)
        _say(f"verify    {type(trainer).__name__}, {'stock' if is_stock else 'attached'}")
        examples = [row for row, _ in zip(trainer.train_dataset, range(size), strict=False)]
        return verify(trainer, batch=examples)


def _stock(trainer: Any, arguments: Any) -> Any:
    """Build the trainer anew, without the accumulation, on the same model and data."""
    from trl import SFTTrainer

    return SFTTrainer(
        model=trainer.model,
        args=arguments.training,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
