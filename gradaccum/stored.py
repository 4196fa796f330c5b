"""What a state is in files, and back: its tree as JSON, its tensors as safetensors.

A tree holds dicts, lists, tuples, numbers, text and tensors; what JSON does not have is under a key
that begins with "$". Each rank writes and reads its shards of the tensors, through
torch.distributed.checkpoint. Here are also the checks of files, and the words for what differs
between two states. Nothing is ever pickled. When all this happens, and that ranks agree on it, is
`checkpoint.py`.
"""

import base64
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from gradaccum.errors import BadInput, MissingExtra

Put = Callable[[str, Tensor], Any]

FILE_BYTES = (
    2**31
)  # a rank has at most so much of an accelerator's memory on the host while it writes


def need_safetensors() -> None:
    """Raise MissingExtra if the package safetensors is not installed."""
    if find_spec("safetensors") is None:
        raise MissingExtra(
            "checkpoints need the package 'safetensors', which is not installed",
            hint="pip install safetensors",
        )


def encoded(tree: Any, path: str, put: Put) -> Any:
    """Return a tree as JSON has it, with what `put` returns for its tensors.

    Raises:
        BadInput: It holds something else than dicts, lists, tuples, numbers, text and tensors.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        return put(path, tree)
    if isinstance(tree, Mapping):
        items = {key: encoded(value, f"{path}/{key}", put) for key, value in tree.items()}
        if type(tree) is Counter:  # milestones of schedulers
            return {"$counter": [[encoded(key, path, put), n] for key, n in items.items()]}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        return {"$dict": [[encoded(key, path, put), value] for key, value in items.items()]}
    if isinstance(tree, list | tuple):
        values = [encoded(value, f"{path}/{i}", put) for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"$tuple": values}
    if isinstance(tree, bytes):
        return {"$bytes": base64.b64encode(tree).decode()}
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(tree, numpy.generic):
        return encoded(tree.item(), path, put)
    if numpy and isinstance(tree, numpy.ndarray):
        return {"$array": [tree.dtype.str, encoded(tree.tolist(), path, put)]}
    raise BadInput(
        f"{path} is a {type(tree).__name__}, which is not stored: reading it would run code",
        hint="let state_dict return dicts, lists, tuples, numbers, text and tensors",
    )


def decoded(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `encoded`."""
    if isinstance(node, list):
        return [decoded(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    match node:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": values}:
            return tuple(decoded(values, tensors))
        case {"$dict": pairs}:
            return {decoded(key, tensors): decoded(value, tensors) for key, value in pairs}
        case {"$counter": pairs}:
            return Counter({decoded(key, tensors): count for key, count in pairs})
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$uint8": text}:
            return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
        case {"$array": [dtype, values]}:
            import numpy

            return numpy.array(decoded(values, tensors), dtype=dtype)
    return {key: decoded(value, tensors) for key, value in node.items()}


def shape_of(tensor: Tensor) -> list[Any]:
    """Return the dtype of a tensor and its sizes, as JSON has them."""
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def collector(tensors: dict[str, Tensor]) -> Put:
    """Return a function that takes tensors in under their names, each memory once."""
    names: dict[Any, str] = {}

    def put(path: str, tensor: Tensor) -> dict[str, str]:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.layout is not torch.strided or type(local) not in (Tensor, nn.Parameter):
            kind = f"{type(local).__name__} ({local.layout})"
            raise BadInput(f"{path} is a {kind}, which safetensors cannot hold")
        # Shards may be empty, and all of these have the address 0; a storage is itself.
        memory = (local.untyped_storage()._cdata, local.storage_offset(), local.dtype)
        name = names.setdefault((*memory, local.shape, local.stride()), path)
        if name == path and tensors.setdefault(path, tensor) is not tensor:
            raise BadInput(f"two tensors are called {path}")
        return {"$tensor": name}

    return put


def inline(path: str, tensor: Tensor) -> dict[str, str]:
    """Keep the bytes of a tensor in the tree: a short one of uint8."""
    return {"$uint8": base64.b64encode(bytes(tensor.tolist())).decode()}


def refuse(path: str, tensor: Tensor) -> Any:
    """Raise BadInput: settings hold no tensors."""
    raise BadInput(f"{path} is a tensor", hint="settings are plain values: numbers, text, lists")


class _Writer(dcp.HuggingFaceStorageWriter):
    """Write the shards of a rank from where they are in memory.

    What torch 2.13 does instead copies all of them twice into the bytes of a file first, and takes
    neither tensors that are not contiguous nor two that share their memory
    (torch/distributed/checkpoint/filesystem.py, `_write_files_from_queue`).
    """

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(str(path), save_distributed=True)
        self._rank = rank

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        from safetensors.torch import save_file

        for i, part in enumerate(_parts(plan.items)):
            seen: set[int] = set()
            tensors = {item.index.fqn: apart(planner.resolve_data(item), seen) for item in part}
            offsets = {
                item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)}
                for item in part
                if item.tensor_data is not None
            }
            file = Path(self.path, f"rank-{self._rank:05d}-{i:05d}.safetensors")
            # This is where the reader of torch looks for what part of a tensor a shard is.
            metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}
            save_file(tensors, file, metadata=metadata)
            flush(file)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _parts(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Cut what a rank writes into files: so much is on the host at once, and no name twice."""
    part: dict[str, WriteItem] = {}
    filled = 0
    for item in items:
        data = item.tensor_data
        size = data.chunk.sizes.numel() * data.properties.dtype.itemsize if data else 0
        if part and (filled + size > FILE_BYTES or item.index.fqn in part):
            yield list(part.values())
            part, filled = {}, 0
        part[item.index.fqn] = item
        filled += size
    if part:
        yield list(part.values())


def apart(tensor: Any, seen: set[int]) -> Tensor:
    """Return a tensor on the host that has its memory for itself; note whose memory was seen."""
    whole = tensor.detach().cpu().contiguous()
    memory = whole.untyped_storage()
    if memory.nbytes() != whole.nbytes or memory._cdata in seen:
        return whole.clone()
    seen.add(memory._cdata)
    return whole


def write_tensors(tensors: dict[str, Tensor], path: Path, *, rank: int) -> None:
    """Let each rank write its shards; of what several ranks have, one of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        if tensors:
            dcp.save(dict(tensors), storage_writer=_Writer(path, rank))


def read_tensors(targets: dict[str, Tensor], path: Path) -> None:
    """Read each rank's part of the tensors, in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        if targets:
            dcp.load(dict(targets), storage_reader=dcp.HuggingFaceStorageReader(str(path)))


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or directory."""
    if path.is_dir() and os.name == "nt":
        return  # there directories cannot be opened
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_files(path: Path, files: dict[str, int]) -> None:
    """Refuse files that are not there, not as long as they were, or without a header."""
    from safetensors import SafetensorError, safe_open

    for file in path.glob("*.safetensors"):
        if file.name not in files:
            raise damaged(file, "it was not written with the others")
    for name, num_bytes in files.items():
        file = path / name
        try:
            there = file.stat().st_size
            if there != num_bytes:
                raise ValueError(f"it has {there:,} bytes and was written with {num_bytes:,}")
            with safe_open(file, framework="pt"):
                pass
        except (OSError, ValueError, SafetensorError) as error:
            raise damaged(file, str(error)) from error


def damaged(path: Path, why: str) -> BadInput:
    """Return what to raise where a file of a checkpoint, or one as a whole, cannot be read."""
    step = path if path.name.startswith("step-") else path.parent
    return BadInput(f"{path} is damaged: {why}", hint=f"remove {step} to use the one before it")


def changes(before: Any, now: Any, name: str = "") -> list[str]:
    """Return "seed was 0, is 1" for every value that differs."""
    if before == now:
        return []
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [f"{name} was {decoded(before, {})!r}, is {decoded(now, {})!r}"]
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        inner = f"{name}.{key}" if name else key
        if key not in now:
            found.append(f"{inner} was {decoded(before[key], {})!r}, is not given")
        elif key not in before:
            found.append(f"{inner} was not given, is {decoded(now[key], {})!r}")
        else:
            found += changes(before[key], now[key], inner)
    return found


def differences(there: dict[str, Any], here: dict[str, Any], limit: int = 3) -> str:
    """Name the first tensors that are not the same."""

    def text(key: str) -> str:
        name = key.partition("/")[2]
        if key not in here or key not in there:
            return f"{name} is only {'in the checkpoint' if key in there else 'here'}"
        (dtype, *shape), (own, *size) = there[key], here[key]
        return f"{name} is {dtype} {shape} in the checkpoint and {own} {size} here"

    found = [text(key) for key in sorted(there | here) if there.get(key) != here.get(key)]
    more = f"; and {len(found) - limit} more" if len(found) > limit else ""
    return "; ".join(found[:limit]) + more
