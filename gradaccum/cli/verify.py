"""`gradaccum verify`: audit the trainer of the flags, or a loop named as module:function.

The verdict goes to stdout, everything else to stderr. Exit codes: 0 exact, 1 not, 2 not judged:
wrong usage, or a loop or a function that failed.
"""

import importlib
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradaccum
from gradaccum.errors import BadInput, GradaccumError, MissingExtra
from gradaccum.verdict import Verdict
from gradaccum.verify import verify

NUM_EXAMPLES = 8  # of the effective batch: what is wrong at eight examples is wrong at 8,000


def run(words: list[str]) -> int:
    """Verify what the words name, print the verdict and return the exit code."""
    as_json = "--json" in words
    rest = [word for word in words if word != "--json"]
    with warnings.catch_warnings(), _progress():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        begin = time.perf_counter()
        is_named = bool(rest) and not rest[0].startswith("-")
        verdict = _of_function(rest[0], rest[1:]) if is_named else _of_flags(rest)
        seconds = time.perf_counter() - begin
    _say(f"{verdict.num_passes:.1f} passes over {verdict.num_examples} examples in {seconds:.1f} s")
    print(verdict.to_json() if as_json else verdict)
    return 0 if verdict.exact else 1


def _of_function(name: str, words: list[str]) -> Verdict:
    """Verify the loop, model and batch that a function returns."""
    module_name, _, function_name = name.partition(":")
    module = os.path.normpath(module_name.removesuffix(".py")).replace(os.sep, ".")
    if module != module_name or not function_name:
        is_data = Path(name).is_file() and not name.endswith(".py")
        dotted = f"gradaccum verify {module.lstrip('.')}:{function_name or 'FUNCTION'}"
        raise BadInput(
            f"{name!r} is neither a flag nor a loop as module:function",
            hint=f"gradaccum verify --dataset_name {name}" if is_data else dotted,
        )
    if words:
        raise BadInput(f"{words[0]!r} does not go with {name}", hint=f"gradaccum verify {name}")
    with _judged(name):
        found = _named(module_name, function_name)
        if not isinstance(found, tuple) or len(found) not in (3, 4):
            raise BadInput(
                f"{name} returns {type(found).__name__}, and has to return (loop, model, batch)",
                hint="(trainer, None, None) for a Trainer; a fourth is the objective",
            )
        _say(f"verify    {name}")
        loop, model, batch, objective = (*found, None)[:4]
        return verify(loop, model, batch, objective=objective)


def _named(module_name: str, function_name: str) -> Any:
    """Return what a function of a module in the working directory returns."""
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise BadInput(
            f"there is no module {module_name!r}", hint="run it where the module can be imported"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not hasattr(module, function_name):
        raise BadInput(f"the module {module_name!r} has no {function_name!r}")
    function = getattr(module, function_name)
    return function() if callable(function) else function


@contextmanager
def _judged(name: str) -> Iterator[None]:
    """Show where foreign code failed, and say that there is no verdict."""
    try:
        yield
    except GradaccumError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = str(Path(gradaccum.__file__).parent)
        foreign = [frame for frame in frames if not frame.filename.startswith((own, "<frozen"))]
        shown = traceback.format_list(foreign or frames)  # a wrong signature fails in our frame
        _say("".join(shown + traceback.format_exception_only(error)))
        raise BadInput(
            f"{name} failed with {type(error).__name__}, so nothing was judged",
            hint="call the function by itself, and then loop(model, [batch])",
        ) from error


@contextmanager
def _progress() -> Iterator[None]:
    """Say each cut on stderr as soon as it has run: a large model takes its time."""
    logger = logging.getLogger("gradaccum.audit")
    handler, before = logging.StreamHandler(sys.stderr), (logger.level, logger.propagate)
    handler.setFormatter(logging.Formatter("          %(message)s"))
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


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
    arguments = parse(words, others=("--stock",))
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
