"""The same effective batches on any number of ranks, and each example once, whatever changes."""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gradaccum.dealing import deal
from gradaccum.errors import BadInput
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.stream import EffectiveBatchStream

MASK = 2**64 - 1
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*set_vital"),
]


class Numbers(Dataset):
    """Example i is i."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        return i


class Stream(IterableDataset):
    def __init__(self, num):
        self.num = num

    def __iter__(self):
        return iter(range(self.num))


def alone(num, size, **given):
    return EffectiveBatchSampler(num, size, rank=0, world=1, **given)


def ranks(num, size, world, **given):
    return [EffectiveBatchSampler(num, size, rank=r, world=world, **given) for r in range(world)]


def epochs(sampler, num=1):
    """Return the order of the next epochs, read and not committed."""
    return [list(itertools.chain(*sampler)) for _ in range(num)]


def lognormal(num, seed=0):
    """Return token counts as text has them: mean about 600, p99 about 3,300, at most 8,192."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(num, generator=generator, dtype=torch.float64).mul(0.9).add(6.0).exp()
    return lengths.round().clamp(8, 8192)


def step(samplers, readers):
    """Take one effective batch with every rank; return its epoch and all of its indices."""
    at = {(s.consumed, s.epoch) for s in samplers}
    assert len(at) == 1
    consumed, epoch = at.pop()
    whole, own = samplers[0].batch(consumed), [next(reader) for reader in readers]
    assert own == samplers[0].shares(consumed)
    assert sorted(itertools.chain(*own)) == sorted(whole)
    for sampler in samplers:
        sampler.commit()
    return epoch, whole


# The order


def hashed(i, *words):
    """splitmix64 in whole numbers of any size."""

    def mixed(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    gamma, state = 0x9E3779B97F4A7C15, 0
    for word in words:
        state = mixed(((state + gamma) & MASK) ^ (word & MASK))
    return mixed((state + (i + 1) * gamma) & MASK)


def signed(z):
    return z - 2**64 if z >> 63 else z


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 123_456_789_012_345])
def test_the_order_is_that_of_a_hash(seed):
    for epoch, order in enumerate(epochs(alone(97, 10, seed=seed), 3)):
        assert order == sorted(range(97), key=lambda i: signed(hashed(i, 0, seed, epoch)))


def test_the_order_is_the_same_on_every_platform():
    sampler = alone(10, 4, seed=7)
    assert [sampler.batch(n) for n in (0, 4, 8, 10)] == EXPECTED
    code = (
        "from gradaccum.sampler import EffectiveBatchSampler as S; import torch;"
        "torch.manual_seed(3); torch.set_num_threads(2); s = S(10, 4, seed=7, rank=0, world=1);"
        "print([s.batch(n) for n in (0, 4, 8, 10)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "5"},
    )  # fmt: skip
    assert json.loads(done.stdout) == EXPECTED


EXPECTED = [[4, 0, 8, 2], [7, 9, 6, 3], [1, 5], [9, 8, 0, 6]]


def test_positions_are_uniform_over_epochs_and_over_seeds():
    num, times = 1000, 300
    by_epoch = alone(num, num)
    orders = [by_epoch.batch(epoch * num) for epoch in range(times)]
    by_seed = [alone(num, num, seed=seed).batch(0) for seed in range(times)]
    for found in (orders, by_seed):
        places = torch.tensor(found).argsort(dim=1).double()  # shape (times, examples)
        deviation = math.sqrt((num**2 - 1) / 12)
        scores = (places.mean(0) - (num - 1) / 2) / (deviation / math.sqrt(times))
        assert 0.92 < float(scores.std()) < 1.08
        assert float(scores.abs().max()) < 5
        assert abs(float(places.std(0).mean()) / deviation - 1) < 0.01
        # One epoch says nothing of the next, nor a neighbour of its neighbour.
        for a, b in ((places[:-1], places[1:]), (places[:, :-1], places[:, 1:])):
            z = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] * math.sqrt(a.numel())
            assert abs(float(z)) < 5


def test_without_shuffle_the_data_keeps_its_order():
    assert epochs(alone(7, 3, shuffle=False), 2) == [list(range(7))] * 2
    extra = alone(4, 3, shuffle=False, weights=[1, 2, 0, 3])
    assert epochs(extra) == [[0, 1, 3, 1, 3, 3]]


# A18: the same effective batches on any number of ranks, each example once


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_effective_batches_are_the_same_on_1_to_8_ranks(drop_last):
    costs = lognormal(103)
    whole = alone(103, 16, drop_last=drop_last)
    for world in range(1, 9):
        samplers = ranks(103, 16, world, costs=costs, drop_last=drop_last)
        for epoch in range(3):
            expected = list(whole)
            assert len(samplers[0]) == len(expected) == (6 if drop_last else 7)
            readers = [iter(sampler) for sampler in samplers]
            for shares in zip(*readers, strict=True):
                assert sorted(itertools.chain(*shares)) == sorted(expected.pop(0))
            assert not expected
            assert {s.epoch for s in samplers} == {epoch}
        whole = alone(103, 16, drop_last=drop_last)


def test_a_short_last_batch_leaves_ranks_without_examples():
    samplers = ranks(9, 8, 4)
    shares = list(zip(*samplers, strict=True))
    assert [sorted(map(len, step)) for step in shares] == [[2, 2, 2, 2], [0, 0, 0, 1]]


