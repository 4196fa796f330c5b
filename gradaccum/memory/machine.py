"""How fast a device runs operations: each as long as it computes or moves data, at the least."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Machine:
    """Say what a device reaches.

    Args:
        name: For people.
        flops: Floating point operations a second, in large products.
        moved_bytes: Bytes that it reads or writes a second.
        launch: Seconds that the smallest operation takes.
        is_here: It is that of this process, so that seconds mean something.
    """

    name: str
    flops: float
    moved_bytes: float
    launch: float
    is_here: bool = False

    def seconds(self, flops: Tensor, moved_bytes: Tensor, num: Tensor) -> float:
        """Return the time of some operations: what each computes and moves, how often it runs."""
        busy = torch.maximum(flops / self.flops, moved_bytes / self.moved_bytes)
        return (busy.clamp(min=self.launch) * num)[moved_bytes > 0].sum().item()


# What an A100 reaches in practice: about 60% of 312 TFLOP/s in 16 bits (19.5 in 32), 80% of 2 TB/s.
# Only ratios of its times are told, and those are alike on other GPUs.
GPU = {
    torch.bfloat16: Machine("a data-centre GPU", 190e12, 1.6e12, 6e-6),
    torch.float16: Machine("a data-centre GPU", 190e12, 1.6e12, 6e-6),
    torch.float32: Machine("a data-centre GPU", 15e12, 1.6e12, 6e-6),
}
SIDE, COPIED = 1024, 2**24  # of a product; elements of a copy


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure this machine in about a tenth of a second."""
    a = torch.randn(SIDE, SIDE, dtype=dtype, device=device)
    big, other = torch.zeros(2, COPIED, device=device).unbind()
    small = torch.zeros(8, device=device, requires_grad=True)
    flops = 2 * SIDE**3 / _fastest(lambda: a @ a, device)
    moved = 2 * big.nbytes / _fastest(lambda: big.copy_(other), device)
    # Forward and backward of 20 sums: about 40 operations, with what Python and autograd add.
    launch = _fastest(lambda: sum([small] * 20, small).sum().backward(), device) / 40
    return Machine(f"this {device.type}", flops, moved, launch, True)


def _fastest(run: Callable[[], object], device: torch.device, times: int = 5) -> float:
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best
