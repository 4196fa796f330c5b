"""Checkpoints of plain PyTorch loops: whole or not there, and read on any number of ranks.

    checkpoints = Checkpoints("runs/a", model=model, optimizer=optimizer, sampler=sampler)
    step = checkpoints.restore()  # 0 if there is none
    while step < num_steps:
        ...
        step += 1
        if step % 100 == 0:
            checkpoints.save(step)
    export("runs/a", model)

A directory `step-100` holds the tensors of all ranks as safetensors, written and read by
torch.distributed.checkpoint, and all else in `state.json`. No file is ever unpickled. Replicated,
DDP, FSDP2 and HSDP models store the same, so each can go on from what another one has left. How a
state becomes files, and back, is `stored.py`.

Deliberately not here: writing in the background, pipeline stages (ranks with other names of
parameters), and folders that not all ranks see.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gradaccum import __version__
from gradaccum.errors import BadInput, PeerFailed
from gradaccum.state import Random
from gradaccum.stored import (
    apart,
    changes,
    check_files,
    collector,
    damaged,
    decoded,
    differences,
    encoded,
    flush,
    inline,
    need_safetensors,
    read_tensors,
    refuse,
    shape_of,
    write_tensors,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
STATE = "state.json"
WRITING = ".writing"


class Checkpoints:
    """Write and read the checkpoints of one run.

    A checkpoint is written aside, flushed to the disk and then renamed: killed at any moment, the
    last one that was whole is there. It is what training stands on, so writing errors are raised,
    on all ranks.

    All ranks have to call `save` and `restore` at the same steps. Only random state may differ
    between ranks; all else that is not sharded is stored once. `restore` leaves the folder as it
    is, so that another process may read what a run writes.

    Args:
        folder: Where they go; all ranks have to see it.
        keep: How many of the latest ones stay.
        settings: What else the trajectory depends on (seed, effective batch size), in plain values.
            Those that have changed are named on restoring.
        on_change: Whether changed settings are logged as warnings or refused.
        **objects: The model, the optimizer and all else that has `state_dict` and
            `load_state_dict`: scheduler, scaler, sampler, an average of weights. None is left out.

    Raises:
        BadInput: An object has no state, or an optimizer steps no module that is given.
        MissingExtra: The package safetensors is not installed.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 2)
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), model=model)
        >>> checkpoints.restore()
        0
        >>> checkpoints.save(3)
        >>> checkpoints.restore()
        3
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 2,
        settings: Mapping[str, Any] | None = None,
        on_change: Literal["warn", "refuse"] = "warn",
        **objects: Any,
    ) -> None:
        if keep < 1 or on_change not in ("warn", "refuse"):
            raise BadInput(f'{keep=} is below 1, or {on_change=} is neither "warn" nor "refuse"')
        need_safetensors()
        self.folder, self.keep, self.on_change = Path(folder), keep, on_change
        self.settings = dict(settings or {})
        self.objects = {name: each for name, each in objects.items() if each is not None}
        self._owners = {
            name: _owner(name, each, self.objects)
            for name, each in self.objects.items()
            if isinstance(each, Optimizer)
        }
        for name, each in self.objects.items():
            if not (
                callable(getattr(each, "load_state_dict", None)) and hasattr(each, "state_dict")
            ):
                raise BadInput(
                    f"{name} ({type(each).__name__}) has no state_dict and load_state_dict",
                    hint="plain values go into settings={...}",
                )
        self._at: int | None = None

    def save(self, step: int) -> None:
        """Write a checkpoint after so many steps; do nothing if it is the one restored or written.

        Args:
            step: How many optimizer steps are done.

        Raises:
            BadInput: A rank could not write it, the folder holds later steps, of another run, or
                an object has another state on another rank.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise BadInput(f"{step=} is not a number of steps")
        if step == self._at:
            return
        writing = self.folder / f"step-{step}{WRITING}"
        try:
            state, tensors = _together(lambda: self._begin(step, writing))
            _together(lambda: _need_shared(writing))
            _need_same(state)
            state["random"] = _gathered(encoded(vars(Random()), "random", inline))
            write_tensors(tensors, writing, rank=_rank())
            _together(lambda: self._publish(state, writing) if _rank() == 0 else None)
        except CheckpointException as error:
            raise self._not_saved(step, _first_of(error)) from error
        except _NotWritten as error:
            raise self._not_saved(step, str(error)) from error
        finally:  # renamed, if all went well
            if _rank() == 0:
                shutil.rmtree(writing, ignore_errors=True)
        self._at = step

    def restore(self) -> int:
        """Load the latest checkpoint into the objects; return its step, or 0 if there is none.

        Optimizers and schedulers get their values (such as learning rates) from the checkpoint, and
        gradients are dropped. Each rank draws random numbers as it would have, if the loader has a
        `generator` of its own (without, each `iter(loader)` draws as well); on another number of
        ranks those that differed between ranks are seeded anew from the checkpoint.

        Raises:
            BadInput: It is damaged, of another model or optimizer, or settings have changed and
                that is to be refused. The objects may then be half loaded.
        """
        step = _gathered(_together(lambda: max(self._steps(), default=None)))[0]
        if step is None:
            return 0
        path = self.folder / f"step-{step}"
        state, targets = _together(lambda: self._read(path))
        try:
            read_tensors(targets, path)
        except CheckpointException as error:
            raise damaged(path, _first_of(error)) from error
        _together(lambda: self._hand_back(state, targets))
        note = _restore_random(state["random"])
        if note and _rank() == 0:
            logger.warning("%s: %s", path, note)
        self._at = step
        return step

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def _begin(self, step: int, writing: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what is to be written: the state that is no tensor, and the tensors."""
        if _rank() == 0:
            self._make(step, writing)
        tensors: dict[str, Tensor] = {}
        trees = {
            name: encoded(self._state_of(name), name, collector(tensors)) for name in self.objects
        }
        state = {
            "format": FORMAT,
            "step": step,
            "versions": {"gradaccum": __version__, "torch": str(torch.__version__)},
            "settings": encoded(self.settings, "settings", refuse),
            "kinds": self._kinds(),
            "objects": trees,
            "tensors": {name: shape_of(tensor) for name, tensor in tensors.items()},
        }
        return state, tensors

    def _make(self, step: int, writing: Path) -> None:
        """Make the directory to write in; remove what a run that was killed has left half done."""
        latest = max(self._steps(), default=-1)
        if latest >= step:
            raise BadInput(
                f"step {step} is not after step {latest}, which {self.folder} holds",
                hint="restore() to go on from there, or take another folder",
            )
        for path in self.folder.glob(f"step-*{WRITING}"):
            shutil.rmtree(path)
        writing.mkdir(parents=True)

    def _publish(self, state: dict[str, Any], writing: Path) -> None:
        state["files"] = {path.name: path.stat().st_size for path in sorted(writing.iterdir())}
        with (writing / STATE).open("x") as file:
            file.write(json.dumps(state))
            file.flush()
            os.fsync(file.fileno())
        flush(writing)
        writing.rename(writing.with_suffix(""))
        flush(self.folder)
        for step in self._steps()[: -self.keep]:
            old = self.folder / f"step-{step}"
            try:  # renamed first: half of it must not look like a checkpoint
                shutil.rmtree(old.rename(old.with_suffix(WRITING)))
            except OSError as error:  # what was to be written is there
                logger.warning("%s could not be removed: %s", old, error)

    def _not_saved(self, step: int, why: str) -> BadInput:
        whole = f"step-{self._at} is still whole in" if self._at is not None else "there is none in"
        return BadInput(f"step {step} could not be saved: {why}", hint=f"{whole} {self.folder}")

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what was written, and tensors of this rank for the others to be read into."""
        _need_shared(path)
        try:
            state = json.loads((path / STATE).read_text())
            missing = {"format", "settings", "kinds", "objects", "tensors", "files", "random"}
            if missing := sorted(missing - state.keys()):
                raise ValueError(f"it lacks {missing[0]}")
        except (OSError, ValueError, AttributeError) as error:
            raise damaged(path / STATE, str(error)) from error
        if state["format"] > FORMAT:
            raise BadInput(
                f"{path} has format {state['format']}, and this version reads up to {FORMAT}",
                hint="pip install --upgrade gradaccum",
            )
        if _rank() == 0:
            check_files(path, state["files"])
        self._compare(path, state)
        targets: dict[str, Tensor] = {}
        for name in self.objects:
            if name in state["objects"]:
                targets |= self._targets(name, state, path)
        return state, targets

    def _compare(self, path: Path, state: dict[str, Any]) -> None:
        """Name what has changed since."""
        now = encoded(self.settings, "settings", refuse)
        found = [
            *changes(state["settings"], now),
            *changes(state["kinds"], self._kinds()),
        ]
        if found and self.on_change == "refuse":
            raise BadInput(
                f"{path} is of a run with other settings: {'; '.join(found)}",
                hint='set them as they were, or pass on_change="warn"',
            )
        for change in found if _rank() == 0 else ():
            logger.warning("%s: %s", path, change)

    def _targets(self, name: str, state: dict[str, Any], path: Path) -> dict[str, Tensor]:
        each, saved = self.objects[name], state["tensors"]
        there = {key: shape for key, shape in saved.items() if key.startswith(f"{name}/")}
        live: dict[str, Tensor] = {}
        if isinstance(each, Optimizer):
            num, num_here = len(state["objects"][name]["param_groups"]), len(each.param_groups)
            if num != num_here:
                raise BadInput(f"{path} has {num} parameter groups in {name}, here are {num_here}")
            each.zero_grad()  # where there are gradients, torch does not set up the state
            if there:
                each.state.clear()
                encoded(get_optimizer_state_dict(self._owners[name], each), name, collector(live))
        else:
            encoded(self._state_of(name), name, collector(live))
        if not isinstance(each, nn.Module | Optimizer):
            # Its own tensors may be of another run; only how they are sharded is taken from them.
            return {
                key: live[key]
                if isinstance(live.get(key), DTensor) and shape_of(live[key]) == shape
                else torch.empty(shape[1:], dtype=getattr(torch, shape[0]))
                for key, shape in there.items()
            }
        here = {key: shape_of(tensor) for key, tensor in live.items()}
        if isinstance(each, Optimizer):  # parameters that were never stepped have no state
            here = {key: shape for key, shape in here.items() if key in there}
        if here != there:
            raise BadInput(
                f"{path} is of another {name}: {differences(there, here)}",
                hint="build it as it was, or take another folder",
            )
        return {key: live[key] for key in there}

    def _hand_back(self, state: dict[str, Any], targets: dict[str, Tensor]) -> None:
        for name, each in self.objects.items():
            if name not in state["objects"]:
                continue
            tree = decoded(state["objects"][name], targets)
            if isinstance(each, nn.Module):
                set_model_state_dict(each, tree)
            elif not isinstance(each, Optimizer):
                each.load_state_dict(tree)
            elif tree["state"]:
                # Not strict: parameters that were never stepped have no state.
                options = StateDictOptions(strict=False)
                set_optimizer_state_dict(self._owners[name], each, tree, options=options)
            else:
                each.state.clear()
                for group, values in zip(each.param_groups, tree["param_groups"], strict=True):
                    group.update(values)

    def _state_of(self, name: str) -> Any:
        each = self.objects[name]
        if isinstance(each, nn.Module):
            # Of tied weights the first one is stored: the same one however the model is wrapped.
            return dict(sorted(get_model_state_dict(each).items()))
        if not isinstance(each, Optimizer):
            return each.state_dict()
        if each.state:
            return get_optimizer_state_dict(self._owners[name], each)
        # That would step it once to set up its state, and Adam would count this step.
        groups = [{k: v for k, v in g.items() if k != "params"} for g in each.param_groups]
        return {"state": {}, "param_groups": groups}

    def _kinds(self) -> dict[str, str]:
        """Return the classes of all but modules, which wrappers change."""
        return {
            name: "module" if isinstance(each, nn.Module) else type(each).__name__
            for name, each in self.objects.items()
        }


def export(folder: str | os.PathLike[str], model: nn.Module) -> Path:
    """Write the whole model to `model.safetensors`, from any sharding; return its path.

    All ranks have to call it; rank 0 gathers the weights in its memory and writes them once, under
    another name until they are whole. Of tied weights one is stored, which is what
    `safetensors.torch.load_model` expects. A model that has `save_pretrained` is better written by
    that: it writes the configuration, too.
    """
    need_safetensors()
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    encoded(dict(sorted(get_model_state_dict(model).items())), "", collector(stored))
    whole: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    path = Path(folder) / "model.safetensors"

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(path.suffix + WRITING)
        seen: set[int] = set()
        tensors = {k: apart(v, seen) for k, v in whole.items() if f"/{k}" in stored}
        try:
            save_file(tensors, aside, metadata={"format": "pt"})
            flush(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        flush(path.parent)

    _together(lambda: write() if _rank() == 0 else None)
    return path


class _NotWritten(BadInput):
    """Report what an operating system has refused; on all ranks."""


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gathered(value: T) -> list[T]:
    """Return the values of all ranks, in order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value)
    return values


