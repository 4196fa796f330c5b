"""FSDP2 and HSDP: the gradient of one process, whatever ranks run, and wherever one fails.

Expected values come from one process and the whole batch; ranks are processes of their own.
"""

import pytest
import torch

import gradaccum
from gradaccum.sync.modes import held_bytes
from tests import models, oracle
from tests.distributed import fsdp_scenes as scenes
from tests.distributed import launch
from tests.distributed.fsdp_scenes import ROWS, Net

MODES = ["each", "once", "hold"]
EXACT = 1e-14  # seen: 3e-16
CAUSE = f"KeyError: {scenes.MISTAKE!r}"
IGNORED = {"ignored": ("branch.weight", "scale")}


def expected(hidden: int = 15, dtype=torch.float64, is_flagged: bool = False) -> dict:
    net, batch = Net(hidden, dtype), scenes.rows(dtype=dtype)
    batch["flag"] |= is_flagged
    return oracle.gradients(net, {"loss": scenes.loss(net, batch)}, {"loss": ROWS})


def run(jobs: list, world: int, deadline: float = 60) -> list:
    """Return what each rank returned, for each job: a function and its arguments."""
    named = [(job[0], job[1:]) for job in jobs]
    found = launch.run_many(named, world, deadline=deadline, warm=True)
    return [launch.values(results) for results in found]


def windows(jobs: list, world: int, deadline: float = 60) -> list:
    """Run several `scenes.windows`; return by job and rank what became of each window."""
    return run([(scenes.windows, *job) for job in jobs], world, deadline)


def check(gradients: dict, limit: float = EXACT, **model) -> None:
    want = expected(**model)
    assert oracle.error(gradients, want) <= limit
    assert abs(oracle.signed_residual(gradients, want)) <= limit


def check_windows(by_rank: list, limit: float = EXACT, **model) -> None:
    for window in [window for found in by_rank for window in found]:
        assert "error" not in window, window
        check(window["gradients"], limit, **model)


def test_3_and_5_micro_batches():
    want = scenes.loss(Net(), scenes.rows()).item() / ROWS
    # Four groups: each gathers in forward and again in backward, but the root, which stays.
    collectives = {"each": (5 * 7, 5 * 4), "once": (5 * 7, 4), "hold": (4, 4)}
    texts = {"each": "reduced in each micro-batch", "once": "reduced once", "hold": "gathered once"}
    for mode, by_rank in zip(MODES, windows([(mode,) for mode in MODES], 2), strict=True):
        check_windows(by_rank)
        for rank, window in [(r, window) for r, found in enumerate(by_rank) for window in found]:
            assert window["runs"] == [3, 5]
            assert window["loss"] == pytest.approx(want, rel=1e-14)
            assert len(window["outputs"]) == ([3, 5][rank] if mode == "hold" else 5)
            assert (window["counts"]["gather"], window["counts"]["scatter"]) == collectives[mode]
            assert window["sync"].startswith(f"sharded, {texts[mode]} (held ")
            # Few rows of rank 0 use the one; nobody uses the other.
            assert window["gradients"]["branch.weight"].abs().max() > 0
            assert window["gradients"]["nobody"] is None


def test_one_process_and_torch_alone_differ_where_only_the_root_sums():
    """The tests can fail: `set_gradient_divide_factor` is not recursive."""
    nothing, root, every = run([(scenes.raw, how) for how in ("nothing", "root", "all")], 2)
    for found, low, high in ((nothing, 0.49, 0.51), (root, 0.2, 0.5), (every, 0, EXACT)):
        for gradients in found:
            del gradients["nobody"]  # zeros, by torch alone
            want = expected(is_flagged=not scenes.HAS_UNUSED)
            del want["nobody"]
            assert low <= oracle.error(gradients, want) <= high


