"""Run what several ranks have to do, in real processes, and tell the error found beside the bound.

python benchmarks/acceptance.py --out benchmarks/results/acceptance.json --page docs/ranks.md

Each row is one or some tests of `tests/`, with gloo and a deadline; the error is the largest that
their comparisons with one process or with the float64 oracle have found.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from common import publish

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RANKS, FSDP, HOSTS, SAVED, SAMPLER = (
    f"tests/{name}.py" for name in ("distributed/test_replicated", "distributed/test_fsdp",
    "distributed/test_hosts", "distributed/test_checkpoint", "test_sampler")
)  # fmt: skip


class Row(NamedTuple):
    """Name one requirement, its bound, and the tests that hold it."""

    what: str
    bound: str
    file: str
    tests: tuple[str, ...]
    controls: int = 0  # comparisons that have to fail


ROWS = {
    "A1": Row("1 to 4 ranks, 3 and 5 micro-batches, uneven shares", "1e-14", RANKS,
              ("test_uneven_shares_in_unequal_numbers_of_micro_batches",
               "test_three_micro_batches_on_one_rank_and_five_on_another")),
    "A2": Row("a rank without examples, a model with buffers", "1e-14", RANKS,
              ("test_a_rank_without_examples",)),
    "A3": Row("parameters that one micro-batch of one rank uses, or nobody", "1e-14, None on all",
              RANKS, ("test_parameters_that_one_rank_uses_or_none",)),
    "A4": Row("replicas after steps on data of their own, 2 to 4 ranks", "every bit", RANKS,
              ("test_replicas_stay_the_same_bits",)),
    "A5": Row("out of memory in forward, backward, last backward of some ranks", "1e-14", RANKS,
              ("test_memory_that_runs_out_on_some_ranks",
               "test_a_rank_that_recovered_is_as_if_nothing_had_happened")),
    "A6": Row("an error that no rank can mend", "PeerFailed on all in 1 s", RANKS,
              ("test_what_one_rank_cannot_mend_all_raise",)),
    "A7": Row("a rank of 2 and of 4 is killed", "PeerFailed on all in 5 s", RANKS,
              ("test_a_rank_that_is_killed_is_noticed_by_all",)),
    "A8": Row("collectives inside a window; of a step", "0; 2 and 1 per bucket", RANKS,
              ("test_collectives_of_a_step",)),
    "A9": Row("FSDP2 in float32", "1e-6", FSDP, ("test_float32_over_gloo",)),
    "A10": Row("FSDP2 in each mode, 3 and 5 micro-batches", "1e-14", FSDP,
               ("test_3_and_5_micro_batches",)),
    "A11": Row("out of memory anywhere in each mode, then a clean window", "1e-14", FSDP,
               ("test_memory_runs_out_on_one_rank", "test_memory_runs_out_on_all_ranks_at_once")),
    "A12": Row("what a failed window of torch alone has left", "1e-14", FSDP,
               ("test_what_a_failed_window_of_torch_alone_left_behind",), controls=1),
    "A13": Row("HSDP 2 x 2, replicas with 3 and 5 micro-batches", "1e-14", FSDP,
               ("test_replicas_of_shards_run_windows_of_their_own",)),
    "A14": Row("bytes held: 4P/W, 4P, 4P and the parameters", "equal", FSDP,
               ("test_bytes_held_between_micro_batches",)),
    "A15": Row("Trainer on 1, 2, 3 ranks, 13 examples in batches of 8", "1e-6", HOSTS,
               ("test_two_ranks_train_as_one[hf]", "test_three_ranks_train_as_one",
                "test_each_epoch_has_each_example_once_and_batches_are_those_of_one_process")),
    "A16": Row("TRL with unequal numbers of micro-batches", "1e-6", HOSTS,
               ("test_two_ranks_train_as_one[sft]", "test_losses_of_trl_on_two_ranks")),
    "A17": Row("Trainer resumed in its second epoch on 1 and 3 ranks", "1e-6", HOSTS,
               ("test_a_run_resumes_in_its_second_epoch_on_other_numbers_of_ranks",)),
    "A18": Row("the same batches on 1 to 8 ranks; each example once, whatever changes", "equal",
               SAMPLER, ("test_the_effective_batches_are_the_same_on_1_to_8_ranks",
                         "test_each_example_once_whatever_changes_within_an_epoch")),
    "A19": Row("lognormal costs, 256 examples on 8 ranks: largest share / mean", "1.01", SAMPLER,
               ("test_a19_shares_cost_the_same",)),
    "A20": Row("an epoch of a million examples is planned", "5 s", SAMPLER,
               ("test_a20_a_million_examples_are_planned_in_seconds",)),
    "A21": Row("torchrun, workers killed, then another number of them", "1e-13", SAVED,
               ("test_torchrun_restarts_killed_workers_and_goes_on_with_another_number",)),
    "A22": Row("a checkpoint of any sharding read by any other", "1e-13", SAVED,
               ("test_any_sharding_goes_on_from_any_other",)),
}  # fmt: skip
PAGE = """\
# What several ranks have to do, and the error found

