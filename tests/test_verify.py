"""Comparing gradients: the measure itself, and the floor below which it says nothing."""

import pytest
import torch
from torch import nn

from gradaccum import verify


def test_gradients_are_taken_and_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    unused = nn.Parameter(torch.ones(2))
    net.register_parameter("unused", unused)
    x = torch.randn(4, 2)
    found = verify.gradients(net, lambda: net(x).sum().backward())
    assert all(p.grad is None for p in net.parameters()) and net[1].num_batches_tracked == 0
    again = verify.gradients(net, lambda: (2 * net(x).sum()).backward())
    assert all(g.dtype == torch.float64 for g in found) and not found[0].any()
    assert verify.relative_error(again, found) == pytest.approx(1.0, rel=1e-5)
    assert verify.relative_error(found, found) == 0.0
    zeros = [torch.zeros_like(g) for g in found]
    assert verify.relative_error(zeros, zeros) == 0.0 and verify.relative_error(found, zeros) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_rounding_that_is_foreseen_is_that_which_occurs(dtype):
    net = nn.Linear(200, 200, dtype=dtype)
    g = [torch.randn(p.shape, dtype=torch.float64) for p in net.parameters()]
    one, other = ([(t * f).to(dtype).double() / f for t in g] for f in (1.0, 1.37))
    assert verify.rounding(net, g) == pytest.approx(verify.relative_error(one, other), rel=0.1)
    assert verify.rounding(net, [torch.zeros_like(t) for t in g]) == 0.0