def test_float32_over_gloo():
    options = {"dtype": torch.float32}
    for by_rank in windows([(mode, options) for mode in MODES], 2):
        check_windows(by_rank, limit=1e-6)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_one_rank(mode):
    narrow = {"dtype": torch.bfloat16}
    exact, rounded = windows([(mode,), (mode, narrow)], 1)
    check_windows(exact)
    # One pass over all rows in bfloat16 is as far from one process in float64.
    check_windows(rounded, limit=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_ways_to_shard(mode):
    kinds = [
        ("grouped", {"how": "grouped"}),
        ("root", {"how": "root"}),
        ("blocks", {"how": "blocks"}),  # all others are on every rank
        ("ignored", IGNORED),
        ("narrow", {"hidden": 1}),  # shards without elements
        ("checkpointed", {"is_checkpointed": True}),
        ("kept", {"reshard_after_forward": False}),
        ("given back", {"reshard_after_forward": True}),
    ]
    for (name, options), by_rank in zip(
        kinds, windows([(mode, options, 1) for _, options in kinds], 2), strict=True
    ):
        print(name)
        check_windows(by_rank, hidden=options.get("hidden", 15))


def test_a_group_that_one_rank_runs():
    (by_rank,) = windows([("hold", {"how": "branch"})], 2)
    check_windows(by_rank)


def test_four_ranks_and_parts_of_them():
    parts = {"reshard_after_forward": 2}
    jobs = [("each", parts, 1), ("hold", parts, 1), ("once", {}, 1)]
    jobs.append(("each", parts, 2, None, 4, dict.fromkeys((1, 2), ("middle", [0], "memory"))))
    for by_rank in windows(jobs, 4):
        check_windows(by_rank)


def test_replicas_of_shards_run_windows_of_their_own():
    """HSDP: 3 micro-batches in one replica, 5 in the other; replicas are summed once."""
    cuts = (0, 4, 12, 13, 32)  # 1, 2 | 1, 5
    jobs = [(mode, {"replicas": 2}, 2, cuts) for mode in MODES]
    for mode, by_rank in zip(MODES, windows(jobs, 4), strict=True):
        check_windows(by_rank)
        for rank, found in enumerate(by_rank):
            for window in found:
                assert window["runs"] == [1, 2, 1, 5]
                alike = [2, 2, 5, 5][rank]
                assert len(window["outputs"]) == (window["runs"][rank] if mode == "hold" else alike)
                assert window["counts"]["all_reduce"] == 4
                assert window["counts"]["scatter"] == (4 * alike if mode == "each" else 4)
        for name, value in by_rank[0][0]["gradients"].items():
            others = [found[0]["gradients"][name] for found in by_rank]
            assert all(value is other or torch.equal(value, other) for other in others)


@pytest.mark.parametrize(("replicas", "world"), [(1, 1), (1, 2), (2, 2)])
def test_an_axis_of_one(replicas, world):
    """One replica, and shards that are whole."""
    fault = {world - 1: ("middle", [1], "memory")}
    options = {"replicas": replicas}
    jobs = [(mode, options, 2, None, 4, fault) for mode in MODES]
    for by_rank in windows(jobs, world):
        check_windows(by_rank)


def test_a_gradient_that_is_lost_is_no_step():
    for said in run([(scenes.lost,)], 2)[0]:
        assert "has left no gradient in" in said


def test_a_replica_without_examples():
    cuts = (0, 12, 32, 32, 32)
    for by_rank in windows([(mode, {"replicas": 2}, 1, cuts) for mode in MODES], 4):
        check_windows(by_rank)


@pytest.mark.parametrize("mode", MODES)
def test_memory_runs_out_on_one_rank(mode):
    faults = [("forward", 0), ("middle", 2), ("last", 4), ("middle", 0), ("last", 7)]
    jobs = [(mode, {}, 2, None, 4, {1: (where, [at], "memory")}) for where, at in faults]
    for (_, at), by_rank in zip(faults, windows(jobs, 2), strict=True):
        check_windows(by_rank)
        for rank, found in enumerate(by_rank):
            for i, window in enumerate(found):
                has_failed = at // 5 == i
                assert window["runs"] == ([3, 10] if has_failed else [3, 5])
                assert window["num_recoveries"] == (has_failed and rank == 1)
                if mode == "hold":  # the other runs nothing again, and nothing is gathered again
                    assert rank == 1 or len(window["outputs"]) == 3
                    assert window["counts"]["gather"] == 4
                elif rank == 0:  # two rounds: all 5 with the rank that failed, and 10
                    outputs = window["outputs"]
                    assert len(outputs) == (15 if has_failed else 5)
                    if has_failed:  # who failed still gives its part of the parameters
                        assert outputs[:3] == outputs[5:8]


@pytest.mark.parametrize("mode", ["each", "once"])
def test_memory_runs_out_on_all_ranks_at_once(mode):
    """Nobody is left who could say what a micro-batch runs, before one has."""
    faults = [
        {0: ("middle", [0], "memory"), 1: ("middle", [0], "memory")},
        {
            0: ("forward", [0], "memory"),
            1: ("last", [0, 3], "memory"),
        },  # one further than the other
    ]
    jobs = [(mode, {}, 2, None, 4, fault) for fault in faults]
    for by_rank in windows(jobs, 2):
        check_windows(by_rank)


def test_memory_runs_out_where_more_is_gathered_or_replicated():
    jobs = [
        ("each", {"is_checkpointed": True}, 2, None, 4, {1: ("middle", [0], "memory")}),
        ("each", {"how": "grouped"}, 2, None, 4, {1: ("last", [2], "memory")}),
        ("once", {"how": "blocks"}, 2, None, 4, {0: ("middle", [1], "memory")}),
        ("each", IGNORED, 2, None, 4, {1: ("last", [3], "memory")}),
        ("hold", IGNORED, 2, None, 4, {1: ("last", [3], "memory")}),
    ]
    for by_rank in windows(jobs, 2):
        check_windows(by_rank)


def test_memory_runs_out_in_one_replica():
    jobs = [
        ("each", {"replicas": 2}, 2, None, 4, {1: ("last", [0], "memory")}),
        ("once", {"replicas": 2}, 2, None, 4, dict.fromkeys((2, 3), ("middle", [1], "memory"))),
        ("hold", {"replicas": 2}, 2, None, 4, dict.fromkeys((0, 3), ("middle", [0], "memory"))),
    ]
    for by_rank in windows(jobs, 4):
        check_windows(by_rank)


def test_memory_runs_out_before_the_first_micro_batch():
    jobs = [
        (scenes.early, mode, where, is_idle)
        for mode, where in (("each", "first"), ("once", "second"))
        for is_idle in (False, True)  # where others wait for inputs, and have not begun
    ]
    for found in run(jobs, 2):
        for gradients in (gradients for rank in found for gradients in rank):
            check(gradients)


def test_inputs_that_cannot_be_lent():
    (found,) = run([(scenes.unsent,)], 2)
    assert found == [f"PeerFailed: rank 1 of 2 failed in this step: {CAUSE}", CAUSE]


@pytest.mark.parametrize("mode", MODES)
def test_other_errors_are_raised_by_every_rank(mode):
    jobs = [
        (mode, {}, 2, None, 4, {1: ("middle", [0], "other")}),
        (mode, {}, 2, None, 4, {0: ("last", [2], "other")}),
    ]
    for failing, by_rank in zip((1, 0), windows(jobs, 2), strict=True):
        assert by_rank[failing][0]["error"] == CAUSE
        peer = f"PeerFailed: rank {failing} of 2 failed in this step: {CAUSE}"
        assert by_rank[1 - failing][0]["error"] == peer
        check_windows([found[1:] for found in by_rank])


def test_one_example_does_not_fit():
    for mode in ("each", "hold"):
        job = (mode, {}, 1, None, 4, {1: ("forward", list(range(99)), "memory")})
        one, other = windows([job], 2)[0]
        assert one[0]["error"].startswith("PeerFailed: rank 1 of 2 failed in this step: DoesNotFit")
        assert other[0]["error"].startswith("DoesNotFit: example 0 of the effective batch")
        assert ("sync='each'" in other[0]["error"]) == (mode == "hold")


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_rank_is_noticed(mode):
    where = "second" if mode == "once" else "first"
    survivor, victim = launch.run(scenes.killed, 2, mode, where, deadline=30, warm=True)
    assert victim.returncode == -9
    kind, seconds = survivor.value
    assert kind == "PeerFailed"
    assert seconds < 5


def test_what_a_failed_window_of_torch_alone_left_behind():
    control, *ours = run([(scenes.stale, mode) for mode in (None, *MODES)], 2)
    for gradients in (gradients for found in ours for gradients in found):
        check(gradients)
    if control[0] is not None:  # reset_iter_state, since torch 2.13
        assert oracle.error(control[0], expected(is_flagged=True)) > 0.1


def test_torch_alone_is_what_it_was_after_a_window():
    for found in run([(scenes.left_alone, mode) for mode in MODES], 2):
        for ours, alone in found:
            check(ours)
            check(alone)


def test_training_gives_the_weights_of_one_process():
    net, batch = Net(), scenes.rows()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.3)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        (scenes.loss(net, batch) / ROWS).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1).item())
        optimizer.step()
    want = {name: p.detach() for name, p in net.named_parameters()}
    found = run([(scenes.training, mode) for mode in ("each", "hold")], 2)
    found += run([(scenes.training, "each", True)], 4)
    for ours, parameters in [rank for ranks in found for rank in ranks]:
        assert ours == pytest.approx(norms, rel=1e-12)
        assert oracle.error(parameters, want) <= 1e-12


