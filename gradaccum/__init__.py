"""The batch size you want, on the memory you have, with the gradient you would have got.

    objective = gradaccum.causal_lm()
    accumulator = gradaccum.Accumulator(model, objective)  # finds how large micro-batches may be
    for batch in loader:
        step = accumulator.backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    trainer = gradaccum.attach(trainer)  # any transformers Trainer
    print(gradaccum.verify(loop, model, batch))  # anybody's loop against the full batch
    print(gradaccum.plan(config, effective_batch=64, memory="24GiB"))  # needs no weights, no GPU

This module only re-exports; importing it needs torch alone and starts nothing.
"""

from typing import TYPE_CHECKING, Any

from gradaccum import errors
from gradaccum.causal import causal_lm
from gradaccum.measured import from_mean
from gradaccum.memory.auto import Accumulator
from gradaccum.memory.plan import plan
from gradaccum.objective import Objective
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.types import Budget
from gradaccum.verify import verify

if TYPE_CHECKING:
    from gradaccum.integrations.hf import attach

__all__ = [
    "Accumulator",
    "Budget",
    "EffectiveBatchSampler",
    "Objective",
    "attach",
    "causal_lm",
    "errors",
    "from_mean",
    "plan",
    "verify",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `attach` on first use, since it needs transformers."""
    if name != "attach":
        raise AttributeError(f"module 'gradaccum' has no attribute {name!r}")
    try:
        from gradaccum.integrations.hf import attach
    except ModuleNotFoundError as error:
        raise errors.MissingExtra(
            f"attach needs the package {error.name!r}, which is not installed",
            hint='pip install "gradaccum[hf]"',
        ) from error
    return attach
