"""What forward and backward read and write besides inputs and outputs, changed only for a while.

Modes, random state, buffers, and the dtype in which gradients add up.
"""

import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving, random state, the model's buffers and its modules' plain attributes.

    Whatever runs inside (a probe, a proof) leaves the training run as if it had not happened.
    Attributes belong to buffers: they tell, say, for which length a table was computed. They are
    bound to what they were; lists changed in place stay, and so does what is new. The random
    state is that of every device, and of Python and NumPy, from which collators and some models
    (masking of spectrograms in transformers) draw.
    """
    devices = (
        list(range(torch.accelerator.device_count())) if torch.accelerator.is_available() else []
    )
    kind = torch.accelerator.current_accelerator() if devices else None
    modules = list(model.modules())
    attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in modules]
    buffers = [dict(m._buffers) for m in modules]
    values = [
        (b, b.detach().clone()) for named in buffers for b in named.values() if _is_written(b)
    ]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices, device_type=kind.type if kind else "cuda"):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(drawn)
        with torch.no_grad():
            for module, plain, named in zip(modules, attributes, buffers, strict=True):
                vars(module).update(plain)
                module._buffers.update(named)
            for buffer, value in values:
                buffer.resize_(value.shape).copy_(value)


def _is_written(buffer: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Tell whether a forward can write into a buffer: not if it is expanded or holds nothing."""
    if buffer is None or buffer.is_meta or buffer.layout is not torch.strided:
        return False
    return 0 not in buffer.stride()


# What modules and their configs call the chance by which a forward in training mode changes values.
CHANCES = re.compile("drop|jitter|mask_(time|feature)_prob")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Let nothing in a forward be left to chance, in the mode in which the model is.

    Dropout layers get p = 0, and so does what modules or their configs call a dropout. In eval mode
    other terms of a loss may be there, and other statistics.
    """
    holders: dict[int, object] = {id(module): module for module in model.modules()}
    for module in model.modules():
        configs = [vars(module).get("config")]
        for config in configs:  # grows while it runs: configs hold configs
            if hasattr(config, "__dict__") and id(config) not in holders:
                holders[id(config)] = config
                configs += vars(config).values()
    before = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if isinstance(value, float) and value and _is_chance(holder, name)
    ]
    try:
        for holder, name, _ in before:
            vars(holder)[name] = 0.0
        yield
    finally:
        for holder, name, value in before:
            vars(holder)[name] = value


def _is_chance(holder: object, name: str) -> bool:
    return CHANCES.search(name) is not None or (isinstance(holder, _DropoutNd) and name == "p")


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the modules that normalise by the statistics of what they are given."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]


@contextmanager
def accumulating(
    parameters: list[nn.Parameter], wide: torch.dtype | None, hand_over: torch.dtype | None
) -> Iterator[None]:
    """Let gradients add up in a wider dtype inside; hand them over rounded once on leaving.

    Whatever fails, inside or while handing over, no gradient is left.

    Args:
        parameters: Whose `.grad` is None on entering.
        wide: Add up at least this wide; None: in what `p.grad_dtype` says.
        hand_over: The dtype of the gradients on leaving; None: what `p.grad_dtype` says.
    """
    before = {p: p.grad_dtype for p in parameters}
    try:
        for p, own in before.items():
            kept = own or p.dtype
            if wide is not None:
                kept = torch.promote_types(torch.promote_types(p.dtype, kept), wide)
            _set_grad_dtype(p, kept)
        yield
        for p, own in before.items():
            grad, p.grad = p.grad, None
            _set_grad_dtype(p, hand_over or own)
            if grad is not None:
                p.grad = grad.to(hand_over or own or p.dtype)
    except BaseException:
        for p, own in before.items():
            p.grad = None
            _set_grad_dtype(p, own)
        raise


def _set_grad_dtype(p: nn.Parameter, dtype: torch.dtype | None) -> None:
    """Set it where it is another: once set, it no longer follows the dtype of the parameter."""
    if p.grad_dtype != dtype:
        p.grad_dtype = dtype
