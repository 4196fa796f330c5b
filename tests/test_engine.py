"""Accumulated gradients against the oracle: float64, any cut, any order, any form of the batch."""

import copy
import functools
import math
import random
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import gradaccum
from gradaccum import device as device_memory
from gradaccum.errors import BadInput, CountMismatch, NotDecomposable
from gradaccum.types import Step
from tests import oracle
from tests.models import CausalLM, collated, examples, model, oracle_loss

Budget = gradaccum.Budget


def accumulated(net, batch, budget, objective=None, **kwargs):
    net.zero_grad()
    objective = objective or gradaccum.causal_lm()
    step = gradaccum.Accumulator(net, objective, budget=budget, **kwargs).backward(batch)
    return oracle.left_in(net), step


def truth(net, batch):
    return oracle.gradients(net, *oracle_loss(net, batch))


budgets = st.one_of(
    st.integers(1, 60).map(lambda n: Budget(tokens=n)),
    st.integers(1, 12).map(lambda n: Budget(examples=n)),
    st.tuples(st.integers(1, 60), st.integers(1, 5)).map(
        lambda b: Budget(tokens=b[0], examples=b[1])
    ),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    masked=st.integers(0, 25),
    budget=budgets,
    form=st.sampled_from(["list", "right", "left"]),
    seed=st.integers(0, 10**6),
)
def test_any_cut_of_any_batch_gives_the_full_gradient(lengths, masked, budget, form, seed):
    net, rng = model(seed % 7), random.Random(seed)
    batch = examples(lengths, seed, masked=lambda n: rng.randint(0, min(n, masked)))
    full = collated(batch, "left" if form == "left" else "right", extra=seed % 3)
    given_batch = batch if form == "list" else full
    loss, weight = oracle_loss(net, full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, step = accumulated(net, given_batch, budget)
    assert step.num_examples == len(batch)
    assert step.weight == weight["loss"]
    if not weight["loss"]:
        assert all((g == 0).all() for g in found.values())
        return
    expected = truth(net, full)
    assert oracle.error(found, expected) <= 1e-12
    assert abs(oracle.signed_residual(found, expected)) <= 1e-12
    assert step.loss == pytest.approx(loss["loss"].item() / weight["loss"], rel=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=2, max_size=10),
    budget=budgets,
    seed=st.integers(0, 10**6),
)
def test_float32_stays_within_1e_6(lengths, budget, seed):
    net = model(seed % 5, dtype=torch.float32)
    batch = examples(lengths, seed)
    expected = truth(copy.deepcopy(net).double(), collated(batch))
    found, _ = accumulated(net, batch, budget)
    assert oracle.error(found, expected) <= 1e-6
    assert abs(oracle.signed_residual(found, expected)) <= 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    budget=st.integers(1, 9).map(lambda n: Budget(examples=n)),
    seed=st.integers(0, 10**6),
    late=st.booleans(),
)
def test_terms_have_their_own_denominators(rows, budget, seed, late):
    """Two terms with two counts; or one whose count is only known after the forward."""
    g = torch.Generator().manual_seed(seed)
    batch = {
        "x": torch.randn(rows, 4, generator=g, dtype=torch.float64),
        "y": torch.randn(rows, 2, generator=g, dtype=torch.float64),
        "has_aux": torch.rand(rows, generator=g) < 0.5,
    }
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def loss(net, micro):
        out = net(micro["x"])
        main = (out - micro["y"]).square().sum()
        aux = (out[micro["has_aux"]]).abs().sum()
        return (main, torch.tensor(micro["y"].numel())) if late else {"main": main, "aux": aux}

    def weight(micro):
        return {"main": micro["y"].numel(), "aux": micro["has_aux"].sum()}

    objective = gradaccum.Objective(loss, None if late else weight)
    found, step = accumulated(net, batch, budget, objective)
    terms = {"main": loss(net, batch)[0]} if late else loss(net, batch)
    counts = {name: max(int(weight(batch)[name]), 1) for name in terms}
    expected = oracle.gradients(net, terms, counts)
    assert oracle.error(found, expected) <= 1e-12
    assert step.loss == pytest.approx(sum(terms[t].item() / counts[t] for t in terms), rel=1e-12)
    if late:
        assert step.weight == batch["y"].numel()


