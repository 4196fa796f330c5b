"""The backward pass of an accelerate loop, for an `Accumulator`.

Tested with accelerate 1.15. `Accelerator.backward` divides every loss by
`gradient_accumulation_steps`, which makes a mean of means; here the weight of the whole effective
batch divides, once, so that number has to be 1. All else of the loop stays: `prepare`, mixed
precision and its scaler, `clip_grad_norm_`, schedulers, checkpoints. `with accelerator.accumulate`
goes.

Not here: more than one process, DeepSpeed, FSDP and Megatron, which are refused.
"""

from collections.abc import Callable

from accelerate import Accelerator, DistributedType
from torch import Tensor

from gradaccum.errors import BadInput


def backward_of(accelerator: Accelerator) -> Callable[[Tensor], None]:
    """Return the accelerator's backward for `Accumulator(..., backward=...)`, or refuse it.

    Raises:
        BadInput: The accelerator runs several processes or a sharding engine; or, here and in any
            later call, it divides losses by a number of accumulation steps.

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
    if kind is not DistributedType.NO:
        raise BadInput(
            f"an Accumulator runs on one process so far, and this accelerator runs {kind.value} "
            f"on {accelerator.num_processes}",
            hint="accelerate launch --num_processes 1, without DeepSpeed, FSDP or Megatron",
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
