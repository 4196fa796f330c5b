"""What the ranks of test_fsdp.py do; each function is called on every rank.

Expected values are not here: they come from one process, which has nothing of FSDP in it.
"""

import contextlib
import gc
import os
import signal
import time
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import gradaccum
from gradaccum import Budget, Objective, device
from gradaccum.engine import Accumulator
from gradaccum.sync.fsdp import Groups
from tests import models

ROWS, WIDTH, CLASSES = 32, 8, 5
MISTAKE = "some mistake"
HAS_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # since torch 2.13
CUTS = {1: (0, 32), 2: (0, 12, 32), 4: (0, 4, 10, 22, 32)}  # 3 and 5 micro-batches of 4; 1, 2, 3, 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.two(torch.tanh(self.one(x))))


class Net(nn.Module):
    """Blocks, a tied head, a branch that few rows take, frozen layers, a parameter nobody uses."""

    def __init__(self, hidden: int = 15, dtype=torch.float64, is_checkpointed: bool = False):
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.embed = nn.Linear(WIDTH, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.branch = nn.Linear(hidden, hidden)
        self.head = nn.Linear(WIDTH, hidden, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(WIDTH, CLASSES)
        self.nobody = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.ones(hidden))
        self.blocks[1].two.weight.requires_grad_(False)
        self.out.bias.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4)
        self.to(dtype)

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x, flag):
        x = torch.tanh(self.embed(x)) * self.scale
        # What is sharded then runs again in backward, and gathers again, in another order.
        x = checkpoint(self.body, x, use_reentrant=False) if self.is_checkpointed else self.body(x)
        if flag.any():
            x = x + torch.tanh(self.branch(x)) * flag[:, None]
        return self.out(x @ self.head.weight)


def rows(begin: int = 0, end: int = ROWS, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    flag = torch.arange(ROWS) == 3  # in the first micro-batch of rank 0, and nowhere else
    return {"x": x[begin:end], "y": y[begin:end], "flag": flag[begin:end]}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["x"], batch["flag"])
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), batch["y"], reduction="sum")


OBJECTIVE = Objective(loss, lambda batch: len(batch["y"]), unit="rows")


def shard(model: nn.Module, how: str = "nested", **options) -> nn.Module:
    """Apply fully_shard in one of the ways that people do."""
    gc.freeze()  # collecting garbage, after memory ran out, would look at all that is imported
    if how == "nested":
        fully_shard(model.blocks[0].one, **options)
    if how == "grouped":
        fully_shard([model.blocks[0], model.blocks[1]], **options)
    elif how != "root":
        for block in model.blocks:
            fully_shard(block, **options)
    if how == "branch":
        fully_shard(model.branch, **options)
    if how != "blocks":  # else all others are on every rank
        fully_shard(model, **options)
    return model


