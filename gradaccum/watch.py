"""Watch a run: its metrics in a file, a live view of them, the noise scale; for any loop.

    with Watch(accumulator, "runs/a", num_steps=1000) as watch:
        for batch in watch.reading(loader):
            step = accumulator.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(step, learning_rate=scheduler.get_last_lr()[0])

A step is written down and shown once the device is done with it, so that nothing waits inside a
window: on an accelerator that is while the next one runs.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gradaccum.device import Lap
from gradaccum.engine import Accumulator
from gradaccum.errors import BadInput
from gradaccum.live import View, view
from gradaccum.metrics import Line, MetricsFile, line
from gradaccum.noise import NoiseScale
from gradaccum.noise.scale import EVERY
from gradaccum.sync.choose import is_sharded
from gradaccum.types import GIB, Budget, Step

T = TypeVar("T")
METRICS = "metrics.jsonl"


class Watch:
    """Write a line for each step, and show it. On ranks other than 0 nothing is written or shown.

    Args:
        accumulator: Whose steps these are; None: `follow` tells later.
        folder: Where `metrics.jsonl` goes, made if it is not there; None: nowhere. That of another
            run is kept beside it, under another name.
        num_steps: Of the whole run, for the time that is left.
        first_step: After which this run goes on: later lines in the file are dropped.
        live: Whether to show anything.
        noise_every: Measure one step in so many for the noise scale; None: leave it out.
        rank: Of this process.

    Raises:
        BadInput: The folder cannot be written to.
        MissingExtra: A terminal is to be drawn on, and rich is not installed.
    """

    def __init__(
        self,
        accumulator: Accumulator | None = None,
        folder: str | Path | None = None,
        *,
        num_steps: int | None = None,
        first_step: int = 0,
        live: bool = True,
        noise_every: int | None = EVERY,
        rank: int = 0,
    ) -> None:
        self.samples = 0
        self.first_step = self._num_steps = first_step
        self._is_first = rank == 0
        self._file: MetricsFile | None = None
        if folder is not None and self._is_first:
            self._file = self._opened(Path(folder))
        self._view: View | None = view(num_steps, first_step) if live and self._is_first else None
        self._waiting: list[tuple[Step, Line]] = []
        self._reading = 0.0
        self._ended = time.perf_counter()
        self._noise_every = noise_every
        self.noise: NoiseScale | None = None
        self.accumulator: Accumulator | None = None
        if accumulator is not None:
            self.follow(accumulator)

    def _opened(self, folder: Path) -> MetricsFile:
        file = MetricsFile(folder / METRICS)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.first_step and file.path.exists():
                last = time.localtime(file.path.stat().st_mtime)
                file.path.rename(folder / f"metrics-{time.strftime('%Y%m%d-%H%M%S', last)}.jsonl")
            self.samples = file.resume(self.first_step).get("samples", 0)
        except OSError as error:
            raise BadInput(f"cannot write to {folder}: {error.strerror}") from error
        return file

    def follow(self, accumulator: Accumulator, noise: dict[str, Any] | None = None) -> None:
        """Watch the steps of this accumulator from now on.

        Args:
            noise: What `self.noise.state_dict()` was when an interrupted run was saved.
        """
        self.accumulator = accumulator
        if self._noise_every is not None and not is_sharded(accumulator.model):
            self.noise = NoiseScale(accumulator, every=self._noise_every)
            if noise:
                self.noise.load_state_dict(noise)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def reading(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield what a loader yields, and note how long it takes."""
        source = iter(loader)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._reading += time.perf_counter() - begin
            yield batch

    def step(self, step: Step, **more: Any) -> None:
        """Take a step after its optimizer step.

        Args:
            more: Fields for its line, as `docs/metrics.md` names them: `learning_rate`,
                `grad_norm`, or any others that JSON can hold.
        """
        self.note(step, **more)
        if step.is_over:
            self.flush()

    def note(self, step: Step, **more: Any) -> None:
        """Take a step whose line is written when the next one comes, or at `flush`."""
        now = time.perf_counter()
        self._num_steps += 1
        self.samples += step.num_examples
        known: Line = {
            "step": self._num_steps,
            "samples": self.samples,
            "seconds": round(now - self._ended, 4),
            "data_seconds": round(self._reading, 4),
        }
        self._ended, self._reading = now, 0.0
        self.flush()  # what came before this step is over by now
        self._waiting = [(step, known | self._bounds() | more)]
        if self.noise is not None:
            self.noise.update(step)

    def add(self, **more: Any) -> None:
        """Add fields to the line of the latest step, if it is not written yet."""
        if self._waiting:
            self._waiting[-1][1].update(more)

    def flush(self, *, waits: bool = True) -> None:
        """Write and show what is waiting; without `waits` only if the device is done with it."""
        if not waits and not all(step.is_over for step, _ in self._waiting):
            return
        waiting, self._waiting = self._waiting, []
        for step, known in waiting:
            self._tell(step, known)

    def figures(self) -> dict[str, float]:
        """Return figures of the latest step for other logs; this waits for the device."""
        if not self._waiting:
            return {}
        step, known = self._waiting[-1]
        found: dict[str, float] = {
            "num_examples": step.num_examples,
            "num_micros": step.num_micros,
            "num_recoveries": len(step.recoveries),
            "padding": 1 - step.useful / max(1, step.padded),
            "useful_tokens_per_second": step.useful / max(known["seconds"], 1e-9),
            "peak_gib": step.peak_bytes / GIB,
        }
        noise = self.noise.estimate if self.noise is not None else None
        if noise is not None and noise.scale is not None:
            found["noise_scale"] = noise.scale
        return found

    def close(self) -> None:
        """Write and show the last step, and leave the terminal as it was."""
        try:
            self.flush()
        finally:
            if self._view is not None:
                self._view.close()
            self._view = None
            if self.noise is not None and self.accumulator is not None:
                self.accumulator.parts = None

    def _tell(self, step: Step, known: Line) -> None:
        if not self._is_first:
            return
        noise = self.noise.estimate if self.noise is not None else None
        known = {name: v() if isinstance(v, Lap) else v for name, v in known.items()}
        found = line(step, noise)
        found |= known | {"events": found["events"] + known.get("events", [])}
        if self._file is not None:
            self._file.write(found)
        if self._view is not None:
            self._view.show(found)

    def _bounds(self) -> Line:
        """Return the budget in force, and the memory for which it was found."""
        accumulator = self.accumulator
        if accumulator is None or not isinstance(accumulator.budget, Budget):
            return {}
        budget = accumulator.budget.within(accumulator.limit)
        found = getattr(accumulator, "found", None)
        cap = {} if found is None else {"cap_bytes": found.cap.stated_bytes}
        return {"budget_tokens": budget.tokens, "budget_examples": budget.examples} | cap