def test_a_rank_without_examples():
    """What it runs for the others is thrown away, even if it is not finite."""
    jobs = [(scenes.idle, mode, is_bad) for mode in MODES for is_bad in (False, True)]
    for found in run(jobs, 2):
        for gradients, nums in found:
            assert nums == [0, ROWS]
            check(gradients)


def test_a_causal_language_model():
    examples = models.examples([9, 3, 7, 5, 12, 4, 6, 8])
    net = models.model()
    want = oracle.gradients(net, *models.oracle_loss(net, models.collated(examples)))
    for found in run([(scenes.language, mode) for mode in MODES], 2):
        for gradients in found:
            assert oracle.error(gradients, want) <= EXACT


def test_weights_that_are_reported_late_and_none_at_all():
    for found in run([(scenes.late, mode) for mode in MODES], 2):
        for (gradients, _), (zeros, loss) in found:
            check(gradients)
            assert loss == 0
            assert all((grad == 0).all() for grad in zeros.values())


def test_16_bits_are_no_worse_than_by_torch_alone():
    want = expected(16, is_flagged=True)

    def precise(mode, policy):
        return scenes.precise, mode, policy

    found = run([precise(None, "mixed"), *(precise(mode, "mixed") for mode in MODES)], 2)
    alone, *ours = [oracle.error(ranks[0], want) for ranks in found]
    assert alone < 0.02
    assert max(ours) <= alone * (1 + 1e-6)
    # Parameters of 16 bits: torch alone adds up their gradients in 16 bits as well.
    found = run([precise(None, "pure"), *(precise(mode, "pure") for mode in MODES)], 2)
    alone, *ours = [oracle.error(ranks[0], want) for ranks in found]
    assert max(ours) < 0.98 * alone
    found = run([precise(mode, "wide") for mode in MODES], 2)
    assert {g.dtype for ranks in found for g in ranks[0].values() if g is not None} == {
        torch.float32
    }
    assert max(oracle.error(ranks[0], want) for ranks in found) < min(ours)


