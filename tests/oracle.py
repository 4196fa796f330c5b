"""The only definition of truth: one pass over the whole batch, nothing of gradaccum in it."""

import torch
from torch import nn


def gradients(model: nn.Module, loss, weight) -> dict[str, torch.Tensor]:
    """Return d(sum of loss[t] / weight[t]) / d(parameters) of one forward and backward."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(
        sum(loss[t] / weight[t] for t in loss), list(named.values()), allow_unused=True
    )
    return dict(zip(named, grads, strict=True))


def error(found: dict, expected: dict) -> float:
    """Return ||found - expected|| / ||expected||; a missing gradient has to be missing in both."""
    assert found.keys() == expected.keys()
    assert [n for n in found if (found[n] is None) != (expected[n] is None)] == []
    pairs = [(found[n].double(), expected[n].double()) for n in found if found[n] is not None]
    difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
    return (difference / sum(b.square().sum() for _, b in pairs).sqrt()).item()


def signed_residual(found: dict, expected: dict) -> float:
    """Return <found - expected, expected> / ||expected||^2: a wrong denominator is a drift."""
    pairs = [(found[n].double(), expected[n].double()) for n in found if found[n] is not None]
    along = sum(((a - b) * b).sum() for a, b in pairs)
    return (along / sum(b.square().sum() for _, b in pairs)).item()


def left_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a loop left in `.grad` of the trainable parameters."""
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
