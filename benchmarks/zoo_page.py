"""Write the page of the zoo: what `benchmarks/zoo.py` measured, by kind and by head."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

Record = dict[str, Any]

CASES = ("8x1", "A", "B")
EXACT = {"float64": 1e-6, "float32": 1e-5}  # relative error; in float32 at least ten floors
WRONG = 1e-6  # of the stock Trainer; in float32 at least ten floors
REFUSALS = ("NotDecomposable", "BadInput", "CountMismatch")

HEAD = """\
# The zoo

Every head class of transformers that can be built tiny from its configuration, trained for one step
on ragged synthetic rows: by the stock `transformers.Trainer`, and by the same after
`gradaccum.attach`. Both gradients are compared with that of the model's own loss on all rows at
once, `model(**collate(rows)).loss.backward()`, as `||g - g_full|| / ||g_full||`.

- **8x1** is 8 rows in one micro-batch, **A** is 2 rows in each of 4 micro-batches, **B** is 7 rows
  as 2, 2, 2, 1: the short last window of an epoch.
- **Exact** is a relative error of at most 1e-6 in float64 and 1e-5 in float32, stock is **wrong**
  above 1e-6. The floor is what turning the order of the rows changes in the full batch; in float32,
  ten floors are exact as well. In float64, what a model casts to float32 stays float64; those that
  cannot run so are run in float32.
- Weights are drawn large enough that the losses of the rows differ; there is no dropout.
- Vision-language heads get text, and pictures where they cannot do without.