@pytest.mark.parametrize("weight", ["rows", "tokens", "shifted_tokens", "callable"])
def test_from_mean_undoes_the_mean(weight):
    net, batch = model(), collated(examples([3, 9, 4, 12, 7]))
    count = {
        "rows": lambda b: len(b["labels"]),
        "tokens": lambda b: (b["labels"] != -100).sum(),
        "shifted_tokens": lambda b: (b["labels"][:, 1:] != -100).sum(),
        "callable": lambda b: b["attention_mask"].sum(),
    }[weight]

    def mean(net, micro):
        return oracle_loss(net, micro)[0]["loss"] / count(micro)

    objective = gradaccum.from_mean(mean, weight=count if weight == "callable" else weight)
    found, _ = accumulated(net, batch, Budget(examples=2), objective)
    expected = oracle.gradients(net, {"loss": mean(net, batch)}, {"loss": 1})
    assert oracle.error(found, expected) <= 1e-12


def test_twenty_steps_follow_the_full_batch_trajectory():
    ours, full = model(), model()
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (ours, full)]
    accumulator = gradaccum.Accumulator(ours, gradaccum.causal_lm(), budget=Budget(tokens=24))
    rng = random.Random(0)
    for i in range(20):
        batch = examples([rng.randint(2, 20) for _ in range(8)], seed=i)
        step = accumulator.backward(batch)
        loss, weight = oracle_loss(full, collated(batch))
        (loss["loss"] / weight["loss"]).backward()
        assert step.loss == pytest.approx(loss["loss"].item() / weight["loss"], rel=1e-10)
        for net, optimizer in zip((ours, full), optimizers, strict=True):
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    distance = oracle.error(dict(ours.named_parameters()), dict(full.named_parameters()))
    assert 0 < distance <= 1e-10


def test_bf16_parameters_are_summed_in_float32_and_rounded_once():
    torch.manual_seed(0)
    net = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    batch = {"x": torch.randn(512, 16).bfloat16()}
    objective = gradaccum.Objective(
        lambda net, micro: net(micro["x"]).float().square().sum(), lambda m: len(m["x"])
    )
    one = {"budget": Budget(examples=1), "objective": objective}
    contributions = []
    for row in batch["x"]:
        loss = net(row[None]).float().square().sum() / 512
        contributions.append(torch.autograd.grad(loss, net.weight)[0].double())
    exact = {"weight": torch.stack(contributions).sum(0)}
    wide, _ = accumulated(net, batch, **one, grad_dtype=torch.float32)
    assert wide["weight"].dtype == torch.float32
    assert oracle.error(wide, exact) < 1e-6
    net = copy.deepcopy(net)  # a fresh grad_dtype
    rounded, _ = accumulated(net, batch, **one)
    assert rounded["weight"].dtype == torch.bfloat16
    assert torch.equal(rounded["weight"], wide["weight"].bfloat16())
    narrow, _ = accumulated(net, batch, **one, accumulate_dtype=None)
    assert oracle.error(narrow, exact) > 1e-2


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "RMSprop"])
def test_optimizers_take_what_is_handed_over(name):
    net = model(dtype=torch.bfloat16)
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-2)
    before = net.head.weight.clone()
    accumulated(net, examples([5, 9, 3]), Budget(examples=1))
    optimizer.step()
    assert not torch.equal(before, net.head.weight)


