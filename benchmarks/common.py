"""What every benchmark says beside its figures: command, versions, device."""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gradaccum


def publish(figures: dict[str, Any], out: str | None, *modules: Any) -> None:
    """Print the figures as JSON with where they come from; write them to `out` as well."""
    words = sys.argv[1:]
    if "--out" in words:  # where the figures went says nothing about them
        at = words.index("--out")
        del words[at : at + 2]
    result = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "versions": {m.__name__: m.__version__ for m in (torch, gradaccum, *modules)},
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        **figures,
    }
    if torch.accelerator.is_available():
        result["device"] = torch.get_device_module().get_device_name()
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        Path(out).write_text(text + "\n")


def device() -> torch.device:
    """Return the accelerator, if there is one."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def seconds_now() -> float:
    """Return the time once the device has done all that was asked of it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed(owner: type, name: str) -> list[float]:
    """Time a method from now on; return the list that gets the seconds of each call."""
    own, spent = getattr(owner, name), []

    def run(self: Any, *args: Any, **given: Any) -> Any:
        begin = time.perf_counter()
        try:
            return own(self, *args, **given)
        finally:
            spent.append(time.perf_counter() - begin)

    setattr(owner, name, run)
    return spent
