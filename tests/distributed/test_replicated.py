"""Ranks that hold the whole model each: the gradient of one process, whatever becomes of a rank.

Names in brackets are those of the acceptance tests in `DISTRIBUTED.md`, section 8b.
"""

import math
from dataclasses import replace

import pytest
import torch

from gradaccum.types import Share
from tests import models, oracle
from tests.distributed import launch, scenes
from tests.distributed.scenes import Case, dealt, expected

EXACT, WEAK = 1e-14, 1e-12


def ran(scene, world, *args, **options):
    return launch.values(launch.run(scene, world, *args, warm=True, **options))


def accumulated(*cases):
    """Return what each rank found, by case; gradients have to be the same bits on all ranks."""
    given = [(scenes.accumulated, (case,)) for case in cases]
    results = launch.run_many(given, cases[0].world, warm=True, deadline=60)
    found = [launch.values(result) for result in results]
    for case, values in zip(cases, found, strict=True):
        for i in range(case.windows):
            first, *others = (value["windows"][i] for value in values)
            for other in others:
                assert same(first["grads"], other["grads"]), case
                assert other["report"] == first["report"], case
                assert other["shares"] == first["shares"], case
    return found


def accumulated_once(case):
    return accumulated(case)[0]


def same(one, other):
    assert one.keys() == other.keys()
    return all(
        (one[n] is None) == (other[n] is None) and (one[n] is None or torch.equal(one[n], other[n]))
        for n in one
    )


def error(case, found=None):
    """Return how far the worst window is from one pass over all of its examples."""
    found = found or accumulated_once(case)
    errors = [
        oracle.error(found[0]["windows"][i]["grads"], expected(case, i))
        for i in range(case.windows)
    ]
    return max(errors)


def errors(*cases):
    """Return the worst error of each of these, by kind and shares."""
    found = accumulated(*cases)
    return {(c.kind, c.shares): error(c, f) for c, f in zip(cases, found, strict=True)}


def wrong(found, bound):
    return {name: value for name, value in found.items() if not value <= bound}


UNEVEN = {1: (dealt(23), (5,)), 2: (dealt(12, 20), (4, 4)), 3: (dealt(3, 11, 6), (1, 4, 5))}
UNEVEN[4] = (dealt(2, 7, 12, 1), (2, 2, 4, 9))


KINDS = ["sum", "terms", "late", "labels", "causal", "conv"]


@pytest.mark.parametrize("world", UNEVEN)
def test_uneven_shares_in_unequal_numbers_of_micro_batches(world):  # [A1]
    cases = [Case(*UNEVEN[world], kind, windows=2) for kind in KINDS]
    assert wrong(errors(*cases), EXACT) == {}


def test_three_micro_batches_on_one_rank_and_five_on_another():  # [A1]
    case = Case(*UNEVEN[2])
    found = accumulated_once(case)
    assert [share.num_micros for share in found[0]["windows"][0]["shares"]] == [3, 5]
    assert error(case, found) <= EXACT


@pytest.mark.parametrize(
    "ddp",
    [
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"broadcast_buffers": True, "bucket_cap_mb": 1},
    ],
    ids=str,
)
def test_a_wrapper_that_would_reduce_does_not(ddp):  # [A1, A8]
    case = Case(*UNEVEN[2], windows=2, ddp=ddp)
    assert error(case) <= EXACT
    for windows in ran(scenes.counted, 2, case):
        for i, window in enumerate(windows):
            assert window["inside"] == [] and window["others"] == []
            assert window["control"] == (3 if i == 0 else 2) and len(window["data"]) == 1


def test_the_wrapper_used_as_usual_is_seen_to_reduce():
    case = Case(dealt(4, 4), (4, 4), ddp={"find_unused_parameters": True})
    for found in ran(scenes.stock, 2, case):
        assert "allreduce_" in {name for name, _, _ in found}


def test_a_compiled_model_inside_of_a_wrapper():
    assert error(Case(dealt(5, 8), (4, 4), "plain", compiled=True, ddp={})) <= EXACT


