"""Make an optimizer's state before its first step, so that memory for it is there or is not.

Optimizers make their state in the first `step()`, after memory has been found to suffice without
it. A step that fails half-way leaves some parameters updated and cannot be run again.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

# Whose state begins with zeros and a step of 0, by the name of a class they derive from; tested
# in tests/test_optimizers.py. NAdam, ASGD and Rprop begin with other values.
KNOWN = ("Adam", "AdamW", "Adamax", "RAdam", "RMSprop", "SGD", "Optimizer8bit", "Adafactor", "Lion")


def materialize(optimizer: Optimizer) -> bool:
    """Make the state of parameters that have none, as their first step would; tell if it is there.

    Runs the step with a gradient of zeros, a learning rate of 0 and no decay, one parameter at a
    time, and sets the number of steps back to 0. The weights are as before, bit for bit.

    Args:
        optimizer: Any; of one that is not known nothing is touched.
    """
    if not any(base.__name__ in KNOWN for base in type(optimizer).__mro__):
        return False
    if any(group.get("dampening") for group in optimizer.param_groups):
        return False  # its first step is not damped
    gradients = [(p, p.grad) for g in optimizer.param_groups for p in g["params"]]
    settings = [
        (g, {k: g[k] for k in ("lr", "weight_decay") if k in g}) for g in optimizer.param_groups
    ]
    step = inspect.unwrap(type(optimizer).step)  # without hooks and profiler
    try:
        for p, _ in gradients:
            p.grad = None
        for group, own in settings:
            group.update(
                {
                    key: torch.zeros_like(v) if isinstance(v, Tensor) else 0.0
                    for key, v in own.items()
                }
            )
        for p, _ in gradients:
            if p.requires_grad and not optimizer.state.get(p):
                _begin(optimizer, step, p)
    finally:
        for group, own in settings:
            group.update(own)
        for p, grad in gradients:
            p.grad = grad
    return True


def state_bytes(optimizer: Optimizer) -> int:
    """Return what the tensors of its state take."""
    leaves = tree_leaves(list(optimizer.state.values()))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def _begin(optimizer: Optimizer, step: Any, p: nn.Parameter) -> None:
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    with torch.no_grad():
        step(optimizer)
        p.copy_(before)
    p.grad = None
    state = optimizer.state.get(p, {})
    if isinstance(state.get("step"), Tensor):
        state["step"].zero_()
    elif "step" in state:
        state["step"] = 0