def test_autocast_runs_forwards_only():
    net, batch = model(dtype=torch.float32), collated(examples([4, 9, 6, 11]))
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    def loss(net, micro):
        seen.append(torch.is_autocast_enabled("cpu"))
        return Probe.apply(gradaccum.causal_lm().loss(net, micro))

    objective = gradaccum.Objective(loss, gradaccum.causal_lm().weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, step = accumulated(net, batch, Budget(examples=2), objective)
    assert seen == [True, False] * step.num_micros
    by_hand = copy.deepcopy(net)
    by_hand.zero_grad()
    for micro in step.micros:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            part = {k: v[list(micro.examples)] for k, v in batch.items()}
            total = gradaccum.causal_lm().loss(by_hand, part) / step.weight
        total.backward()
    assert oracle.error(found, oracle.left_in(by_hand)) < 1e-2  # bf16 at other widths


def test_grad_scaler_checkpointing_and_dropout_need_nothing_special():
    net, batch = model(dtype=torch.float32), examples([5, 9, 3, 12])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, _ = accumulated(
        net, batch, Budget(examples=1), backward=lambda loss: scaler.scale(loss).backward()
    )
    plain, _ = accumulated(copy.deepcopy(net), batch, Budget(examples=1))
    unscaled = {n: None if g is None else g / 2**10 for n, g in scaled.items()}
    assert oracle.error(unscaled, plain) < 1e-7

    class Checkpointed(CausalLM):
        def forward(self, *args, **kwargs):
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)

    dropping = model(dropout=0.3)
    recomputed = Checkpointed(dropout=0.3)
    recomputed.load_state_dict(dropping.state_dict())
    torch.manual_seed(1)
    expected, _ = accumulated(dropping, batch, Budget(examples=1))
    torch.manual_seed(1)
    found, _ = accumulated(recomputed, batch, Budget(examples=1))
    assert oracle.error(found, expected) <= 1e-12


def test_compiled_models_give_the_same_gradient():
    net, batch = model(), collated(examples([5, 9, 3, 12]))
    expected = truth(net, batch)
    compiled = torch.compile(net, backend="aot_eager", dynamic=True)
    gradaccum.Accumulator(compiled, gradaccum.causal_lm(), budget=Budget(examples=2)).backward(
        batch
    )
    assert oracle.error(oracle.left_in(net), expected) <= 1e-12


def test_lora_adapters_on_a_frozen_base():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "partly"], init_lora_weights=False)
    net, batch = peft.get_peft_model(model(), config), examples([5, 9, 3, 12])
    found, _ = accumulated(net, batch, Budget(tokens=10))
    assert found and all("lora" in name for name in found)
    assert oracle.error(found, truth(net, collated(batch))) <= 1e-12


def test_micro_batches_without_weight_never_run():
    """Row 1 has no label and an input that the model turns into inf: 0 * inf would be nan."""
    net = model()
    batch = examples([4, 4, 4])
    batch[1] = {"input_ids": batch[1]["input_ids"], "labels": [-100] * 4}
    ran = []
    net.register_forward_hook(lambda *_: ran.append(1))
    found, step = accumulated(net, batch, Budget(examples=1))
    assert (len(ran), step.num_micros) == (2, 3)
    assert oracle.error(found, truth(net, collated([batch[0], batch[2]]))) <= 1e-12


def test_a_window_without_weight_leaves_zeros_and_says_so():
    net = model(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="no trained tokens: the gradients are zero"):
        found, step = accumulated(net, examples([4, 6], masked=lambda n: n), Budget(examples=1))
    assert all(g is not None and g.dtype == torch.bfloat16 and not g.any() for g in found.values())
    assert step.loss == 0.0 and "no trained tokens" in str(step)


def test_a_loss_that_is_not_finite_is_named():
    net, batch = (
        nn.Linear(2, 1),
        {"x": torch.ones(4, 2), "y": torch.tensor([0.0, 0, float("inf"), 0])},
    )
    objective = gradaccum.Objective(
        lambda net, m: (net(m["x"])[:, 0] - m["y"]).square().sum(), lambda m: len(m["y"])
    )
    accumulator = gradaccum.Accumulator(net, objective, budget=Budget(examples=1))
    step = accumulator.backward(batch)
    assert [m.examples for m in step.nonfinite] == [(2,)]
    assert not torch.tensor(step.loss).isfinite() and "not finite: examples [2]" in str(step)
    net.zero_grad()
    with pytest.warns(UserWarning, match=r"last step was not finite: examples \[2\]"):
        accumulator.backward(batch)


