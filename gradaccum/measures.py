"""Compare the gradients that two ways of running the same batch leave behind."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gradaccum.state import undisturbed


def gradients(
    model: nn.Module, run: Callable[[], object], *, most: int | None = None
) -> list[Tensor]:
    """Return what `run` leaves in `.grad`, one float64 tensor on the CPU for each parameter.

    The model, its buffers and the random state are as before afterwards, and the gradients are
    cleared. No gradient counts as zero.

    Args:
        model: In a mode without dropout, its gradients cleared.
        run: Leaves gradients, such as an accumulated step or one pass over the full batch.
        most: About how many elements of each to return, spread over it; None: all.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with undisturbed(model):
        run()
    found = []
    for p in parameters:
        grad = (torch.zeros_like(p) if p.grad is None else p.grad).to_dense()
        step = 1 if most is None else p.numel() // most | 1  # odd, so as not to stay in one column
        found.append((grad if step == 1 else grad.flatten()[::step]).cpu().double())
        p.grad = None
    return found


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ||found - expected|| / ||expected|| over all tensors."""
    difference = norm(a - b for a, b in zip(found, expected, strict=True))
    size = norm(expected)
    return difference / size if size else float(difference > 0)


def rounding(
    model: nn.Module, gradients: list[Tensor], computed: torch.dtype | None = None
) -> float:
    """Return the relative error that storing these gradients in the parameters' dtype causes.

    A number between 2^e and 2^(e+1) is off by up to half of 2^e eps, by 1/sqrt(12) of it in the
    root mean square; two that are rounded apart differ by sqrt(2) of that. Dominates in 16 bits.

    Args:
        model: Its trainable parameters have these gradients.
        gradients: In float64.
        computed: The dtype of autocast, in which gradients are rounded before they are stored.
    """
    dtypes = [p.dtype for p in model.parameters() if p.requires_grad]
    steps = (
        torch.where(g == 0, 0.0, torch.exp2(g.abs().log2().floor())) * _eps(dtype, computed)
        for g, dtype in zip(gradients, dtypes, strict=True)
    )
    size = norm(gradients)
    return norm(steps) / size / 6**0.5 if size else 0.0


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm over all tensors."""
    return sum(t.square().sum().item() for t in tensors) ** 0.5


def dot(some: list[Tensor], others: list[Tensor]) -> float:
    """Return the inner product over all tensors."""
    return sum((a * b).sum().item() for a, b in zip(some, others, strict=True))


def _eps(dtype: torch.dtype, computed: torch.dtype | None) -> float:
    own = torch.finfo(dtype).eps
    return own if computed is None else max(own, torch.finfo(computed).eps)