def test_float32_is_exact_up_to_its_rounding():
    cases = [Case(*UNEVEN[3], kind, windows=2, dtype=torch.float32) for kind in KINDS]
    assert wrong(errors(*cases), 1e-6) == {}


def one_by_one(case, kept):
    """Return what ranks found, and what autograd adds up in `kept` on each, summed in float64."""
    found, total = accumulated_once(case), {}
    (_, weight, _), net = scenes.full(case), case.net()
    for p in net.parameters():
        p.grad_dtype = kept
    for rank, value in enumerate(found):
        rows = case.rows(0, case.shares[rank])
        net.zero_grad()
        for micro in value["windows"][0]["micros"]:
            b = torch.utils.data.default_collate([rows[i] for i in micro.examples])
            (scenes.fit(net, b).sum() / weight["loss"]).backward()
        for name, grad in oracle.left_in(net).items():
            if grad is not None:
                total[name] = total.get(name, 0) + grad.double()
    return found[0]["windows"][0]["grads"], {n: total.get(n) for n in oracle.left_in(net)}


def rounded(grads):
    return {n: None if g is None else g.bfloat16() for n, g in grads.items()}


def test_gradients_of_bfloat16_add_up_in_float32_over_ranks_as_well():
    case = Case(dealt(14, 11, 9), (1, 1, 1), dtype=torch.bfloat16)
    wide = replace(case, options={"grad_dtype": torch.float32})
    found, exact = one_by_one(wide, torch.float32)
    assert {g.dtype for g in found.values() if g is not None} == {torch.float32}
    assert oracle.error(found, exact) <= 1e-6
    handed, _ = one_by_one(case, torch.float32)
    assert same(handed, rounded(found))
    # On each rank in bfloat16, if that is wanted, and in float32 between them all the same.
    narrow, wanted = one_by_one(replace(case, options={"accumulate_dtype": None}), torch.bfloat16)
    assert same(narrow, rounded(wanted)) and oracle.error(narrow, exact) > 1e-4


@pytest.mark.parametrize("options", [{"accumulate_dtype": None}, {"grad_dtype": torch.float64}])
def test_other_dtypes_of_the_sum(options):
    dtype = torch.float64 if "accumulate_dtype" in options else torch.float32
    case = Case(*UNEVEN[2], dtype=dtype, options=options)
    assert error(case) <= (EXACT if dtype is torch.float64 else 1e-6)


def test_gradients_with_channels_last_are_put_back_in_their_places():
    (one, _) = accumulated_once(Case(dealt(6, 3), (2, 2), "conv"))
    grad = one["windows"][0]["grads"]["conv.weight"]
    assert not grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last)


def test_gradients_cut_by_buckets_that_are_smaller_than_a_parameter():
    for values in (1, 7, 50):
        cases = [Case(dealt(6, 9), (2, 4), kind, bucket=8 * values) for kind in ("sum", "conv")]
        assert wrong(errors(*cases), EXACT) == {}, values


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_without_examples(world):  # [A2]
    """Its buffers stay; it is idle from the first window on, or in that alone."""
    shares, budgets = ((), *dealt(9, 4)[: world - 1]), (2, 2, 3)[:world]
    cases = [Case(shares, budgets, kind, windows=2) for kind in KINDS]
    found = accumulated(*cases)
    assert wrong(errors(*[replace(c, rotating=True) for c in cases]), EXACT) == {}
    for case, values in zip(cases, found, strict=True):
        assert error(case, values) <= EXACT, case
        assert values[0]["windows"][0]["micros"] == () and values[0]["forwards"] in (0, None)
    assert found[0][0]["buffers"]["seen"] == 0 and found[0][1]["buffers"]["seen"] == 18


def test_no_rank_has_examples():
    case = Case(((), ()), (2, 2))
    for result in launch.run(scenes.accumulated, 2, case, warm=True):
        assert result.error and "BadInput: the effective batch has no examples" in result.error