def test_the_last_step_is_waited_for_when_all_of_the_next_is_queued(monkeypatch):
    events = []
    wait = lambda step: events.append("wait") or []  # noqa: E731
    monkeypatch.setattr(Step, "nonfinite", property(wait))
    objective = gradaccum.Objective(
        lambda net, m: events.append("run") or net(m["x"]).sum(), lambda m: len(m["x"])
    )
    collate = lambda rows: events.append("collate") or {"x": torch.stack(rows)}  # noqa: E731
    net = nn.Linear(2, 1)
    accumulator = gradaccum.Accumulator(net, objective, budget=Budget(examples=1), collate=collate)
    for _ in range(2):
        accumulator.backward([torch.ones(2), torch.ones(2)])
        net.zero_grad()
    window = ["collate", "collate", "run", "run"]
    assert events == [*window, *window, "wait"]


def test_nothing_of_a_micro_batch_is_held_once_it_has_run():
    losses = []

    def loss(net, micro):
        found = net(micro["x"]).square().sum()
        losses.append(weakref.ref(found))
        return found

    accumulator = gradaccum.Accumulator(
        nn.Linear(2, 1),
        gradaccum.Objective(loss, lambda m: len(m["x"])),
        budget=Budget(examples=1),
        after_micro=lambda _: held.append(losses[-1]()),
    )
    held = []
    accumulator.backward({"x": torch.ones(3, 2)})
    assert held == [None] * 3


def test_gradients_of_an_unfinished_step_are_detected():
    net, batch = model(), examples([3, 5])
    accumulator = gradaccum.Accumulator(net, gradaccum.causal_lm(), budget=Budget(examples=1))
    accumulator.backward(batch)
    with pytest.raises(BadInput, match="gradients of an unfinished step"):
        accumulator.backward(batch)
    sparse = nn.Embedding(5, 2, sparse=True)
    objective = gradaccum.Objective(lambda net, m: net(m["i"]).sum(), lambda m: len(m["i"]))
    looked_up = gradaccum.Accumulator(sparse, objective, budget=Budget(examples=1))
    looked_up.backward({"i": torch.arange(3)})
    with pytest.raises(BadInput, match="gradients of an unfinished step"):
        looked_up.backward({"i": torch.arange(3)})
    net.zero_grad(set_to_none=False)  # zeros are no leftovers
    accumulator.backward(batch)
    assert oracle.error(oracle.left_in(net), truth(net, collated(batch))) <= 1e-12


@pytest.mark.parametrize("fail_at", ["forward", "backward"])
def test_a_failed_window_leaves_no_gradient_and_no_changed_dtype(fail_at):
    net, calls = model(dtype=torch.bfloat16), []

    def loss(net, micro):
        calls.append(1)
        if fail_at == "forward" and len(calls) == 2:
            raise RuntimeError("boom")
        return gradaccum.causal_lm().loss(net, micro)

    def backward(loss):
        loss.backward()
        if fail_at == "backward" and len(calls) == 2:
            raise RuntimeError("boom")

    objective = gradaccum.Objective(loss, gradaccum.causal_lm().weight)
    with pytest.raises(RuntimeError, match="boom"):
        accumulated(net, examples([3, 5, 7]), Budget(examples=1), objective, backward=backward)
    assert all(p.grad is None and p.grad_dtype == torch.bfloat16 for p in net.parameters())


def test_batch_norm_is_refused_by_name_unless_the_batch_is_whole():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    batch = {"x": torch.randn(6, 2, dtype=torch.float64)}
    objective = gradaccum.Objective(lambda net, m: net(m["x"]).pow(3).sum(), lambda m: len(m["x"]))
    with pytest.raises(NotDecomposable, match=r"BatchNorm in training mode \(1\)"):
        accumulated(net, batch, Budget(examples=2), objective)
    accumulated(net, batch, Budget(examples=6), objective)
    accumulated(net.eval(), batch, Budget(examples=2), objective)


