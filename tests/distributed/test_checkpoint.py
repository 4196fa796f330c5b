"""Checkpoints: any number of ranks to any other, killed anywhere, damaged, of another model."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradaccum import checkpoint, stored
from gradaccum.checkpoint import Checkpoints, export
from gradaccum.errors import BadInput, MissingExtra, PeerFailed
from tests.distributed import launch
from tests.distributed.elastic_train import (
    NUM_EXAMPLES,
    Net,
    backward,
    consumed,
    sharded,
    survive,
    train,
    whole,
)

SAVED_AT, STEPS = 7, 20
RANKS: Any = {"warm": True, "deadline": 150, "timeout": 120}  # also where others use the machine
SOURCES = [("fsdp2", 4), ("hsdp", 4), ("replicated", 2)]
TARGETS = [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("replicated", 1), ("replicated", 3)]


def distance(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in others)


def same(found, expected, tolerance=1e-13):
    """Compare a run that went on with one process that was never stopped."""
    assert distance(found["weights"], expected["weights"]) <= tolerance
    rest = expected["losses"][found["begin"] :]
    assert len(found["losses"]) == len(rest)
    assert max(abs(a - b) for a, b in zip(found["losses"], rest, strict=True)) <= tolerance
    assert found["seen"] == expected["seen"] == consumed(STEPS)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    return train(0, 1, str(tmp_path_factory.mktemp("alone")), STEPS, every=0)


# Any to any


def started(rank, world, folder, kind):
    train(rank, world, folder, SAVED_AT, kind=kind)


def resumed(rank, world, folder, kind, without=()):
    return train(rank, world, folder, STEPS, kind=kind, every=0, without=without)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Save after 7 steps on 4 and 2 ranks, in three kinds of sharding."""
    folders = {source: str(tmp_path_factory.mktemp(source[0])) for source in SOURCES}
    for world in {world for _, world in SOURCES}:
        scenes = [
            (started, (folders[source], source[0])) for source in SOURCES if source[1] == world
        ]
        for results in launch.run_many(scenes, world, **RANKS):
            launch.values(results)
    return folders


@pytest.mark.parametrize(("kind", "world"), TARGETS)
def test_any_sharding_goes_on_from_any_other(kind, world, sources, never_stopped):
    scenes = [(resumed, (folder, kind)) for folder in sources.values()]
    for results in launch.run_many(scenes, world, **RANKS):
        for found in launch.values(results):
            assert found["begin"] == SAVED_AT
            same(found, never_stopped)


def test_without_the_optimizer_it_would_be_another_trajectory(sources, never_stopped, caplog):
    """Whether the comparison could fail at all."""
    found = resumed(0, 1, sources["replicated", 2], "replicated", ("optimizer",))
    assert distance(found["weights"], never_stopped["weights"]) > 1e-3
    assert "optimizer was 'AdamW', is not given" in caplog.text


def test_no_file_is_ever_unpickled(sources, never_stopped, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    for owner, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ]:
        monkeypatch.setattr(owner, name, forbidden)
    for folder in sources.values():
        same(resumed(0, 1, folder, "replicated"), never_stopped)
        files = {path.suffix for path in Path(folder, f"step-{SAVED_AT}").iterdir()}
        assert files == {".safetensors", ".json"}


# Random numbers


def dropping(rank, world, folder):
    uninterrupted = train(rank, world, f"{folder}/a", 8, every=0, dropout=0.3)
    train(rank, world, f"{folder}/b", 5, every=5, dropout=0.3)
    return uninterrupted, train(rank, world, f"{folder}/b", 8, every=0, dropout=0.3)


def test_dropout_goes_on_as_it_would_have(tmp_path):
    for results in launch.values(launch.run(dropping, 2, str(tmp_path), **RANKS)):
        uninterrupted, found = results
        assert found["begin"] == 5 and found["drawn"] == uninterrupted["drawn"]
        assert distance(found["weights"], uninterrupted["weights"]) == 0.0