def test_nothing_that_weighs():
    """One process leaves zeros, and so do ranks."""
    case = Case(((9, 19), (14,)), (1, 1), "labels")  # that are all -100
    for value in accumulated_once(case):
        window = value["windows"][0]
        assert all(g is not None and not g.any() for g in window["grads"].values())
        assert window["report"]["weight"] == 0
        assert window["warned"] == ["no labels: the gradients are zero"]


def test_parameters_that_one_rank_uses_or_none():  # [A3]
    """The rare one is used by example 4: in a micro-batch of rank 1 that is not its last."""
    case = Case(((0, 1, 2, 3), (5, 4, 6, 7, 8, 10)), (2, 2))
    found = accumulated_once(case)
    assert error(case, found) <= EXACT
    for value in found:
        grads = value["windows"][0]["grads"]
        assert grads["rare.weight"].any() and grads["unused"] is None
    without = Case(((0, 1, 2, 3), (5, 6, 7, 8)), (2, 2))
    for value in accumulated_once(without):
        assert value["windows"][0]["grads"]["rare.weight"] is None


@pytest.mark.parametrize("world", [2, 3, 4])
def test_replicas_stay_the_same_bits(world):  # [A4]
    case = Case(*UNEVEN[world], windows=5)
    first, *others = ran(scenes.trained, world, case)
    alone = Case(dealt(sum(map(len, case.shares))), (4,), windows=5)
    one = scenes.trained(0, 1, alone)
    for other in others:
        assert same(first["first"], other["first"]) and first["losses"] == other["losses"]
        names = [n for n in first["weights"] if n not in ("seen", "running")]
        assert all(torch.equal(first["weights"][n], other["weights"][n]) for n in names)
        assert max(
            (first["weights"][n] - one["weights"][n]).abs().max() / one["weights"][n].abs().max()
            for n in names
        ) <= 1e-13  # fmt: skip


FAULTS = {
    "first forward": ({"forward": [0]}, 1),
    "last forward": ({"forward": [2]}, 1),
    "middle of the first backward": ({"backward": [0]}, 1),
    "middle of a backward": ({"backward": [1]}, 1),
    "last backward": ({"backward": [2]}, 1),
    "three times": ({"forward": [0, 1], "backward": [0]}, 3),
    "again in the second window": ({"forward": [2], "backward": [9]}, 2),
}


@pytest.mark.parametrize("kind", ["sum", "late"])
@pytest.mark.parametrize("ranks", [(1,), (0, 2), (0, 1, 2)], ids=str)
def test_memory_that_runs_out_on_some_ranks(ranks, kind):  # [A5]
    """The others run nothing again."""
    cases = {}
    for where, (faults, _) in FAULTS.items():
        windows, given = 2 if "second" in where else 1, dict.fromkeys(ranks, faults)
        cases[where] = Case(dealt(24, 24, 24), (8, 8, 8), kind, windows, faults=given)
    for (where, case), found in zip(cases.items(), accumulated(*cases.values()), strict=True):
        assert error(case, found) <= EXACT, where
        for rank, value in enumerate(found):
            recoveries = [r for window in value["windows"] for r in window["recoveries"]]
            if rank in ranks:
                last = recoveries[-1]
                assert len(recoveries) == FAULTS[where][1], where
                assert value["limit"] == last.limit, where
                assert last.limit.examples == len(last.micro.examples) // 2, where
            else:
                micros = sum(len(window["micros"]) for window in value["windows"])
                assert value["forwards"] == micros, where
                assert value["limit"] is None and not recoveries, where


@pytest.mark.parametrize("where", ["first forward", "middle of a backward", "last backward"])
def test_a_rank_that_recovered_is_as_if_nothing_had_happened(where):  # [A5]
    faults, _ = FAULTS[where]
    shares = dealt(20, 22, 9)
    found = accumulated_once(Case(shares, (8, 8, 4), dropout=0.5, faults={1: faults}))
    limit = found[1]["limit"].examples
    plain = accumulated_once(Case(shares, (8, limit, 4), dropout=0.5))
    for one, other in zip(found, plain, strict=True):
        assert same(one["windows"][0]["grads"], other["windows"][0]["grads"])
        assert one["windows"][0]["report"] == other["windows"][0]["report"]
        assert one["drawn"] == other["drawn"] and same(one["buffers"], other["buffers"])


