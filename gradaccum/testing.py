"""For a user's own test suite: one assertion that an accumulation loop is exact.

def test_my_loop_accumulates_exactly():
    gradaccum.testing.assert_exact(my_loop, model, batch)
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from gradaccum.batch import Collate
from gradaccum.objective import Objective
from gradaccum.verdict import Verdict
from gradaccum.verify import verify


def assert_exact(
    loop: Any,
    model: nn.Module | None = None,
    batch: Any = None,
    *,
    splits: Iterable[Sequence[int]] | None = None,
    objective: Objective | None = None,
    collate: Collate | None = None,
) -> Verdict:
    """Assert that `verify` finds a loop or a trainer exact, and return its verdict.

    Takes what `verify` takes.

    Raises:
        AssertionError: It is not exact; the text is that of the verdict.
    """
    verdict = verify(loop, model, batch, splits=splits, objective=objective, collate=collate)
    if not verdict.exact:
        raise AssertionError(str(verdict))
    return verdict