def full(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {
        name: None if p.grad is None else full(p.grad)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def share_of(rank: int, world: int, **options) -> dict[str, torch.Tensor]:
    return rows(*CUTS[world][rank : rank + 2], **options)


def clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


@contextlib.contextmanager
def counting():
    """Count the collectives of FSDP: gathers, scatters, and all-reduces over replicas."""
    counts, names = Counter(), {"DefaultAllGather": "gather", "DefaultReduceScatter": "scatter"}
    before = {name: getattr(_fsdp_collectives, name).__call__ for name in names}
    all_reduce = dist.all_reduce

    def counted(name):
        def call(*args, **kwargs):
            counts[names[name]] += 1
            return before[name](*args, **kwargs)

        return call

    def counted_all_reduce(*args, group=None, **kwargs):
        is_replicas = group is not None and group.size() < dist.get_world_size()
        counts["all_reduce"] += is_replicas
        return all_reduce(*args, group=group, **kwargs)

    for name in names:
        getattr(_fsdp_collectives, name).__call__ = counted(name)
    dist.all_reduce = counted_all_reduce
    try:
        yield counts
    finally:
        dist.all_reduce = all_reduce
        for name in names:
            getattr(_fsdp_collectives, name).__call__ = before[name]


class Boom(torch.autograd.Function):
    """Raise in backward."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


class Faulty:
    """Fail in the micro-batches whose numbers are given, counted over all windows of this rank.

    Args:
        where: "forward", "middle" or "last": before, in and at the end of a backward.
        at: Numbers of the micro-batches.
        error: What to raise.
    """

    def __init__(self, model: nn.Module, where: str, at: set[int], error: Exception) -> None:
        self.where, self.at, self.error, self.num = where, at, error, 0
        model.register_forward_pre_hook(self._before)
        model.blocks[0].register_forward_hook(self._between)
        model.embed.register_forward_hook(self._begin)

    def _before(self, module, args):
        self.num += 1
        self.is_now = self.num - 1 in self.at

    def _between(self, module, args, output):
        if self.is_now and self.where == "forward":
            raise self.error
        return Boom.apply(output, self.error) if self.is_now and self.where == "middle" else None

    def _begin(self, module, args, output):
        return Boom.apply(output, self.error) if self.is_now and self.where == "last" else None


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail_once(holder, name: str) -> None:
    def fail(*_):
        delattr(holder, name)
        raise out_of_memory()

    setattr(holder, name, fail)


def build(world, options):
    """Return a sharded model, as some options say."""
    options = dict(options)
    how, dtype = options.pop("how", "nested"), options.pop("dtype", torch.float64)
    hidden, is_checkpointed = options.pop("hidden", 15), options.pop("is_checkpointed", False)
    ignored, replicas = options.pop("ignored", ()), options.pop("replicas", 0)
    if replicas:
        shape = (replicas, world // replicas)
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
    model = Net(hidden, dtype, is_checkpointed)
    if ignored:
        options["ignored_params"] = {dict(model.named_parameters())[name] for name in ignored}
    return shard(model, how, **options)


def windows(rank, world, mode, options=(), num=2, cuts=None, examples=4, fault=None):
    """Run some windows; return of each the gradients, or the error, and how it went.

    Args:
        mode: As of `Accumulator`.
        options: Of `build`.
        num: Windows.
        cuts: Where the shares of ranks begin.
        examples: The budget.
        fault: By rank that fails, the arguments of `Faulty` but the model; the error by name.
    """
    options = dict(options)
    dtype = options.get("dtype", torch.float64)
    model = build(world, options)
    if fault is not None and rank in fault:
        where, at, error = fault[rank]
        Faulty(model, where, set(at), ERRORS[error]())
    begin, end = (cuts or CUTS[world])[rank : rank + 2]
    outputs = []
    model.out.register_forward_hook(lambda module, args, out: outputs.append(out.detach().sum()))
    found = []
    for _ in range(num):
        # The limit after memory ran out is of this window alone, so that the next is cut alike.
        accumulator = Accumulator(model, OBJECTIVE, budget=Budget(examples=examples), sync=mode)
        outputs.clear()
        with counting() as counts:
            try:
                step = accumulator.backward(rows(begin, end, dtype))
            except Exception as error:
                found.append({"error": f"{type(error).__name__}: {error}"})
                clear(model)
                continue
        found.append(
            {
                "gradients": gradients(model),
                "loss": step.loss,
                "runs": [share.num_micros for share in step.shares],
                "sync": step.sync,
                "counts": dict(counts),
                "num_recoveries": len(step.recoveries),
                "outputs": outputs.copy(),
            }
        )
        clear(model)
    return found


ERRORS = {"memory": out_of_memory, "other": lambda: KeyError(MISTAKE)}


def raw(rank, world, how):
    """Run a window by torch alone: what has to be set, and what is not enough."""
    model, batch = shard(Net(dtype=torch.float64)), share_of(rank, world)
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if HAS_UNUSED:
        model.set_reduce_scatter_unused_params(True)
    else:
        batch["flag"][:] = True  # else torch hangs
    for module in {"nothing": [], "root": [model], "all": modules}[how]:
        module.set_gradient_divide_factor(1.0)
    (loss(model, batch) / ROWS).backward()
    return gradients(model)


def stale(rank, world, mode):
    """Fail in a window of torch alone, whose gradients wait for a later backward; then go on."""
    model = shard(Net())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    model.set_requires_gradient_sync(False)
    batch = share_of(rank, world)
    batch["flag"][:] = True
    loss(model, batch).div(ROWS).backward()
    handle = model.blocks[0].register_forward_hook(
        lambda module, args, output: Boom.apply(output, out_of_memory())
    )
    with contextlib.suppress(torch.OutOfMemoryError):
        loss(model, batch).div(ROWS).backward()
    handle.remove()
    clear(model)
    if mode is not None:
        Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync=mode).backward(
            share_of(rank, world)
        )
    elif not hasattr(model, "reset_iter_state"):
        return None
    else:
        model.reset_iter_state()
        model.set_requires_gradient_sync(True)
        loss(model, batch).div(ROWS).backward()
    return gradients(model)


def left_alone(rank, world, mode):
    """Train by torch alone after a window: it averages, as if nothing had been."""
    model = shard(Net())
    accumulator = Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync=mode)
    accumulator.backward(share_of(rank, world))
    clear(model)
    with torch.no_grad():
        loss(model, rows(0, 8))  # leaves the root's parameters gathered
    accumulator.backward(share_of(rank, world))
    found = gradients(model)
    clear(model)
    loss(model, rows()).div(ROWS).backward()
    return found, gradients(model)


def training(rank, world, mode, hsdp=False):
    """Train for 5 steps, with clipping; return norms and parameters."""
    model = build(world, {"replicas": 2 * hsdp})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    accumulator = Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync=mode)
    norms = []
    for _ in range(5):
        accumulator.backward(share_of(rank, world))
        norms.append(full(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: full(p) for name, p in model.named_parameters()}


def idle(rank, world, mode, is_bad):
    """Run a window in which rank 0 has no examples; where `is_bad`, others' are not finite for it.

    What a rank runs for others' sake alone must leave no trace, whatever its loss is.
    """
    model = build(world, {"ignored": ("branch.weight", "scale")})

    def spoiled(model, batch):
        found = loss(model, batch)
        return found * torch.nan if is_bad and rank == 0 else found

    objective = Objective(spoiled, OBJECTIVE.weight, unit="rows")
    accumulator = Accumulator(model, objective, budget=Budget(examples=4), sync=mode)
    step = accumulator.backward([] if rank == 0 else rows())
    return gradients(model), [share.num_examples for share in step.shares]


def language(rank, world, mode):
    """Run a window of a causal language model: ragged examples, tied embeddings."""
    model, examples = models.model(), models.examples([9, 3, 7, 5, 12, 4, 6, 8])
    fully_shard(model.qkv)
    fully_shard(model)
    accumulator = Accumulator(
        model, gradaccum.causal_lm(), budget=Budget(tokens=16), sync=mode, collate=models.collated
    )
    accumulator.backward(examples[:2] if rank == 0 else examples[2:])
    return gradients(model)


class Unsent:
    """What cannot be sent to another rank."""

    def __reduce__(self):
        raise KeyError(MISTAKE)


def early(rank, world, mode, where, is_idle):
    """Fail on rank 1 before its first micro-batch, in the first or second window."""
    model, found = shard(Net()), []
    accumulator = Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync=mode)
    for window in ("first", "second"):
        if window == where and rank == 1:
            fail_once(accumulator.ranks.groups, "begin")
        whole = rows() if rank == 1 else []
        accumulator.backward(whole if is_idle else share_of(rank, world))
        found.append(gradients(model))
        clear(model)
    return found


def unsent(rank, world):
    """Lend what cannot be sent."""
    objective = Objective(lambda model, batch: loss(model, batch[0]), lambda batch: 1.0)
    accumulator = Accumulator(
        shard(Net()),
        objective,
        budget=Budget(examples=4),
        sync="each",
        collate=lambda examples: (rows(), Unsent()),
    )
    try:
        accumulator.backward([0, 1] if rank == 1 else [])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def late(rank, world, mode):
    """Run a window whose weight the loss reports, and one without any weight."""
    model, found = shard(Net()), []
    for objective in (
        Objective(lambda model, batch: (loss(model, batch), len(batch["y"])), None, unit="rows"),
        Objective(loss, lambda batch: 0, unit="rows"),
    ):
        accumulator = Accumulator(model, objective, budget=Budget(examples=4), sync=mode)
        step = accumulator.backward(share_of(rank, world))
        found.append((gradients(model), step.loss))
        clear(model)
    return found


def precise(rank, world, mode, policy):
    """Run four micro-batches a rank in 16 bits, by torch alone (mode None) or accumulated."""
    dtype, options = torch.float32, {}
    if policy == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    else:
        dtype = torch.bfloat16
    model, size = shard(Net(16, dtype), **options), ROWS // world
    batch = rows(rank * size, (rank + 1) * size, dtype)
    batch["flag"][:] = True
    if mode is None:
        for i in range(0, size, 4):
            part = {key: value[i : i + 4] for key, value in batch.items()}
            loss(model, part).div(ROWS / world).backward()
    else:
        wide = torch.float32 if policy == "wide" else None
        Accumulator(
            model, OBJECTIVE, budget=Budget(examples=4), sync=mode, grad_dtype=wide
        ).backward(batch)
    return gradients(model)


def storages() -> int:
    """Return the bytes of large tensors, younger than `gc.freeze`; random states are bytes."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if x.dtype.itemsize > 1]
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in parts}
    return sum(num for num in found.values() if num >= 4096)


def held(rank, world, mode, hsdp=False):
    """Return the bytes that are held between micro-batches, and how many parameters there are."""
    gc.collect()
    gc.freeze()
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
    num = sum(p.numel() for p in model.parameters())
    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    if hsdp:
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    for layer in model[:2]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    objective = Objective(lambda model, batch: model(batch["x"]).float().square().sum(), len)
    seen = []

    def see(_):
        time.sleep(0.05)  # gloo's thread lets go of its buffers a moment later
        seen.append(storages())

    accumulator = Accumulator(
        model, objective, budget=Budget(examples=1), sync=mode, after_micro=see
    )
    batch = {"x": torch.ones(3, 128)}
    accumulator.backward(batch)
    clear(model)
    before = storages()
    seen.clear()
    step = accumulator.backward(batch)
    return [now - before for now in seen], num, step.sync


TOKENS, WORDS = 128, 2048


def language_model() -> LlamaForCausalLM:
    config = LlamaConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=4, vocab_size=WORDS,
                         use_cache=False)  # fmt: skip
    return LlamaForCausalLM(config).train()


