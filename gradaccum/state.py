"""What a forward writes besides its outputs: the state of random generators, and buffers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving, the random state of every device and the model's buffers.

    Whatever runs inside (a probe, a proof) leaves the training run as if it had not happened.
    Python's own generator is covered too, since collators draw from it. NumPy's is not: nothing
    in torch or transformers draws from its global generator while training.
    """
    devices = (
        list(range(torch.accelerator.device_count())) if torch.accelerator.is_available() else []
    )
    kind = torch.accelerator.current_accelerator() if devices else None
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices, device_type=kind.type if kind else "cuda"):
            yield
    finally:
        random.setstate(python)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