def test_bytes_held_between_micro_batches():
    wide = {"reduce_itemsize": 4, "param_itemsize": 2}
    for found, mode, shard_ranks in [
        *zip(run([(scenes.held, mode) for mode in MODES], 2), MODES, (2, 2, 2), strict=True),
        *zip(
            run([(scenes.held, "each"), (scenes.held, "each", True)], 4),
            ("each", "each"),
            (4, 2),
            strict=True,
        ),
    ]:
        for seen, num, _ in found:
            want = held_bytes(mode, num, shard_ranks=shard_ranks, **wide)
            assert seen == [want] * 3


def test_the_plan_knows_what_a_rank_takes():
    rows = 4
    found = run([(scenes.stepped, mode, rows) for mode in MODES], 2)
    plan = gradaccum.plan(
        scenes.language_model(),
        effective_batch=4 * rows,
        ranks=2,
        shard_ranks=2,
        lengths=scenes.TOKENS,
        memory="8GiB",
        optimizer=scenes.adam,
        checkpointing=False,
    )
    planned = {o.sync: o.peak_bytes for o in plan.options if o.chunk is None and o.rows == rows}
    for mode, peaks in zip(MODES, found, strict=True):
        for peak in peaks:
            assert 0.93 <= planned[mode] / peak <= 1.2  # seen: 1.00 to 1.13


