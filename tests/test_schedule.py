"""Batch-size schedules: what is spelt is what each step has, wherever a run is interrupted."""

import itertools
import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gradaccum.errors import BadInput
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.schedule import BatchSchedule
from gradaccum.stream import EffectiveBatchStream
from tests.test_sampler import Numbers, lognormal

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def alone(num, schedule, **given):
    return EffectiveBatchSampler(num, schedule, **{"rank": 0, "world": 1} | given)


def take(sampler, num):
    """Take so many steps; return the size that each was announced with, and its indices."""
    found, reader, epoch = [], None, None
    for _ in range(num):
        if sampler.epoch != epoch:
            epoch, reader = sampler.epoch, iter(sampler)
        found.append((sampler.effective_batch_size, next(reader)))
        sampler.commit()
    return found


# What is spelt


@pytest.mark.parametrize(
    ("text", "stages", "unit"),
    [
        ("32:0,64:10k,128:50k", ((32, 0), (64, 10_000), (128, 50_000)), "steps"),
        ("32:0, 64:10k samples", ((32, 0), (64, 10_000)), "samples"),
        ("256:0,64:1.5M tokens", ((256, 0), (64, 1_500_000)), "tokens"),
        ("8:0,16:1_000,32:2G", ((8, 0), (16, 1000), (32, 2 * 10**9)), "steps"),
        ("7:0 steps", ((7, 0),), "steps"),
        ("16..64 by 16 over 3k samples", ((16, 0), (32, 1000), (48, 2000), (64, 3000)), "samples"),
        ("16..48 by 16 over 5", ((16, 0), (32, 3), (48, 5)), "steps"),
    ],
)
def test_a_spelling_is_read_and_given_back(text, stages, unit):
    schedule = BatchSchedule.parse(text)
    assert (schedule.stages, schedule.unit) == (stages, unit)
    assert BatchSchedule.parse(str(schedule)) == schedule