segments = st.lists(
    st.tuples(
        st.integers(1, 20),  # effective batch size
        st.integers(1, 5),  # world
        st.integers(0, 2),  # seed
        st.booleans(),  # shuffle
        st.integers(0, 6),  # steps
    ),
    min_size=1,
    max_size=6,
)
weighted = st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.3, 2.0]), min_size=20)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(20, 45), segments, weighted, st.booleans())
def test_each_example_once_whatever_changes_within_an_epoch(num, life, weights, drop_last):
    """World, effective batch size, seed and shuffle change; the state goes through JSON."""
    weights = weights and (weights * num)[: num - 1] + [1.0]
    same = {"weights": weights, "drop_last": drop_last}
    if drop_last and (sum(weights) if weights else num) < 20:
        same["drop_last"] = False
    state, used, last = None, {}, None
    for size, world, seed, shuffle, steps in [*life, (3, 2, 0, True, 50)]:
        samplers = ranks(num, size, world, seed=seed, shuffle=shuffle, **same)
        before = samplers[0]
        if state:
            for sampler in samplers:
                sampler.load_state_dict(json.loads(json.dumps(state)))
        reading = None
        for _ in range(steps):
            if reading != before.epoch:
                reading, readers = before.epoch, [iter(sampler) for sampler in samplers]
            epoch, batch = step(samplers, readers)
            assert batch
            assert len(batch) == size or not same["drop_last"]
            used.setdefault(epoch, []).extend(batch)
            last = epoch
        assert len({json.dumps(sampler.state_dict()) for sampler in samplers}) == 1
        state = samplers[0].state_dict()
    for epoch, found in used.items():
        counts = Counter(found)
        for i in range(num):
            weight = weights[i] if weights else 1
            most = math.floor(weight) + (weight % 1 > 0)
            assert counts[i] <= most
            if epoch < last and not same["drop_last"]:
                assert counts[i] >= math.floor(weight)


def test_the_rest_of_an_epoch_comes_in_the_order_of_the_new_seed():
    first = alone(50, 8, seed=5)
    reader = iter(first)
    done = [i for _ in range(3) for i in (next(reader), first.commit())[0]]
    second = alone(50, 8, seed=7)
    second.batch(0)  # what it knows of the epoch is no longer so
    second.load_state_dict(first.state_dict())
    rest, whole = epochs(second)[0], epochs(alone(50, 8, seed=7))[0]
    assert done == epochs(alone(50, 8, seed=5))[0][:24]
    assert rest == [i for i in whole if i not in done]
    # A third run knows both, and the epoch after is all the last one's.
    third = alone(50, 50, seed=7)
    second.load_state_dict(first.state_dict())
    next(iter(second)), second.commit()
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert third.batch(0) == done + rest
    assert third.batch(50) == alone(50, 50, seed=7).batch(50)
    for expected in (rest[8:], third.batch(50)):
        for batch in third:
            assert batch == expected
            third.commit()


def test_seed_and_fractions_do_not_change_what_an_epoch_holds():
    weights = [0.5] * 200
    first = alone(200, 10, seed=5, weights=weights)
    reader = iter(first)
    done = next(reader)
    first.commit()
    expected = Counter(done + list(itertools.chain(*reader)))
    second = alone(200, 7, seed=6, weights=weights)
    second.load_state_dict(first.state_dict())
    assert Counter(done + epochs(second)[0]) == expected


def test_drop_last_leaves_out_what_does_not_fill_the_new_size():
    sampler = alone(100, 30, drop_last=True)
    reader = iter(sampler)
    for _ in range(2):
        next(reader), sampler.commit()
    for size, lengths in ((30, [30]), (7, [7] * 5), (40, [40]), (41, [])):
        other = alone(100, size, drop_last=True)
        other.load_state_dict(sampler.state_dict())
        if lengths:
            assert other.epoch == 0
            assert len(other) == len(lengths)
            assert [len(batch) for batch in other] == lengths
        else:  # 40 are left: none of them are used
            assert (other.epoch, other.consumed) == (1, 100)
            assert [len(batch) for batch in other] == [41, 41]
    assert Counter(map(len, sampler)) == {30: 1}
    sampler.commit()
    assert (sampler.epoch, sampler.consumed) == (1, 100)


# Weights


def test_weights_say_how_often_an_example_occurs():
    weights = [0, 1, 2.25, 0.5] * 50
    sampler = alone(200, 16, weights=weights)
    runs = [Counter(order) for order in epochs(sampler, 200)]
    assert len({run.total() for run in runs}) > 5
    for i, weight in enumerate(weights):
        times = [run[i] for run in runs]
        assert set(times) <= {math.floor(weight), math.ceil(weight)}
        assert abs(statistics.mean(times) - weight) <= 5 * math.sqrt(0.25 / 200)
    seen = statistics.mean(run.total() for run in runs)
    assert abs(seen / sum(weights) - 1) < 0.01
    # Whether an example occurs does not say when.
    orders = epochs(sampler, 100)
    places = [
        order.index(i) / len(order) for order in orders for i in range(3, 200, 4) if i in order
    ]
    assert abs(statistics.mean(places) - 0.5) < 5 * math.sqrt(1 / 12 / len(places))


def test_epochs_of_different_lengths_are_found_at_random_access():
    weights = [0.7] * 40
    sampler = alone(40, 8, weights=weights)
    read, consumed = [], 0
    for _ in range(12):
        for batch in sampler:
            read.append((consumed, batch))
            consumed += len(batch)
    fresh = alone(40, 8, weights=weights)
    for at, batch in reversed(read):
        assert fresh.batch(at) == batch
    moved = alone(40, 8, weights=weights)
    moved.set_epoch(11)
    assert list(moved) == [batch for at, batch in read if at >= moved.consumed]
    for at, batch in read:
        assert moved.batch(at) == batch