def test_the_mode_follows_from_the_memory_there_is():
    jobs = [(scenes.crowded, where) for where in ("nowhere", "available", "gathering", "end")]
    for (_, where), found in zip(jobs, run(jobs, 2), strict=True):
        way = "gathered once" if where == "nowhere" else "reduced in each micro-batch"
        for gradients, sync, num_recoveries in [window for rank in found for window in rank]:
            check(gradients)
            assert sync.startswith(f"sharded, {way}")
            assert num_recoveries == 0


def test_no_room_to_reduce():
    for found in run([(scenes.crowded, "end", mode) for mode in ("once", "hold")], 2):
        for rank, ((gradients, _, num_recoveries), _) in enumerate(found):
            check(gradients)
            assert num_recoveries == (rank == 0)


def test_collectives_may_differ_between_windows_not_between_micro_batches():
    switched, varied = run([(scenes.switched,), (scenes.varied,)], 2)
    for gradients in [gradients for found in switched for gradients in found]:
        check(gradients)
    assert all(said.startswith("NotDecomposable: micro-batches of this model") for said in varied)


def test_what_is_refused():
    said, other = run([(scenes.refused,)], 2)[0]
    assert said == other
    for name, text in {
        "parallel": "BadInput: 0.weight is a DTensor, and fully_shard has not made it",
        "wide": "BadInput: weight is sharded as S(1), not in its first dimension",
        "offloaded": "BadInput: CPUOffloadPolicy keeps gradients on the CPU",
        "hooked": "BadInput: set_all_reduce_hook reduces gradients in a way",
        "part": "BadInput: the model is sharded over 1 of 2 ranks",
        "other": "RankDisagreement: 1 of 17 parameters differ between ranks 0 and 1, scale among",
        "word": "BadInput: sync='twice' is none of 'each', 'once', 'hold'",
        "words": "RankDisagreement: 1 of 17 parameters differ between ranks 0 and 1, sync among",
        "plain": "BadInput: sync='each' is for models that went through fully_shard",
        "measured": "BadInput: this loss is measured by forwards that each rank runs on its own",
        "auto": "BadInput: budget='auto' is measured by micro-batches that each rank runs",
    }.items():
        assert said[name].startswith(text), name
    (replicas,) = run([(scenes.unequal_replicas,)], 4)
    text = "RankDisagreement: 1 of 16 parameters differ between ranks 1 and 3, scale among them"
    assert all(said.startswith(text) for said in replicas)
