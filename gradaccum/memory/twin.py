"""A model's twin that holds no data: the same modules and shapes, on fake tensors.

Tested with torch 2.13, transformers 5.23 and peft 0.21.
"""

import copy
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OWN = ("_parameters", "_buffers", "_modules")  # of nn.Module


def twin_of(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of the model, real or on the meta device, that allocates nothing.

    Ties, hooks, adapters and checkpointing stay as they are.
    """
    memo: dict[int, Any] = {}  # of deepcopy: what is in it already is not copied
    bases: dict[int, Tensor] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers(), plain_tensors(model)):
        if id(tensor) not in memo:
            memo[id(tensor)] = fake_like(tensor, mode, bases)
    return copy.deepcopy(model, memo)


def plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that modules hold as plain attributes, as tables and masks often are."""
    for module in model.modules():
        own = {k: v for k, v in vars(module).items() if k not in OWN}
        yield from (leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor))


def fake_like(tensor: Any, mode: FakeTensorMode, bases: dict[int, Tensor] | None = None) -> Any:
    """Return a tensor of the same shape, strides and dtype without data; other values as they are.

    It is on the CPU whatever it is like: without a GPU, torch ends the process on others.

    Args:
        tensor: Real or on the meta device.
        mode: In which it is to be used.
        bases: The storages of tensors before it, by those of the real ones: views share theirs.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    if tensor.layout is not torch.strided:
        return copy.copy(tensor)
    storage = tensor.untyped_storage()
    num = -(-storage.nbytes() // tensor.element_size())
    bases = {} if bases is None else bases
    base = bases.get(storage._cdata)
    if base is None or base.dtype != tensor.dtype:
        base = bases[storage._cdata] = torch.empty(num, dtype=tensor.dtype, device="meta")
    meta = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    fake = FakeTensor(mode, meta, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake


@contextmanager
def faking(model: nn.Module, *, padded: bool, as_cuda: bool = False) -> Iterator[FakeTensorMode]:
    """Yield the mode in which a twin runs.

    Args:
        model: Whose twin it will be.
        padded: Whether batches have padding; without it models are given no mask.
        as_cuda: Take the operations that CUDA takes where the CPU has others.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError("a FakeTensorMode is active already, and nested ones count wrongly")
    packing = nullcontext() if padded else _without_packing()
    has_experts = any("expert" in type(m).__name__.lower() for m in model.modules())
    grouping = _GroupedInAnyDtype() if has_experts else nullcontext()
    attending = _attending_as_cuda() if as_cuda else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, packing, grouping, attending:
        yield mode


@contextmanager
def _without_packing() -> Iterator[None]:
    """Let transformers make no mask where it would make none of real tensors.

    It takes fake tensors for `torch.export`, where it does not look whether sequences are packed
    (`find_packed_sequence_indices`), and makes a mask of (B, 1, T, T) for the case. Dies when it
    tells the two apart.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:
        yield
        return
    before = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = before


@contextmanager
def _attending_as_cuda() -> Iterator[None]:
    """Attend by single products where CUDA has no fused kernel: float32 with shared heads.

    Flash attention takes 16 bits, and the memory-efficient kernel as many keys as queries; seen on
    an H200 with torch 2.11. A mode for functions would be off where a checkpoint runs its forward
    again. Dies when a kernel takes both.
    """
    attend = nn.functional.scaled_dot_product_attention

    def as_cuda(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_single = query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not (is_single and kwargs.get("enable_gqa")):
            return attend(query, *args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            return attend(query, *args, **kwargs)

    nn.functional.scaled_dot_product_attention = as_cuda
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = attend


class _GroupedInAnyDtype(TorchDispatchMode):
    """Let the grouped product of experts run on fake tensors of any dtype, as it does on real ones.

    Its shape function insists on bfloat16. Dies when that is lifted.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        dtype = args[0].dtype
        return func(*(_cast(a, torch.bfloat16) for a in args), **(kwargs or {})).to(dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value
