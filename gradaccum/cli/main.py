"""The entry point: choose the command, and turn errors into one sentence and an exit code.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 128 + signal when stopped by one.
"""

import logging
import signal
import sys

import gradaccum
from gradaccum.cli.help import TRAIN, USAGE
from gradaccum.errors import BadInput, GradaccumError, MissingExtra


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
        if words[0] != "train":
            raise BadInput(f"there is no command {words[0]!r}", hint="gradaccum --help")
        if "-h" in words or "--help" in words:
            print(TRAIN, end="")
            return 0
        return _train(words[1:])
    except GradaccumError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (BadInput, MissingExtra)) else 1
    except KeyboardInterrupt as interrupt:
        print("stopped at once: nothing more was saved", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _train(words: list[str]) -> int:
    # At its import it warns of a kernel that only inference would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from gradaccum.cli import train
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"gradaccum train needs the package {error.name!r}, which is not installed",
            hint='pip install "gradaccum[hf]"',
        ) from error
    return train.run(words)
