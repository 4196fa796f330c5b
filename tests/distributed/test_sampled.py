"""`EffectiveBatchSampler` in attached trainers, and shares that follow the speeds of ranks."""

import itertools

import pytest
import torch

from gradaccum.errors import BadInput
from tests.distributed import hosts, sampled
from tests.distributed.launch import run_many, values
from tests.distributed.test_hosts import DEADLINE, same

BEGINS = [0, 8, 13, 21, 26, 34]  # of effective batches, in examples


def started(scenes, world):
    return [values(found) for found in run_many(scenes, world, deadline=DEADLINE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole():
    """What the trainer makes of the same batches without gradaccum, on one process."""
    size = {"per_device_train_batch_size": hosts.BATCH}
    return sampled.train(0, 1, "prepared", attached=False, **size)


@pytest.fixture(scope="module")
def two(folder):
    scenes = [(sampled.train, (way,)) for way in sampled.WAYS]
    scenes += [(sampled.interrupted, (folder,)), (sampled.wrong, ()), (sampled.followed, ())]
    scenes += [(sampled.uneven, ()), (sampled.uneven, (True,))]
    scenes += [(sampled.scheduled, (f"{folder}-s", at)) for at in (0, 2, 3, 4)]
    names = (*sampled.WAYS, "interrupted", "wrong", "followed", "uneven", "determined", 0, 2, 3, 4)
    return dict(zip(names, started(scenes, 2), strict=True))


@pytest.fixture(scope="module")
def three(two, folder):
    scenes = [(sampled.train, ()), *((sampled.resumed, (folder, at)) for at in (1, 2, 3))]
    return dict(zip(("plain", 1, 2, 3), started(scenes, 3), strict=True))


def had(found, first=0, last=6):
    """All ranks together had these effective batches, each example once and in its step."""
    left = [list(rank["asked"]) for rank in found]
    for at in range(first, last):
        shares = sampled.sampler(rank=0, world=len(found)).shares(BEGINS[at])
        for rank, share in zip(left, shares, strict=True):
            assert rank[: len(share)] == share
            del rank[: len(share)]
    assert not any(left)


@pytest.mark.parametrize("way", sampled.WAYS)
def test_one_process_trains_as_without_gradaccum(whole, way):
    found = sampled.train(0, 1, way)
    same(found, whole)
    had([found])
    had([whole])
    assert found["position"]["consumed"] == 39


@pytest.mark.parametrize("way", sampled.WAYS)
def test_two_ranks_have_the_shares_of_the_sampler(whole, two, way):
    had(two[way])
    for found in two[way]:
        same(found, whole)
        assert found["position"]["consumed"] == 39


def test_three_ranks_have_the_shares_of_the_sampler(whole, three):
    had(three["plain"])
    same(three["plain"][2], whole)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_goes_on_in_each_epoch_on_other_numbers_of_ranks(whole, two, three, folder, at):
    had(two["interrupted"], 0, 3)
    assert [found["position"]["consumed"] for found in two["interrupted"]] == [21, 21]
    for found in ([sampled.resumed(0, 1, folder, at, "prepared")], three[at]):
        had(found, at)
        for rank in found:
            assert rank["steps"] == 6
            assert rank["position"]["consumed"] == 39
            assert hosts.relative(rank["weights"], whole["weights"]) <= 1e-6


def test_a_schedule_on_two_ranks_has_the_batches_of_one_and_goes_on_bit_by_bit(
    two, folder, tmp_path
):
    one, whole = sampled.scheduled(0, 1, str(tmp_path)), two[0]
    for found in whole:
        same(found, one)
        assert (found["steps"], found["epoch"]) == (7, 3.0)
        assert found["position"]["consumed"] == 39 and found["position"]["steps"] == 7
    asked = sorted(i for found in whole for i in found["asked"])
    assert asked == sorted(3 * list(range(13)))
    for at in (2, 3, 4):
        for found, rank in zip(two[at], whole, strict=True):
            assert all(torch.equal(w, rank["weights"][n]) for n, w in found["weights"].items())
            assert found["logs"] == rank["logs"] and found["position"] == rank["position"]
    alone = sampled.scheduled(0, 1, f"{folder}-s", 3)
    assert hosts.relative(alone["weights"], one["weights"]) <= 1e-6


def test_a_loader_that_reads_ahead_goes_on_as_well(whole, two, folder):
    found = sampled.resumed(0, 1, folder, 3, dataloader_num_workers=2)
    assert found["steps"] == 6 and found["position"]["consumed"] == 39
    assert hosts.relative(found["weights"], whole["weights"]) <= 1e-6


def test_a_checkpoint_of_the_stock_trainer_goes_on(whole, tmp_path):
    size = {"per_device_train_batch_size": hosts.BATCH}
    saved = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3} | size
    sampled.train(0, 1, "prepared", folder=str(tmp_path), attached=False, **saved)
    for attached in (True, False):
        found = sampled.resumed(0, 1, str(tmp_path), 3, "prepared", attached=attached, **size)
        had([found], 3)
        assert hosts.relative(found["weights"], whole["weights"]) <= 1e-6


def test_another_seed_uses_what_is_left_of_the_epoch(whole, two, folder):
    with pytest.warns(UserWarning, match=r"sampler was EffectiveBatchSampler\(seed=1\), is .*2\)"):
        found = sampled.resumed(0, 1, folder, 3, own=sampled.sampler(seed=2))
    assert sorted(found["asked"][:5]) == sorted(whole["asked"][21:26])
    assert found["position"]["history"] == [[1, True, 0], [2, True, 21]]


def test_ignoring_the_position_begins_with_the_epoch(two, folder):
    found = sampled.resumed(0, 1, folder, 3, ignore_data_skip=True)
    had([found | {"asked": found["asked"][:13]}], 2, 4)


def test_a_trainer_that_trains_again_begins_where_it_began(tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer, told = sampled.build(folder=str(tmp_path), **settings)
    trainer.train()
    trainer.train()
    asked = told()["asked"]
    had([{"asked": asked[:21]}], 0, 3)
    had([{"asked": asked[21:]}], 0, 3)
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=True)
    had([{"asked": told()["asked"][42:]}], 3, 4)


def test_the_size_is_that_of_the_sampler_where_attach_was_given_none(whole):
    found = sampled.train(0, 1, size=None)
    same(found, whole)


def test_what_does_not_fit_is_refused(two):
    trainer, _ = sampled.build(size=4)
    with pytest.raises(BadInput, match="batches of 8 where attach was given effective_batch_si"):
        trainer.train()
    own = sampled.sampler()
    own.commit()
    trainer, _ = sampled.build(own=own)
    with pytest.raises(BadInput, match="has consumed 8 examples of epoch 0, and a trainer counts"):
        trainer.train()
    for said in two["wrong"]:
        for name in ("seed", "costs"):
            assert "RankDisagreement: the EffectiveBatchSamplers of ranks deal" in said[name]
        assert "EffectiveBatchSampler is for rank 0 of 1 in process" in said["rank"]


def test_shares_follow_speeds_from_a_batch_on_that_no_rank_has_read(two):
    for key, even in (("read", 4), ("again", 0), ("even", 10)):
        batches = list(zip(*(found[key] for found in two["followed"]), strict=True))
        for at, shares in enumerate(batches):
            assert sorted(itertools.chain(*shares)) == list(range(8 * at, 8 * at + 8))
            assert tuple(map(len, shares)) == ((4, 4) if at < even else (5, 3))


def test_a_slow_rank_has_a_smaller_share(two):
    one = sampled.uneven(0, 1)
    for found in two["uneven"]:
        same(found, one)
        # Known from the second step on, and one batch has been read ahead.
        assert found["shares"] == [[4, 4]] * 34 + [[6, 2]] * 6
    asked = sorted(i for found in two["uneven"] for i in found["asked"])
    assert asked == sorted(8 * list(range(40)))


def test_full_determinism_keeps_shares_even(two):
    assert two["determined"][0]["shares"] == [[4, 4]] * 40
