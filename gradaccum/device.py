"""What the engine asks of a device: memory figures, and time measured without waiting for it.

On the CPU memory is that of the process.
"""

import functools
import os
import sys
import time
from collections.abc import Callable

import torch


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on an accelerator, resident on the CPU.

    It is the peak since the process began (or since the user reset it): resetting it here would
    take the figure away from whoever else reads it.
    """
    if device.type == "cpu":
        if sys.platform == "win32":
            return 0  # no figure there without another package
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # Metal keeps no peak
    return torch.get_device_module(device).max_memory_allocated(device)


@functools.cache
def total_bytes(device: torch.device) -> int:
    """Return the memory of the device in bytes; the machine's on the CPU."""
    if device.type == "cpu":
        if sys.platform == "win32":
            return 0
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return torch.get_device_module(device).mem_get_info(device)[1]


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start timing; return `stop`, which returns `seconds`, which waits for the device.

    On an accelerator the times are those of events in its stream, so that neither starting nor
    stopping makes the host wait.

    Example:
        >>> stop = stopwatch(torch.device("cpu"))
        >>> seconds = stop()
        >>> seconds() >= 0
        True
    """
    if device.type == "cpu":
        begin = time.perf_counter()

        def stop_cpu() -> Callable[[], float]:
            elapsed = time.perf_counter() - begin
            return lambda: elapsed

        return stop_cpu
    start = torch.Event(device, enable_timing=True)
    start.record()

    def stop() -> Callable[[], float]:
        end = torch.Event(device, enable_timing=True)
        end.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds

    return stop
