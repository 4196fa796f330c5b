"""What runs aside leaves no trace: random state, buffers, attributes; also after a failure."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gradaccum.state import accumulating, undisturbed, without_dropout


class Table(nn.Module):
    """A table that grows, with the length for which it was computed, as of rotary embeddings."""

    def __init__(self):
        super().__init__()
        self.length = 2
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.register_buffer("running", torch.zeros(1))
        self.register_buffer("cache", None)
        self.register_buffer("wide", torch.full((1,), torch.nan).expand(3))
        self.register_buffer("grown", torch.ones(1))

    def forward(self, length):
        if length > self.length:
            self.length = length
            self.register_buffer("table", torch.full((length,), 1 / length), persistent=False)
        self.running += 1
        self.grown.resize_(5).zero_()
        self.cache = torch.ones(length)
        return self.table[:length].sum()


def drawn():
    return torch.rand(3).tolist() + [random.random(), *np.random.rand(2)]


@pytest.mark.parametrize("fails", [False, True])
def test_undisturbed_puts_everything_back(fails):
    net = nn.Sequential(Table(), nn.BatchNorm1d(3))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = drawn()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    table = net[0].table
    try:
        with undisturbed(net):
            drawn(), net[0](5), net[1](torch.randn(4, 3))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert drawn() == expected
    assert net[0].table is table and net[0].length == 2 and net[0].cache is None
    assert (
        net[0].running == 0 and net[1].num_batches_tracked == 0 and (net[1].running_var == 1).all()
    )
    assert net[0](5) == pytest.approx(1.0)  # grows as if for the first time


def test_without_dropout_leaves_modes_and_puts_chances_back():
    """Also those that a forward reads from plain attributes and from nested configs."""
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2).eval())
    inner = SimpleNamespace(attention_dropout=0.1, width=0.5)
    net[1].config = SimpleNamespace(layerdrop=0.2, text_config=inner, is_decoder=True)
    net[1].dropout = 0.4
    x = torch.randn(64, 2)
    with without_dropout(net):
        assert net.training and net[0].training and not net[1].training
        assert torch.equal(net[0](x), x)
        assert (net[1].dropout, net[1].config.layerdrop, inner.attention_dropout) == (0, 0, 0)
        assert inner.width == 0.5 and net[1].config.is_decoder
    assert (net[0].p, net[1].dropout, net[1].config.layerdrop) == (0.3, 0.4, 0.2)
    assert inner.attention_dropout == 0.1 and not torch.equal(net[0](x), x)


@pytest.mark.parametrize(
    ("own", "left", "wide", "hand_over", "inside", "after"),
    [
        ("bfloat16", None, "float32", None, "float32", "bfloat16"),
        ("bfloat16", None, None, None, "bfloat16", "bfloat16"),
        ("bfloat16", None, "float32", "float32", "float32", "float32"),
        ("float32", "bfloat16", "float32", None, "float32", "bfloat16"),  # left by another one
        ("bfloat16", "float32", None, None, "float32", "float32"),
        ("float64", None, "float32", None, "float64", "float64"),
        ("float16", None, "bfloat16", None, "float32", "float16"),  # holds both
        ("complex64", None, "float64", None, "complex128", "complex64"),
    ],
)
def test_gradients_add_up_at_least_as_wide_as_asked_for(own, left, wide, hand_over, inside, after):
    own, left, wide, hand_over, inside, after = (
        getattr(torch, name) if name else None
        for name in (own, left, wide, hand_over, inside, after)
    )
    p = nn.Parameter(torch.ones(2, dtype=own))
    if left is not None:
        p.grad_dtype = left
    with accumulating([p], wide, hand_over):
        (p * 2).abs().sum().backward()
        assert p.grad.dtype == inside
    assert p.grad.dtype == p.grad_dtype == after


def test_a_failure_while_gradients_are_handed_over_leaves_none(monkeypatch):
    parameters = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(3)]
    calls = []
    to = torch.Tensor.to

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        return to(self, *args, **kwargs)

    with pytest.raises(torch.OutOfMemoryError), accumulating(parameters, torch.float32, None):
        sum(p.sum() for p in parameters).backward()
        monkeypatch.setattr(torch.Tensor, "to", failing)
    monkeypatch.undo()
    assert [(p.grad, p.grad_dtype) for p in parameters] == [(None, torch.bfloat16)] * 3


def test_what_need_not_change_is_not_touched():
    """Once set, `grad_dtype` no longer follows a parameter that is converted."""
    p = nn.Parameter(torch.ones(2))
    with accumulating([p], torch.float32, None):
        p.sum().backward()
    p.grad = None
    p.data = p.data.bfloat16()
    assert p.grad_dtype == torch.bfloat16
