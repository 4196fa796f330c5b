"""The worker's side of a benchmark: wait for a turn, and tell what each step did."""

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch


@final
class Stage:
    """The worker's end: wait for a turn, tell what each step did, answer questions.

    It talks on what was stdout, and lets stdout be stderr from then on, so that whatever a library
    prints cannot break in. When the parent hangs up, `wait` and `done` raise SystemExit.

    A step lasts from the beginning of the turn, or from the `done` before, so that reading data
    counts.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._device = torch.device("cpu")
        self._answers: dict[str, Callable[..., Any]] = {}
        self._peak: Callable[[], int | None] | None = None
        self._left = 0
        self._seconds: list[float] = []
        self._counts = {"trained": 0, "padded": 0, "useful": 0}
        self._begin: float | None = None

    def wait(
        self, device: torch.device | str = "cpu", answers: Mapping[str, Callable] | None = None
    ) -> None:
        """Say that all is built, and return when the first turn begins.

        Args:
            device: Whose memory is measured and whose work is waited for.
            answers: Called by the name of a question, with its arguments.
        """
        self._device = torch.device(device)
        self._answers = dict(answers or {})
        self._tell({"ready": True})
        self._await_turn()

    def stop(self) -> None:
        """End the time of a step: what comes until `done`, as counting, costs it nothing."""
        if self._begin is None:
            return
        self._synchronize()
        self._seconds.append(time.perf_counter() - self._begin)
        self._begin = None

    def done(self, *, trained: int = 0, padded: int = 0, useful: int = 0) -> None:
        """End a step; after the last one of a turn, return when the next turn begins."""
        self.stop()
        for name, count in (("trained", trained), ("padded", padded), ("useful", useful)):
            self._counts[name] += count
        self._left -= 1
        if self._left == 0:
            assert self._peak is not None, "set when the first turn began"
            self._tell({"seconds": self._seconds, **self._counts, "peak_bytes": self._peak()})
            self._await_turn()
        self._begin = time.perf_counter()

    def _await_turn(self) -> None:
        while True:
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            message = json.loads(line)
            if "steps" in message:
                break
            question = message["question"]
            self._tell({"answer": self._answers[question.pop("name")](**question)})
        self._left, self._seconds = message["steps"], []
        self._counts = dict.fromkeys(self._counts, 0)
        if self._peak is None:
            self._peak = peak_beyond_now(self._device)
        self._synchronize()
        self._begin = time.perf_counter()

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def peak_beyond_now(device: torch.device) -> Callable[[], int | None]:
    """Return a function that tells the peak memory in bytes beyond what is held now.

    On the CPU it is resident memory, and None where /proc does not tell.
    """
    gc.collect()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.empty_cache()
        module.reset_peak_memory_stats(device)
        held = module.memory_allocated(device)
        return lambda: module.max_memory_allocated(device) - held
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed would be filled without a trace
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident_peak()
    return lambda: None if before is None else (_resident_peak() or before) - before


def _resident_peak() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