def drawing(rank, world, folder):
    """Draw the same with Python on all ranks, and other numbers with torch."""
    random.seed(5)
    numpy.random.seed(6)
    torch.manual_seed(rank)
    Checkpoints(folder, model=nn.Linear(1, 1)).save(1)
    return drawn()


def drawn():
    return random.random(), numpy.random.rand(), torch.rand(()).item()


def redrawn(rank, world, folder):
    torch.manual_seed(0)
    Checkpoints(folder, model=nn.Linear(1, 1)).restore()
    return drawn()


def test_on_other_ranks_what_all_drew_alike_goes_on_and_the_rest_is_seeded_anew(tmp_path, caplog):
    folder = str(tmp_path)
    before = launch.values(launch.run(drawing, 2, folder, **RANKS))
    assert launch.values(launch.run(redrawn, 2, folder, **RANKS)) == before
    three = launch.values(launch.run(redrawn, 3, folder, **RANKS))
    assert three == launch.values(launch.run(redrawn, 3, folder, **RANKS))
    assert all(after[:2] == before[0][:2] for after in three)
    assert len({after[2] for after in [*before, *three]}) == 5
    redrawn(0, 1, folder)
    assert "was written on 2 ranks" in caplog.text and "seeded anew" in caplog.text


# Killed


def test_killed_at_random_moments(tmp_path):
    """At least 30 times: nothing is lost, nothing doubled, every bit as if it had not been."""
    alone = train(0, 1, str(tmp_path / "alone"), 6, every=0)
    found = survive(tmp_path, random.Random(0), num_kills=30, steps=6, every=1, worlds=(2,))
    assert found["kills"] == 30 and found["completed"] > 2 and found["half_written"] > 0
    assert found["lost_or_doubled"] == 0
    assert found["checkpoints_lost"] == 0
    first = found["weights"][0]
    assert distance(first, alone["weights"]) <= 1e-13
    for other in found["weights"]:
        assert distance(other, first) == 0.0


TOUCHING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