`{command}`, {versions}, {device}, {date}.
"""


def page(records: list[Record], origin: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    built = [r for r in records if "unbuilt" not in r]
    parts = [HEAD.format(**origin | {"versions": versions})]
    for dtype in dict.fromkeys(r["asked"] for r in built):
        own = [r for r in built if r["asked"] == dtype]
        parts += [f"## By kind, {dtype}\n", *by_kind([r for r in own if not r["variant"]])]
        variants = by_kind([r for r in own if r["variant"]], key="variant")
        parts += [f"\n## Variants, {dtype}\n", *variants, ""]
    parts += [
        *listed("Wrong after attach", built, lambda r: worst(r) > limit(r) and "more than exact"),
        *listed("Refused by attach", built, lambda r: said(r, "ours", REFUSALS)),
        *listed("Other errors after attach", built, lambda r: failed(r, "ours")),
        *listed("Errors of the stock Trainer", built, lambda r: failed(r, "stock")),
        *listed("Losses that draw random numbers", built, lambda r: "random" in r and "not judged"),
        *listed("Not built", records, lambda r: r.get("unbuilt")),
        "\n## All heads\n",
        *table([r for r in built if r["asked"] == built[0]["asked"]]),
    ]
    return "\n".join(parts) + "\n"


def limit(record: Record) -> float:
    floors = 10 * record["floor"] if record["dtype"] == "float32" else 0.0
    return max(EXACT[record["dtype"]], floors)


def is_wrong(record: Record, case: str) -> bool:
    """Tell whether the stock gradient is not that of the full batch, or there is none."""
    found = record["stock"][case]
    floors = 10 * record["floor"] if record["dtype"] == "float32" else 0.0
    return isinstance(found, str) or not found[1] <= max(WRONG, floors)


def worst(record: Record) -> float:
    """Return the largest error after attach; 0 where nothing was trained or nothing is known."""
    if "random" in record:
        return 0.0
    return max((x[1] for x in record["ours"].values() if not isinstance(x, str)), default=0.0)


def is_exact(record: Record) -> bool:
    trained = [x for x in record["ours"].values() if not isinstance(x, str)]
    return len(trained) == len(CASES) and worst(record) <= limit(record)


def said(record: Record, way: str, errors: tuple[str, ...]) -> str:
    """Return the first of these errors that a way raised, without the name of the head."""
    texts = (x for x in record[way].values() if isinstance(x, str) and x.startswith(errors))
    return next(texts, "").replace(record["name"], "the head")


def failed(record: Record, way: str) -> str:
    texts = (x for x in record[way].values() if isinstance(x, str))
    return next((x for x in texts if way == "stock" or not x.startswith(REFUSALS)), "")


def summary(records: list[Record]) -> dict[str, Any]:
    """Return the counts of some heads; those with random losses are only counted."""
    judged = [r for r in records if "random" not in r]
    return {
        "heads": len(records),
        "classes": len({r["name"] for r in records}),
        "random": len(records) - len(judged),
        "stock_wrong_in_A": sum(is_wrong(r, "A") for r in judged),
        "stock_wrong_in_A_or_B": sum(is_wrong(r, "A") or is_wrong(r, "B") for r in judged),
        "ours_exact": sum(map(is_exact, judged)),
        "ours_below_1e-10": sum(is_exact(r) and worst(r) < 1e-10 for r in judged),
        "ours_refused": sum(bool(said(r, "ours", REFUSALS)) for r in judged),
        "ours_failed": sum(bool(failed(r, "ours")) for r in judged),
        "ours_wrong": sum(worst(r) > limit(r) for r in judged),
        "ours_worst_error": max(map(worst, judged), default=0.0),
    }


COLUMNS = {
    "heads": "heads",
    "random": "random",
    "stock_wrong_in_A": "stock wrong in A",
    "stock_wrong_in_A_or_B": "in A or B",
    "ours_exact": "attached: exact",
    "ours_below_1e-10": "below 1e-10",
    "ours_refused": "refused",
    "ours_failed": "failed",
    "ours_wrong": "wrong",
    "ours_worst_error": "worst error",
}


def by_kind(records: list[Record], key: str = "kind") -> Iterator[str]:
    groups = {name: [r for r in records if r[key] == name] for name in unique(records, key)}
    yield from header(key, *COLUMNS.values())
    for name, group in [*groups.items(), ("**all**", records)]:
        counts = summary(group)
        yield row(name, *(short(counts[column]) for column in COLUMNS))


def unique(records: list[Record], key: str) -> list[str]:
    """Return the values of a field, the most frequent first."""
    values = [r[key] for r in records]
    return sorted(set(values), key=lambda value: (-values.count(value), value))


def listed(title: str, records: Iterable[Record], reason: Any) -> Iterator[str]:
    """Yield a section with the heads that have a reason, by reason."""
    found = sorted((cause(reason(r)), label(r)) for r in records if reason(r))
    yield f"\n## {title}: {len(found)}\n"
    for text, group in groupby(found, key=lambda pair: pair[0]):
        names = ", ".join(name for _, name in group)
        yield f"- {text.replace('|', '/').replace('<', '`<`')}: {names}"


def cause(text: str) -> str:
    """Return a message without what is of one head: figures, and what is in brackets."""
    return re.sub(r"\b\d[\d.,]*(e[+-]?\d+)?", "#", re.sub(r" ?\([^()]*(\)|$)", "", text))


def table(records: list[Record]) -> Iterator[str]:
    ways = [(way, case) for way in ("stock", "ours") for case in CASES]
    yield from header("head", "kind", *(f"{way} {case}" for way, case in ways), "floor")
    for record in sorted(records, key=label):
        errors = (cell(record[way][case]) for way, case in ways)
        yield row(label(record), record["kind"], *errors, short(record["floor"]))


def cell(found: list[float] | str) -> str:
    return found.split(":")[0] if isinstance(found, str) else short(found[1])


def label(record: Record) -> str:
    dtype = record["dtype"] if record.get("dtype", "float64") != "float64" else ""
    extra = ", ".join(filter(None, (record["variant"], dtype)))
    return f"{record['name']} ({extra})" if extra else record["name"]


def short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else "0" if value == 0 else f"{value:.1e}"


def header(*columns: str) -> Iterator[str]:
    yield row(*columns)
    yield row(*(["---"] * len(columns)))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