By `{command}`: {num} tests, real processes with gloo and
deadlines, on {device}. Errors are relative, and the largest of all that were compared with one
process or with the float64 oracle (`tests/oracle.py`). The seconds are those of all tests of a row
with the start of their processes, which A16 and A17 share with A15.

| | what | bound | error found | tests | seconds |
|---|---|---|---|---|---|
{rows}

A23, DeepSpeed: refused by name, not run. It reduces in backward, divides by its own number of steps
and cannot run a micro-batch again.
"""


class Seen:
    """Note, as a plugin of pytest, what each test compares and how it ends."""

    def __init__(self) -> None:
        self.errors: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self._now = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        from tests import oracle
        from tests.distributed import hosts

        oracle.error, hosts.relative = map(self._noting, (oracle.error, hosts.relative))
        for module in {item.module for item in session.items}:
            if hasattr(module, "distance"):
                module.distance = self._noting(module.distance)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._now = item.nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self.seconds.get(report.nodeid, 0.0)
        self.seconds[report.nodeid] = before + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def _noting(self, compare: Any) -> Any:
        @functools.wraps(compare)
        def noting(*args: Any) -> float:
            found = float(compare(*args))
            self.errors.setdefault(self._now, []).append(found)
            return found

        return noting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--page")
    args = parser.parse_args()
    seen = Seen()
    names = [f"{ROOT}/{row.file}::{test}" for row in ROWS.values() for test in row.tests]
    code = pytest.main([*names, "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"], [seen])
    found: dict[str, Any] = {}
    for name, row in ROWS.items():
        wanted = [f"{row.file}::{test}" for test in row.tests]
        ran = [node for node in seen.seconds if any(node.startswith(test) for test in wanted)]
        assert ran, f"{name} has run nothing"
        errors = sorted(error for node in ran for error in seen.errors.get(node, []))
        errors = errors[: len(errors) - row.controls]
        found[name] = {
            "what": row.what,
            "bound": row.bound,
            "error": max(errors) if errors else None,
            "tests": len(ran),
            "failed": [node for node in ran if node in seen.failed],
            "seconds": round(sum(seen.seconds[node] for node in ran), 1),
        }
    publish({"acceptance": found}, args.out)
    if args.page:
        Path(args.page).write_text(page(found))
    sys.exit(code)


def page(found: dict[str, Any]) -> str:
    lines = []
    for name, row in found.items():
        held = "held" if row["error"] is None else f"{row['error']:.1e}"
        cells = [name, row["what"], row["bound"], "FAILED" if row["failed"] else held,
                 f"{row['tests']}", f"{row['seconds']:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    num, rows = sum(row["tests"] for row in found.values()), "\n".join(lines)
    return PAGE.format(
        command="python benchmarks/acceptance.py", num=num, device="two cores", rows=rows
    )


if __name__ == "__main__":
    main()