def test_what_waits_for_accumulated_gradients_is_refused():
    net, batch = nn.Linear(2, 1), {"x": torch.ones(4, 2)}
    objective = gradaccum.Objective(lambda n, m: n(m["x"]).sum(), lambda m: len(m["x"]))
    optimizer = torch.optim.SGD([net.weight], lr=1.0)
    net.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(NotDecomposable, match=r"hook on weight .* at each of the 2 micro-batches"):
        accumulated(net, batch, Budget(examples=2), objective)
    accumulated(net, batch, Budget(examples=4), objective)


@pytest.mark.parametrize("reported", [-1.0, float("nan")])
def test_a_weight_that_is_reported_wrong_is_not_hidden(reported):
    net, batch = nn.Linear(2, 1), {"x": torch.ones(4, 2)}
    objective = gradaccum.Objective(
        lambda n, m: (n(m["x"]).sum(), torch.tensor(reported)), weight=None
    )
    found, step = accumulated(net, batch, Budget(examples=2), objective)
    assert len(step.nonfinite) == 2 and found["weight"].isnan().all()


def test_a_sum_that_is_not_finite_shows_even_without_weight():
    net, batch = nn.Linear(2, 1), {"x": torch.randn(4, 2), "k": torch.tensor([1.0, 0, 1, 1])}

    def loss(net, micro):
        weight = micro["k"].sum()
        return (net(micro["x"])[:, 0] * micro["k"]).sum() / weight * weight, weight

    found, step = accumulated(
        net, batch, Budget(examples=1), gradaccum.Objective(loss, weight=None)
    )
    assert found["weight"].isnan().any() and [m.examples for m in step.nonfinite] == [(1,)]


def test_rows_are_counted_by_the_labels_not_by_a_constant():
    net = nn.Linear(4, 3).double()
    x, labels = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    constants = {"temperature": torch.tensor(2.0), "scale": torch.ones(3, dtype=torch.float64)}
    batch = constants | {"x": x, "labels": labels}

    def mean(net, micro):
        return F.cross_entropy(net(micro["x"]) * micro["scale"], micro["labels"])

    found, step = accumulated(
        net, batch, Budget(examples=4), gradaccum.from_mean(mean, weight="rows")
    )
    assert step.weight == 5
    expected = oracle.gradients(net, {"loss": mean(net, batch)}, {"loss": 1})
    assert oracle.error(found, expected) <= 1e-12


def test_reported_weights_are_summed_wide_and_zero_adds_zero():
    """1,000 weights of 3 in bf16 would stop adding up at 1,024."""
    net, batch = nn.Linear(2, 1).double(), {"x": torch.randn(1000, 2).double()}

    def loss(net, micro):
        part = net(micro["x"]).square().sum()
        is_first = (micro["x"] == batch["x"][0]).all()
        return part, torch.where(is_first, 0.0, 3.0).bfloat16()

    found, step = accumulated(
        net, batch, Budget(examples=1), gradaccum.Objective(loss, weight=None)
    )
    assert step.weight == 2997
    rest = net(batch["x"][1:]).square().sum()
    expected = oracle.gradients(net, {"loss": rest}, {"loss": 2997})
    assert oracle.error(found, expected) <= 1e-12


def test_gradients_are_handed_over_in_the_dtype_that_was_asked_for():
    net, batch = model(dtype=torch.float32), examples([5, 9, 3])
    exact, _ = accumulated(copy.deepcopy(net), batch, Budget(examples=1))
    for _ in range(2):  # the second window finds grad_dtype as the first has left it
        found, _ = accumulated(net, batch, Budget(examples=1), grad_dtype=torch.bfloat16)
        assert found["embed.weight"].dtype == torch.bfloat16
        assert torch.equal(found["embed.weight"], exact["embed.weight"].bfloat16())