def filled(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def touching(rank, world, folder, at):
    """Save twice, each with a weight that is its step; be killed at one touch of the folder."""
    count = 0

    def watch(event, args):
        nonlocal count
        if rank == 0 and event in TOUCHING and args and str(args[0]).startswith(folder):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    model = nn.Linear(3, 3)
    checkpoints = Checkpoints(folder, model=model, keep=1)
    filled(model, 1.0)
    checkpoints.save(1)
    sys.addaudithook(watch)
    filled(model, 2.0)
    checkpoints.save(2)
    return count


def test_killed_at_every_file_that_is_touched(tmp_path):
    (num, _) = launch.values(launch.run(touching, 2, str(tmp_path / "whole"), -1, **RANKS))
    assert num > 10
    found = Counter()
    for at in range(1, num + 1):
        folder = tmp_path / str(at)
        results = launch.run(touching, 2, str(folder), at, **RANKS)
        assert results[0].returncode == -signal.SIGKILL
        left = {path.name for path in folder.iterdir() if path.suffix == ""}
        found[max(left)] += 1
        for name in sorted(left):  # the latest one, and the one before if it still has its name
            alone = tmp_path / f"{at}-{name}"
            shutil.copytree(folder / name, alone / name)
            model = nn.Linear(3, 3)
            step = Checkpoints(alone, model=model).restore()
            assert name == f"step-{step}" and all((p == step).all() for p in model.parameters())
        checkpoints = Checkpoints(folder, model=nn.Linear(3, 3), keep=1)
        assert f"step-{checkpoints.restore()}" == max(left)
        checkpoints.save(3)
        assert [path.name for path in folder.iterdir()] == ["step-3"]
    assert found["step-1"] > 5 and found["step-2"] > 2


def run_elastic(folder, *options, nproc, script=(), deadline=120):
    result = launch.torchrun(
        *options, "-m", "tests.distributed.elastic_train", str(folder), "--steps", str(STEPS),
        *script, nproc=nproc, deadline=deadline,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return result, lines


def same_log(lines, folder, expected):
    """The last line of each step is what counts: the step was done again if there are others."""
    last = {line[0]: line for line in lines}
    assert list(last) == list(range(1, STEPS + 1))
    for step, loss, _, _, _ in last.values():
        assert abs(loss - expected["losses"][step - 1]) <= 1e-13
    assert [i for line in last.values() for i in line[4]] == consumed(STEPS)
    model = Net()
    load_model(model, folder / "model.safetensors")
    assert distance(dict(model.state_dict()), expected["weights"]) <= 1e-13


def test_torchrun_restarts_killed_workers_and_goes_on_with_another_number(tmp_path, never_stopped):
    """Killed in step 8 and again in step 13, which is once too often; then on one rank."""
    kills = ["--kill", "0:1:7,1:0:12", "--kind", "fsdp2"]
    result, lines = run_elastic(tmp_path, "--max-restarts", "1", nproc=2, script=kills)
    assert not result.ok and not result.hung, result.stderr
    assert {line[3] for line in lines} == {0, 6} and 12 <= lines[-1][0] <= 13
    result, lines = run_elastic(tmp_path, nproc=1)
    assert result.ok, result.stderr
    assert {(line[2], line[3]) for line in lines} == {(2, 0), (2, 6), (1, 12)}
    same_log(lines, tmp_path, never_stopped)


# Not written


def refused(rank, world, folder):
    """Let the system refuse large files: to rank 1 those of tensors, then to rank 0 the state."""
    model = nn.ModuleList(nn.Linear(100, 100) for _ in range(4))
    checkpoints = Checkpoints(folder, keep=1, model=model)
    checkpoints.save(1)
    told = []
    large = Checkpoints(folder, keep=1, settings={"text": "x" * 300_000}, model=model)
    large.restore()
    for one, limited in ((checkpoints, 1), (large, 0)):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if limited else 250_000, before[1]))
        try:
            one.save(2)
        except BadInput as error:
            told.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        dist.barrier()
        told.append(sorted(os.listdir(folder)))
        dist.barrier()
    checkpoints.save(2)
    return told, sorted(os.listdir(folder))


def test_a_disk_that_refuses_to_one_rank_is_told_on_all_and_the_old_one_stays(tmp_path):
    for told, after in launch.values(launch.run(refused, 2, str(tmp_path), **RANKS)):
        first, held, second, still = told
        assert "step 2 could not be saved: rank 1: SafetensorError: " in first
        assert "File too large" in first
        assert "step 2 could not be saved: rank 0: OSError: [Errno 27] File too large" in second
        assert "hint: step-1 is still whole in" in first and "step-1 is still whole in" in second
        assert held == still == ["step-1"] and after == ["step-2"]


class Broken:
    """An object whose state cannot be told on one rank."""

    def __init__(self, rank):
        self.rank = rank

    def state_dict(self):
        if self.rank == 1:
            raise RuntimeError("no state here")
        return {}

    def load_state_dict(self, state): ...


def half_broken(rank, world, folder):
    checkpoints = Checkpoints(folder, model=nn.Linear(1, 1), broken=Broken(rank))
    with pytest.raises(RuntimeError if rank else PeerFailed, match="no state here"):
        checkpoints.save(1)
    dist.barrier()
    return sorted(os.listdir(folder))


def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    assert launch.values(launch.run(half_broken, 2, str(tmp_path), **RANKS)) == [[], []]


class OfRank(Broken):
    def state_dict(self):
        return {"rank": self.rank}


