"""Compare the gradients that two ways of running the same batch leave behind."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradaccum.state import undisturbed


def gradient_difference(
    model: nn.Module, run: Callable[[], object], reference: Callable[[], object]
) -> float:
    """Return ||g - g_ref|| / ||g_ref|| over all parameters, computed in float64.

    Both leave gradients in `.grad`, starting from none; the model, its buffers and the random
    state are as before afterwards, and the gradients are cleared. No gradient counts as zero.

    Args:
        model: Whose gradients are compared; in a mode without dropout.
        run: Leaves the gradients in question, such as an accumulated step.
        reference: Leaves the gradients to compare with, such as one pass over the full batch.
    """
    found, expected = _gradients(model, run), _gradients(model, reference)
    difference = norm = 0.0
    for g, g_ref in zip(found, expected, strict=True):
        difference += (g - g_ref).square().sum().item()
        norm += g_ref.square().sum().item()
    return (difference / norm) ** 0.5 if norm else float(difference > 0)


def _gradients(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with undisturbed(model):
        run()
    gradients = [
        (torch.zeros_like(p) if p.grad is None else p.grad).cpu().double() for p in parameters
    ]
    for p in parameters:
        p.grad = None
    return gradients