@pytest.mark.parametrize("kind", ["collate", "weight"])
def test_memory_that_runs_out_on_the_host_is_no_reason_to_cut_smaller(kind):
    for rank, value in enumerate(ran(scenes.failing, 2, kind, [1])):
        assert value["kind"] == ("OutOfMemoryError" if rank else "PeerFailed")
        assert rank or "rank 1 of 2 failed in this step: OutOfMemoryError: inj" in value["text"]


def test_a_collator_that_runs_out_of_memory_when_it_collates_again():
    case = Case(dealt(6, 6), (2, 2), faults={1: {"forward": [0], "collate": [4]}})
    results = launch.run(scenes.accumulated, 2, case, warm=True)
    assert "rank 1 of 2 failed in this step: OutOfMemoryError: injected" in results[0].error
    assert results[1].error.startswith("OutOfMemoryError: injected")


CAUSES = {
    "DoesNotFit": ("DoesNotFit", "DoesNotFit: example 0 of the effective batch, of size 1, does"),
    "loss": ("ValueError", "ValueError: no such row"),
    "backward": ("ValueError", "ValueError: no such row"),
    "BadInput": ("BadInput", "BadInput: the weight of 'loss' is "),
    "function": ("FileNotFoundError", "FileNotFoundError: shard 7"),
    "unfinished": ("BadInput", "BadInput: 1 parameters still hold gradients"),
    "CountMismatch": ("CountMismatch", "CountMismatch: the loss has the terms ['fit', 'kind']"),
    "NotDecomposable": ("NotDecomposable", "NotDecomposable: a hook on first.bias runs"),
    "after_micro": ("RuntimeError", "RuntimeError: broken"),
}


@pytest.mark.parametrize("culprits", [(1,), (0, 2)], ids=str)
@pytest.mark.parametrize("how", CAUSES)
def test_what_one_rank_cannot_mend_all_raise(how, culprits):  # [A6]
    """Each names rank and cause, nothing is left in `.grad`, and the next step is a good one."""
    own, cause = CAUSES[how]
    case = Case(dealt(6, 6, 6), (2, 2, 2))
    found = ran(scenes.failing, 3, how, culprits)
    for rank, value in enumerate(found):
        if rank in culprits:
            assert value["kind"] == own
        else:
            more = " (and 1 more)" if len(culprits) > 1 else ""
            assert value["kind"] == "PeerFailed"
            assert f"rank {culprits[0]} of 3{more} failed in this step: {cause}" in value["text"]
            assert "and more" not in value["text"]
        assert value["none_left"] or (how == "unfinished" and rank in culprits)
        assert value["at"] - min(v["at"] for v in found) < 1
        assert oracle.error(value["grads"], expected(case)) <= EXACT


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_is_killed_is_noticed_by_all(tmp_path, world):  # [A7]
    """Also by those that are not beside it, while those that are stay alive."""
    jobs = {}
    for when in ("window", "between", "reduce"):
        folder = tmp_path / when
        folder.mkdir()
        scene = (scenes.killed, (when, str(folder), 6.0))
        jobs[folder] = launch.Job([scene], world, warm=True, timeout=600)
    for folder, job in jobs.items():
        victim = job.wait()[0]
        died = float((folder / "at").read_text())
        assert victim[1].returncode == -9
        for value in launch.values([r for r in victim if r.rank != 1]):
            assert value["kind"] == "PeerFailed" and "a rank is gone" in value["text"], folder
            assert value["at"] - died < 5, folder
            assert value["again"] == "PeerFailed" and value["none_left"]


def test_a_collator_that_draws_for_each_micro_batch_is_counted_again_by_all():
    """Who runs again in smaller ones has drawn others."""
    found = ran(scenes.drawn, 2)
    ran_by_all = [b for _, _, inputs in found for b in inputs]
    net = Case(dealt(8, 8), (4, 4)).net()
    weight = sum(b["mask"].sum() for b in ran_by_all)
    expected = oracle.gradients(
        net, {"loss": sum(scenes.masked(net, b) for b in ran_by_all)}, {"loss": weight}
    )
    for grads, said, _ in found:
        assert said == weight.item() > 0 and oracle.error(grads, expected) <= EXACT