def of_rank(rank, world, folder):
    objects = {"model": nn.Linear(1, 1), "cursor": OfRank(rank)}
    with pytest.raises(BadInput, match="cursor is not the same on rank 1 as on rank 0"):
        Checkpoints(folder, **objects).save(1)
    stages = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(BadInput, match="model is not the same on rank 1"):
        Checkpoints(folder, model=stages[:1] if rank else stages).save(1)


def test_what_differs_between_ranks_is_not_lost_in_silence(tmp_path):
    launch.values(launch.run(of_rank, 2, str(tmp_path), **RANKS))


def test_what_was_left_half_written_is_never_loaded_and_removed_by_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path, model=nn.Linear(1, 1))
    checkpoints.save(1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-9.writing")
    assert checkpoints.restore() == 1
    checkpoints.save(2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_it_keeps_the_latest_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, model=nn.Linear(1, 1), keep=3)
    for step in (5, 9, 10, 100, 101):
        checkpoints.save(step)
    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-100", "step-101"}


def test_a_run_that_was_not_restored_does_not_mix_with_what_is_there(tmp_path):
    model = nn.Linear(1, 1)
    one = Checkpoints(tmp_path, model=model)
    one.save(8)
    one.save(8)  # at the end of training it may just have been saved
    for step in (3, 8):
        with pytest.raises(BadInput, match=f"step {step} is not after step 8"):
            Checkpoints(tmp_path, model=model).save(step)
    other = Checkpoints(tmp_path, model=model)
    assert other.restore() == 8
    other.save(9)


# Other settings, other objects, damage


def said(caplog):
    """Return what was logged here; torch logs, too."""
    return [r.getMessage() for r in caplog.records if r.name == checkpoint.__name__]


def test_changed_settings_are_named(tmp_path, caplog):
    model = nn.Linear(1, 1)
    before = {"effective_batch_size": 32, "seed": 0, "data": {"path": "a", "length": (8, 9)}}
    Checkpoints(tmp_path, model=model, settings=before).save(1)
    now = {"effective_batch_size": 64, "data": {"path": "b", "length": (8, 9)}, "new": True}
    assert Checkpoints(tmp_path, model=model, settings=now).restore() == 1
    path = tmp_path / "step-1"
    assert said(caplog) == [
        f"{path}: effective_batch_size was 32, is 64",
        f"{path}: seed was 0, is not given",
        f"{path}: data.path was 'a', is 'b'",
        f"{path}: new was not given, is True",
    ]
    caplog.clear()
    with pytest.raises(BadInput, match="effective_batch_size was 32, is 64; seed was 0"):
        Checkpoints(tmp_path, model=model, settings=now, on_change="refuse").restore()
    assert Checkpoints(tmp_path, model=model, settings=before, on_change="refuse").restore() == 1
    assert not said(caplog)


def other_width():
    model = Net()
    model.narrow = nn.Linear(30, 4).double()
    return model


def other_name():
    model = Net()
    model.wide = model.narrow
    del model.narrow
    return model


def untied():
    model = Net()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (other_width, r"narrow.bias is float64 \[3\] in the checkpoint and float64 \[4\] here"),
        (other_name, "narrow.bias is only in the checkpoint; .*wide.bias is only here; and 1 more"),
        (untied, "head.weight is only here"),
        (lambda: Net().float(), "and float32 .* here; and 9 more"),
    ],
)
def test_the_checkpoint_of_another_model(make, told, tmp_path):
    Checkpoints(tmp_path, model=Net()).save(1)
    with pytest.raises(BadInput, match=told):
        Checkpoints(tmp_path, model=make()).restore()