def test_the_spelling_that_is_given_back_is_short():
    assert str(BatchSchedule.parse("32:0,64:10000")) == "32:0,64:10k"
    assert str(BatchSchedule.parse("32:0,64:1500000 tokens")) == "32:0,64:1500k tokens"
    assert str(BatchSchedule.parse("32:0,64:1M,128:1000001")) == "32:0,64:1M,128:1000001"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32", "'32' is no schedule of effective_batch_size: '32' is no size with its begin"),
        ("", "is no size with its begin"),
        ("32:0,64", "'64' is no size with its begin"),
        ("32:0,64:ten", "'ten' is no whole number"),
        ("32:0,64:-1", "'-1' is no whole number"),
        ("32:0,64:1.0005k", "'1.0005k' is no whole number"),
        ("32:0,64:10K", "'10K' is no whole number"),
        ("32:0,64:10k rows", "'10k rows' is no whole number"),
        ("0:0", "has a size below 1"),
        ("32:1k,64:2k", "begins at 1,000, and no size is given before"),
        ("32:0,64:9,128:9", "has 128 from 9 on, which is not after 9"),
        ("32:0,64:9,128:3", "has 128 from 3 on, which is not after 9"),
        ("16..64 by 20 over 1k", "from 16 to 64 is no whole number of times 20"),
        ("64..16 by 16 over 1k", "from 64 to 16 is no whole number of times 16"),
        ("16..64 by 0 over 1k", "by=0 is not a whole number"),
        ("1..9 by 1 over 3", "8 stages do not fit into 3"),
    ],
)
def test_what_is_no_schedule_is_refused(text, message):
    with pytest.raises(BadInput, match=message):
        BatchSchedule.parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": ()}, "no pairs of two whole numbers"),
        ({"stages": 3}, "no pairs of size and begin"),
        ({"stages": ((32, 0, 1),)}, "no pairs of size and begin"),
        ({"stages": ((32.0, 0),)}, "no pairs of two whole numbers"),
        ({"stages": ((True, 0),)}, "no pairs of two whole numbers"),
        ({"unit": "epochs"}, "unit='epochs' is none of steps, samples, tokens"),
        ({"lr": "cubic"}, "lr='cubic' is none of none, linear, sqrt"),
        ({"beta2": 1}, "beta2=1 is not True or False"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises(BadInput, match=message):
        BatchSchedule(**{"stages": ((32, 0),)} | given)


def test_a_stage_begins_with_the_step_that_finds_so_much_done():
    schedule = BatchSchedule.parse("32:0,64:10,16:12")
    sizes = [schedule.size_at(n) for n in (0, 9, 10, 11, 12, 10**9)]
    assert sizes == [32, 32, 64, 64, 16, 16]
    assert (schedule.first, schedule.largest) == (32, 64)
    assert [schedule.is_final(n) for n in (11, 12)] == [False, True]


def megatron(start, stop, by, over, consumed):
    """The rule of Megatron-LM's RampupBatchsizeNumMicroBatchesCalculator."""
    if consumed > over:
        return stop
    return start + int(consumed / (over / ((stop - start) // by))) * by


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 12), st.integers(12, 5000))
def test_a_ramp_is_that_of_megatron(start, by, num, over):
    stop = start + by * num
    schedule = BatchSchedule.ramp(start, stop, by=by, over=over)
    consumed = 0
    while consumed <= over + stop:
        # Its quotient is rounded: where a stage begins exactly, it may be one sample late.
        is_begin = consumed * num % over == 0
        asked = (consumed, consumed + 1) if is_begin else (consumed,)
        expected = [megatron(start, stop, by, over, at) for at in asked]
        assert schedule.size_at(consumed) in expected
        consumed += schedule.size_at(consumed)


def test_a_number_is_the_size_of_each_step():
    assert BatchSchedule.of(32).is_constant and BatchSchedule.of(32).size_at(10**9) == 32
    schedule = BatchSchedule.parse("32:0,64:9")
    assert BatchSchedule.of(schedule) is schedule
    assert BatchSchedule.of("32:0,64:9") == schedule
    for wrong in (0, 2.0, True, None):
        with pytest.raises(BadInput, match="effective_batch_size is"):
            BatchSchedule.of(wrong)


# Learning rate and beta2


def parameter():
    return torch.nn.Parameter(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_a_rule_scales_the_step_alone(rule, factor):
    schedule = BatchSchedule.parse("16:0,64:2", lr=rule)
    p, q = parameter(), parameter()
    optimizer = torch.optim.SGD([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=0.1)
    schedules = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for size, lr in ((16, 0.1), (64, 0.05), (64, 0.025)):
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = torch.ones(2, 3, dtype=torch.float64)
        with schedule.scaled(optimizer, size):
            optimizer.step()
        schedules.step()
        by = factor if size == 64 else 1
        for weight, old, rate in ((p, before[0], lr * by), (q, before[1], 5 * lr * by)):
            assert (old - weight).tolist() == pytest.approx([rate] * 3, rel=1e-12)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0125, 0.0625]


def test_what_was_scaled_is_put_back_where_the_step_fails():
    schedule = BatchSchedule.parse("16:0,64:2", lr="linear", beta2=True)
    optimizer = torch.optim.AdamW([parameter()], lr=torch.tensor(1e-3), betas=(0.9, 0.99))
    before = dict(optimizer.param_groups[0])
    with pytest.raises(RuntimeError), schedule.scaled(optimizer, 64):
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(4e-3)
        raise RuntimeError
    for name, value in before.items():
        assert optimizer.param_groups[0][name] is value


def test_beta2_has_the_second_moments_average_over_as_many_examples():
    """Four steps of 16 forget as much as one of 64."""
    schedule = BatchSchedule.parse("16:0,64:2", beta2=True)
    kept = []
    for size, num in ((16, 4), (64, 1)):
        p = parameter()
        optimizer = torch.optim.Adam([p], lr=0.0, betas=(0.9, 0.99))
        p.grad = torch.ones_like(p)
        optimizer.step()
        before = optimizer.state[p]["exp_avg_sq"].clone()
        p.grad = torch.zeros_like(p)
        for _ in range(num):
            with schedule.scaled(optimizer, size):
                optimizer.step()
        kept.append((optimizer.state[p]["exp_avg_sq"] / before)[0].item())
    assert kept[0] == pytest.approx(0.99**4, rel=1e-12)
    assert kept[1] == pytest.approx(kept[0], rel=1e-12)


def test_a_rule_for_what_an_optimizer_has_not_is_refused():
    schedule = BatchSchedule.parse("16:0,64:2", beta2=True)
    with (
        pytest.raises(BadInput, match="SGD has no betas, and the schedule has a rule for it"),
        schedule.scaled(torch.optim.SGD([parameter()]), 16),
    ):
        pass


# What each step has


def test_sizes_follow_steps_also_within_an_epoch_and_over_its_end():
    sampler = alone(25, "4:0,6:3,2:6")
    assert [(size, len(batch)) for size, batch in take(sampler, 9)] == [
        (4, 4), (4, 4), (4, 4), (6, 6), (6, 6), (6, 1), (2, 2), (2, 2), (2, 2),
    ]  # fmt: skip
    assert sampler.state_dict()["steps"] == 9


def test_sizes_follow_samples():
    sampler = alone(20, "4:0,6:5 samples")
    assert [len(batch) for _, batch in take(sampler, 6)] == [4, 4, 6, 6, 6, 6]
    assert set(sampler.state_dict()) == set(alone(20, 4).state_dict())


def test_sizes_follow_tokens():
    costs = torch.arange(10) + 1
    sampler = alone(10, "2:0,3:20 tokens", costs=costs)
    seen = 0
    for size, batch in take(sampler, 12):
        assert size == (2 if seen < 20 else 3)
        seen += int(costs[batch].sum())
    assert sampler.state_dict()["tokens"] == seen


def test_a_position_by_samples_tells_its_batch_and_one_by_steps_is_walked_to():
    by_samples = alone(20, "4:0,6:5 samples")
    assert len(by_samples.batch(3)) == 4 and len(by_samples.batch(5)) == 6
    by_steps = alone(20, "4:0,6:2")
    expected = [batch for _, batch in take(alone(20, "4:0,6:2"), 6)]
    ends = [0, *itertools.accumulate(map(len, expected))]
    take(by_steps, 3)
    for at in (5, 2, 4, 0, 3, 1):
        assert by_steps.batch(ends[at]) == expected[at]
    with pytest.raises(BadInput, match="no effective batch that is known begins after 5 examples"):
        by_steps.batch(5)
    again = alone(20, "4:0,6:2")
    again.load_state_dict(by_steps.state_dict())
    assert again.batch(ends[4]) == expected[4]
    with pytest.raises(BadInput, match="no effective batch that is known begins after 4 examples"):
        again.batch(4)


UNITS = st.sampled_from(["steps", "samples", "tokens"])
STAGES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=5)
SCALE = {"steps": 1, "samples": 6, "tokens": 40}
EPOCHS = st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=14)


def made(unit, parts):
    begins = [0, *itertools.accumulate(SCALE[unit] * gap for _, gap in parts)]
    return BatchSchedule(tuple((s, b) for (s, _), b in zip(parts, begins, strict=False)), unit)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(UNITS, STAGES, st.integers(14, 40), st.booleans(), EPOCHS, st.lists(st.integers(1, 4)))
def test_a_run_that_is_interrupted_and_has_other_ranks_takes_the_same_batches(
    unit, parts, num, drop_last, weights, worlds
):
    """By the definition: what is done before each step gives its size; nothing else does."""
    schedule, costs = made(unit, parts), [1 + i % 7 for i in range(num)]
    weights = weights and (weights * num)[: num - 1] + [1.0]
    same = {"costs": costs, "drop_last": drop_last, "weights": weights, "seed": 3}
    if drop_last and (sum(weights) if weights else num) < schedule.largest:
        same["drop_last"] = False
    whole = alone(num, schedule, **same)
    places = list(itertools.islice(whole.places(), 30))
    found = take(whole, 30)
    done = 0
    for (size, batch), place in zip(found, places, strict=True):
        done = place.at if unit == "samples" else done
        assert size == schedule.size_at(done)
        assert len(batch) == place.over - place.at == min(size, place.end - place.at)
        assert len(batch) == size or not same["drop_last"]
        done += 1 if unit == "steps" else sum(costs[i] for i in batch)
    state, at = None, 0
    for world in [*worlds, 2]:
        samplers = [alone(num, schedule, rank=r, world=world, **same) for r in range(world)]
        for sampler in samplers:
            if state:
                sampler.load_state_dict(json.loads(json.dumps(state)))
        taken = [take(sampler, min(3, 30 - at)) for sampler in samplers]
        for shares in zip(*taken, strict=True):
            size, batch = found[at]
            assert {announced for announced, _ in shares} == {size}
            assert sorted(i for _, share in shares for i in share) == sorted(batch)
            at += 1
        state = samplers[0].state_dict()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(UNITS, STAGES, st.integers(14, 40), st.sampled_from([0.3, 1, 1.5, 3]), st.integers(0, 5))
def test_the_number_of_batches_is_known_before_they_are_read(unit, parts, num, epochs, first):
    given = {"costs": [1 + i % 7 for i in range(num)]}
    before, sampler = (alone(num, made(unit, parts), **given) for _ in range(2))
    take(before, first)
    sampler.load_state_dict(before.state_dict())
    begin = sampler.epoch
    of_epoch = [0] * 5
    for place in itertools.islice(sampler.places(), 4 * num):
        of_epoch[min(place.epoch - begin, 4)] += 1
    whole = math.floor(epochs)
    assert sampler.num_batches(1) == len(sampler) == of_epoch[0] == len(list(sampler))
    expected = sum(of_epoch[:whole]) + math.ceil((epochs - whole) * of_epoch[whole])
    assert before.num_batches(epochs) == expected


@pytest.mark.parametrize("unit", ["steps", "samples", "tokens"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_loader_reads_ahead_has_the_sizes_that_it_will_have(unit, workers):
    text = {"steps": "4:0,7:6", "samples": "4:0,7:24 samples", "tokens": "4:0,7:60 tokens"}[unit]
    costs = [1 + i % 4 for i in range(50)]
    expected = [batch for _, batch in take(alone(50, text, costs=costs), 20)]
    sampler = alone(50, text, costs=costs)
    data = DataLoader(Numbers(50), batch_sampler=sampler, collate_fn=list, num_workers=workers)
    found, states = [], []
    while len(found) < 20:
        for batch in data:
            found.append(batch)
            states.append(json.loads(json.dumps(sampler.state_dict())))
            sampler.commit()
    assert found[:20] == expected
    assert {len(batch) for batch in found} >= {4, 7}
    for at in (1, 5, 6, 7, 12):
        again = alone(50, text, costs=costs)
        again.load_state_dict(states[at])
        assert [batch for _, batch in take(again, 20 - at)] == expected[at:]


def test_a_million_examples_are_counted_in_seconds():
    sampler = alone(1_000_000, "16:0,256:2M tokens", costs=lognormal(1_000_000))
    begin = time.process_time()
    assert 11_000 < sampler.num_batches(3) < 12_500
    assert time.process_time() - begin < 8


def test_another_schedule_holds_from_where_a_state_was_taken():
    first = alone(60, "4:0,8:3")
    take(first, 2)
    second = alone(60, "4:0,8:3,2:4")
    second.load_state_dict(first.state_dict())
    assert [size for size, _ in take(second, 4)] == [4, 8, 2, 2]
    by_samples = alone(60, "4:0,5:12 samples")
    by_samples.load_state_dict(first.state_dict())
    assert [size for size, _ in take(by_samples, 3)] == [4, 5, 5]
    constant = alone(60, 9)
    constant.load_state_dict(second.state_dict())
    take(constant, 1)
    for unit in ("steps", "tokens"):
        other = alone(60, made(unit, [(4, 1), (8, 1)]), costs=[1] * 60)
        with pytest.raises(BadInput, match=f"counts {unit}, and the state does not tell how many"):
            other.load_state_dict(constant.state_dict())
    with pytest.raises(BadInput, match="not the state of an EffectiveBatchSampler"):
        second.load_state_dict(first.state_dict() | {"steps": "x"})


def test_what_a_schedule_needs_is_asked_for_at_once():
    for costs in (None, lambda i: 1):
        with pytest.raises(BadInput, match="counts tokens, and costs do not tell those of each"):
            alone(20, "4:0,8:9 tokens", costs=costs)
    with pytest.raises(BadInput, match="counts tokens, and costs are no whole numbers"):
        alone(20, "4:0,8:9 tokens", costs=[0.5] * 20)
    with pytest.raises(BadInput, match=r"an epoch has 7 examples, .* of 8"):
        alone(7, "4:0,8:9", drop_last=True)
    with pytest.raises(BadInput, match="a stream takes one effective_batch_size, and no schedule"):
        EffectiveBatchStream([1, 2], "4:0,8:9", rank=0, world=1)
