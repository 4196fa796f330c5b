"""The errors of gradaccum, as one tree.

    GradaccumError
    |-- BadInput          a wrong argument, file or setting; said before any work starts
    |   `-- CountMismatch the loss and the weight name different terms
    |-- DoesNotFit        not even one example fits into memory
    |-- NotDecomposable   no sum over micro-batches gives the gradient of the full batch
    |-- RankDisagreement  ranks have different models, losses or settings; every rank raises it
    |-- PeerFailed        another rank failed or is gone; every rank that is left raises it
    `-- MissingExtra      an optional dependency is not installed

Every message is one sentence with both sides of the comparison; the hint names the next step.
"""

import functools
from typing import Any


class GradaccumError(Exception):
    """Carry a message and, after a blank line, a hint that says what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n\nhint: {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:  # the default would lose the hint
        return functools.partial(type(self), hint=self.hint), (self.message,)


class BadInput(GradaccumError, ValueError):
    """Report a wrong argument, file or setting."""


class CountMismatch(BadInput):
    """Report a loss and a weight that name different terms."""


class DoesNotFit(GradaccumError):
    """Report what needs more memory than there is, however small its micro-batches are."""


LESS_MEMORY = (
    "gradient checkpointing, shorter examples (max_length), fewer trained parameters (LoRA), or a "
    "loss that does not hold all logits"
)


class NotDecomposable(GradaccumError):
    """Refuse a model or a loss whose full-batch gradient is no sum over micro-batches."""


class RankDisagreement(GradaccumError):
    """Report ranks that would train different things; raised on every rank."""


class PeerFailed(GradaccumError):
    """Report another rank that failed or is gone; raised on every rank that is left."""


class MissingExtra(GradaccumError, ImportError):
    """Report an optional dependency that is not installed."""
