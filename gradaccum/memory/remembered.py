"""Keep what was measured on disk, so that another run of the same cuts its batches alike."""

import functools
import hashlib
import json
import logging
import os
import tempfile
import types
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import gradaccum
from gradaccum.engine import Accumulator
from gradaccum.memory.probe import Probed, Shape

logger = logging.getLogger(__name__)


def key_of(
    accumulator: Accumulator, device: torch.device, shapes: Sequence[Shape], name: str
) -> str:
    """Return what probes depend on: model, loss, their shapes, device and versions, no weights.

    Args:
        accumulator: Whose micro-batches are measured.
        device: Of its model.
        shapes: Rows and tokens of each probe.
        name: Tells losses apart that the same code may compute.
    """
    model, objective = accumulator.model, accumulator.objective
    place = device.type
    if device.type not in ("cpu", "mps"):
        place = torch.get_device_module(device).get_device_name(device)
    config: Any = getattr(model, "config", None)
    parts = (
        gradaccum.__version__,
        torch.__version__,
        place,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        sorted(shapes),
        type(model).__name__,
        config.to_json_string() if hasattr(config, "to_json_string") else None,
        getattr(config, "_attn_implementation", None),
        [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()],
        [type(m).__name__ + str(getattr(m, "gradient_checkpointing", "")) for m in model.modules()],
        objective.unit,
        objective.chunk,
        accumulator.layout is not None,
        _code(objective.loss),
        accumulator._accumulate_dtype,
        accumulator._grad_dtype,
        name,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _code(value: Any, depth: int = 4) -> Any:
    """Return what a function computes with, as far as it can be told: its code and what it holds.

    No addresses: another process has others.
    """
    if isinstance(value, functools.partial):
        return _code(value.func, depth), _code(value.args, depth), _code(value.keywords, depth)
    if isinstance(value, types.MethodType):
        return type(value.__self__).__qualname__, _code(value.__func__, depth)
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        defaults = (value.__defaults__, value.__kwdefaults__)
        inner = [_code(one, depth - 1) for one in (*held, *defaults)] if depth else ()
        return value.__module__, value.__qualname__, _constants(value.__code__), inner
    if isinstance(value, dict):
        return [(str(k), _code(v, depth - 1)) for k, v in value.items()] if depth else ()
    if isinstance(value, (list, tuple)):
        return [_code(one, depth - 1) for one in value] if depth else ()
    if isinstance(value, (int, float, str, bytes, torch.dtype, type(None))):
        return value
    return type(value).__qualname__


def _constants(code: types.CodeType) -> Any:
    inner = [_constants(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, code.co_names, inner


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that is bound later
        return False


def _file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gradaccum" / "probes.json"


def _kept() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recall(key: str) -> Probed | None:
    """Return what was measured under this key before."""
    try:
        entry = _kept()[key]
        return Probed(tuple(entry["times"]), tuple(entry["sizes"]), within=tuple(entry["within"]))
    except (KeyError, TypeError):
        return None


def keep(key: str, probed: Probed) -> None:
    """Write it to the file, whole or not at all; where that cannot be, a run measures again."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(_kept() | {key: asdict(probed)}, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("the probes are not kept: %s", error)
