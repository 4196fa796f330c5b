"""What forward and backward read and write besides inputs and outputs, changed only for a while.

Modes, random state, buffers, and the dtype in which gradients add up.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving, the random state of every device and the model's buffers.

    Whatever runs inside (a probe, a proof) leaves the training run as if it had not happened.
    Python's own generator is covered too, since collators draw from it. NumPy's is not: nothing
    in torch or transformers draws from its global generator while training.
    """
    devices = (
        list(range(torch.accelerator.device_count())) if torch.accelerator.is_available() else []
    )
    kind = torch.accelerator.current_accelerator() if devices else None
    owners = [module for module in model.modules() if module._buffers]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in owners
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices, device_type=kind.type if kind else "cuda"):
            yield
    finally:
        random.setstate(python)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                now = module._buffers.get(name)
                # A buffer of another shape is a cache that has grown, with whatever tells its size.
                if now is not None and now.shape == value.shape:
                    buffer.copy_(value)
                    module._buffers[name] = buffer


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, but for those that a forward in eval mode would change.

    BatchNorm is in eval mode inside as well; whoever measures has to look for it beforehand.
    """
    modes = {module: module.training for module in model.modules()}
    for module, mode in modes.items():
        module.training = mode and _repacks_in_eval(module)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _repacks_in_eval(module: nn.Module) -> bool:
    """Tell whether a module is changed for good by a forward in eval mode.

    bitsandbytes 0.50 packs 4-bit weights on the CPU for inference at the first such forward, and
    from then on multiplies through a kernel without a backward, in training mode too.
    """
    return any(base.__module__.startswith("bitsandbytes.") for base in type(module).__mro__)


@contextmanager
def accumulating(
    parameters: list[nn.Parameter], wide: torch.dtype | None, hand_over: torch.dtype | None
) -> Iterator[None]:
    """Let gradients add up in a wider dtype inside; hand them over rounded once on leaving."""
    own = {}
    for p in parameters:
        is_narrow = wide is not None and torch.finfo(p.dtype).bits < torch.finfo(wide).bits
        if is_narrow or hand_over is not None:
            own[p] = p.grad_dtype
            p.grad_dtype = wide if is_narrow else p.dtype
    try:
        yield
    except BaseException:
        for p in parameters:
            p.grad = None
        raise
    finally:
        for p, before in own.items():
            grad, p.grad = p.grad, None
            p.grad_dtype = hand_over or before
            if grad is not None:
                p.grad = grad.to(p.grad_dtype)