def test_a_resumed_run_does_not_count_all_epochs_before_it():
    sampler = alone(40, 8, weights=[0.7] * 40)
    sampler.set_epoch(500)
    resumed, asked = alone(40, 8, weights=[0.7] * 40), []
    count = resumed._num_copies
    resumed._num_copies = lambda *at: asked.append(at) or count(*at)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(sampler)
    assert {epoch for epoch, _ in asked} <= {500, 501}


def test_weights_of_one_change_nothing():
    assert epochs(alone(30, 4, weights=[1.0] * 30), 2) == epochs(alone(30, 4), 2)


# Shares


def test_a19_shares_cost_the_same():
    lengths = lognormal(256 * 60)
    sampler = EffectiveBatchSampler(len(lengths), 256, costs=lengths, rank=0, world=8)
    ours, contiguous = [], []
    for consumed in range(0, len(lengths), 256):
        shares = [float(lengths[share].sum()) for share in sampler.shares(consumed)]
        parts = lengths[sampler.batch(consumed)].view(8, 32).sum(dim=1)
        ours.append(max(shares) / statistics.mean(shares))
        contiguous.append(float(parts.max() / parts.mean()))
    assert statistics.mean(ours) <= 1.01
    assert statistics.mean(contiguous) >= 1.25  # the same batches, cut as they come


costs_of = st.lists(st.integers(0, 50), max_size=40)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(costs_of, st.integers(1, 6), st.none() | st.lists(st.sampled_from([1, 2, 3.5]), min_size=6))
def test_deal_gives_each_once_the_most_expensive_first(costs, world, speeds):
    speeds = speeds and speeds[:world]
    dealt = deal(costs, world, speeds)
    assert sorted(itertools.chain(*dealt)) == list(range(len(costs)))
    for share in dealt:
        assert share == sorted(share, key=lambda i: (-costs[i], i))
    # Nobody would have been done with its last example sooner on another rank.
    pace = speeds or [1] * world
    for r, share in enumerate(dealt):
        if share:
            load = sum(costs[i] for i in share)
            others = [sum(costs[i] for i in other) for other in dealt]
            assert all(
                load / pace[r] <= (others[o] + costs[share[-1]]) / pace[o] + 1e-9
                for o in range(world)
            )