def test_the_rate_of_a_rank_is_its_own():
    """Without the time in which it has waited for others."""
    for fast, other in ran(scenes.slow, 2):
        assert fast > 4 * other > 0


def test_each_rank_finds_its_own_budget():
    """One has nothing to measure on at first."""
    first, other = ran(scenes.automatic, 2)
    assert max(error for error, _ in (*first, *other)) <= EXACT
    assert other[0][1] == "auto" and "auto" not in (first[0][1], first[1][1], other[1][1])


@pytest.mark.parametrize("values", [10**6, 64, 100])
@pytest.mark.parametrize("kind", ["sum", "late"])
def test_collectives_of_a_step(kind, values):  # [A8]
    """None inside of the window; two messages, and as many sums as buckets are filled."""
    case = Case(*UNEVEN[3], kind, windows=3, bucket=8 * values)
    for windows in ran(scenes.counted, 3, case):
        for i, window in enumerate(windows):
            assert window["inside"] == [] and window["others"] == []
            assert window["control"] == (3 if i == 0 else 2)  # parameters are compared once
            beside = sum(window["data"]) - window["values"]
            assert 0 < beside <= 2 * 2 * 3
            assert len(window["data"]) == math.ceil((window["values"] + beside) / values)


@pytest.mark.parametrize(
    ("kind", "first", "later"),
    [
        ("divided by nothing", 9, 2),
        ("mean over rows", 4, 3),
        ("classes", 4, 3),
        ("routed", 5, 4),
    ],
)
def test_collectives_of_a_measured_loss(kind, first, later):
    """One message more while counters still agree, and one for what terms are divided by."""
    case = Case(dealt(12, 7), (3, 2), kind, windows=3)
    for windows in ran(scenes.counted, 2, case):
        assert all(window["inside"] == [] and len(window["data"]) == 1 for window in windows)
        assert [window["control"] for window in windows] == [first, later, later]


SHARES = {
    "uneven": (dealt(11, 4), (3, 2)),
    "three ranks": (dealt(5, 2, 9), (2, 1, 4)),
    "idle at first": (((), *dealt(14)), (3, 4)),
    "one example beside many": (dealt(1, 13), (1, 3)),
    "one micro-batch each": (dealt(8, 8), (8, 8)),
}
WITHOUT = ("coupled", "by rank")
MEASURED = [kind for kind in {**scenes.MEANS, **scenes.COUNTED} if kind not in WITHOUT]


@pytest.mark.parametrize("shares", SHARES)
def test_what_a_loss_is_a_mean_over_is_measured_for_all_ranks(shares):
    cases = [Case(*SHARES[shares], kind, windows=2, rotating=True) for kind in MEASURED]
    found = accumulated(*cases)
    for case, values in zip(cases, found, strict=True):
        assert error(case, values) <= WEAK, case
        assert len({value["contract"] for value in values}) == 1, case


def test_one_example_on_each_rank():
    kinds = ["mean over rows", "mean over tokens", "classes", "divided by nothing"]
    cases = [Case(dealt(1, 1, 1), (1, 1, 1), kind, windows=2) for kind in kinds]
    assert wrong(errors(*cases), WEAK) == {}


def test_one_example_in_all():
    kinds = ["mean over rows", "mean over tokens", "two means"]
    assert wrong(errors(*[Case(((), (0,)), (1, 1), kind, windows=2) for kind in kinds]), WEAK) == {}


def test_a_loss_that_does_not_decompose_is_exact_in_one_micro_batch():
    case = Case(((), *dealt(9)), (9, 9), "coupled")
    found = accumulated_once(case)
    assert error(case, found) <= WEAK
    assert found[0]["windows"][0]["report"]["weight"] == 9


