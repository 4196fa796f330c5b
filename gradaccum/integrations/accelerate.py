"""The backward pass of an accelerate loop, for an `Accumulator`.

Tested with accelerate 1.15. `Accelerator.backward` divides every loss by
`gradient_accumulation_steps`, which makes a mean of means; here the weight of the whole effective
batch divides, once, so that number has to be 1. All else of the loop stays: `prepare`, mixed
precision and its scaler, `clip_grad_norm_`, schedulers, checkpoints. `with accelerator.accumulate`
goes.

On several ranks pass the model that `accelerator.prepare` returned; its wrapper reduces nothing,
`Accumulator.backward` does. Let the loader be your own, with `gradaccum.EffectiveBatchSampler`:
prepared ones repeat examples where batches are uneven.

Not here: DeepSpeed, FSDP and Megatron, which are refused.
"""

from collections.abc import Callable

from accelerate import Accelerator, DistributedType
from torch import Tensor

from gradaccum.errors import BadInput

# Those that wrap the model in DistributedDataParallel.
REPLICATED = (
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_HPU,
)


def backward_of(accelerator: Accelerator) -> Callable[[Tensor], None]:
    """Return the accelerator's backward for `Accumulator(..., backward=...)`, or refuse it.

    Raises:
        BadInput: The accelerator runs a sharding engine; or, here and in any later call, it divides
            losses by a number of accumulation steps.

    Example:
        >>> import gradaccum, torch
        >>> model, accelerator = torch.nn.Linear(3, 1), Accelerator(cpu=True)
        >>> accumulator = gradaccum.Accumulator(
        ...     model,
        ...     gradaccum.from_mean(lambda model, x: model(x).square().mean(), weight="rows"),
        ...     budget=gradaccum.Budget(examples=2),
        ...     backward=backward_of(accelerator),
        ... )
        >>> accumulator.backward(torch.ones(5, 3)).num_micros
        3
    """
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, *REPLICATED):
        raise BadInput(
            f"this accelerator runs {kind.value} on {accelerator.num_processes} processes, whose "
            "backward reduces and divides on its own",
            hint="accelerate launch without DeepSpeed, FSDP or Megatron; a model of fully_shard "
            "needs no accelerator",
        )

    def backward(loss: Tensor) -> None:
        _refuse_division(accelerator.gradient_accumulation_steps)
        accelerator.backward(loss)

    _refuse_division(accelerator.gradient_accumulation_steps)
    return backward


def _refuse_division(steps: int) -> None:
    if steps != 1:
        raise BadInput(
            f"Accelerator(gradient_accumulation_steps={steps}) divides each loss by {steps}, and "
            "an Accumulator has divided it by the weight of the effective batch already",
            hint="leave gradient_accumulation_steps at 1, and let the loader yield whole batches",
        )
