"""Build a tiny model whose losses differ from row to row, and in which nothing is random."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 30_000_000  # parameters; what the rules of `configs.py` leave larger is not built
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors be of this type inside: many models make masks without naming one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class KeepDouble(TorchFunctionMode):
    """Keep float64 where a model casts to float32: only so a wrong weight shows below 1e-8."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:  # of positions too, which models multiply with float64
            return args[0].double()
        wide = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def working_precision(dtype: torch.dtype) -> Iterator[None]:
    """Let everything inside be computed in this dtype, also where a model names another."""
    with default_dtype(dtype), KeepDouble() if dtype is torch.float64 else nullcontext():
        yield


def build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, *, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """Return the model in training mode, without dropout, its weights drawn in float32.

    Raises:
        ValueError: The configuration is not tiny.
    """
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters, more than {LARGEST:,}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        redraw(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    nn.Module.to(model, dtype)
    return model.train()


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draw weights as large as their inputs ask for: at 0.02 all rows have nearly the same loss."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter.is_floating_point():
                draw(parameter, module)


def draw(parameter: Tensor, module: nn.Module) -> None:
    noise = torch.randn_like(parameter)
    if parameter.ndim < 2 or not parameter.numel():
        parameter.nan_to_num_(0.0).add_(0.1 * noise)
        return
    fan_in = parameter[0].numel() if isinstance(module, CONVOLUTIONS) else parameter.shape[-1]
    parameter.copy_(noise if isinstance(module, nn.Embedding) else noise / fan_in**0.5)