def test_wrong_objectives_are_refused():
    net, batch = nn.Linear(2, 1), {"x": torch.ones(4, 2)}
    cases = [
        (lambda n, m: n(m["x"]), lambda m: 1, BadInput, "shape"),
        (lambda n, m: {"a": n(m["x"]).sum()}, lambda m: 1, CountMismatch, "terms"),
        (lambda n, m: n(m["x"]).sum(), lambda m: -1, BadInput, "at least 0"),
        (lambda n, m: n(m["x"]).sum(), None, CountMismatch, r"\(sum, weight\)"),
        (lambda n, m: (n(m["x"]).sum(), torch.ones(2)), None, BadInput, "not one number"),
        (lambda n, m: ({"a": 1}, {"a": 1}), None, CountMismatch, "several terms need"),
        (lambda n, m: n(m["x"]).sum(), lambda m: m["x"], BadInput, "not a number"),
        (lambda n, m: n(m["x"]).sum(), lambda m: None, BadInput, "is None, not a number"),
        (lambda n, m: n(m["x"]).sum().half(), lambda m: 1, BadInput, "float16, which ends"),
        (
            lambda n, m: {"a": n(m["x"]).sum(), "b": 0.0},
            lambda m: {"a": 1, "b": 0},
            BadInput,
            "shape",
        ),
    ]
    for loss, weight, error, match in cases:
        with pytest.raises(error, match=match):
            accumulated(net, batch, Budget(examples=2), gradaccum.Objective(loss, weight))
    with pytest.raises(BadInput, match=r"512 is no gradaccum.Budget"):
        gradaccum.Accumulator(net, gradaccum.causal_lm(), budget=512)
    with pytest.raises(BadInput, match=r"no torch\.dtype"):
        accumulated(net, batch, Budget(examples=2), accumulate_dtype="float32")
    with pytest.raises(BadInput, match="Linear returns no loss for a batch of x"):
        net.forward = lambda x: SimpleNamespace(loss=None)
        accumulated(net, batch, Budget(examples=2), gradaccum.from_mean(weight="rows"))
    with pytest.raises(BadInput, match="no examples"):
        accumulated(net, [], Budget(examples=2))
    weights = iter([{"a": 1}, {"a": 1, "b": 1}])
    lacking = gradaccum.Objective(lambda n, m: {}, lambda m: next(weights))
    with pytest.raises(CountMismatch, match="lacks one of the terms"):
        accumulated(net, batch, Budget(examples=2), lacking)
    with pytest.raises(BadInput, match="the labels are a list"):
        accumulated(net, {"input_ids": [[1], [2, 3]], "labels": [[1], [2, 3]]}, Budget(examples=2))
    with pytest.raises(BadInput, match="no 'labels'"):
        accumulated(net, [{"input_ids": [1]}], Budget(examples=2))


def test_after_micro_sees_each_and_step_prints_it_all():
    net, seen = model(), []
    _, step = accumulated(net, examples([3, 9, 5]), Budget(tokens=10), after_micro=seen.append)
    assert tuple(seen) == step.micros
    assert (step.padded, step.useful) == (19, 17)
    assert step.seconds > 0 and 0 < step.peak_bytes <= step.total_bytes
    assert "trained tokens in 2 micro-batches | peak" in str(step)


def test_vision_graph_like_and_ragged_batches_pass_through():
    """Tuples, ragged image lists and non-tensor leaves: sliced by rows, others untouched."""
    net = nn.Linear(1, 1).double()
    images = [torch.randn(3, 4 + i, 5 + i, dtype=torch.float64) for i in range(5)]
    batch = {
        "images": images,
        "nested": (torch.arange(5.0), {"names": list("abcde")}),
        "constant": torch.tensor(2.0),
        "note": "left alone",
    }

    def loss(net, m):
        assert m["note"] == "left alone" and m["constant"] == 2
        assert len(m["images"]) == len(m["nested"][0]) == len(m["nested"][1]["names"])
        return sum(net(image.mean()[None])[0] for image in m["images"])

    objective = gradaccum.Objective(loss, lambda m: len(m["images"]))
    found, step = accumulated(net, batch, Budget(examples=2), objective)
    assert step.num_micros == 3
    expected = oracle.gradients(net, {"loss": loss(net, batch)}, {"loss": 5})
    assert oracle.error(found, expected) <= 1e-12


