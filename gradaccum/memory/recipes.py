"""What stands in for optimizers and layers that run no Python, and so cannot be traced.

Kernels of bitsandbytes take addresses, and Adafactor of transformers looks at values. Their states
are accounted for by shape; what that assumes is said.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gradaccum.errors import BadInput

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
State = Callable[[Tensor], list[Tensor]]
BLOCK_8BIT, BLOCK_4BIT, BLOCK_NESTED = 256, 64, 256  # elements that share a scale in bitsandbytes
SMALLEST_8BIT = 4096  # elements; smaller tensors keep their state in 32 bits


class Accounted(Optimizer):
    """Hold the state of an optimizer that cannot be traced, and what its step takes for a while.

    Args:
        params: As of any optimizer.
        state: Makes what is kept for a parameter.
        passing: Makes what a step takes for one parameter and frees.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], state: State, passing: State = lambda p: []
    ) -> None:
        super().__init__(params, {})
        self._passing = passing
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = dict(enumerate(state(p)))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._passing(p)


def _wide(p: Tensor) -> Tensor:
    return torch.empty(p.shape, dtype=torch.float32)


def _quantised(num: int, p: Tensor) -> list[Tensor]:
    """Return `num` states in 8 bits with a scale of 32 bits a block, as of bitsandbytes."""
    if p.numel() < SMALLEST_8BIT:
        return [_wide(p) for _ in range(num)]
    scales = math.ceil(p.numel() / BLOCK_8BIT)
    return [
        part
        for _ in range(num)
        for part in (torch.empty(p.shape, dtype=torch.uint8), torch.empty(scales))
    ]


def _factored(p: Tensor) -> list[Tensor]:
    """Return the row and column means of Adafactor."""
    if p.ndim < 2:
        return [_wide(p)]
    return [torch.empty(p.shape[:-1]), torch.empty((*p.shape[:-2], p.shape[-1]))]


def _nothing(p: Tensor) -> list[Tensor]:
    return []


def _accounted(state: State, passing: State = _nothing) -> MakeOptimizer:
    return partial(Accounted, state=state, passing=passing)


ON_HOST = "the state of a paged optimizer is in the host's memory while the device needs its own"
IN_8_BITS = (
    "8-bit state: 1 byte an element and 4 bytes a block of 256, 32 bits below 4,096 elements"
)
FACTORED = "Adafactor: row and column means, and two float32 copies of one parameter in its step"
ADAFACTOR = _accounted(_factored, lambda p: [_wide(p), _wide(p)])
EIGHT, LION_8 = _accounted(partial(_quantised, 2)), _accounted(partial(_quantised, 1))
PAGED = _accounted(_nothing)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
# By the names of transformers' `optim`; what is assumed of those that cannot be traced.
OPTIMIZERS: dict[str, tuple[MakeOptimizer, str]] = {
    "adamw": (ADAMW, ""),
    "adamw_torch": (ADAMW, ""),
    "adamw_torch_fused": (partial(torch.optim.AdamW, lr=1e-3, fused=True), ""),
    "sgd": (partial(torch.optim.SGD, lr=1e-3), ""),
    "sgd_momentum": (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), ""),
    "adagrad": (partial(torch.optim.Adagrad, lr=1e-3), ""),
    "rmsprop": (partial(torch.optim.RMSprop, lr=1e-3), ""),
    "adafactor": (ADAFACTOR, FACTORED),
    "adamw_8bit": (EIGHT, IN_8_BITS),
    "adamw_bnb_8bit": (EIGHT, IN_8_BITS),
    "lion_8bit": (LION_8, IN_8_BITS),
    "paged_adamw": (PAGED, ON_HOST),
    "paged_adamw_32bit": (PAGED, ON_HOST),
    "paged_adamw_8bit": (PAGED, ON_HOST),
    "paged_lion_8bit": (PAGED, ON_HOST),
    "paged_lion_32bit": (PAGED, ON_HOST),
}


def optimizer_of(given: str | MakeOptimizer) -> tuple[MakeOptimizer, str]:
    """Return how to make an optimizer, and what is assumed of it.

    Raises:
        BadInput: The name is not known.
    """
    if callable(given):
        return given, ""
    name = str(given).removeprefix("OptimizerNames.").lower()
    if name not in OPTIMIZERS:
        raise BadInput(
            f"optimizer={given!r} is not known to the planner",
            hint=f"one of {', '.join(OPTIMIZERS)}, or a function of the parameters",
        )
    return OPTIMIZERS[name]


class FourBit(nn.Module):
    """Stand in for a linear layer of bitsandbytes in 4 bits: its memory, not its values.

    Weights are packed by two, with a scale for each 64 that is itself in 8 bits. A forward and a
    backward each unpack the whole matrix for one product.

    Args:
        linear: What is quantised.
        nested: Whether scales are quantised too (`bnb_4bit_use_double_quant`).
    """

    def __init__(self, linear: nn.Linear, *, nested: bool) -> None:
        super().__init__()
        num, device = linear.weight.numel(), linear.weight.device
        scales = math.ceil(num / BLOCK_4BIT)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter(
            torch.empty(math.ceil(num / 2), 1, dtype=torch.uint8, device=device),
            requires_grad=False,
        )
        kept = torch.uint8 if nested else torch.float32
        self.register_buffer("scales", torch.empty(scales, dtype=kept, device=device))
        if nested:
            outer = torch.empty(math.ceil(scales / BLOCK_NESTED), device=device)
            self.register_buffer("outer", outer)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """Return the packed weights, as the layer of bitsandbytes does."""
        return self.packed

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        y = _Unpacked.apply(x, self.packed, shape)
        return y if self.bias is None else y + self.bias


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return grad @ grad.new_empty(ctx.shape), None, None


FOUR_BIT = (
    "4-bit layers by shape: half a byte a weight and its scales; one matrix at a time is unpacked "
    "in forward and in backward; the head, embeddings and norms stay in the model's dtype"
)


def quantise(model: nn.Module, *, nested: bool, keep: Iterable[str] = ("lm_head",)) -> None:
    """Put `FourBit` in the place of the linear layers, as loading in 4 bits does.

    Args:
        model: Changed in place; on the meta device. Adapters keep their own layers.
        nested: As of `FourBit`.
        keep: Parts of names that are left as they are; layers of adapters are too.
    """
    left = (*keep, "lora_", "modules_to_save")
    for name, parent in list(model.named_modules()):
        for own, child in list(parent.named_children()):
            whole = f"{name}.{own}"
            if type(child) is nn.Linear and not any(part in whole for part in left):
                setattr(parent, own, FourBit(child, nested=nested))