@pytest.mark.parametrize("shares", [dealt(6, 6), (*dealt(9), ()), dealt(1, 8), dealt(1, 1)])
def test_a_loss_that_does_not_decompose_is_refused_on_all_ranks(shares):
    case = Case(shares, (4, 4), "coupled")
    for result in launch.run(scenes.accumulated, 2, case, warm=True):
        kind, _, text = result.error.partition(": ")
        assert kind == "NotDecomposable" and "in-batch negatives" in text, result


def test_a_rank_whose_rows_train_nothing():
    """Examples 9, 14, 19 have no label."""
    kinds = ["labels", "mean over labels", "at least one", "classes", "two means"]
    shares = (9, 14, 19), (0, 1, 2, 3, 5, 6)
    cases = [Case(shares, (2, 4), kind, windows=2) for kind in kinds]
    assert wrong(errors(*cases), WEAK) == {}
    cases = [Case(((), *shares), (1, 2, 4), kind, windows=2) for kind in kinds]
    assert wrong(errors(*cases), WEAK) == {}


def test_losses_that_differ_between_ranks():
    for result in launch.run(
        scenes.accumulated, 2, Case(dealt(6, 6), (2, 2), "by rank"), warm=True
    ):
        assert result.error and "RankDisagreement: ranks measured the loss as a me" in result.error


def test_counters_that_one_rank_tells_apart_later():
    assert max(map(max, ran(scenes.grown, 2, 4))) <= WEAK


def masked(lengths, first, seed=0):
    return models.examples(lengths, seed, masked=lambda n: first(n))


def test_counters_that_agree_on_one_rank_only():
    """Shifted and unshifted counts agree where each row's first label is masked."""
    parts = [masked([5, 8, 6, 9], lambda n: 1 + n % 3), masked([7, 4, 9, 6], lambda n: n % 3, 1)]
    for found, _, _ in ran(scenes.measured, 2, parts, False):
        assert found <= WEAK
    for found, _, _ in ran(scenes.measured, 2, parts[::-1], False):
        assert found <= WEAK


def test_counters_that_only_all_ranks_together_tell_apart():
    """Each rank has rows of one length, as batches that are grouped by length have."""
    parts = [masked([5] * 4, lambda n: 0), masked([9] * 4, lambda n: 0, seed=1)]
    for found, _, _ in ran(scenes.measured, 2, parts, False):
        assert found <= WEAK


@pytest.mark.parametrize("swap", [False, True])
def test_memory_that_runs_out_in_the_step_that_measures(swap):
    parts = [masked([5, 8, 6, 9], lambda n: 1 + n % 3), masked([7, 4, 9, 6], lambda n: n % 3, 1)]
    (one, times, _), (other, none, forwards) = ran(
        scenes.measured, 2, parts[::-1] if swap else parts, True
    )
    assert one <= WEAK and other == one
    assert (times, none) == (1, 0)
    assert forwards == (4 if swap else 2)  # what the other has heard does not always suffice


@pytest.mark.parametrize("shares", [dealt(7, 4), (*dealt(9), ())], ids=["both", "idle"])
def test_windows_that_are_prepared_ahead(shares):
    kinds = [*KINDS, "mean over labels", "classes", "two means"]
    cases = [Case(shares, (3, 2), kind, windows=3, ahead=True) for kind in kinds]
    assert wrong(errors(*cases), WEAK) == {}


@pytest.mark.parametrize("given", ["ahead", "lazily"])
def test_windows_given_otherwise_run_again_as_well(given):
    case = Case(dealt(12, 16), (4, 8), windows=2, faults={1: {"forward": [1], "backward": [6]}})
    case = replace(case, **{given: True})
    found = accumulated_once(case)
    assert error(case, found) <= EXACT
    assert [len(w["recoveries"]) for w in found[1]["windows"]] == [1, 1]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("seed", "parameters differ between ranks 0 and 1"),
        ("shape", "last.bias"),
        ("order", "parameters differ between ranks 0 and 1, first.bias among them"),
        ("frozen", "2 of 12 parameters differ between ranks 0 and 1, first.bias among them"),
        ("dtype", "unused"),
        ("terms", "lack one of the terms ['fit', 'kind', 'other']"),
        ("accumulate_dtype", "torch.float32"),
    ],
)
def test_ranks_that_would_train_different_things_raise(how, text):
    """Each time that they try."""
    for rank in ran(scenes.disagreeing, 2, how):
        for kind, said, _ in rank:
            assert kind == "RankDisagreement" and text in said


