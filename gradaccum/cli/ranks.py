"""Which of several ranks speaks and writes: the first, for all."""

import os
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from gradaccum.errors import BadInput

T = TypeVar("T")
IS_FIRST = os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate launch set it
RESTARTS = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0  # torchrun does, if one dies


def decided(decide: Callable[[], T]) -> T:
    """Return what the first rank decides; where that refuses its input, all do.

    Raises:
        BadInput: As `decide` on the first rank.
    """
    answer: list[T | BadInput | None] = [None]
    if IS_FIRST:
        try:
            answer[0] = decide()
        except BadInput as error:
            answer[0] = error
    if PartialState().num_processes > 1:
        broadcast_object_list(answer)
    found = answer[0]
    if isinstance(found, BadInput):
        raise found
    return found  # pyright: ignore[reportReturnType]
