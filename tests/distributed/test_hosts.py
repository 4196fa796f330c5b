"""Attached trainers on several ranks: the gradients, batches and logs of one process."""

import itertools
import os
import re
import subprocess
import sys

import pytest

from gradaccum.dealing import deal
from tests.distributed import hosts
from tests.distributed.launch import ROOT, free_port, run_many, values

KINDS = ("sft dft", "sft experts", "dpo", "reward centred", "kto", "orpo")
ON_EACH = [
    (hosts.hf, ()), (hosts.sft, ()), (hosts.stream, ()), (hosts.evaluated, ("hf",)),
    (hosts.evaluated, ("sft",)), (hosts.accelerate_loop, ()),
    *((hosts.trl, (kind,)) for kind in KINDS),
]  # fmt: skip
DEADLINE = 400


def started(scenes, world):
    """Return what every rank returned, by function and arguments."""
    results = run_many(scenes, world, deadline=DEADLINE)
    keys = [(function.__name__, *args) for function, args in scenes]
    return {key: values(found) for key, found in zip(keys, results, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def two(folder):
    more = [
        (hosts.interrupted, (folder,)), (hosts.out_of_memory, ()), (hosts.shuffled_apart, ()),
        (hosts.unshared, ()),
    ]  # fmt: skip
    return started([*ON_EACH, *more], 2)


@pytest.fixture(scope="module")
def one(two, folder):
    more = [(hosts.resumed, (folder,)), (hosts.resumed, (f"{folder}-whole", 0))]
    return {key: found[0] for key, found in started([*ON_EACH, *more], 1).items()}


@pytest.fixture(scope="module")
def three(two, folder):
    return started([(hosts.hf, ()), (hosts.resumed, (folder,))], 3)


def same(ours, theirs):
    assert ours["steps"] == theirs["steps"] and ours["tokens"] == theirs["tokens"]
    assert hosts.relative(ours["weights"], theirs["weights"]) <= 1e-6
    for found, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert hosts.relative(found, expected) <= 1e-6
    for found, expected in zip(ours["logs"], theirs["logs"], strict=True):
        assert found == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("kind", ["hf", "sft", "stream"])
def test_two_ranks_train_as_one(one, two, kind):
    for found in two[kind,]:
        same(found, one[kind,])


def test_three_ranks_train_as_one(one, three):
    for found in three["hf",]:
        same(found, one["hf",])


def test_each_epoch_has_each_example_once_and_batches_are_those_of_one_process(one, two, three):
    whole = one["hf",]["asked"]
    bounds = [0, 8, 13, 21, 26]
    for found in (two["hf",], three["hf",]):
        asked = sorted(i for rank in found for i in rank["asked"])
        assert asked == sorted(2 * list(range(hosts.NUM)))
        left = [iter(rank["asked"]) for rank in found]
        for begin, end in itertools.pairwise(bounds):
            shares = deal([1.0] * (end - begin), len(found))
            had = [next(rank) for rank, share in zip(left, shares, strict=True) for _ in share]
            assert sorted(had) == sorted(whole[begin:end])


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_trl_on_two_ranks(one, two, kind):
    expected, log = one["trl", kind]
    for rank, (found, own) in enumerate(two["trl", kind]):
        assert hosts.relative(found, expected) <= 1e-6
        for key in log if rank == 0 else ():
            if not key.startswith((*hosts.test_trl.OTHER, "train_")):
                assert own[key] == pytest.approx(log[key], rel=1e-4), key


@pytest.mark.parametrize("kind", ["hf", "sft"])
def test_an_evaluation_loss_counts_no_example_twice(one, two, kind):
    expected = one["evaluated", kind]["eval_loss"]
    assert [r["eval_loss"] for r in two["evaluated", kind]] == pytest.approx([expected] * 2, 1e-6)


def test_a_run_resumes_in_its_second_epoch_on_other_numbers_of_ranks(one, two, three, folder):
    whole = one["resumed", f"{folder}-whole", 0]
    for found in ([one["resumed", folder]], three["resumed", folder]):
        asked = sorted(i for rank in found for i in rank["asked"])
        assert asked == sorted(whole["asked"][21:])  # after steps of 8, 5 and 8
        for rank in found:
            assert hosts.relative(rank["weights"], whole["weights"]) <= 1e-6


def test_a_rank_without_memory_recovers_while_the_other_waits(one, two):
    for found in two["out_of_memory",]:
        same(found | {"tokens": 0}, one["hf",] | {"tokens": 0})


def test_a_loop_of_accelerate(one, two):
    for found in two["accelerate_loop",]:
        assert hosts.relative(found, one["accelerate_loop",]) <= 1e-12


def test_accelerate_launch():
    """The example, whose loader yields shares, as a user starts it."""
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *options]
    launcher += ["--main_process_port", str(free_port())]
    said = []
    for command in ([], launcher):
        done = subprocess.run(
            [sys.executable, *command, str(ROOT / "examples" / "accelerate_loop.py")],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        said.append(re.findall(r"loss ([\d.]+) \| ([\d,]+) shifted tokens in", done.stdout))
        assert done.returncode == 0 and len(said[-1]) == 15, done.stderr
        assert "same examples" not in done.stderr
    for (loss, tokens), (other, others) in zip(*said, strict=True):
        assert float(loss) == pytest.approx(float(other), rel=2e-3)  # in bfloat16
        assert tokens == others


def test_what_ranks_would_do_apart_is_refused(two):
    assert all("ranks shuffle their data differently" in said for said in two["shuffled_apart",])
    assert all("does not share them out" in said for said in two["unshared",])
    (unjoined,) = run_many([(hosts.unjoined, (free_port(),))], 2, deadline=DEADLINE)
    assert all("each would train a model of its own" in said for said in values(unjoined))


def test_a_failure_on_one_rank_is_told_to_the_other():
    (results,) = run_many([(hosts.failing, ())], 2, deadline=DEADLINE)
    (peer, _), (own, _) = values(results)
    assert own == "ArithmeticError: no such loss"
    assert peer.startswith("PeerFailed: rank 1 of 2 failed in this step: ArithmeticError")