def adam(parameters):
    return torch.optim.AdamW(parameters, foreach=False)


def stepped(rank, world, mode, num_rows):
    """Return the most bytes that are allocated in a step with state, as the allocator tells it."""
    model = language_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = adam(model.parameters())
    accumulator = Accumulator(
        model, gradaccum.causal_lm(), budget=Budget(examples=num_rows), sync=mode
    )
    ids = torch.randint(0, WORDS, (2 * num_rows, TOKENS))
    batch = [{"input_ids": row, "labels": row} for row in ids]

    def step():
        accumulator.backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    now = most = storages()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def killed(rank, world, mode, where):
    """Kill rank 1 in a micro-batch; return what rank 0 raised, and after how many seconds."""
    model = shard(Net())
    accumulator = Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync=mode)
    if where == "second":
        accumulator.backward(share_of(rank, world))
        clear(model)
    if rank == 1:
        model.blocks[0].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    begin = time.monotonic()
    try:
        accumulator.backward(share_of(rank, world))
    except Exception as error:
        return type(error).__name__, time.monotonic() - begin


def crowded(rank, world, where, mode=None):
    """Find no room for "hold": by what is available, in the middle of gathering, or at the end."""
    model, available_bytes = shard(Net()), device.available_bytes
    accumulator = Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync=mode)
    if where == "available" and rank == 1:
        device.available_bytes = lambda device: 100
    try:
        groups = accumulator.ranks.groups
    finally:
        device.available_bytes = available_bytes

    if where == "gathering" and rank == 1:
        fail_once(groups.all[2], "unshard")
    if where == "end" and rank == 0:
        fail_once(groups, "reserve")
    found = []
    for _ in range(2):
        step = accumulator.backward(share_of(rank, world))
        found.append((gradients(model), step.sync, len(step.recoveries)))
        clear(model)
    return found


