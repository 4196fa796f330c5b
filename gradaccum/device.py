"""What the engine asks of a device: memory figures and errors, and time measured without waiting.

On the CPU memory is that of the process.
"""

import functools
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Messages that mean out of memory where the error is no `torch.OutOfMemoryError`. Not among them:
# "out of resource" of Triton (shared memory, which a smaller batch does not change) and
# CUDNN_STATUS_NOT_SUPPORTED (which accelerate takes for it, and which may mean any unsupported
# shape: halving until one example is left would hide that).
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",  # c10/core/impl/alloc_cpu.cpp
    "DefaultCPUAllocator: not enough memory",  # the same on Windows
    "CUDA error: out of memory",  # cudaMalloc outside of torch's allocator
    "CUDA driver error: out of memory",  # cuMemCreate with expandable segments
    "HIP error: out of memory",
    "MPS backend out of memory",  # aten/src/ATen/mps/MPSAllocator.mm
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",  # SYCL, on xpu
    "UR_RESULT_ERROR_OUT_OF_RESOURCES",
    # Handles and workspaces that libraries allocate for themselves; aten/src/ATen/cuda/CUDABlas.cpp
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",  # cuDNN 8
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # cuDNN 9
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether memory ran out; also where a compiler wrapped that error in one of its own."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(t in str(error) for t in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold, even if somebody keeps the error.

    That is activations, and in torch 2.11 checkpoints that are still open: as long as they are,
    they pack the tensors that later forwards save.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def suppressing_out_of_memory() -> Iterator[None]:
    """Go on after what is inside if it runs out of memory; other errors are raised."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)


@contextmanager
def attending_any_shape(device: torch.device) -> Iterator[None]:
    """Leave cuDNN's attention aside where another kernel can take its place.

    It compiles a plan for each shape it meets, and ragged micro-batches are new shapes all the
    time: 0.2 s each, forward and backward, on an H200 with torch 2.11, which prefers it there.
    """
    cuda = torch.backends.cuda
    can = cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()
    if device.type != "cuda" or not can or not cuda.cudnn_sdp_enabled():
        yield
        return
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(True)


def release(device: torch.device) -> None:
    """Give memory back that nothing uses: cycles that hold tensors, the allocator's cache."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


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
    """Return the memory of the device in bytes; on the CPU the machine's or the container's."""
    if device.type == "cpu":
        if sys.platform == "win32":
            return 0
        limits = [limit for limit, _ in _cgroup()]
        return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return torch.get_device_module(device).mem_get_info(device)[1]


def available_bytes(device: torch.device) -> int:
    """Return how many more bytes this process may take: free memory and the allocator's cache.

    On Linux a container's limit counts as well. 0 where nothing tells.
    """
    if device.type == "cpu":
        found = [_meminfo_available(), *(max(0, limit - used) for limit, used in _cgroup())]
        return min((n for n in found if n is not None), default=total_bytes(device))
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    module = torch.get_device_module(device)
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + cached


def _meminfo_available() -> int | None:
    lines = _lines("/proc/meminfo")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _cgroup() -> Iterator[tuple[int, int]]:
    """Yield limit and use of a container's control group, by either version of its files."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        bounds = [_lines(f"/sys/fs/cgroup/{name}") for name in (limit, used)]
        if all(bound and bound[0].isdecimal() for bound in bounds):
            yield int(bounds[0][0]), int(bounds[1][0])


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except OSError:
        return []


class Lap:
    """Tell the seconds of a stopwatch when called, which waits for the device.

    Args:
        elapsed: On the CPU.
        events: Of an accelerator's stream, where it began and where it ended.
    """

    def __init__(self, elapsed: float, events: tuple[torch.Event, torch.Event] | None) -> None:
        self._elapsed, self._events = elapsed, events

    def __call__(self) -> float:
        if self._events is None:
            return self._elapsed
        start, end = self._events
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    @property
    def is_over(self) -> bool:
        """Tell, without waiting, whether the device has got that far."""
        return self._events is None or self._events[1].query()


def stopwatch(device: torch.device) -> Callable[[], Lap]:
    """Start timing; return `stop`, which returns the `Lap`.

    On an accelerator the times are those of events in its stream, so that neither starting nor
    stopping makes the host wait.

    Example:
        >>> stop = stopwatch(torch.device("cpu"))
        >>> lap = stop()
        >>> lap.is_over and lap() >= 0
        True
    """
    if device.type == "cpu":
        begin = time.perf_counter()
        return lambda: Lap(time.perf_counter() - begin, None)
    start = torch.Event(device, enable_timing=True)
    start.record()

    def stop() -> Lap:
        end = torch.Event(device, enable_timing=True)
        end.record()
        return Lap(0.0, (start, end))

    return stop
