"""Loops of several ranks that are right or wrong in one way each, as `verify` is given them."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradaccum
from gradaccum.objective import Objective


def summed(model, micro):
    rows = F.cross_entropy(model(micro["x"]), micro["y"], reduction="none")
    return (rows * micro["w"]).sum()


OBJECTIVE = Objective(summed, lambda micro: micro["w"].sum(), lambda _: 1, "tokens")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def rows(rank: int, num: int = 4, seed: int = 1) -> list[dict]:
    g = torch.Generator().manual_seed(seed + 10 * rank)
    return [
        {
            "x": torch.randn(6, generator=g, dtype=torch.float64),
            "y": torch.randint(4, (), generator=g),
            "w": torch.randint(1, 9, (), generator=g).double(),
        }
        for _ in range(num)
    ]


def total(micros) -> torch.Tensor:
    weight = sum(micro["w"].sum() for micro in micros)
    dist.all_reduce(weight)
    return weight


def right(model, micros) -> None:
    """Average by the wrapper, so times the number of ranks."""
    weight = total(micros)
    for i, micro in enumerate(micros):
        model.require_backward_grad_sync = i == len(micros) - 1
        (summed(model, micro) / weight * dist.get_world_size()).backward()


def averaged(model, micros) -> None:
    weight = total(micros)
    for i, micro in enumerate(micros):
        model.require_backward_grad_sync = i == len(micros) - 1
        (summed(model, micro) / weight).backward()


def rank_means(model, micros) -> None:
    weight = sum(micro["w"].sum() for micro in micros)
    for i, micro in enumerate(micros):
        model.require_backward_grad_sync = i == len(micros) - 1
        (summed(model, micro) / weight).backward()


def one_left_out(model, micros) -> None:
    weight = total(micros)
    for micro in micros:
        (summed(model, micro) / weight).backward()
    for p in list(model.parameters())[1:]:
        dist.all_reduce(p.grad)


def verdicts(rank: int, world: int) -> dict[str, tuple[bool, tuple[str, ...], float]]:
    found = {}

    def judge(name, loop, model, share, **kwargs):
        verdict = gradaccum.verify(loop, model, share, **kwargs)
        found[name] = verdict.exact, verdict.names, verdict.comparisons[0].relative_error

    share = rows(rank)
    for loop in (right, averaged, rank_means):
        wrapped = DistributedDataParallel(net())
        judge(loop.__name__, loop, wrapped, share, objective=OBJECTIVE)
    judge("one left out", one_left_out, net(), share, objective=OBJECTIVE)
    ours = gradaccum.Accumulator(net(), OBJECTIVE, budget=gradaccum.Budget(examples=2))
    judge("ours", ours, None, share)
    judge("ours uneven", ours, None, rows(rank, 3 + rank))
    judge("ours idle", ours, None, rows(rank, 4 * (rank == 0)))
    judge("doubled", ours, None, rows(0))
    judge("diverged", one_left_out, net(rank), share, objective=OBJECTIVE)
    return found