def test_deal_breaks_ties_by_position_then_by_number_then_by_rank():
    assert deal([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert deal([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]
    assert deal([3, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert deal([], 3) == [[], [], []]
    assert deal([2, 2], 2, [1, 2]) == [[1], [0]]


def test_speeds_decide_the_shares_and_not_the_batches():
    costs = lognormal(4096)
    plain = EffectiveBatchSampler(4096, 512, costs=costs, rank=0, world=3)
    fast = EffectiveBatchSampler(4096, 512, costs=costs, rank=0, world=3, speeds=[10, 10, 20])
    assert fast.batch(512) == plain.batch(512)
    loads = [float(costs[share].sum()) for share in fast.shares(512)]
    assert [load / sum(loads) for load in loads] == pytest.approx([0.25, 0.25, 0.5], abs=0.005)


def test_speeds_are_rounded_to_percents_of_the_fastest():
    given = {"costs": lognormal(64), "rank": 0, "world": 3}
    even = EffectiveBatchSampler(64, 64, **given).shares(0)
    assert EffectiveBatchSampler(64, 64, speeds=[7.0, 6.98, 7.01], **given).shares(0) == even
    assert EffectiveBatchSampler(64, 64, speeds=[7.0, 6.8, 7.01], **given).shares(0) != even
    assert all(EffectiveBatchSampler(64, 64, speeds=[7.0, 1e-9, 7.01], **given).shares(0))


def test_costs_may_be_a_function():
    lengths = lognormal(64)
    given = {"rank": 1, "world": 4}
    asked = EffectiveBatchSampler(64, 16, costs=lambda i: lengths[i], **given)
    assert list(asked) == list(EffectiveBatchSampler(64, 16, costs=lengths.tolist(), **given))
    wrong = EffectiveBatchSampler(64, 16, costs=lambda i: math.nan, **given)
    with pytest.raises(BadInput, match="the cost of example"):
        next(iter(wrong))


def test_a_default_device_changes_nothing():
    given = {"costs": lognormal(40).tolist(), "weights": [1.5] * 40, "rank": 1, "world": 2}
    expected = list(EffectiveBatchSampler(40, 9, **given))
    with torch.device("meta"):
        assert list(EffectiveBatchSampler(40, 9, **given)) == expected
        assert list(EffectiveBatchStream([1, 2, 3], 2, rank=0, world=1)) == [[1, 2], [3]]


def test_costs_and_weights_are_copied():
    costs, weights = torch.ones(2, 20, dtype=torch.float64)
    sampler = EffectiveBatchSampler(20, 8, costs=costs, weights=weights, rank=0, world=2)
    before = sampler.shares(0)
    costs[5:], weights[:] = 9, 0
    assert sampler.shares(0) == before


def test_a20_a_million_examples_are_planned_in_seconds():
    sampler = EffectiveBatchSampler(1_000_000, 256, costs=lognormal(1_000_000), rank=3, world=8)
    begin = time.process_time()
    num = sum(len(share) for share in sampler)
    spent = time.process_time() - begin
    assert 124_000 < num < 126_000
    assert spent < 5
    begin = time.process_time()
    for consumed in range(500_000, 600_000, 1000):
        sampler.shares(consumed)
    assert time.process_time() - begin < 0.5


# Progress


def test_commit_counts_and_reading_does_not():
    sampler = alone(20, 6)
    reader = iter(sampler)
    first, second = next(reader), next(reader)
    assert sampler.consumed == 0
    sampler.commit()
    assert sampler.consumed == 6
    assert next(iter(sampler)) == second != first
    reader = iter(sampler)
    for _ in reader:
        sampler.commit()
    assert (sampler.epoch, sampler.consumed) == (1, 20)


def test_what_nobody_commits_moves_on_by_epochs():
    sampler = alone(20, 6)
    seen = epochs(sampler, 3)
    assert seen == [alone(20, 20).batch(20 * epoch) for epoch in range(3)]
    assert sampler.state_dict()["consumed"] == 40
    stopped = alone(20, 6)
    for _ in range(2):  # a pass that was not read to its end begins anew
        assert list(itertools.islice(stopped, 2)) == list(alone(20, 6))[:2]
    assert stopped.consumed == 0


def test_an_epoch_that_is_read_and_not_committed_is_refused_once_there_are_commits():
    sampler = alone(20, 6)
    for _ in sampler:
        sampler.commit()
    list(sampler)
    with pytest.raises(BadInput, match="4 effective batches were read, to the end"):
        iter(sampler)
    sampler.load_state_dict(sampler.state_dict())
    assert sorted(itertools.chain(*sampler)) == list(range(20))
    with pytest.raises(BadInput, match="4 effective batches"):  # a state knows of commits
        iter(sampler)
    # A step that failed leaves the rest of the epoch, and only that.
    sampler.load_state_dict(sampler.state_dict())
    for number, _ in enumerate(sampler):
        if number < 3:
            sampler.commit()
    rest = list(sampler)
    assert [len(batch) for batch in rest] == [2]


def test_commits_may_begin_later():
    sampler = alone(20, 6)
    list(sampler)
    for _ in sampler:
        sampler.commit()
    assert sampler.epoch == 2


def test_commit_of_what_was_not_read_is_refused():
    sampler = alone(20, 6)
    reader = iter(sampler)
    with pytest.raises(BadInput, match="no more have been read"):
        sampler.commit()
    next(reader)
    sampler.commit()
    with pytest.raises(BadInput, match="commit\\(\\) at 6 consumed examples"):
        sampler.commit()
    assert sampler.consumed == 6
    again = iter(sampler)  # and never read: what the first one reads can be committed
    next(reader), next(reader)
    sampler.commit()
    assert (sampler.consumed, again.at) == (12, 6)
    next(again)
    sampler.commit()
    plain = alone(20, 6)  # without an iterator, batch() and shares() are read
    for expected in (6, 12, 18, 20, 26):
        plain.commit()
        assert plain.consumed == expected


def test_len_is_that_of_the_pass():
    sampler = alone(20, 6)
    assert len(sampler) == 4
    for _ in sampler:
        assert len(sampler) == 4
        sampler.commit()
    reader = iter(sampler)
    next(reader), sampler.commit()
    resumed = alone(20, 6)
    resumed.load_state_dict(sampler.state_dict())
    assert len(resumed) == 3
    for _ in resumed:
        assert len(resumed) == 3
        resumed.commit()
    assert len(resumed) == 4
    resumed.load_state_dict(sampler.state_dict())
    assert len(resumed) == 3
    assert len(alone(20, 6, drop_last=True)) == 3


def test_set_epoch_moves_only_what_nobody_keeps():
    sampler = alone(20, 6)
    third = alone(20, 20).batch(60)
    for _ in range(2):
        sampler.set_epoch(3)
        assert epochs(sampler) == [third]
    sampler.set_epoch(1)  # back, as with torch's DistributedSampler
    assert sampler.consumed == 20
    reader = iter(sampler)
    next(reader)
    sampler.set_epoch(1)  # accelerate sets it again
    next(reader)
    sampler.commit()
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        assert sampler.consumed == 26
    next(reader)
    resumed = alone(20, 6)
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(0)  # accelerate's count begins at 0 after a restart
    assert (resumed.epoch, resumed.consumed) == (1, 26)
    unkept = alone(20, 6)  # so does it where a loader, and no commit(), keeps the position
    reader = iter(unkept)
    next(reader)
    resumed = alone(20, 6)
    iter(resumed).load_state_dict(reader.state_dict())
    resumed.set_epoch(2)
    assert (resumed.epoch, resumed.consumed) == (0, 6)


def test_an_iterator_does_not_survive_that_the_sampler_is_moved():
    sampler = alone(20, 6)
    reader = iter(sampler)
    next(reader)
    sampler.set_epoch(2)
    with pytest.raises(BadInput, match="moved to 40"):
        next(reader)
    assert len(list(sampler)) == 4


def test_states_of_something_else_are_refused():
    state = alone(20, 6, weights=[2] * 20).state_dict()
    same = {"weights": [2] * 20}
    alone(20, 5, **same).load_state_dict(state)
    assert not {"rank", "world", "batch", "step", "effective_batch_size"} & set(state)
    with pytest.raises(BadInput, match="examples=20, and this sampler has 21"):
        alone(21, 6, weights=[2] * 21).load_state_dict(state)
    with pytest.raises(BadInput, match=r"weights='[0-9a-f]{16}', and this sampler has None"):
        alone(20, 6).load_state_dict(state)
    with pytest.raises(BadInput, match=r"weights='[0-9a-f]{16}', and this sampler has '[0-9a-f]"):
        alone(20, 6, weights=[2] * 19 + [1]).load_state_dict(state)
    with pytest.raises(BadInput, match="drop_last=False, and this sampler has True"):
        alone(20, 6, drop_last=True, **same).load_state_dict(state)
    for wrong in (
        {}, None, {**state, "history": []}, {**state, "history": [[0, True, 3]]},
        {**state, "consumed": -1}, {**state, "epoch": "x"}, {**state, "epoch_begin": 7},
    ):  # fmt: skip
        with pytest.raises(BadInput, match="not the state of an EffectiveBatchSampler"):
            alone(20, 6, **same).load_state_dict(wrong)


def test_a_state_is_a_copy():
    sampler = alone(20, 6)
    state = sampler.state_dict()
    text = json.dumps(state)
    other = alone(20, 6, seed=4)
    other.load_state_dict(state)
    other.commit()
    state["history"].append([9, True, 3])
    assert json.dumps(sampler.state_dict()) == text


# Other speeds while it runs


def test_rebalance_holds_from_a_batch_that_nobody_has_read():
    costs = lognormal(10_000)
    samplers = ranks(10_000, 100, 2, costs=costs)
    readers = [iter(sampler) for sampler in samplers]
    expected = {n: samplers[0].shares(n) for n in range(0, 10_000, 100)}
    batches = {n: samplers[0].batch(n) for n in range(0, 10_000, 100)}
    for number in range(60):
        own = [next(reader) for reader in readers]
        assert (own == expected[number * 100]) == (not 37 <= number < 50)
        assert sorted(itertools.chain(*own)) == sorted(batches[number * 100])
        loads = [float(costs[share].sum()) for share in own]
        fast = (3, 1) if 37 <= number < 50 else (1, 1)
        assert loads[0] / loads[1] == pytest.approx(fast[0] / fast[1], rel=0.15)
        for sampler in samplers:
            sampler.commit()
        if number == 4:
            assert [sampler.rebalance([3, 1]) for sampler in samplers] == [3700, 3700]
        if number == 40:
            assert [sampler.rebalance([1, 1], ahead=9) for sampler in samplers] == [5000, 5000]
    assert "speeds" not in json.dumps(samplers[0].state_dict())


def test_rebalance_is_refused_where_the_batch_was_read():
    sampler = EffectiveBatchSampler(1000, 10, rank=0, world=2)
    reader = iter(sampler)
    for _ in range(5):
        next(reader)
    sampler.commit()
    before = [sampler.shares(n) for n in range(0, 1000, 10)]
    with pytest.raises(BadInput, match=r"from 40 examples on, and 50 .*\(10 are committed\)"):
        sampler.rebalance([1, 2], ahead=3)
    with pytest.raises(BadInput, match="from 49 examples"):
        sampler.rebalance([1, 2], at=49)
    assert before == [sampler.shares(n) for n in range(0, 1000, 10)]
    assert sampler.rebalance([1, 2], ahead=4) == 50
    assert before[:5] == [sampler.shares(n) for n in range(0, 50, 10)]
    assert all(len(sampler.shares(n)[1]) > 5 for n in range(50, 1000, 10))
    with pytest.raises(BadInput, match="speeds has shape"):
        sampler.rebalance([1, 2, 3])
    # What was asked for later is overruled from the earlier position on.
    assert [sampler.rebalance([5, 1], at=90), sampler.rebalance([1, 1], at=70)] == [90, 70]
    assert before[7:] == [sampler.shares(n) for n in range(70, 1000, 10)]
    sampler.rebalance([9, 1], at=90)
    sampler.load_state_dict(sampler.state_dict())
    assert all(len(sampler.shares(n)[0]) > 7 for n in range(0, 1000, 10))


def test_rebalance_reaches_over_the_end_of_an_epoch():
    sampler = EffectiveBatchSampler(25, 10, rank=0, world=2, drop_last=True)
    assert sampler.rebalance([1, 2], ahead=3) == 35
    assert EffectiveBatchSampler(25, 10, rank=0, world=2).rebalance([1, 2], ahead=3) == 25


# Loaders


def loader(sampler, workers=0, **given):
    if workers:
        given = {"prefetch_factor": 3, **given}
    return DataLoader(
        Numbers(sampler.num_examples), batch_sampler=sampler, collate_fn=list, num_workers=workers,
        **given,
    )  # fmt: skip


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_loaders_read_ahead_and_nothing_is_lost(workers, persistent):
    given = {"costs": lognormal(60), "rank": 1, "world": 3}
    expected = EffectiveBatchSampler(60, 7, **given)
    sampler = EffectiveBatchSampler(60, 7, **given)
    data = loader(sampler, workers, persistent_workers=persistent)
    assert len(data) == 9
    assert [list(data), list(data)] == [list(expected), list(expected)]  # nobody commits
    done, resumed = [], EffectiveBatchSampler(60, 7, **given)
    for number, batch in enumerate(data):
        done.append(batch)
        sampler.commit()
        if number == 3:
            state = json.loads(json.dumps(sampler.state_dict()))
            assert state["consumed"] == 120 + 28
            break
    resumed.load_state_dict(state)
    for again in (data, loader(resumed, workers, persistent_workers=persistent)):
        rest = list(again)
        assert done + rest == list(alone_like(expected, 2))
    assert sampler.consumed == resumed.consumed == 148


def alone_like(sampler, epoch):
    fresh = EffectiveBatchSampler(60, 7, costs=lognormal(60), rank=1, world=3)
    fresh.set_epoch(epoch)
    return fresh


def test_the_last_step_is_committed_after_the_sampler_was_read_to_its_end():
    sampler = alone(12, 4)
    for epoch in range(3):
        for number, _ in enumerate(loader(sampler, 2)):
            assert (sampler.epoch, sampler.consumed) == (epoch, 12 * epoch + 4 * number)
            sampler.commit()
    assert sampler.epoch == 3


def test_empty_shares_reach_the_loop():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": list(range(3))})
    for rank in range(4):
        sampler = EffectiveBatchSampler(rows, 2, rank=rank, world=4)
        batches = list(DataLoader(rows, batch_sampler=sampler, collate_fn=list))
        assert [len(batch) for batch in batches] == [rank < 2, rank < 1]


def test_rank_and_world_come_from_where_the_process_runs(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    sampler = EffectiveBatchSampler(10, 4)
    assert (sampler.rank, sampler.world) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    sampler = EffectiveBatchSampler(10, 4)
    assert (sampler.rank, sampler.world) == (2, 5)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        sampler = EffectiveBatchSampler(10, 4)
    finally:
        torch.distributed.destroy_process_group()
    assert (sampler.rank, sampler.world) == (0, 1)
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(BadInput, match="RANK=two and WORLD_SIZE=5"):
        EffectiveBatchSampler(10, 4)


@pytest.mark.parametrize(
    ("data", "size", "given", "message"),
    [
        (0, 4, {}, "the number of examples is 0"),
        (True, 4, {}, "the number of examples is True"),
        ([], 4, {}, "the number of examples is 0"),
        (10, 0, {}, "effective_batch_size is 0"),
        (10, 2.0, {}, "effective_batch_size is 2.0"),
        (10, 4, {"seed": 1.5}, "seed is 1.5"),
        (10, 4, {"seed": True}, "seed is True"),
        (10, 4, {"shuffle": 1}, "shuffle is 1"),
        (10, 4, {"drop_last": None}, "drop_last is None"),
        (10, 4, {"costs": [1] * 9}, r"costs has shape \(9,\), and there are 10 examples"),
        (10, 4, {"costs": [[1]] * 10}, r"costs has shape \(10, 1\)"),
        (10, 4, {"costs": [1] * 9 + [-1]}, r"costs\[9\] is -1.0"),
        (10, 4, {"costs": [1, math.nan] * 5}, r"costs\[1\] is nan"),
        (10, 4, {"costs": [math.inf] * 10}, r"costs\[0\] is inf"),
        (10, 4, {"costs": ["x"] * 10}, "costs is .*not a number for each"),
        (10, 4, {"costs": 3}, "costs is 3, not a number for each"),
        (10, 4, {"costs": torch.tensor(3)}, r"costs is tensor\(3\), not a number for each"),
        (10, 4, {"costs": {}}, "costs is {}, not a number for each"),
        (iter([1]), 4, {}, "the number of examples is <list_iterator"),
        (10, 4, {"weights": [1] * 11}, r"weights has shape \(11,\)"),
        (10, 4, {"weights": [-1] + [1] * 9}, r"weights\[0\] is -1.0"),
        (10, 4, {"weights": [0] * 10}, "the weights sum to 0"),
        (10, 4, {"weights": [0.05] * 10}, "the weights sum to 0.5"),
        (3, 4, {"drop_last": True}, "an epoch has 3 examples, .* of 4"),
        (10, 4, {"drop_last": True, "weights": [0.3] * 10}, "an epoch has 3 examples"),
        (10, 4, {"rank": 0}, "rank=0 and world=None"),
        (10, 4, {"world": 2}, "rank=None and world=2"),
        (10, 4, {"rank": 2, "world": 2}, "rank is 2, and there are 2 ranks"),
        (10, 4, {"rank": -1, "world": 2}, "rank is -1"),
        (10, 4, {"rank": 0, "world": 0}, "world is 0"),
        (10, 4, {"rank": 0, "world": 2, "speeds": [1]}, r"speeds has shape \(1,\)"),
        (10, 4, {"rank": 0, "world": 2, "speeds": [1, 0]}, r"speeds\[1\] is 0"),
        (10, 4, {"rank": 0, "world": 2, "speeds": [1, math.nan]}, r"speeds\[1\] is nan"),
    ],
)
def test_arguments_are_checked(data, size, given, message):
    with pytest.raises(BadInput, match=message):
        EffectiveBatchSampler(data, size, **given)


def test_positions_are_checked():
    sampler = alone(10, 4)
    for ask in (sampler.batch, sampler.shares, sampler.set_epoch):
        for wrong in (-1, 0.5, None):
            with pytest.raises(BadInput):
                ask(wrong)
    for wrong in ({"ahead": -1}, {"at": -1}, {"ahead": 1.5}):
        with pytest.raises(BadInput):
            sampler.rebalance([1], **wrong)


# torchdata's StatefulDataLoader: its state is what it has yielded


@pytest.mark.parametrize(
    ("workers", "commits", "every"),
    [(0, False, 1), (0, True, 1), (2, False, 1), (2, True, 1), (2, False, 3)],
)
def test_a_stateful_loader_resumes_where_it_was(workers, commits, every):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def make(size=7, seed=0):
        sampler = alone(60, size, seed=seed)
        return sampler, torchdata.StatefulDataLoader(
            Numbers(60),
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=workers,
            snapshot_every_n_steps=every,
        )

    whole = alone(60, 7)
    expected = [list(whole) for _ in range(4)]
    for stop in (0, 3, 8):  # the first, one in the middle, the last of nine
        sampler, data = make()
        for _ in range(2):
            for _ in data:
                if commits:
                    sampler.commit()
        done = []
        for number, batch in enumerate(data):
            done.append(batch)
            if commits:
                sampler.commit()
            if number == stop:
                state = json.loads(json.dumps(data.state_dict(), default=str))
                break
        is_changed = stop == 3 and every == 1
        again, data = make(seed=int(is_changed))
        data.load_state_dict(state)
        rest = []
        for batch in data:
            rest.append(batch)
            if commits:
                again.commit()
        if not is_changed:
            assert done + rest == expected[2]
            assert list(data) == expected[3]
        else:
            assert sorted(itertools.chain(*done, *rest)) == list(range(60))
            assert done == expected[2][:4]
            assert sorted(itertools.chain(*data)) == list(range(60))
            assert again.epoch == 3


def test_a_stateful_loader_of_a_stream_resumes_where_it_was():
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    for workers in (0, 1, 2):
        whole = list(EffectiveBatchStream(Stream(45), 4, rank=0, world=1))
        for stop in (1, 4, 5, 12):
            stream = EffectiveBatchStream(Stream(45), 4, rank=0, world=1)
            data = torchdata.StatefulDataLoader(stream, batch_size=None, num_workers=workers)
            done = list(itertools.islice(data, stop))
            state = data.state_dict()
            again = torchdata.StatefulDataLoader(
                EffectiveBatchStream(Stream(45), 4, rank=0, world=1),
                batch_size=None,
                num_workers=workers,
            )
            again.load_state_dict(state)
            assert done + list(again) == whole
    again.load_state_dict(state)
    again.dataset.effective_batch_size = 5
    with pytest.raises(BadInput, match="effective batches of 4 examples, and this stream has 5"):
        list(again)


# Streams


def streams(num, size, world, **given):
    return [
        EffectiveBatchStream(Stream(num), size, rank=r, world=world, **given) for r in range(world)
    ]


def test_streams_give_the_same_batches_on_any_number_of_ranks():
    costs = lognormal(45).tolist()
    for world in range(1, 6):
        shares = list(zip(*streams(45, 8, world, cost=costs.__getitem__), strict=True))
        batches = [sorted(itertools.chain(*step)) for step in shares]
        assert batches == [list(range(n, min(n + 8, 45))) for n in range(0, 45, 8)]
    dropped = EffectiveBatchStream(Stream(45), 8, drop_last=True, rank=0, world=1)
    assert [len(batch) for batch in dropped] == [8] * 5


def test_shares_of_a_stream_are_dealt_by_cost():
    costs = lognormal(1024).tolist()
    found = streams(1024, 256, 4, cost=costs.__getitem__)
    for shares in zip(*found, strict=True):
        loads = [sum(costs[i] for i in share) for share in shares]
        assert max(loads) / statistics.mean(loads) < 1.01
    fast = streams(1024, 256, 2, cost=costs.__getitem__, speeds=[1, 3])
    for shares in zip(*fast, strict=True):
        loads = [sum(costs[i] for i in share) for share in shares]
        assert loads[1] / loads[0] == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("num", [40, 41, 47])
def test_workers_keep_the_order_of_a_stream_to_its_end(workers, num):
    for drop_last in (False, True):
        expected = list(EffectiveBatchStream(Stream(num), 4, drop_last=drop_last, rank=1, world=2))
        stream = EffectiveBatchStream(Stream(num), 4, drop_last=drop_last, rank=1, world=2)
        data = DataLoader(stream, batch_size=None, num_workers=workers)
        assert list(data) == expected
        assert (stream.consumed, stream.epoch) == (0, 0)
        # Committed, and stopped within the second pass.
        for epoch in range(2):
            for number, batch in enumerate(data):
                assert batch == expected[number]
                assert stream.epoch == epoch
                stream.commit()
                if (epoch, number) == (1, 2):
                    break
        assert (stream.consumed, stream.epoch) == (12, 1)
        assert list(data) == expected[3:]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 60),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 5)), max_size=6),
    st.booleans(),
)
def test_each_example_of_a_stream_once_whatever_changes(num, life, can_skip):
    state, used = {"consumed": 0, "epoch": 0}, []
    for size, world, steps in [*life, (3, 2, 99)]:
        found = streams(num, size, world)
        for stream in found:
            if can_skip:
                stream.data.skip = lambda n: range(n, num)
            stream.load_state_dict(json.loads(json.dumps(state)))
        readers = [iter(stream) for stream in found]
        for _, shares in zip(range(steps), zip(*readers, strict=True), strict=False):
            used.extend(sorted(itertools.chain(*shares)))
            for stream in found:
                stream.commit()
        state = found[0].state_dict()
        assert all(stream.state_dict() == state for stream in found)
        if state["epoch"]:
            break
    assert used == list(range(num))


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_stream_resumes_in_the_epoch_of_its_data(num_shards):
    datasets = pytest.importorskip("datasets")
    rows = [{"x": i} for i in range(50)]

    def make():
        data = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards)
        return EffectiveBatchStream(data.shuffle(seed=3, buffer_size=20), 8, rank=0, world=1)

    first = make()
    passes = []
    for _ in range(3):
        passes.append([])
        for batch in first:
            passes[-1].append(batch)
            first.commit()
            if len(passes) == 3 and len(passes[-1]) == 4:
                break
    assert passes[0] != passes[1]
    assert first.state_dict() == {"consumed": 32, "epoch": 2, "is_committed": True}
    again = make()
    again.load_state_dict(first.state_dict())
    rest = list(again)
    assert sorted(row["x"] for batch in passes[2] + rest for row in batch) == list(range(50))
    fresh = make()
    fresh.set_epoch(2)
    assert list(fresh) == passes[2] + rest
    fresh.load_state_dict({"consumed": 32, "epoch": 0})
    assert list(fresh) == passes[0][4:]


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_pass_that_is_read_ahead_to_its_end_is_counted(workers):
    stream = EffectiveBatchStream(list(range(12)), 4, rank=0, world=1)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    for epoch in range(3):
        for at, _ in enumerate(loader, start=1):
            stream.commit()
            state = stream.state_dict()
            ends = [(epoch + 1, 0)] if at == 3 else []  # if it is known by now that it ends here
            assert (state["epoch"], state["consumed"]) in [(epoch, 4 * at), *ends]


