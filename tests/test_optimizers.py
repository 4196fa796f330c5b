"""State made before the first step: the same trajectory, bit for bit, as state made by it."""

import pytest
import torch
from torch import nn

from gradaccum.optimizers import materialize


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 65), nn.Tanh(), nn.Linear(65, 3))
    made[2].bias.requires_grad_(False)
    return made


def hf_adafactor(params):
    from transformers import Adafactor

    return Adafactor(params)


def of_bitsandbytes(name):
    def make(params):
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(params, lr=1e-2, weight_decay=0.1)

    return make


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
MAKERS = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: ADAMW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: ADAMW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: ADAMW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: ADAMW(p, lr=1e-2, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor of transformers": hf_adafactor,
    "adamw 8-bit": of_bitsandbytes("AdamW8bit"),
    "lion 8-bit": of_bitsandbytes("Lion8bit"),
    "paged adamw": of_bitsandbytes("PagedAdamW8bit"),
}


def trajectory(make, before=lambda optimizer: None):
    model = net()
    optimizer = make(list(model.parameters()))
    before(optimizer)
    for i in range(4):
        torch.manual_seed(i)
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", MAKERS)
def test_the_trajectory_is_the_same(name):
    made = []

    def before(optimizer):
        model = optimizer.param_groups[0]["params"]
        weights = [p.detach().clone() for p in model]
        made.append(materialize(optimizer))
        assert all(
            torch.equal(p, own) and p.grad is None for p, own in zip(model, weights, strict=True)
        )
        made.append({k: sorted(s) for k, s in optimizer.state.items() if k.requires_grad})

    found, optimizer = trajectory(MAKERS[name], before)
    expected, _ = trajectory(MAKERS[name])
    for (key, p), own in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, own), key
    assert made[0] is True
    if name != "sgd":
        assert made[1] == {k: sorted(s) for k, s in optimizer.state.items()} and made[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.Rprop(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    ],
    ids=["nadam", "rprop", "asgd", "dampening"],
)
def test_those_that_begin_otherwise_are_left_alone(make):
    optimizer = make(list(net().parameters()))
    assert materialize(optimizer) is False and not optimizer.state


def test_hooks_and_schedulers_see_no_step():
    model = net()
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    before = optimizer.param_groups[0]["lr"]
    materialize(optimizer)
    assert not calls and optimizer.param_groups[0]["lr"] == before
    assert scheduler.last_epoch == 0
