"""How much memory a step may take: what the user states, less what is not the step's."""

import os
import re
from dataclasses import dataclass

import torch
from torch import nn

from gradaccum.device import available_bytes, total_bytes
from gradaccum.errors import BadInput
from gradaccum.types import amount

UNITS = {"": 1, "b": 1} | {
    f"{prefix}{binary}b": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("kmgt", start=1)
    for binary in ("", "i")
}
HINT = 'memory="20GiB" (or "20G"), "24GB", bytes, or a fraction such as 0.9 or "90%"'
MIB = 2**20
# Of CUDA; each is an assumption that a plan names. Measured on an H200 with torch 2.11
# (benchmarks/gpu.py): a context of 711 MiB; the smallest bound under which a step runs lies above
# what its tensors take by 5 to 10% where that is 10 to 20 GiB, by 66 to 284 MiB where it is less.
CONTEXT = 768 * MIB  # of driver and kernels, outside of torch's allocator
# Of cuBLAS, kept for the thread that runs forwards and the one that runs backwards: 8 MiB each, and
# 32 MiB on Hopper; aten/src/ATen/cuda/CublasHandlePool.cpp.
WORKSPACE = 64 * MIB
FRAGMENTS, SEGMENTS = 0.1, 128 * MIB  # of the allocator: blocks that do not fit together
# Of glibc, which keeps some of what is freed. Measured with its default thresholds: 13 to 40% where
# most memory is activations; the share of what is available leaves room for that.
AVAILABLE = 0.7
CPU_MARGIN, CPU_SLACK = 0.01, 2 * MIB  # worst seen of what is counted against what is allocated


@dataclass(frozen=True, slots=True)
class Cap:
    """Bound the bytes that tensors of a step may take.

    Args:
        stated_bytes: What there is in all.
        num_bytes: What is left for tensors.
        assumptions: How the one follows from the other.
    """

    stated_bytes: int
    num_bytes: int
    assumptions: tuple[str, ...]


def cap_of(
    memory: str | float | None,
    device: torch.device,
    *,
    held_bytes: int = 0,
    beyond_bytes: int | None = None,
) -> Cap:
    """Return the bound.

    Args:
        memory: "20GiB", "24GB", a number of bytes, or a fraction of the device's memory; by
            default what is available and what is held.
        device: Whose memory it is.
        held_bytes: What tensors of the step take already.
        beyond_bytes: What a step takes beyond its tensors, where that was measured.

    Raises:
        BadInput: It is none of these, or more than the unit of a typing error would be.
    """
    stated, said = _stated(memory, device, held_bytes)
    if device.type == "cpu":
        left = round((stated - CPU_SLACK) / (1 + CPU_MARGIN))
        text = f"{said}; 1% and 2 MiB of it are left for what no tensor holds"
        return Cap(stated, max(0, left), (text,))
    others = CONTEXT + WORKSPACE + SEGMENTS + (beyond_bytes or 0)
    left = round((stated - others) / (1 + FRAGMENTS))
    kernels = ""
    if beyond_bytes is not None:
        kernels = f"{beyond_bytes // MIB} MiB for those of kernels (measured), "
    texts = (
        said,
        f"{CONTEXT // MIB} MiB of it for the context of the driver (assumed), "
        f"{WORKSPACE // MIB} MiB for the workspaces of cuBLAS (assumed), "
        f"{kernels}{FRAGMENTS:.0%} and {SEGMENTS // MIB} MiB for blocks that do not fit together "
        "(assumed)",
    )
    return Cap(stated, max(0, left), texts)


def held_bytes(model: nn.Module) -> int:
    """Return what parameters and buffers take."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _stated(memory: str | float | None, device: torch.device, held: int) -> tuple[int, str]:
    is_here = device.type == "cpu" or torch.accelerator.is_available()
    if memory is None:
        if not is_here:
            raise BadInput("there is no GPU here whose memory could be read", hint=HINT)
        free = available_bytes(device)
        num = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks that share this memory
        share = AVAILABLE / num if device.type == "cpu" else 1.0
        stated = held + round(free * share)
        part = f"{share:.0%} of " if share < 1 else ""
        return stated, f"{amount(stated)}: {part}what is available on this {device.type}"
    number, unit = parsed(memory)
    if unit is None:
        if not is_here:
            raise BadInput(f"memory={memory} is a fraction, and there is no GPU here", hint=HINT)
        total = total_bytes(device)
        return round(number * total), f"{number:.0%} of the {amount(total)} of {device.type}"
    stated = round(number * UNITS[unit])
    return stated, f"{amount(stated)}, as stated"


def parsed(memory: str | float) -> tuple[float, str | None]:
    """Read an amount of memory; return the number and its unit, None for a part of the device.

    Raises:
        BadInput: It is no amount, or too small a one.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?) ?([a-z%]*)", str(memory).strip().lower())
    if isinstance(memory, bool) or found is None or found[2] not in {*UNITS, "%", *"kmgt"}:
        raise BadInput(f"memory={memory!r} is no amount of memory", hint=HINT)
    number, unit = float(found[1]), found[2]
    if number <= 0:
        raise BadInput(f"memory={memory!r} is not above 0", hint=HINT)
    if unit == "%" and number > 100:
        raise BadInput(f"memory={memory!r} is more than there is", hint=HINT)
    if unit == "%" or (not unit and number <= 1):
        return (number / 100 if unit else number), None
    stated = round(number * UNITS[f"{unit}ib" if unit in tuple("kmgt") else unit])
    if stated < MIB:
        hint = HINT if unit else f'did you mean "{number:g}GiB"?'
        raise BadInput(f"memory={memory!r} is {stated:,} bytes, too few for anything", hint=hint)
    return number, f"{unit}ib" if unit in tuple("kmgt") else unit
