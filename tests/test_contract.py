"""How a loss is reduced, measured: what is found, what is refused, and that it is exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradaccum
from gradaccum.batch import Listed
from gradaccum.counters import counts
from gradaccum.errors import BadInput, NotDecomposable
from gradaccum.measured import Measured, _is_due, from_mean
from gradaccum.padding import pad_collate
from gradaccum.rows import choose
from tests import oracle
from tests.models import collated, examples, model

LENGTHS = [9, 5, 12, 7, 30, 6, 4, 11]
ROWS = examples(LENGTHS, masked=lambda length: length % 3)


def nll(net, x, *, shift=True, reduction="mean", ignore_index=-100):
    logits = net(x["input_ids"], x["attention_mask"], x["position_ids"])
    labels = x["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction=reduction, ignore_index=ignore_index
    )


def per_row(net, x):
    logits = net(x["input_ids"], x["attention_mask"], x["position_ids"])[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), x["labels"][:, 1:], reduction="none")
    kept = x["labels"][:, 1:] != -100
    return losses.sum(1) / kept.sum(1).clamp(min=1)


def two_means(net, x):
    hidden = net(x["input_ids"], x["attention_mask"], x["position_ids"])
    return nll(net, x) + 0.5 * F.mse_loss(hidden[:, 0], torch.ones_like(hidden[:, 0]))


def full(net, loss, rows=ROWS):
    return oracle.gradients(net, {"loss": loss(net, collated(rows))}, {"loss": 1})


def accumulated(net, loss, rows=ROWS, size=3, **settings):
    measured = Measured(lambda net, x, count: loss(net, x), takes_count=False, **settings)
    accumulator = gradaccum.Accumulator(
        net, measured.objective(), budget=gradaccum.Budget(examples=size), collate=collated
    )
    accumulator.backward(rows)
    return measured, oracle.left_in(net)


@pytest.mark.parametrize(
    ("loss", "counter"),
    [
        (nll, "shifted:labels"),
        (lambda net, x: nll(net, x, shift=False), "trained:labels"),
        (lambda net, x: 3 * per_row(net, x).mean(), "rows:"),
        (lambda net, x: per_row(net, x).sum(), "sum:"),
        (lambda net, x: nll(net, x, reduction="sum") / 7, "sum:"),
        (lambda net, x: nll(net, x, reduction="sum") / x["attention_mask"].sum(), "nonzero:"),
        (lambda net, x: per_row(net, x).square().mean(), "rows:"),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_what_a_loss_is_a_mean_over_is_found_and_exact(loss, counter, size):
    net = model()
    expected = full(net, loss)
    measured, found = accumulated(net, loss, size=size)
    assert measured.contract.counters[0].startswith(counter)
    assert not measured.contract.split and not measured.contract.counted
    assert oracle.error(found, expected) <= 1e-12


def test_means_over_different_things_are_each_divided_by_their_own():
    net = model()
    expected = full(net, two_means)
    measured, found = accumulated(net, two_means)
    assert measured.contract.split
    assert oracle.error(found, expected) <= 1e-12


def test_a_penalty_is_no_reason_to_refuse():
    def penalised(net, x):
        return nll(net, x) + 0.1 * sum(p.square().sum() for p in net.parameters())

    net = model()
    expected = full(net, penalised)
    _, found = accumulated(net, penalised)
    assert oracle.error(found, expected) <= 1e-12


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        (lambda net, x: 0.0, None),
        (lambda net, x: 1e-3 * per_row(net, x).mean(), "rows:"),
        (lambda net, x: 1e-3 * sum(p.square().sum() for p in net.parameters()), "rows:"),
        (lambda net, x: 1e-3 * nll(net, x, shift=False), "trained:labels"),
    ],
)
def test_a_counted_loss_and_what_its_count_does_not_divide(extra, found):
    def loss(net, x, count):
        total = nll(net, x, reduction="sum")
        return total / (count or (x["labels"][:, 1:] != -100).sum()) + extra(net, x)

    net = model()
    expected = full(net, lambda net, x: loss(net, x, None))
    measured = Measured(loss)
    accumulator = gradaccum.Accumulator(
        net, measured.objective(), budget=gradaccum.Budget(examples=3), collate=collated
    )
    accumulator.backward(ROWS)
    assert measured.contract.counted and measured.contract.extra == found
    assert measured.contract.counters[0] == "shifted:labels"
    assert oracle.error(oracle.left_in(net), expected) <= 1e-12


def in_batch(net, x):
    hidden = net(x["input_ids"], x["attention_mask"], x["position_ids"]).mean(1)
    return F.cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)))


def normalised(net, x):
    losses = per_row(net, x)
    return ((losses - losses.mean().detach()) / losses.std(correction=0).add(1).detach()).mean()


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (in_batch, "in-batch negatives"),
        (lambda net, x: nll(net, x) + per_row(net, x).std(correction=0), "rows depend on each"),
        (normalised, "it weighs them .* by no known count"),
        (lambda net, x: nll(net, x, reduction="sum").sqrt(), "by no known count"),
        (lambda net, x: nll(net, x) * len(x["labels"]), "it weighs them .* by no known count"),
        (lambda net, x: nll(net, x) + torch.rand(()), "it draws random numbers"),
    ],
)
def test_what_has_no_weights_is_refused_with_its_cause(loss, cause):
    net = model()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(NotDecomposable, match=cause):
        accumulated(net, loss)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_one_micro_batch_that_holds_all_is_exact_whatever_the_loss():
    net = model()
    expected = full(net, in_batch)
    _, found = accumulated(net, in_batch, size=8)
    assert oracle.error(found, expected) <= 1e-12


def test_a_loss_of_equal_values_is_told_by_its_gradients():
    """On fresh weights the losses of all rows are nearly the same, and every mean would do."""
    net = model()
    with torch.no_grad():
        net.head.weight.mul_(1e-4)
    expected = full(net, nll)
    measured, found = accumulated(net, nll)
    assert measured.contract.counters[0] == "shifted:labels"
    assert oracle.error(found, expected) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_finds_the_same(dtype):
    measured, _ = accumulated(model(dtype=dtype), nll)
    assert measured.contract.counters[0] == "shifted:labels"


def test_dropout_does_not_disturb_and_is_put_back():
    net = model(dropout=0.5)
    measured, _ = accumulated(net, nll)
    assert measured.contract.counters[0] == "shifted:labels" and net.dropout.p == 0.5


def test_counters_that_agreed_are_told_apart_by_a_later_batch():
    """The first batch masks every first label, so that shifted and unshifted counts coincide."""
    net = model()
    measured = Measured(lambda net, x, count: nll(net, x, shift=False), takes_count=False)
    accumulator = gradaccum.Accumulator(
        net, measured.objective(), budget=gradaccum.Budget(examples=3), collate=collated
    )
    masked = examples(LENGTHS, masked=lambda length: 1 + length % 3)
    for rows in (masked, ROWS):
        expected = full(net, lambda net, x: nll(net, x, shift=False), rows)
        accumulator.backward(rows)
        assert oracle.error(oracle.left_in(net), expected) <= 1e-12
        net.zero_grad()
    assert "shifted:labels" not in measured.contract.counters


def test_rows_without_a_label_are_no_reason_to_refuse():
    rows = [row | {"labels": [-100] * len(row["labels"])} if i % 3 else row for i, row in
            enumerate(ROWS)]  # fmt: skip
    net = model()
    expected = full(net, nll, rows)
    _, found = accumulated(net, nll, rows)
    assert oracle.error(found, expected) <= 1e-12
    none = [row | {"labels": [-100] * len(row["labels"])} for row in ROWS]
    net.zero_grad()
    with pytest.warns(UserWarning, match="the gradients are zero"):
        measured, found = accumulated(net, nll, none)
    assert measured.contract is None and all(not g.any() for g in found.values())


def test_a_loss_that_is_not_finite_is_an_error_before_the_step():
    net = model()
    with torch.no_grad():
        net.qkv.weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"the loss is nan on 3 examples before the first step"):
        accumulated(net, nll)


def test_a_coupling_that_grows_is_noticed():
    scale = {"of": 0.0}

    def growing(net, x):
        losses = per_row(net, x)
        return losses.mean() + scale["of"] * losses.var(correction=0)

    budget = gradaccum.Budget(examples=2)
    accumulator = gradaccum.Accumulator(
        model(), from_mean(growing), budget=budget, collate=collated
    )

    def step():
        accumulator.model.zero_grad()
        accumulator.backward(ROWS)

    for _ in range(3):
        step()
    scale["of"] = 1.0
    step()  # before the fourth nothing is due
    with pytest.raises(NotDecomposable):
        step()


def test_terms_that_begin_later_are_looked_for_again():
    assert [num for num in range(600) if _is_due(num)] == [
        1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512,
    ]  # fmt: skip


def test_measuring_costs_few_rows_and_leaves_no_trace():
    net = model()
    before, state = [p.clone() for p in net.parameters()], torch.get_rng_state()
    measured = Measured(lambda net, x, count: nll(net, x), takes_count=False)
    measured.look_at(net, Listed(ROWS, collated))
    assert measured.num_rows <= 66  # a row forward and backward counts three
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_measuring_does_without_the_longest_row_where_two_of_its_length_do_not_fit():
    def short_of_memory(net, x):
        if x["input_ids"].numel() > 1.5 * max(LENGTHS):
            raise torch.OutOfMemoryError("too many tokens")
        return nll(net, x)

    net = model()
    expected = full(net, nll)
    measured, found = accumulated(net, short_of_memory, size=1)
    assert measured.contract.counters[0] == "shifted:labels"
    assert oracle.error(found, expected) <= 1e-12


def test_the_rows_chosen_tell_counters_apart():
    rows = [{"input_ids": [1] * n, "labels": [-100] * m + [1] * (n - m)} for n, m in
            [(4, 2), (4, 2), (4, 2), (5, 0), (6, 2), (20, 2)]]  # fmt: skip
    host, groups, _ = choose(Listed(rows, pad_collate), 5)
    assert [len(group) for group in groups] == [1, 2, 1]
    first, pair = (counts(host.take(group), len(group)) for group in groups[:2])
    shares = {n: first[n] / (first[n] + pair[n]) for n in first}
    assert shares["shifted:labels"] != shares["trained:labels"] != shares["rows:"]


def test_from_mean_measures_by_default():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model()

        def forward(self, labels, **inputs):
            return type("Outputs", (), {"loss": nll(self.body, inputs | {"labels": labels})})

    net = Head()
    expected = full(net, lambda net, x: net(**x).loss)
    accumulator = gradaccum.Accumulator(
        net, gradaccum.from_mean(), budget=gradaccum.Budget(tokens=30), collate=collated
    )
    step = accumulator.backward(ROWS)
    assert step.num_micros > 3 and step.unit == "trained tokens"
    assert oracle.error(oracle.left_in(net), expected) <= 1e-12


def test_a_batch_of_one_row_is_exact_before_and_after_the_contract_is_known():
    net = model()
    measured = Measured(lambda net, x, count: nll(net, x), takes_count=False)
    accumulator = gradaccum.Accumulator(
        net, measured.objective(), budget=gradaccum.Budget(examples=3), collate=collated
    )
    for rows in (ROWS[:1], ROWS, ROWS[2:3], ROWS[::-1]):
        expected = full(net, nll, rows)
        accumulator.backward(rows)
        assert oracle.error(oracle.left_in(net), expected) <= 1e-12
        net.zero_grad()


def test_what_was_refused_is_not_measured_at_every_step_of_one_micro_batch():
    net = model()
    measured = Measured(lambda net, x, count: in_batch(net, x), takes_count=False)
    accumulator = gradaccum.Accumulator(
        net, measured.objective(), budget=gradaccum.Budget(examples=8), collate=collated
    )
    accumulator.backward(ROWS)
    net.zero_grad()
    num_rows = measured.num_rows
    accumulator.backward(ROWS)
    net.zero_grad()
    assert measured.num_rows == num_rows > 0
    accumulator.budget = gradaccum.Budget(examples=4)
    with pytest.raises(NotDecomposable, match="in-batch negatives"):
        accumulator.backward(ROWS)
