"""Train one step of every head class of transformers, stock and attached, against the full batch.

python benchmarks/zoo.py --dtype both --jobs 2 --out benchmarks/results/zoo.json --page docs/zoo.md

Rows of the effective batch: A is 2 rows x 4 micro-batches against 8 rows at once, B is 2, 2, 2, 1
against 7 rows: the short last window of an epoch. What is measured is in `tests/zoo`. Records are
appended to a file in `--work` as they come, so that a stopped sweep goes on where it was; another
version of the code needs another folder.
"""

import argparse
import datetime
import gc
import json
import multiprocessing
import queue
import re
import sys
import tempfile
import threading
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zoo_page
from common import publish

sys.path.insert(0, str(Path(__file__).parent.parent))

Task = tuple[str, str, str, str]  # class, kind, variant, dtype
Record = dict[str, Any]

SECONDS = 120  # a head may take, with the import of its module
HEADS_PER_PROCESS = 100  # then a fresh one, so that memory does not grow with the sweep
DTYPES = {"float64": ("float64",), "float32": ("float32",), "both": ("float64", "float32")}


def serve(pipe: Connection) -> None:
    """Measure what the pipe asks for, until it closes; runs in a process of its own."""
    import transformers

    from tests.zoo import Head, measure

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    while (task := pipe.recv()) is not None:
        name, kind, variant, dtype = task
        gc.freeze()  # a Trainer collects garbage after its run, and the heap is full of modules
        record = measure(Head(name, kind, variant), getattr(torch, dtype))
        if "unbuilt" in record and dtype == "float64":  # some models compute in float32 alone
            narrow = measure(Head(name, kind, variant), torch.float32)
            record = record if "unbuilt" in narrow else narrow
        pipe.send(record)


class Worker:
    """Hold a process that measures; a crash or a time limit costs one head and a new process."""

    def __init__(self) -> None:
        self.served = HEADS_PER_PROCESS
        self.process: Any = None

    def ask(self, task: Task) -> Record:
        if self.served == HEADS_PER_PROCESS:
            self.renew()
        self.served += 1
        try:
            self.pipe.send(task)
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            lost = f"TimeoutError: more than {SECONDS} s"
        except (EOFError, ConnectionError):
            self.process.join()
            lost = f"ProcessError: the process ended with {self.process.exitcode}"
        self.served = HEADS_PER_PROCESS
        return {"name": task[0], "kind": task[1], "variant": task[2], "unbuilt": lost}

    def renew(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.served = 0

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()


def sweep(tasks: list[Task], journal: Path, jobs: int) -> None:
    """Append the record of every task to the journal, as they come."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    lock, begin, done = threading.Lock(), time.monotonic(), 0

    def work() -> None:
        nonlocal done
        worker = Worker()
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return worker.close()
            record = worker.ask(task) | {"asked": task[3]}
            with lock, journal.open("a") as file:
                file.write(json.dumps(record) + "\n")
                done += 1
                left = (time.monotonic() - begin) / done * (len(tasks) - done)
                print(f"\r{done}/{len(tasks)}, {left / 60:.1f} min left ", end="", file=sys.stderr)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(file=sys.stderr)


def recorded(journal: Path) -> dict[Task, Record]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    records = [json.loads(line) for line in lines]
    return {(r["name"], r["kind"], r["variant"], r["asked"]): r for r in records}


def write(records: list[Record], out: str | None, page: str | None) -> None:
    """Publish the counts, then the records one line each; write the page."""
    import transformers

    built = [r for r in records if "unbuilt" not in r]
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "unbuilt": len({(r["name"], r["variant"]) for r in records if "unbuilt" in r}),
    }
    for dtype in dict.fromkeys(r["asked"] for r in built):
        own = [r for r in built if r["asked"] == dtype]
        figures[dtype] = {
            "plain": zoo_page.summary([r for r in own if not r["variant"]]),
            "variants": zoo_page.summary([r for r in own if r["variant"]]),
        }
    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder) / "counts.json"
        publish(figures, str(published), transformers)
        text = published.read_text()
    if out:
        lines = ",\n".join(f"    {json.dumps(rounded(record))}" for record in records)
        head = text.rstrip().removesuffix("}").rstrip()
        Path(out).write_text(f'{head},\n  "heads": [\n{lines}\n  ]\n}}\n')
    if page:
        Path(page).write_text(zoo_page.page(records, json.loads(text)))


def rounded(value: Any) -> Any:
    """Return a record with its numbers as long as they say something."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items() if key != "asked"}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, str):
        return value[:120]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression for names of classes")
    parser.add_argument("--kind", default="", help="regular expression for kinds of heads")
    parser.add_argument("--dtype", choices=DTYPES, default="float64")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gradaccum-zoo"))
    parser.add_argument("--list", action="store_true", help="name the heads and stop")
    parser.add_argument("--out", help="write the records as JSON")
    parser.add_argument("--page", help="write the page")
    options = parser.parse_args()

    from tests.zoo import heads

    chosen = [
        (h.name, h.kind, h.variant, dtype)
        for dtype in DTYPES[options.dtype]
        for h in heads()
        if re.search(options.only, h.name) and re.search(options.kind, h.kind)
    ]
    if options.list:
        for name, kind, variant, dtype in chosen:
            print(f"{name}\t{kind}\t{variant}\t{dtype}")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    journal = options.work / "records.jsonl"
    before = recorded(journal)
    sweep([task for task in chosen if task not in before], journal, options.jobs)
    records = recorded(journal)
    write([records[task] for task in chosen], options.out, options.page)


if __name__ == "__main__":
    main()
