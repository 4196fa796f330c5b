"""What `torch.compile` has been at: told, run eagerly, run in any shape, and counted."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradaccum.modules import modules_of
from gradaccum.trees import named_leaves


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a module is compiled, or a part of it."""
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in modules_of(model)
    )


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run eagerly inside: what is measured runs once in shapes of its own."""
    # Asked for only there: it imports the compiler, for seconds.
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def in_any_shape(inputs: Any) -> None:
    """Let the compiler make one graph for all numbers of rows and tokens.

    Else it makes one for the first micro-batch and another for all shapes at the second; told
    `dynamic=False`, one for each shape until it gives up. A dimension of 1 is a shape of its own.

    Args:
        inputs: A micro-batch as the model is given it; leaves of shape (B, ...) or (B, T, ...).
    """
    mark: Callable[[Tensor, int], None] = torch._dynamo.maybe_mark_dynamic
    for _, leaf in named_leaves(inputs):
        if isinstance(leaf, Tensor):
            for dim in range(min(2, leaf.ndim)):
                if leaf.shape[dim] > 1:
                    mark(leaf, dim)


def num_graphs() -> int:
    """Return how many graphs have been compiled in this process."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler.counters["stats"]["unique_graphs"] if compiler else 0