def stepped(model, make, groups=None):
    optimizer = make(groups or model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_the_state_of_another_optimizer(tmp_path, caplog):
    model = nn.Linear(2, 2)
    Checkpoints(tmp_path, model=model, optimizer=stepped(model, momentum)).save(1)
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(BadInput, match="bias/momentum_buffer is only in the checkpoint"):
        Checkpoints(tmp_path, model=model, optimizer=adam).restore()
    assert "optimizer was 'SGD', is 'AdamW'" in caplog.text
    two = momentum([{"params": [model.weight]}, {"params": [model.bias]}])
    with pytest.raises(BadInput, match="1 parameter groups in optimizer, here are 2"):
        Checkpoints(tmp_path, model=model, optimizer=two).restore()


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def garbled(path):
    data = path.read_bytes()
    path.write_bytes(bytes([255]) * 8 + data[8:])


@pytest.mark.parametrize("damage", [cut, garbled, Path.unlink])
@pytest.mark.parametrize("suffix", ["*.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_the_one_before_can_be_used(damage, suffix, tmp_path):
    model = nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path, model=model)
    filled(model, 1.0)
    checkpoints.save(1)
    filled(model, 2.0)
    checkpoints.save(2)
    (file,) = (tmp_path / "step-2").glob(suffix)
    damage(file)
    with pytest.raises(BadInput) as caught:
        checkpoints.restore()
    told = str(caught.value)
    assert f"{file} is damaged" in told
    assert ("bytes and was written with" in told) == (damage is cut and "safe" in suffix)
    assert f"hint: remove {tmp_path / 'step-2'} to use the one before it" in told
    shutil.rmtree(tmp_path / "step-2")
    assert checkpoints.restore() == 1 and (model.weight == 1).all()


def test_a_file_of_another_checkpoint_is_not_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, model=nn.Linear(2, 2))
    checkpoints.save(1)
    (file,) = (tmp_path / "step-1").glob("*.safetensors")
    shutil.copy(file, file.with_name("rank-00001-00000.safetensors"))
    with pytest.raises(BadInput, match=r"rank-00001.* is damaged: it was not written with"):
        checkpoints.restore()


def test_a_later_format_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, model=nn.Linear(2, 2))
    checkpoints.save(1)
    file = tmp_path / "step-1" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(BadInput, match="has format 2, and this version reads up to 1"):
        checkpoints.restore()


def test_objects_that_cannot_be_stored(tmp_path, monkeypatch):
    model = nn.Linear(1, 1)
    with pytest.raises(BadInput, match=r"sampler .list. has no state_dict"):
        Checkpoints(tmp_path, model=model, sampler=[1])
    with pytest.raises(BadInput, match="optimizer steps parameters that no module given holds"):
        Checkpoints(tmp_path, model=model, optimizer=momentum(nn.Linear(1, 1).parameters()))
    with pytest.raises(BadInput, match="keep=0"):
        Checkpoints(tmp_path, model=model, keep=0)
    with pytest.raises(BadInput, match="settings/x is a tensor"):
        Checkpoints(tmp_path, model=model, settings={"x": torch.ones(1)}).save(1)
    with pytest.raises(BadInput, match="step=True is not"):
        Checkpoints(tmp_path, model=model).save(True)
    held = Holding({"deep": [1, {"f": len}]})
    with pytest.raises(BadInput, match="held/deep/1/f is a builtin_function_or_method"):
        Checkpoints(tmp_path, model=model, held=held).save(1)
    sparse = Holding({"x": torch.eye(2).to_sparse()})
    with pytest.raises(BadInput, match=r"held/x is a Tensor \(torch.sparse_coo\)"):
        Checkpoints(tmp_path, model=model, held=sparse).save(1)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr(stored, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="safetensors"):
        Checkpoints(tmp_path, model=model)


# What is stored


