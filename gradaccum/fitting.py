"""Whether values and gradients of parts add up to those of the whole, and with which weights.

Each is one flat tensor, shape (1 + gradients,): the value of a loss and a sample of its gradient.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def is_nothing(parts: list[Tensor], whole: Tensor) -> bool:
    """Tell whether values and gradients are rounding beside those of the whole."""
    eps = torch.finfo(torch.float32).eps
    return all(
        part[0].abs() <= eps * whole[0].abs() and part[1:].norm() <= eps * whole[1:].norm()
        for part in parts
    )


def best_weights(parts: list[Tensor], target: Tensor) -> tuple[list[float], float]:
    """Return the weights with which the parts come nearest to the target, and how near."""
    stacked = torch.stack(parts, 1)
    norm = target.norm().item() or 1.0
    if not (stacked.isfinite().all() and target.isfinite().all()):
        return [math.nan] * len(parts), math.inf
    weights = torch.linalg.lstsq(stacked / norm, target[:, None] / norm, driver="gelsd").solution
    return weights[:, 0].tolist(), ((target - stacked @ weights[:, 0]).norm() / norm).item()


def fit(
    parts: list[Tensor],
    target: Tensor,
    shares: Mapping[str, list[float]],
    *,
    whole: Tensor,
    residual: float,
    excess: float,
    value: float,
) -> set[str]:
    """Return the shares by which the parts, value and gradient, add up to the target.

    Args:
        parts: Value and gradient of each group, shape (1 + gradients,).
        target: What they should add up to.
        shares: The weights to try, by name.
        whole: Value and gradient of the union, which say what is large.
        residual: How far the best weights may be off, relative to the whole.
        excess: How far others may be from the best.
        value: How far the value may be off, relative to that of the whole.
    """
    norm = (whole[1:].norm() or whole.norm()).item() or 1.0
    stacked, target = torch.stack(parts, 1) / norm, target / norm
    gradients = slice(1, None) if whole[1:].any() else slice(0, 1)
    best, off = best_weights(list(stacked[gradients].unbind(1)), target[gradients])
    if not off * target[gradients].norm() <= residual:
        return set()

    def fits(weights: list[float]) -> bool:
        given = torch.tensor(weights, dtype=stacked.dtype)
        beside = stacked[gradients] @ (given - torch.tensor(best, dtype=stacked.dtype))
        value_off = (target[0] - stacked[0] @ given).abs() * norm
        return bool(beside.norm() <= excess and value_off <= value * whole[0].abs())

    return {name for name, weights in shares.items() if fits(weights)}
