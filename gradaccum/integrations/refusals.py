"""What `attach` cannot do, said before anything has started.

Tested with transformers 5.17 and 5.23, trl 1.16, unsloth 2026.10.
"""

import os

from transformers import Trainer
from transformers.training_args import OptimizerNames

from gradaccum.errors import BadInput, NotDecomposable

# Where the methods may come from that `Attached` replaces. Those of TRL here only switch activation
# offloading on, in others they generate data or count steps. Those of Unsloth, which it puts in
# their place on a GPU, are theirs with a count and with what `unsloth.py` here does.
KNOWN = {
    "training_step": {
        "transformers.trainer",
        "trl.trainer.sft_trainer",
        "trl.trainer.dpo_trainer",
        "trl.trainer.kto_trainer",
        "trl.trainer.reward_trainer",
        "unsloth.models._utils",
        "UnslothSFTTrainer",
    },
    "get_batch_samples": {"transformers.trainer", "unsloth.models._utils"},
}


def refuse(trainer: Trainer) -> None:
    """Raise BadInput or NotDecomposable, with the cause, for a trainer that cannot be attached."""
    args = trainer.args
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > args.world_size:
        raise BadInput(
            f"{started} processes were started, and this trainer knows of {args.world_size}: each "
            "would train a model of its own",
            hint="use_cpu=True, without which transformers does not join processes on the CPU",
        )
    if args.n_gpu > 1:
        raise BadInput(
            f"attach runs one device in each process, and this trainer uses {args.n_gpu}",
            hint=f"torchrun --nproc-per-node {args.n_gpu}, or CUDA_VISIBLE_DEVICES=0 for one",
        )
    for name, modules in KNOWN.items():
        # What would run, not what the class says: methods are patched on classes and instances.
        method = getattr(trainer, name)
        function = getattr(method, "__func__", method)
        # Where it was written; `__module__` is what functools.wraps says.
        if getattr(function, "__globals__", {}).get("__name__") not in modules:
            called = getattr(function, "__qualname__", repr(function))
            raise BadInput(
                f"{called} would not be called: attach runs the step itself",
                hint="override compute_loss, or use a callback such as on_pre_optimizer_step",
            )
    if trainer.is_deepspeed_enabled:
        raise BadInput(
            "DeepSpeed reduces gradients inside of backward, as often on each rank, and divides "
            "them by its own number of steps, so that ranks cannot have micro-batches of their "
            "own, nor run one again",
            hint="leave out deepspeed: DistributedDataParallel, or FSDP2 in a plain loop with "
            "gradaccum.Accumulator",
        )
    if trainer.is_fsdp_enabled:
        raise BadInput(
            "how the trainer's loss is reduced is measured by forwards of a few rows, in which "
            "ranks that share their parameters (FSDP) would have to take part alike",
            hint="gradaccum.Accumulator with causal_lm() in a plain loop takes a model of "
            "fully_shard",
        )
    if args.auto_find_batch_size:
        raise BadInput(
            "auto_find_batch_size shrinks the effective batch and starts over on changed weights",
            hint="leave it out and pass attach(trainer, budget=...)",
        )
    if args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
        raise NotDecomposable(
            f"optim={args.optim!s} updates the weights inside backward, at every micro-batch"
        )
