"""Measure the figures of exactness: oracle errors, a trajectory, bf16 sums, a million examples.

python benchmarks/exactness.py --out benchmarks/results/exactness.json
"""

import argparse
import copy
import random
import sys
import time
from pathlib import Path

import torch
from common import publish
from torch import nn

import gradaccum
from gradaccum.split import split

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import oracle
from tests.models import collated, examples, model, oracle_loss


def worst_errors(dtype, cases):
    """Return the largest error and mean signed residual over random cuts of random batches."""
    errors, residuals = [], []
    for seed in range(cases):
        rng = random.Random(seed)
        batch = examples([rng.randint(2, 20) for _ in range(rng.randint(2, 16))], seed)
        net = model(seed % 7, dtype=dtype)
        # Left padding is part of the batch: it gives the first label something to follow.
        full = collated(batch, "right" if seed % 2 else rng.choice(["left", "right"]))
        wide = copy.deepcopy(net).double()
        expected = oracle.gradients(wide, *oracle_loss(wide, full))
        budget = gradaccum.Budget(tokens=rng.randint(1, 60))
        given = batch if seed % 2 else full
        gradaccum.Accumulator(net, gradaccum.causal_lm(), budget=budget).backward(given)
        errors.append(oracle.error(oracle.left_in(net), expected))
        residuals.append(oracle.signed_residual(oracle.left_in(net), expected))
    mean = sum(residuals) / cases
    return {"cases": cases, "largest_error": max(errors), "mean_signed_residual": mean}


def trajectory(steps=20):
    ours, full = model(), model()
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (ours, full)]
    budget = gradaccum.Budget(tokens=24)
    accumulator = gradaccum.Accumulator(ours, gradaccum.causal_lm(), budget=budget)
    rng = random.Random(0)
    for i in range(steps):
        batch = examples([rng.randint(2, 20) for _ in range(8)], seed=i)
        accumulator.backward(batch)
        loss, weight = oracle_loss(full, collated(batch))
        (loss["loss"] / weight["loss"]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return oracle.error(dict(ours.named_parameters()), dict(full.named_parameters()))


def bf16_sums(num_micros=1024):
    """Return the errors of a bf16 layer's accumulated gradient, by where the sum is kept.

    The truth is the float64 sum of the very contributions that autograd hands over.
    """
    torch.manual_seed(0)
    net = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    x = torch.randn(num_micros, 64).bfloat16()
    objective = gradaccum.Objective(
        lambda net, micro: net(micro["x"]).float().square().sum(), lambda micro: len(micro["x"])
    )
    exact = torch.zeros(64, 64, dtype=torch.float64)
    for row in x:
        loss = net(row[None]).float().square().sum() / num_micros
        exact += torch.autograd.grad(loss, net.weight)[0].double()
    found = {}
    for name, kept, handed in (
        ("bf16 sum", None, None),
        ("float32 sum, handed over in bf16", torch.float32, None),
        ("float32 sum, handed over in float32", torch.float32, torch.float32),
    ):
        net.zero_grad()
        gradaccum.Accumulator(
            net, objective, budget=gradaccum.Budget(examples=1), accumulate_dtype=kept,
            grad_dtype=handed,
        ).backward({"x": x})  # fmt: skip
        found[name] = float((net.weight.grad.double() - exact).norm() / exact.norm())
        found[name + ", norm"] = float(net.weight.grad.double().norm() / exact.norm())
    return found


def million():
    rng = random.Random(0)
    batch = [{"input_ids": [0] * rng.randint(1, 50)} for _ in range(1_000_000)]
    seconds = {}
    for budget in (gradaccum.Budget(tokens=4096), gradaccum.Budget(examples=1)):
        begin = time.perf_counter()
        count = len(split(batch, gradaccum.causal_lm(), budget))
        seconds[f"{budget}: {count:,} micro-batches"] = round(time.perf_counter() - begin, 2)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--out")
    options = parser.parse_args()
    figures = {
        "float64": worst_errors(torch.float64, options.cases),
        "float32": worst_errors(torch.float32, options.cases),
        "trajectory_20_steps_float64": trajectory(),
        "bf16_1024_micro_batches": bf16_sums(),
        "split_1_000_000_examples_seconds": million(),
    }
    publish(figures, options.out)


if __name__ == "__main__":
    main()