class Holding:
    """Anything with a state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def equal(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, numpy.ndarray):
        return one.dtype == other.dtype and (one == other).all()
    return one == other or (one != one and other != other)


def test_any_plain_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(3.0)
    state = {
        "none": None, "yes": True, "int": 2**70, "float": 0.1, "inf": -float("inf"),
        "nan": float("nan"), "text": "a/b", "bytes": b"\x00\xff", "tuple": (1, (2, [3])),
        "empty": {}, "keys": {1: "a", (2, "b"): "c", None: 4, False: 5}, "$tensor": {"$": 1},
        "array": numpy.arange(6, dtype=numpy.uint32).reshape(2, 3), "counter": Counter({2: 1}),
        "tensors": [shared, shared, torch.tensor(2.5), torch.ones(0, 3), torch.ones(2, 3).t()],
        "bfloat16": torch.randn(3).bfloat16(), "bool": torch.tensor([True]),
        "complex": torch.randn(2, dtype=torch.complex64), "long": torch.tensor(2**60),
        "expanded": torch.ones(1).expand(4), "halves": torch.arange(4.0).split(2),
    }  # fmt: skip
    Checkpoints(tmp_path, held=Holding(state)).save(1)
    found = Holding(None)
    Checkpoints(tmp_path, held=found).restore()
    assert equal(found.state, state)
    Checkpoints(tmp_path, held=Holding({"count": numpy.int64(3)})).restore()
    with pytest.raises(BadInput, match="two tensors are called held/a/b"):
        Checkpoints(tmp_path, held=Holding({"a": {"b": shared}, "a/b": shared + 1})).save(2)


def schedulers(optimizer):
    from torch.optim import lr_scheduler as lr

    warm = lr.LinearLR(optimizer, total_iters=3)
    return [
        lr.SequentialLR(optimizer, [warm, lr.CosineAnnealingLR(optimizer, 9)], [3]),
        lr.MultiStepLR(optimizer, [2, 5]),
        lr.LambdaLR(optimizer, lambda step: 0.9**step),
    ]


def test_schedulers_scaler_and_average_go_on(tmp_path):
    def objects():
        model = nn.Linear(3, 3).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return {
            "model": model,
            "optimizer": optimizer,
            **{f"scheduler{i}": each for i, each in enumerate(schedulers(optimizer))},
            "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0),
            "average": torch.optim.swa_utils.AveragedModel(model),
        }

    def go(model, optimizer, average, scaler, plateau, steps, **others):
        for step in range(*steps):
            loss = model(torch.full((1, 3), float(step), dtype=torch.float64)).square().sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            average.update_parameters(model)
            plateau.step(step)
            for scheduler in others.values():
                scheduler.step()

    torch.manual_seed(0)
    one = objects()
    go(**one, steps=(0, 4))
    Checkpoints(tmp_path, **one).save(4)
    two = objects()
    assert Checkpoints(tmp_path, **two).restore() == 4
    for each in (one, two):
        go(**each, steps=(4, 8))
    for name in one:
        assert equal(*(dict(each[name].state_dict()) for each in (one, two))), name


@pytest.mark.parametrize("make", [torch.optim.AdamW, momentum, torch.optim.SGD])
def test_saving_before_the_first_step_changes_nothing(make, tmp_path):
    """torch would step an optimizer once to set up its state, and Adam would count that step."""
    model, twin = Net(), Net()
    optimizer, other = make(model.parameters()), make(twin.parameters())
    checkpoints = Checkpoints(tmp_path, model=model, optimizer=optimizer)
    checkpoints.save(0)
    for _ in range(2):
        for each, its in ((model, optimizer), (twin, other)):
            backward(each, [0, 1], 0, 1, "replicated")
            its.step()
    assert distance(model.state_dict(), twin.state_dict()) == 0.0
    assert checkpoints.restore() == 0 and not optimizer.state
    assert distance(model.state_dict(), Net().state_dict()) == 0.0


def test_the_learning_rate_of_an_optimizer_without_a_state(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = stepped(model, lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    optimizer.param_groups[0]["lr"] = 0.25
    Checkpoints(tmp_path, model=model, optimizer=optimizer).save(1)
    fresh = torch.optim.SGD(model.parameters(), lr=0.5)
    Checkpoints(tmp_path, model=model, optimizer=fresh).restore()
    assert fresh.param_groups[0]["lr"] == 0.25


def test_two_optimizers_and_a_model_in_strange_memory(tmp_path):
    """Channels last is not contiguous; buffers share memory; a half is in bfloat16."""

    def objects():
        conv = nn.Conv2d(3, 4, 3)
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        model = nn.Sequential(conv, nn.Linear(4, 4).bfloat16())
        halves, square = torch.split(torch.randn(4), 2), torch.randn(2, 2)
        for name, buffer in {
            "first": halves[0], "second": halves[1], "again": halves[0],
            "square": square, "flat": square.view(-1),
        }.items():  # fmt: skip
            model.register_buffer(name, buffer)
        return {
            "model": model,
            "one": stepped(model[0], torch.optim.AdamW),
            "two": stepped(model[1], momentum),
        }

    one, two = objects(), objects()
    Checkpoints(tmp_path, **one).save(1)
    Checkpoints(tmp_path, **two).restore()
    for name in one:
        assert equal(*(dict(each[name].state_dict()) for each in (one, two))), name
    assert two["model"].again is two["model"].first


def wrapped(rank, world, folder):
    model = Net()
    Checkpoints(f"{folder}/plain", model=model).save(1)
    model.unused.data += 1
    ddp = DistributedDataParallel(model)
    Checkpoints(f"{folder}/ddp", model=ddp, optimizer=stepped(ddp, torch.optim.AdamW)).save(1)
    Checkpoints(f"{folder}/plain", model=ddp).restore()
    return whole(model)


def test_wrappers_do_not_show_in_a_checkpoint(tmp_path):
    for weights in launch.values(launch.run(wrapped, 2, str(tmp_path), **RANKS)):
        assert distance(weights, Net().state_dict()) == 0.0
    model: Any = torch.compile(Net())
    optimizer = torch.optim.AdamW(model.parameters())
    Checkpoints(tmp_path / "ddp", model=model, optimizer=optimizer).restore()
    assert not torch.equal(model.unused, Net().unused) and len(optimizer.state) > 5


def test_tensors_go_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "FILE_BYTES", 10_000)
    Checkpoints(tmp_path, model=Net()).save(1)
    files = list((tmp_path / "step-1").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 12_000
    model = Net()
    filled(model, 0.0)
    Checkpoints(tmp_path, model=model).restore()
    assert distance(model.state_dict(), Net().state_dict()) == 0.0


def exported(rank, world, folder, kind):
    export(folder, sharded(Net(), kind))


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2), ("replicated", 2), ("replicated", 1)])
def test_export_writes_the_whole_model(kind, world, tmp_path):
    if world == 1:
        exported(0, 1, tmp_path, kind)
    else:
        launch.values(launch.run(exported, world, str(tmp_path), kind, **RANKS))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    model = Net()
    filled(model, 0.0)
    load_model(model, tmp_path / "model.safetensors")
    assert distance(model.state_dict(), Net().state_dict()) == 0.0
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")


# The launcher itself


def late(rank, world):
    if rank == 1:
        import time

        time.sleep(60)
    return rank


def gone(rank, world):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_the_launcher_tells_what_became_of_each_rank():
    assert launch.values(launch.run(consumed_of, 1)) == [NUM_EXAMPLES]
    launch.run(consumed_of, 1, warm=True)  # so that the fork server is there
    first, second = launch.run_many([(consumed_of, ()), (late, ())], 2, deadline=5, warm=True)
    assert launch.values(first) == [NUM_EXAMPLES] * 2
    assert second[0].value == 0 and second[1].hung and "in late" in second[1].stderr
    alive, killed = launch.run(gone, 2, warm=True)
    assert killed.returncode == -signal.SIGKILL and "before it returned" in str(killed.error)
    assert str(alive.error).startswith("RuntimeError") and not alive.hung


def consumed_of(rank, world):
    return len(consumed(5))
