"""Benchmarks of several contenders side by side, each in a process of its own.

The parent gives turns: in each round every contender does some steps while the others wait, and
the order turns from round to round. So a slow minute of the machine hits all of them, and ratios
are taken within a round. A contender that dies says why, and the others go on.

    parent                               worker
    race(contenders, rounds=5, steps=2)  stage = Stage()
                                         stage.wait()
                                         for batch in batches:
                                             ...
                                             stage.done(trained=..., padded=..., useful=...)

Not here: what is timed, and how it is shown (`gradaccum.cli.bench`).
"""

from gradaccum.bench.race import Contender, Outcome, Turn, WorkerFailed, race, rotated
from gradaccum.bench.rows import Row, Spread, rows, spread
from gradaccum.bench.stage import Stage

__all__ = [
    "Contender",
    "Outcome",
    "Row",
    "Spread",
    "Stage",
    "Turn",
    "WorkerFailed",
    "race",
    "rotated",
    "rows",
    "spread",
]
