"""Modules: walked over, and run by another forward for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what `model.modules()` yields, in half its time: this runs before every step."""
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            left += module._modules.values()
    return list(found.values())


@contextmanager
def having(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward inside."""
    own = vars(module).get("forward")  # of those who wrap modules: offloading, kernels
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
