"""Count the bytes of every tensor that is alive while a step runs, by what they are for.

The same on real tensors and on fake ones, which hold no data: then nothing is allocated. What is
counted are storages as torch asks for them; what an allocator makes of that (rounding, blocks that
do not fit together) is not here. On request each operation is noted, with what it computes and
moves, so that a step of another size can be derived.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from gradaccum.memory.twin import plain_tensors

PARAMETERS, BUFFERS, GRADIENTS = "parameters", "buffers", "gradients"
STATE, ACTIVATIONS, TEMPORARIES, INPUTS = "optimizer state", "activations", "temporaries", "inputs"
CATEGORIES = (PARAMETERS, BUFFERS, GRADIENTS, STATE, ACTIVATIONS, TEMPORARIES, INPUTS)
BLOCK = 512  # bytes; c10/cuda/CUDACachingAllocator.cpp rounds to kMinBlockSize
AFTER = -1  # the part of a step after its micro-batches: the optimizer


class Op(NamedTuple):
    """Note one operation of a step.

    Args:
        part: The position of its micro-batch, or AFTER.
        flops: What it computes, in floating point operations of products; others count as none.
        moved_bytes: What it reads and writes; 0 for views.
        live_bytes: What is alive after it, by category.
    """

    part: int
    flops: int
    moved_bytes: int
    live_bytes: tuple[int, ...]


class _Storage:
    """Hold what is known of one storage that is alive."""

    __slots__ = ("category", "num_bytes", "ref")

    def __init__(self, num_bytes: int, category: str, ref: Any) -> None:
        self.num_bytes, self.category, self.ref = num_bytes, category, ref


class Tracker(TorchDispatchMode):
    """Follow the bytes that are alive; `peak_bytes` and `peak` are those where they were most.

    Args:
        device: Count tensors of this kind of device ("cpu", "cuda").
        cap: Raise `torch.OutOfMemoryError` where more bytes are alive: a device of any size.
        record: Keep `ops`, each operation.
        as_cuda: Count as CUDA would: storages in blocks of 512 bytes, and what the backward of
            flash attention takes for itself.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        cap: int | None = None,
        record: bool = False,
        as_cuda: bool = False,
    ) -> None:
        super().__init__()
        self.cap = cap
        self.live_bytes = self.peak_bytes = 0
        self.peak: dict[str, int] = {}
        self.ops: list[Op] = []
        self.part = 0  # of the step, which whoever runs it counts
        self._device, self._record, self._as_cuda = device, record, as_cuda
        self._by_category: Counter[str] = Counter()
        self._storages: dict[int, _Storage] = {}
        self._is_stepping = False
        self._handles: list[Any] = []

    def follow(
        self, model: nn.Module, optimizer: Optimizer | None = None, inputs: Any = ()
    ) -> None:
        """Take in what is there already, and tell gradients and optimizer state as they come."""
        for p in model.parameters():
            self._add(p, PARAMETERS)
            self._add(p.grad, GRADIENTS)
            if p.requires_grad:
                self._handles.append(_after_accumulation(p, self._add_gradient))
        self._add_all(model.buffers(), BUFFERS)
        self._add_all(plain_tensors(model), BUFFERS)
        self._add_all(tree_leaves(inputs), INPUTS)
        if optimizer is not None:
            self._add_state(optimizer)
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        self._note_peak()

    def close(self) -> None:
        """Follow no longer."""
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # of a fake tensor; autograd asks twice for each
            return getattr(args[0], "fake_device", None) or func(*args, **kwargs)
        outputs = func(*args, **kwargs)
        self._add_all(_tensors((outputs,)), self._phase(), first=True)
        scratch = _scratch_bytes(func, args) if self._as_cuda else 0
        self._hold(TEMPORARIES, scratch)
        self._note_peak()
        if self._record:
            live = tuple(self._by_category[name] for name in CATEGORIES)
            part = AFTER if self._is_stepping else self.part
            self.ops.append(Op(part, *_costs(func, args, kwargs, outputs), live))
        self._hold(TEMPORARIES, -scratch)
        if self.cap is not None and self.live_bytes > self.cap:
            raise torch.OutOfMemoryError(
                f"{self.live_bytes:,} bytes are alive after {func}, more than {self.cap:,}"
            )
        return outputs

    def _add_gradient(self, p: nn.Parameter) -> None:
        self._add(p.grad, GRADIENTS)

    def _phase(self) -> str:
        # Inside the autograd engine gradients are enabled only where a checkpoint runs forward.
        in_backward = torch._C._current_graph_task_id() != -1
        is_temporary = self._is_stepping or (in_backward and not torch.is_grad_enabled())
        return TEMPORARIES if is_temporary else ACTIVATIONS

    def _add_all(self, values: Iterable[Any], category: str, *, first: bool = False) -> None:
        for value in values:
            self._add(value, category, first=first)

    def _add(self, value: Any, category: str, *, first: bool = False) -> None:
        """Count a tensor's storage; `first`: keep the category that it has."""
        if not isinstance(value, Tensor) or value.device.type != self._device:
            return
        if value.layout is not torch.strided:
            parts = (value._indices(), value._values()) if value.is_sparse else ()
            return self._add_all(parts, category, first=first)
        storage = value.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if self._as_cuda:
            num_bytes = -(-num_bytes // BLOCK) * BLOCK
        known = self._storages.get(key)
        if known is None:
            ref = weakref.ref(storage, lambda _, key=key: self._drop(key))
            known = self._storages[key] = _Storage(0, category, ref)
        elif not first and known.category != category:
            self._by_category[known.category] -= known.num_bytes
            self._by_category[category] += known.num_bytes
            known.category = category
        self._hold(known.category, num_bytes - known.num_bytes)  # storages are resized in place
        known.num_bytes = num_bytes

    def _drop(self, key: int) -> None:
        known = self._storages.pop(key)
        self._hold(known.category, -known.num_bytes)

    def _hold(self, category: str, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self._by_category[category] += num_bytes

    def _note_peak(self) -> None:
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak = {name: self._by_category[name] for name in CATEGORIES}

    def _add_state(self, optimizer: Optimizer) -> None:
        self._add_all(tree_leaves(list(optimizer.state.values())), STATE)

    def _before_step(self, *_: Any) -> None:
        self._is_stepping = True

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._add_state(optimizer)
        self._is_stepping = False


class _after_accumulation:
    """Call a function with a parameter whenever a gradient is added to it.

    On the graph's node: a hook of the parameter itself would say that somebody waits for it, as
    an optimizer that steps inside backward does, and be refused.
    """

    def __init__(self, p: nn.Parameter, call: Callable[[nn.Parameter], None]) -> None:
        with torch.enable_grad():
            node = p.view_as(p).grad_fn
        assert node is not None, "it requires a gradient"
        self._node: Any = node.next_functions[0][0]  # lives as long as it is held
        self._handle = self._node.register_hook(lambda *_: call(p))

    def remove(self) -> None:
        self._handle.remove()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results; operations nest them in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _costs(func: Any, args: Any, kwargs: Any, outputs: Any) -> tuple[int, int]:
    """Return what an operation computes and moves: FLOPs, bytes."""
    if _is_view(func):
        return 0, 0
    formula = _FLOPS.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=outputs) if formula is not None else 0
    moved = sum(
        leaf.numel() * leaf.element_size()
        for leaf in _tensors((args, tuple(kwargs.values()), outputs))
        if leaf.layout is torch.strided
    )
    return flops, moved


@functools.cache
def _is_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _scratch_bytes(func: Any, args: Any) -> int:
    """Return what flash attention's backward allocates inside on CUDA, from its source.

    In float32 a copy of the gradient of the queries (`dq_accum`) and one number a row
    (`softmax_d`); see csrc/flash_attn/flash_api.cpp. The CPU's kernel takes neither.
    """
    if func._overloadpacket is not _FLASH_BACKWARD:
        return 0
    query = args[1]
    return 4 * (query.numel() + query.numel() // query.shape[-1])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, *_with_heads_of(query, key, value))


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, *_with_heads_of(query, key, value))


def _with_heads_of(query: Tensor, *others: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of keys and values with as many heads as queries, (B, H, T, D).

    Where several queries share one, each is multiplied all the same; torch 2.11 refuses fewer.
    """
    return [(*query.shape[:2], *other.shape[2:]) for other in others]


_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch counts attention on accelerators alone.
_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _FLASH_BACKWARD: _attention_backward,
}
