"""The entry point: choose the command, and turn errors into one sentence and an exit code.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 128 + signal when stopped by one.
"""

import importlib
import logging
import os
import signal
import sys
from typing import Any

import gradaccum
from gradaccum.cli.help import BENCH, PLAN, REPORT, TRAIN, USAGE, VERIFY
from gradaccum.errors import BadInput, GradaccumError, MissingExtra, PeerFailed


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"gradaccum {gradaccum.__version__}")
        return 0
    try:
        commands = {
            "train": (TRAIN, _train),
            "verify": (VERIFY, _verify),
            "plan": (PLAN, _plan),
            "bench": (BENCH, _bench),
            "report": (REPORT, _report),
        }
        if words[0] not in commands:
            raise BadInput(f"there is no command {words[0]!r}", hint="gradaccum --help")
        text, run = commands[words[0]]
        if "-h" in words or "--help" in words:
            print(text, end="")
            return 0
        # At its import it warns of a kernel that only inference would use.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return run(words[1:])
    except GradaccumError as error:
        rank = os.environ.get("RANK", "0")
        # Of several ranks the first says what all refuse, and whoever fails alone what happened.
        if rank == "0" or not isinstance(error, (BadInput, MissingExtra, PeerFailed)):
            print(f"error: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return 2 if isinstance(error, (BadInput, MissingExtra)) else 1
    except KeyboardInterrupt as interrupt:
        print("stopped at once: nothing more was saved", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _train(words: list[str]) -> int:
    return _imported("train").run(words)


def _plan(words: list[str]) -> int:
    return _imported("plan").run(words)


def _bench(words: list[str]) -> int:
    return _imported("bench").run(words)


def _report(words: list[str]) -> int:
    from gradaccum.cli import report

    return report.run(words)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(f"gradaccum.cli.{name}")
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"gradaccum {name} needs the package {error.name!r}, which is not installed",
            hint='pip install "gradaccum[hf]"',
        ) from error


def _verify(words: list[str]) -> int:
    from gradaccum.cli import verify  # now, since it imports torch and what its loop needs

    return verify.run(words)