def _together(work: Callable[[], T]) -> T:
    """Do something on each rank; if it fails on one, fail on all.

    Raises:
        BadInput: So it was raised on a rank; `_NotWritten` for errors of its operating system.
        PeerFailed: Another rank raised something else.
    """
    result, error = None, None
    try:
        result = work()
    except OSError as refused:
        error = _NotWritten(f"rank {_rank()}: {_said(refused)}")
        error.__cause__ = refused
    except Exception as raised:
        error = raised
    # Exceptions need not survive pickling; these words do.
    known = isinstance(error, BadInput)
    words = error and (type(error) if known else None, *_words(error))
    failed = [(rank, *each) for rank, each in enumerate(_gathered(words)) if each]
    if error is not None:
        raise error
    if failed:
        rank, kind, message, hint = failed[0]
        raise kind(message, hint=hint) if kind else PeerFailed(f"rank {rank} failed: {message}")
    return result  # pyright: ignore[reportReturnType]


def _words(error: Exception) -> tuple[str, str]:
    return (error.message, error.hint) if isinstance(error, BadInput) else (_said(error), "")


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _first_of(error: CheckpointException) -> str:
    """Return one line on what went wrong first, and on which rank."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if not isinstance(cause, Exception):
        raise cause  # somebody has stopped it
    return f"rank {rank}: {_said(cause)}"


def _need_shared(path: Path) -> None:
    if not path.is_dir():
        raise BadInput(
            f"rank {_rank()} does not see {path}, which rank 0 sees",
            hint="take a folder on a file system that all ranks share",
        )


def _need_same(state: dict[str, Any]) -> None:
    """Refuse what would be lost, since it is stored as rank 0 has it."""
    parts = state["objects"] | {"the set of all tensors": state["tensors"]}
    texts = {name: json.dumps(part, sort_keys=True).encode() for name, part in parts.items()}
    digests = _gathered({name: hashlib.sha256(text).hexdigest() for name, text in texts.items()})
    for rank, its in enumerate(digests):
        for name in parts:
            if its.get(name) != digests[0].get(name):
                raise BadInput(
                    f"{name} is not the same on rank {rank} as on rank 0, and is stored once",
                    hint="let state_dict return what holds for all ranks",
                )


def _owner(name: str, optimizer: Optimizer, objects: dict[str, Any]) -> nn.Module:
    """Return the module whose parameters an optimizer steps."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for each in objects.values():
        if isinstance(each, nn.Module) and stepped <= {id(p) for p in each.parameters()}:
            return each
    raise BadInput(
        f"{name} steps parameters that no module given holds",
        hint="make the optimizer after sharding the model, and pass that as model=",
    )


def _restore_random(saved: list[Any]) -> str:
    """Draw on from where each rank was; return what was not possible."""
    notes, state = [], saved[_rank() % len(saved)]
    if len(saved) != _world():
        # What all ranks had in common holds for any number of them; the rest is seeded.
        common = {k: v for k, v in state.items() if all(each[k] == v for each in saved)}
        if len(common) < len(state):
            text = json.dumps([saved[0], _rank(), _world()])
            _seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)
            notes.append(
                f"was written on {len(saved)} ranks, which drew different random numbers; the "
                f"{_world()} here are seeded anew from it"
            )
        state = common
    present = Random()
    found = decoded(state, {})
    if len(found.get("_devices", present._devices)) != len(present._devices):
        notes.append("has the random state of other accelerators, which is not restored")
        found.pop("_devices", None)
    if present._numpy is None or found.get("_numpy") is None:
        found.pop("_numpy", None)
    vars(present).update(found)
    present.restore()
    return "; ".join(notes)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
