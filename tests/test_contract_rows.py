"""Losses whose contract a few rows do not tell: later batches, odd rows, masks, rare classes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradaccum
from gradaccum.errors import BadInput, NotDecomposable
from gradaccum.measured import from_mean
from tests import oracle

N = 16


def mlp(out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, out)).double()


def batch(seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    found = {
        "x": torch.randn(N, 4, generator=generator).double(),
        "y": torch.randn(N, 3, generator=generator).double(),
        "kind": torch.randint(0, 3, (N,), generator=generator),
    }
    return found | more


def errors(loss, batches, *, size=1, net=None, get=lambda b: b):
    """Return the error of each accumulated batch against one pass over it."""
    net, found = net or mlp(), []
    accumulator = gradaccum.Accumulator(
        net, from_mean(loss), budget=gradaccum.Budget(examples=size)
    )
    for given in map(get, batches):
        net.zero_grad()
        expected = oracle.gradients(net, {"loss": loss(net, given)}, {"loss": 1})
        net.zero_grad()
        accumulator.backward(given)
        found.append(oracle.error(oracle.left_in(net), expected))
    return found


def masked_mean(net, b, mask):
    return ((net(b["x"]) - b["y"]).square().mean(1) * mask).sum() / mask.sum()


def ones(*zeros, dtype=torch.float64):
    mask = torch.ones(N, dtype=dtype)
    mask[list(zeros)] = 0
    return mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool], ids=str)
@pytest.mark.parametrize("first", [(), (9, 10, 11), (0, 3, 5, 9)], ids=["full", "late", "mixed"])
@pytest.mark.parametrize(
    "get",
    [
        lambda b: b,
        lambda b: (b["x"], b["y"], b["mask"]),
        lambda b: (b["x"], b["mask"], b["y"]),
        lambda b: {"of": {"x": b["x"], "mask": b["mask"]}, "y": b["y"]},
    ],
    ids=["dict", "tuple", "other tuple", "nested"],
)
def test_masks_of_rows(dtype, first, get):
    def loss(net, given):
        if isinstance(given, tuple):
            x, *others = given
            mask = next(part for part in others if part.ndim == 1)
            y = next(part for part in others if part.ndim == 2)
        else:
            inner = given.get("of", given)
            x, mask, y = inner["x"], inner["mask"], given["y"]
        return masked_mean(net, {"x": x, "y": y}, mask)

    batches = [batch(0, mask=ones(*first, dtype=dtype)), batch(1, mask=ones(1, 8, 12, dtype=dtype))]
    assert max(errors(loss, batches, get=get)) <= 1e-12


def test_weights_of_samples_that_are_ones_at_first():
    generator = torch.Generator().manual_seed(0)
    later = torch.rand(N, generator=generator).double() * 3
    batches = [batch(0, mask=ones()), batch(1, mask=ones()), batch(2, mask=later)]
    assert max(errors(lambda net, b: masked_mean(net, b, b["mask"]), batches)) <= 1e-12


def test_a_mean_over_the_sum_of_lengths():
    def loss(net, b):
        kept = (torch.arange(5) < b["lengths"][:, None])[..., None]
        return ((net(b["x"]) - b["y"]).square() * kept).sum() / kept.sum()

    def ragged(seed):
        generator = torch.Generator().manual_seed(seed)
        size = {"generator": generator, "dtype": torch.float64}
        lengths = torch.randint(1, 6, (N,), generator=generator)
        return {"x": torch.randn(N, 5, 4, **size), "y": torch.randn(N, 5, 3, **size)} | {
            "lengths": lengths
        }

    assert max(errors(loss, map(ragged, range(3)), size=3)) <= 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_classes_where_a_class_is_rare(seed):
    weight = torch.tensor([1.0, 20.0, 1.0], dtype=torch.float64)
    kind = torch.zeros(N, dtype=torch.long)
    kind[torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:2]] = 1
    found = errors(
        lambda net, b: F.cross_entropy(net(b["x"]), b["kind"], weight=weight),
        [batch(seed, kind=kind), batch(seed + 100)],
        size=4,
    )
    assert max(found) <= 1e-12


def positives(*empty, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(N, 3, generator=generator) < 0.4).long()
    target[:, 0] = 1
    target[list(empty)] = 0
    return batch(seed, target=target)


def focal(net, b):
    logits, target = net(b["x"]), b["target"].double()
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * (logits.sigmoid() - target).square()).sum() / target.sum().clamp(min=1)


@pytest.mark.parametrize("size", [1, 5, N])
@pytest.mark.parametrize(
    "batches",
    [
        [positives(10)],
        [positives(), positives(), positives(3, 10)],
        [positives(*range(N)), positives(*range(N)), positives()],
        [positives(), positives(*range(N), seed=1)],
    ],
    ids=["one empty", "empty later", "none at first", "none later"],
)
def test_a_count_of_at_least_one(batches, size):
    assert max(errors(focal, batches, size=size)) <= 1e-12


def tasks(*single):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (N, 2), generator=generator)
    for row in single:
        labels[row, row % 2] = -100
    return batch(labels=labels)


def test_terms_that_are_left_out_where_they_have_no_labels():
    def loss(net, b):
        logits, total = net(b["x"]).reshape(-1, 2, 3), 0.0 * net(b["x"]).sum()
        if (b["labels"][:, 0] != -100).any():
            total = total + F.cross_entropy(logits[:, 0], b["labels"][:, 0])
        if (b["labels"][:, 1] != -100).any():
            total = total + 2 * F.cross_entropy(logits[:, 1], b["labels"][:, 1])
        return total

    batches = [tasks(), tasks(3, 4, 8, 11), tasks(*range(1, N))]
    assert max(errors(loss, batches, net=mlp(6))) <= 1e-12


def test_such_terms_taken_in_one_line_are_refused():
    def loss(net, b):
        logits, total = net(b["x"]).reshape(-1, 2, 3), 0.0 * net(b["x"]).sum()
        for i in range(2):
            if (b["labels"][:, i] != -100).any():
                total = total + F.cross_entropy(logits[:, i], b["labels"][:, i])
        return total

    with pytest.raises(NotDecomposable, match="means in one line for some rows"):
        errors(loss, [tasks(), tasks(*range(1, N))], net=mlp(6))


def test_a_coupling_beside_several_means_is_noticed_when_it_grows():
    scale = {"of": 0.0}
    weight = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)

    def loss(net, b):
        logits = net(b["x"])
        spread = logits.var(0, correction=0).sum()
        return F.cross_entropy(logits, b["kind"], weight=weight) + scale["of"] * spread

    def growing():
        yield batch(0)
        scale["of"] = 0.01
        yield batch(1)

    with pytest.raises(NotDecomposable):
        errors(loss, growing(), size=4)


def capacity(net, b):
    losses = (net(b["x"]) - b["y"]).square().mean(1)
    return losses.topk(max(4, len(losses) // 4)).values.mean() if len(losses) > 4 else losses.mean()


def missing(net, b):
    kept = b["y"] > -900
    return ((net(b["x"]) - b["y"]).square() * kept).sum() / kept.sum()


def test_what_only_many_rows_or_odd_ones_show_is_refused():
    with pytest.raises(NotDecomposable, match="takes a part of them"):
        errors(capacity, [batch()])
    odd = batch()
    odd["y"][10:14, 1] = -999.0
    with pytest.raises(NotDecomposable):
        errors(missing, [odd])


def test_a_penalty_on_gradients():
    def loss(net, b):
        x = b["x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return slope.square().mean() + (net(b["x"]) - b["y"]).square().mean()

    assert max(errors(loss, [batch()], size=3)) <= 1e-12


def test_a_forward_that_writes_into_a_parameter_is_said():
    class Initialised(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.bias.copy_(-x.mean())
            return super().forward(x)

    with pytest.raises(BadInput, match="writes into the parameter bias"):
        errors(
            lambda net, b: net(b["x"]).square().mean(), [batch()], net=Initialised(4, 3).double()
        )


def test_examples_that_agree_in_length_get_the_mask_of_the_others():
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)).double()

    def loss(net, b):
        logits, mask = net(b["input_ids"]).transpose(1, 2), b["attention_mask"]
        return (F.cross_entropy(logits, b["labels"], reduction="none") * mask).sum() / mask.sum()

    rows = [{"input_ids": list(range(n)), "labels": list(range(1, n + 1))} for n in (3, 5, 2, 7)]
    accumulator = gradaccum.Accumulator(net, from_mean(loss), budget=gradaccum.Budget(examples=1))
    whole = accumulator.prepare(rows)
    assert all("attention_mask" in inputs for inputs in whole.inputs)
    accumulator.backward(whole)


def test_soft_labels_whose_sums_are_one_but_for_rounding_are_rows():
    """In float32 their shares differ by 1e-8 from those of rows, which no gradient shows."""

    def loss(net, b):
        bce = F.binary_cross_entropy_with_logits(net(b["x"]), b["soft"])
        return bce * b["soft"].shape[1]

    soft = [batch(seed)["y"].float().softmax(-1) for seed in range(4)]
    given = [{"x": batch(i)["x"].float(), "soft": rows} for i, rows in enumerate(soft)]
    assert any((rows.double().sum(1) != 1).any() for rows in soft)
    assert max(errors(loss, given, net=mlp().float())) < 5e-7


def test_a_row_far_longer_than_the_others_is_not_run_to_measure():
    """It would take most of the time, and more memory than the others need."""
    net, widths = nn.Embedding(9, 3).double(), []

    def loss(net, b):
        widths.append(b["input_ids"].shape[1])
        picked = net(b["input_ids"]).square().sum(-1) * (b["labels"] != -100)
        return picked.sum() / (b["labels"] != -100).sum()

    lengths = [3, 5, 4, 6, 7, 20, 100]
    rows = [{"input_ids": [1 + i % 8] * n, "labels": [1] * n} for i, n in enumerate(lengths)]
    budget = gradaccum.Budget(examples=1)
    gradaccum.Accumulator(net, from_mean(loss), budget=budget).prepare(rows)
    assert max(widths) == 20