def test_set_epoch_of_a_stream_moves_only_what_nobody_keeps():
    stream = EffectiveBatchStream(Stream(9), 4, rank=0, world=1)
    stream.set_epoch(3)
    assert stream.epoch == 3
    stream.commit()
    stream.set_epoch(0)
    assert (stream.consumed, stream.epoch) == (4, 3)
    resumed = EffectiveBatchStream(Stream(9), 4, rank=0, world=1)
    resumed.load_state_dict(resumed.state_dict())  # of a run without commits
    resumed.set_epoch(5)
    assert resumed.epoch == 5
    resumed.load_state_dict(stream.state_dict())
    resumed.set_epoch(5)
    assert resumed.epoch == 3


def test_data_that_divides_itself_among_workers_is_refused():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": list(range(20))}).to_iterable_dataset(num_shards=2)
    stream = EffectiveBatchStream(rows, 4, rank=0, world=1)
    with pytest.raises(BadInput, match="divides its examples among the workers"):
        list(DataLoader(stream, batch_size=None, num_workers=2, collate_fn=list))
    found = list(DataLoader(stream, batch_size=None, num_workers=1, collate_fn=list))
    assert [row["x"] for batch in found for row in batch] == list(range(20))


def test_persistent_workers_of_a_stream_are_refused():
    stream = EffectiveBatchStream(Stream(20), 4, rank=0, world=1)
    list(stream)
    data = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    assert len(list(data)) == 5
    with pytest.raises(BadInput, match="a persistent worker does not learn"):
        list(data)