def test_dataloader_lists_of_tensors_are_a_batch():
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,))
    objective = gradaccum.Objective(
        lambda net, m: F.cross_entropy(net(m[0]), m[1], reduction="sum"), lambda m: len(m[1])
    )
    found, step = accumulated(net, [x, y], Budget(examples=3), objective)
    assert step.num_micros == 3
    loss = F.cross_entropy(net(x), y, reduction="sum")
    assert oracle.error(found, oracle.gradients(net, {"loss": loss}, {"loss": 7})) <= 1e-12


def test_a_loss_that_sees_padding_gets_it():
    """Only an objective that says so has its padding cut: here positions compete in a softmax."""
    net = nn.Linear(1, 1).double()
    batch = {
        "input_ids": torch.arange(12.0, dtype=torch.float64).reshape(3, 4),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([1, 0, 3]),
    }

    def mean(net, micro):
        return F.cross_entropy(net(micro["input_ids"][..., None])[..., 0], micro["labels"])

    objective = gradaccum.from_mean(mean, weight="rows")
    found, _ = accumulated(net, batch, Budget(examples=1), objective)
    expected = oracle.gradients(net, {"loss": mean(net, batch)}, {"loss": 1})
    assert oracle.error(found, expected) <= 1e-12


def test_pairs_that_are_nested():
    """The gradient of a preference loss over two token batches that share a width."""
    net = model()
    sides = {
        name: {k: v for k, v in collated(examples(lengths, seed), extra=3).items() if k != "labels"}
        for name, lengths, seed in (("chosen", [9, 3, 5], 0), ("rejected", [2, 9, 4], 1))
    }

    def score(net, side):
        logits = net(**side)
        return (logits.logsumexp(-1) * side["attention_mask"]).sum(-1)

    def loss(net, m):
        return -F.logsigmoid(score(net, m["chosen"]) - score(net, m["rejected"])).sum()

    objective = gradaccum.Objective(loss, lambda m: len(m["chosen"]["input_ids"]), trim=True)
    found, step = accumulated(net, sides, Budget(examples=1), objective)
    assert step.num_micros == 3
    expected = oracle.gradients(net, {"loss": loss(net, sides)}, {"loss": 3})
    assert oracle.error(found, expected) <= 1e-12


def test_ragged_batches_leave_the_attention_aside_that_compiles_for_each_shape(monkeypatch):
    cuda, seen = torch.backends.cuda, []
    on_cuda = functools.partial(device_memory.attending_any_shape, torch.device("cuda"))
    monkeypatch.setattr(device_memory, "attending_any_shape", lambda _: on_cuda())
    net = model()
    net.register_forward_pre_hook(lambda *_: seen.append(cuda.cudnn_sdp_enabled()))
    for lengths, budget in (([4, 4, 4], 8), ([4, 3, 4], 12), ([4, 2], 4), ([5, 5], 10)):
        accumulated(net, examples(lengths), Budget(tokens=budget))
    assert seen == [True, True, False, False, False, True] and cuda.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), on_cuda():
        assert cuda.cudnn_sdp_enabled()  # there is no other


def test_examples_hold_scalars_of_any_kind():
    import numpy as np

    sizes = [gradaccum.causal_lm().size({"input_ids": ids}) for ids in ([1, 2], np.ones(3), None)]
    assert sizes == [2, 3, 1]
    assert gradaccum.causal_lm().size({"labels": np.int64(3), "input_ids": [1, 2, 3]}) == 3
    assert gradaccum.causal_lm().size({"labels": [1, 2], "input_ids": [1, 2, 3]}) == 5
    assert gradaccum.causal_lm().size({"labels": [1, 2, 3], "input_ids": [1, 2, 3]}) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, None),
        lambda t: {"logits": t},
        lambda t: SimpleNamespace(logits=t),
    ],
)
def test_causal_lm_takes_logits_in_any_common_form(wrap):
    def net(input_ids):
        return wrap(torch.zeros(*input_ids.shape, 4))

    micro = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, -100]])}
    assert gradaccum.causal_lm().loss(net, micro).item() == pytest.approx(math.log(4))
