"""Which ranks a model is trained by, read from the model and from torch.distributed."""

import os
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradaccum.errors import BadInput, NotDecomposable
from gradaccum.sync.alone import Alone
from gradaccum.sync.replicated import Replicated


def num_ranks() -> int:
    """Return how many ranks there are; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def module_of(model: nn.Module) -> nn.Module:
    """Return what a forward calls: a model without the wrapper that would reduce on its own."""
    own = getattr(model, "_orig_mod", model)  # compiled around the wrapper
    return own.module if isinstance(own, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Tell whether forwards of a model take all ranks: parts of it went through `fully_shard`."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return "FSDPModule" in kinds


def ranks_of(model: nn.Module, sync: Any = None) -> Alone:
    """Return who trains this model together. Collective where there are several ranks.

    Args:
        model: To be trained.
        sync: The mode of `Sharded`.

    Raises:
        BadInput: It is wrapped or sharded in a way that has no exact accumulation here.
        NotDecomposable: It has collectives of its own, for which ranks would have to run alike.
    """
    inner = module_of(model)
    if num_ranks() == 1 and not is_sharded(inner):
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            raise BadInput(
                f"{started} processes were started, and torch.distributed is not initialised in "
                "this one: each would train a model of its own",
                hint="torch.distributed.init_process_group()",
            )
        return Alone()
    for name, module in inner.named_modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel):
            raise BadInput(
                f"{name} inside of the model is a DistributedDataParallel, which reduces in each "
                "backward",
                hint="wrap the whole model or nothing",
            )
        if kind == "FullyShardedDataParallel":
            raise BadInput(
                f"{name or 'the model'} is sharded by FSDP1, which divides and reduces on its own",
                hint="torch.distributed.fsdp.fully_shard (FSDP2)",
            )
        if kind in ("DeepSpeedEngine", "PipelineEngine"):
            raise BadInput(
                "DeepSpeed divides by its own number of accumulation steps, reduces in backward "
                "and cannot run a micro-batch again",
                hint="DistributedDataParallel or fully_shard do the same with an Accumulator",
            )
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise NotDecomposable(
                f"{name} normalises by the statistics of one micro-batch on all ranks",
                hint="put it in eval mode, or use GroupNorm",
            )
    if is_sharded(inner):
        from gradaccum.sync.sharded import Sharded  # DTensor takes torch 1.5 s to import

        return Sharded(inner, sync)
    if sync is not None:
        raise BadInput(f"sync={sync!r} is for models that went through fully_shard")
    return Replicated()