def test_ranks_with_streams_of_their_own_take_their_parts_of_each_batch():
    def make(rank, world=3, **given):
        data = list(range(rank * 100, rank * 100 + (20, 11, 4)[rank]))
        return EffectiveBatchStream(
            data, 8, rank=rank, world=world, is_sharded=True, num_batches=6, **given
        )

    passes = [list(make(rank)) for rank in range(3)]
    assert [[len(share) for share in one] for one in passes] == [
        [3, 3, 3, 3, 3, 3], [3, 3, 3, 2, 0, 0], [2, 2, 0, 0, 0, 0],
    ]  # fmt: skip
    for workers in (0, 2):
        for rank in range(3):
            stream = make(rank)
            data = DataLoader(stream, batch_size=None, num_workers=workers)
            for number, share in enumerate(data):
                assert share == passes[rank][number]
                stream.commit()
                if number == 2:
                    break
            state = json.loads(json.dumps(stream.state_dict()))
            assert state == {
                "consumed": 24, "epoch": 0, "is_committed": True, "shards": [9, 9, 6], "batches": 3
            }  # fmt: skip
            again = make(rank)
            again.load_state_dict(state)
            data = DataLoader(again, batch_size=None, num_workers=workers)
            for number, share in enumerate(data):
                assert share == passes[rank][3 + number]
                again.commit()
            assert again.state_dict()["epoch"] == 1
            assert list(again) == passes[rank]
    with pytest.raises(BadInput, match="3 streams, sharded by rank, and this is one of 2 streams"):
        make(0, world=2).load_state_dict(state)
    with pytest.raises(BadInput, match="and this is one of one stream"):
        EffectiveBatchStream([1], 8, rank=0, world=3).load_state_dict(state)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_data_set_split_by_node_resumes_where_it_was(num_shards):
    datasets = pytest.importorskip("datasets")
    split = pytest.importorskip("datasets.distributed")
    rows = datasets.Dataset.from_dict({"x": list(range(40))}).to_iterable_dataset(num_shards)
    seen = []
    for rank in range(2):
        data = split.split_dataset_by_node(rows, rank, 2)
        given = {"rank": rank, "world": 2, "is_sharded": True, "num_batches": 7}
        stream, state = EffectiveBatchStream(data, 6, **given), None
        for number, share in enumerate(stream):
            seen += [row["x"] for row in share]
            stream.commit()
            if number == 2:
                state = stream.state_dict()
                break
        again = EffectiveBatchStream(data, 6, **given)
        again.load_state_dict(state)
        seen += [row["x"] for share in again for row in share]
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": iter([1, 2])}, "list_iterator can be read only once"),
        ({"size": 0}, "effective_batch_size is 0"),
        ({"drop_last": 1}, "drop_last is 1"),
        ({"is_sharded": True}, "is_sharded=True and num_batches=None"),
        ({"num_batches": 3}, "is_sharded=False and num_batches=3"),
        ({"is_sharded": True, "num_batches": 0}, "num_batches is 0"),
        ({"is_sharded": True, "num_batches": 3, "cost": len}, "takes no cost"),
        ({"is_sharded": True, "num_batches": 3, "drop_last": True}, "takes no cost"),
        ({"rank": 1, "world": 1}, "rank is 1"),
        ({"speeds": [1, 2]}, r"speeds has shape \(2,\)"),
    ],
)
def test_arguments_of_streams_are_checked(given, message):
    given = {"data": [1, 2], "size": 2, "rank": 0, "world": 1, **given}
    with pytest.raises(BadInput, match=message):
        EffectiveBatchStream(given.pop("data"), given.pop("size"), **given)


def test_costs_and_states_of_streams_are_checked():
    for wrong in (math.nan, -1, "x"):
        with pytest.raises(BadInput, match="the cost of an example is"):
            list(EffectiveBatchStream([1, 2], 2, cost=lambda _, w=wrong: w, rank=0, world=1))
    stream = EffectiveBatchStream([1, 2], 2, rank=0, world=1)
    for wrong in ({}, None, {"consumed": -1, "epoch": 0}, {"consumed": "x", "epoch": 0}):
        with pytest.raises(BadInput, match="not the state of an EffectiveBatchStream"):
            stream.load_state_dict(wrong)
