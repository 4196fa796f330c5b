"""`gradaccum report`: what became of a run, or how several compare, from their directories.

The page goes to a file whose path is printed; with --json or --markdown it is text on stdout.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradaccum.errors import BadInput
from gradaccum.report.compare import Comparison, compare, differences, explanation
from gradaccum.report.facts import facts
from gradaccum.report.page import check, html
from gradaccum.report.read import Run, number, read_all
from gradaccum.report.words import headline, headline_of, markdown, remarks, verdicts

ONE, SEVERAL = "report.html", "comparison.html"  # in the directory of the first run


def run(words: list[str]) -> int:
    """Report on the runs and return the exit code."""
    mine = _parsed(words)
    is_page = mine.out is not None or not (mine.json or mine.markdown)
    if is_page:
        check()
    runs = read_all(Path(folder) for folder in mine.runs)
    out = Path(mine.out) if mine.out else runs[0].folder / (ONE if len(runs) == 1 else SEVERAL)
    if is_page:
        _check_out(out)
    _say(runs)
    if is_page:
        _write(runs, out)
    if mine.json:
        print(json.dumps(_figures(runs), allow_nan=False))
    elif mine.markdown:
        print(markdown(runs))
    else:
        print(out)
    return 0


def _parsed(words: list[str]) -> argparse.Namespace:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("runs", nargs="*")
    own.add_argument("--out")
    own.add_argument("--json", action="store_true")
    own.add_argument("--markdown", action="store_true")
    try:
        mine, rest = own.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise BadInput(f"{error}", hint="gradaccum report --help") from error
    if rest:
        raise BadInput(f"report has no flag {rest[0]}", hint="gradaccum report --help")
    if not mine.runs:
        raise BadInput(
            "report needs the directory of a run", hint="gradaccum report gradaccum-runs/DATE-TIME"
        )
    if mine.json and mine.markdown:
        raise BadInput("--json and --markdown both print on stdout", hint="choose one")
    return mine


def _check_out(out: Path) -> None:
    if out.suffix not in (".html", ".htm"):
        raise BadInput(f"--out {out} is no .html file")
    if out.is_dir():
        raise BadInput(f"--out {out} is a directory", hint=f"--out {out / ONE}")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"there is no directory {out.parent} for --out")


def _say(runs: Sequence[Run]) -> None:
    """Tell the answer at once, and what could not be read."""
    if len(runs) == 1:
        told = facts(runs[0])
        lines = [headline(runs[0], told), *remarks(runs[0], told)]
    else:
        found = [compare(runs[0], other) for other in runs[1:]]
        lines = [headline_of(runs, found), *verdicts(runs, found).sentences]
        lines += [f"{each.name}: {note}" for each in runs for note in each.notes]
    for line in lines:
        print(line, file=sys.stderr)


def _write(runs: Sequence[Run], out: Path) -> None:
    from gradaccum.report import several, single

    page = single.page(runs[0]) if len(runs) == 1 else several.page(runs)
    try:
        out.write_text(html(page), encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"cannot write {out}: {os.strerror(error.errno or 0)}", hint="--out FILE"
        ) from error


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    if len(runs) == 1:
        return facts(runs[0])
    return {
        "runs": [facts(each) for each in runs],
        "comparisons": [_compared(runs[0], other) for other in runs[1:]],
        "asked_differently": [
            {"name": d.name, "values": list(d.values), "effect": d.effect}
            for d in differences(list(runs))
        ],
    }


def _compared(first: Run, other: Run) -> dict[str, Any]:
    found: Comparison = compare(first, other)
    return {
        "first": first.name,
        "other": other.name,
        "kind": found.kind,
        "step": found.step,
        "common_steps": found.num_common,
        "largest_relative_difference": number(found.largest),
        "sentence": found.sentence,
        "explanation": explanation(first, other, found),
    }