def test_ranks_that_have_the_same_examples_are_warned_once():
    """A loader that shares nothing out."""
    (warning,), *others = ran(scenes.doubled, 3, True)
    assert warning.startswith("3 ranks, 0 and 1 among them, have the same examples") and others == [
        [],
        [],
    ]
    assert ran(scenes.doubled, 3, False) == [[], [], []]


def test_a_parameter_that_is_frozen_later_on_one_rank():
    for (first, _, _), (kind, said, _) in ran(scenes.disagreeing, 2, "later"):
        assert first == "" and kind == "RankDisagreement" and "9 parameters" in said


def test_memory_that_runs_out_for_what_is_added():
    """Zeros for what this rank has no gradient of are there before the others begin to add."""
    for first, second in ran(scenes.late, 2, "zeros"):
        assert first[0] == second[0] == ""


def test_memory_that_runs_out_when_gradients_are_handed_over():
    """The others have stepped on: it is too late to run again, and they raise in the next step."""
    (first, then), (own,) = ran(scenes.late, 2, "hand over")
    assert own[0] == "OutOfMemoryError" and first[0] == ""
    assert then[0] == "PeerFailed" and "rank 1 of 2 failed in this step: OutOfM" in then[1]


def test_the_report_is_that_of_one_process():
    kinds = [*KINDS, "classes", "mean over labels", "divided by nothing"]
    cases = [Case(((), *dealt(9, 6)), (1, 2, 4), kind) for kind in kinds]
    for case, found in zip(cases, accumulated(*cases), strict=True):
        alone = replace(case, shares=dealt(15), budgets=(4,))
        step = scenes.accumulator(alone).backward(alone.rows(0))
        wanted = scenes.told(step)["report"]
        for rank, value in enumerate(found):
            window = value["windows"][0]
            assert window["rank"] == rank and window["sync"] == "replicated"
            assert [s.num_micros for s in window["shares"]] == [0, 5, 2]
            assert [s.num_examples for s in window["shares"]] == [0, 9, 6]
            assert all(isinstance(s, Share) for s in window["shares"])
            report = window["report"]
            assert report["loss"] == pytest.approx(wanted["loss"], rel=1e-13)
            assert report["terms"] == pytest.approx(wanted["terms"], rel=1e-13)
            for name in ("weight", "unit", "num_examples", "useful"):
                assert report[name] == wanted[name], (case, name)
            assert "in 7 micro-batches on 3 ranks" in window["text"]


def test_weights_that_are_reported_late_are_not_rounded():
    """In a float32 model: more than 16 million tokens on each rank, say."""
    case = Case(dealt(3, 5), (3, 5), "counts", dtype=torch.float32)
    for value in accumulated_once(case):
        assert value["windows"][0]["report"]["weight"] == 40_000_001


def test_ranks_measure_their_own_examples_and_add_what_they_find():
    """A rank without examples, one with two, which are two draws, and one with a single one."""
    case = Case(dealt(0, 2, 1), (1, 1, 1))
    found = ran(scenes.in_parts, 3, case, range(12))
    assert found[0] == found[1] == found[2]
    whole = sum(float(g.square().sum()) for g in expected(case).values() if g is not None)
    draws = {round(squares.examples, 12): squares for squares in found[0]}
    assert len(draws) == 2
    assert all(s.gradient == pytest.approx(whole, rel=1e-12) for s in draws.values())
    assert all(s.num_examples == 3 for s in draws.values())
    examples, weights = scenes.each(case)
    assert sum(s.examples for s in draws.values()) / 2 == pytest.approx(examples, rel=1e-12)
    assert sum(s.weights for s in draws.values()) / 2 == pytest.approx(weights, rel=1e-12)
