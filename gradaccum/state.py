"""What forward and backward read and write besides inputs and outputs, changed only for a while.

Modes, random state, buffers, and the dtype in which gradients add up.
"""

import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradaccum.compiled import uncompiled
from gradaccum.errors import BadInput
from gradaccum.modules import modules_of


class Random:
    """Hold the random state of Python, NumPy, the CPU and every accelerator that is in use.

    Collators and some models (masking of spectrograms in transformers) draw from the first two.
    """

    def __init__(self) -> None:
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy else None
        self._devices = _device_states()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Random):
            return NotImplemented
        mine, its = ((r._python, repr(r._numpy)) for r in (self, other))
        tensors = zip((self._cpu, *self._devices), (other._cpu, *other._devices), strict=False)
        return mine == its and all(torch.equal(one, two) for one, two in tensors)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def restore(self) -> None:
        """Draw the same numbers again."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for i, state in enumerate(self._devices):
            module = torch.get_device_module()
            module.set_rng_state(state) if module is torch.mps else module.set_rng_state(state, i)


class Past:
    """Hold what forwards change besides gradients: random state, buffers, plain attributes.

    Attributes belong to buffers: they tell, say, for which length a table was computed. They are
    bound to what they were; lists changed in place stay, and so does what is new.

    Args:
        model: Whose forwards will run.
        largest: Keep the values of buffers of up to so many elements; by default of all.
    """

    def __init__(self, model: nn.Module, *, largest: int | None = None) -> None:
        self.random = Random()
        self._modules = [(m, vars(m).copy(), m._buffers.copy()) for m in modules_of(model)]
        self._values: list[tuple[Tensor, Tensor]] = []
        self._others: list[tuple[str, Tensor, int]] = []
        for module, _, buffers in self._modules:
            for name, buffer in buffers.items():
                if buffer is None:
                    continue
                if largest is not None and buffer.numel() > largest:
                    self._others.append(
                        (f"{name} of {type(module).__name__}", buffer, buffer._version)
                    )
                elif _is_written(buffer):
                    self._values.append((buffer, buffer.detach().clone()))

    def restore(self) -> None:
        """Put it back.

        Raises:
            BadInput: A buffer was written whose values were not kept.
        """
        self.random.restore()
        with torch.no_grad():
            for module, attributes, named in self._modules:
                plain = {k: v for k, v in attributes.items() if not k.startswith("_")}
                vars(module).update(plain)
                module._buffers.update(named)
            for buffer, value in self._values:
                buffer.resize_(value.shape).copy_(value)
        for name, buffer, version in self._others:
            if buffer._version != version:
                raise BadInput(
                    f"a forward wrote into the buffer {name} of {buffer.numel():,} elements, and "
                    "its values were too many to be kept"
                )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving, random state, the model's buffers and its modules' plain attributes.

    Whatever runs inside (a probe, a proof) leaves the training run as if it had not happened.
    """
    past = Past(model)
    try:
        yield
    finally:
        past.restore()


def _is_written(buffer: Tensor) -> bool:
    """Tell whether a forward can write into a buffer: not if it is expanded or holds nothing."""
    return not buffer.is_meta and buffer.layout is torch.strided and 0 not in buffer.stride()


def _device_states() -> list[Tensor]:
    """Return the random state of each accelerator, in order; asking does not start any."""
    if not torch.accelerator.is_available():
        return []
    module = torch.get_device_module()
    if module is torch.mps:
        return [module.get_rng_state()]
    used = range(torch.accelerator.device_count()) if module.is_initialized() else ()
    return [module.get_rng_state(i) for i in used]


# What modules and their configs call the chance by which a forward in training mode changes values.
CHANCES = re.compile("drop|jitter|mask_(time|feature)_prob")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Let nothing in a forward be left to chance, in the mode in which the model is; uncompiled.

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
        with uncompiled(model):
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