def switched(rank, world):
    """Run other collectives in another window: they are learnt anew, and a rank then fails."""
    model, found = shard(Net()), []
    if rank == 1:
        Faulty(model, "middle", {5}, out_of_memory())
    accumulator = Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync="each")
    for model.is_checkpointed in (False, True):
        found.append((accumulator.backward(share_of(rank, world)), gradients(model))[1])
        clear(model)
    return found


def varied(rank, world):
    """Run other collectives in another micro-batch of a window."""
    model = shard(Net())
    model.register_forward_pre_hook(lambda module, args: setattr(module, "x", 0))
    forward, nums = model.forward, iter(range(100))

    def varying(*args):
        if next(nums) == 2:
            model.blocks[1](torch.zeros(1, 15, dtype=torch.float64))
        return forward(*args)

    model.forward = varying
    return error_of(Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync="each"), rank)


def lost(rank, world):
    """Return what is said where gradients are not looked for where torch has put them."""
    Groups.is_hybrid = False
    model = build(world, {"replicas": 1})
    return error_of(Accumulator(model, OBJECTIVE, budget=Budget(examples=4), sync="each"), rank)


def error_of(accumulator, rank) -> str:
    try:
        accumulator.backward(share_of(rank, 2))
    except gradaccum.errors.GradaccumError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refused(rank, world):
    """Return what is said of models and jobs that are not summed exactly."""
    mesh = init_device_mesh("cpu", (2,))
    parallel = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    parallel[0].weight = nn.Parameter(distribute_tensor(parallel[0].weight, mesh, [Replicate()]))
    fully_shard(parallel[1])
    wide = fully_shard(nn.Linear(4, 4), shard_placement_fn=lambda p: Shard(p.ndim - 1))
    half = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]  # of one rank each
    part = fully_shard(nn.Linear(4, 4), mesh=half)
    offloaded = fully_shard(nn.Linear(4, 4), offload_policy=CPUOffloadPolicy(pin_memory=False))
    hooked = fully_shard(nn.Linear(4, 4))
    hooked.set_all_reduce_hook(lambda output: None)
    other = Net()
    with torch.no_grad():
        other.scale.add_(rank)
    other = shard(other, ignored_params={other.scale})
    budget = Budget(examples=4)
    accumulators = {
        "parallel": Accumulator(parallel, OBJECTIVE, budget=budget),
        "wide": Accumulator(wide, OBJECTIVE, budget=budget),
        "offloaded": Accumulator(offloaded, OBJECTIVE, budget=budget),
        "part": Accumulator(part, OBJECTIVE, budget=budget),
        "hooked": Accumulator(hooked, OBJECTIVE, budget=budget),
        "other": Accumulator(other, OBJECTIVE, budget=budget),
        "word": Accumulator(shard(Net()), OBJECTIVE, budget=budget, sync="twice"),
        "words": Accumulator(
            shard(Net()), OBJECTIVE, budget=budget, sync="each" if rank else "once"
        ),
        "plain": Accumulator(Net(), OBJECTIVE, budget=budget, sync="each"),
        "measured": Accumulator(
            shard(Net()),
            gradaccum.from_mean(lambda model, batch: loss(model, batch) / len(batch["y"])),
            budget=budget,
        ),
        "auto": gradaccum.Accumulator(shard(Net()), OBJECTIVE),
    }
    return {name: error_of(accumulator, rank) for name, accumulator in accumulators.items()}


def unequal_replicas(rank, world):
    """Return what is said of replicas of a shard that are not equal."""
    model = build(world, {"replicas": 2})
    with torch.no_grad():
        model.scale.to_local().add_(rank == 3)
    return error_of(Accumulator(model, OBJECTIVE, budget=Budget(examples=4)), 0)
