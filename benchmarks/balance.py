"""Compare how evenly ranks share a step, and what it takes to plan that for a thousand ranks.

python benchmarks/balance.py --out benchmarks/results/balance.json

Two parts, neither of which runs a model: costs are those of a cost model.

"balance": cost of the most expensive share over the mean share, in the mean and the 95th percentile
over steps. Lengths are lognormal (mean about 600, 99th percentile about 3,300, at most 8,192). All
deal the same effective batches: contiguous parts of a random order; ours; and the sampler of
transformers, run as its Trainer does, in `gradient_accumulation_steps = E / (W * per_device)`
micro-batches a rank. That one balances padded tokens plus 0.001 times their squares, so that both
are judged by that as well, with the padding of the micro-batches which each of them makes, ours
under three budgets. "slowest" is then the most expensive share over what the mean would be without
padding; beside it are the number of micro-batches of a rank and the padded tokens of the largest.
"bound" is what no dealing gets below: the largest example, where it costs more than a share.

"plan": one epoch of a million examples, 32 for each rank a step. Every rank plans for itself. Times
are CPU times. The peak memory is what planning adds to a process that has the costs in memory.
Bytes are what one rank sends in a step by rings, by the planner's formulas and not measured
(`gradaccum/memory/spread.py`), with ours under 4,096 tokens, parameters gathered in bfloat16 and
gradients reduced in float32: as replicas, and sharded over all ranks in each mode of `sync`.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from common import publish
from transformers.trainer_pt_utils import BatchRebalanceSampler

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradaccum
from gradaccum.memory.spread import Group, Spread
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.split import split
from gradaccum.sync.modes import MODES

EXAMPLES = 1_000_000
PARAMETERS = 8_000_000_000
BUDGETS = (2048, 4096, 8192)
SIZE = gradaccum.Objective(loss=lambda *_: None, weight=None, size=lambda example: example)
COSTS = {
    "tokens": lambda lengths: lengths,
    "tokens + tokens^2 / 6144": lambda lengths: lengths + lengths**2 / 6144,
}
PADDED = "padded tokens + 0.001 tokens^2"


def lengths_of(num: int) -> torch.Tensor:
    """Return token counts, float64, shape (num,)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(num, dtype=torch.float64).normal_(6.0, 0.9, generator=generator)
    return drawn.exp_().round_().clamp_(8, 8192)


def spread(loads: torch.Tensor) -> dict[str, float]:
    """Return mean and 95th percentile of max over mean, of loads of shape (steps, ranks)."""
    ratios = loads.amax(dim=1) / loads.mean(dim=1)
    return {"mean": round(float(ratios.mean()), 4), "p95": round(float(ratios.quantile(0.95)), 4)}


def rebalanced(
    tokens: list[int], size: int, world: int, per_device: int, steps: int
) -> list[list[list[list[int]]]]:
    """Return the micro-batches of transformers' sampler: by step, rank, micro-batch, example."""
    accumulation = size // (world * per_device)
    ranks = [
        BatchRebalanceSampler(tokens, size, world, accumulation, shuffle=False, rank=rank)
        for rank in range(world)
    ]
    readers = [iter(rank) for rank in ranks]
    return [[list(islice(reader, accumulation)) for reader in readers] for _ in range(steps)]


def balance(size: int, world: int, steps: int) -> dict[str, Any]:
    """Deal the same effective batches in each way."""
    lengths = lengths_of(size * steps)
    sampler = EffectiveBatchSampler(len(lengths), size, rank=0, world=world)
    order = [i for at in range(0, size * steps, size) for i in sampler.batch(at)]
    lengths = lengths[torch.tensor(order)]
    tokens = lengths.int().tolist()
    found: dict[str, Any] = {name: {} for name in (*COSTS, PADDED)}
    milliseconds: dict[str, float] = {}

    def ours(costs: torch.Tensor) -> list[list[list[int]]]:
        dealer = EffectiveBatchSampler(
            len(lengths), size, costs=costs, shuffle=False, rank=0, world=world
        )
        begin = time.process_time()
        dealt = [dealer.shares(at) for at in range(0, size * steps, size)]
        milliseconds["ours"] = round(1000 * (time.process_time() - begin) / steps, 2)
        return dealt

    for name, cost in COSTS.items():
        costs = cost(lengths)
        by_step = costs.view(steps, size)
        largest = by_step.amax(dim=1) * world / by_step.sum(dim=1)
        found[name]["bound"] = round(float(largest.clamp(min=1).mean()), 4)
        found[name]["contiguous"] = spread(costs.view(steps, world, -1).sum(dim=2))
        loads = [[float(costs[share].sum()) for share in shares] for shares in ours(costs)]
        found[name]["ours"] = spread(torch.tensor(loads))
    alone, dealt = one_by_one(lengths), ours(one_by_one(lengths))
    ideal = alone.view(steps, size).sum(dim=1) / world
    for budget in BUDGETS:
        micros = [[cut(share, tokens, budget) for share in shares] for shares in dealt]
        found[PADDED][f"ours, {budget} tokens"] = as_run(micros, tokens, ideal)
    for per_device in (4, 1):
        key = f"batch_rebalance, per_device {per_device}"
        begin = time.process_time()
        micros = rebalanced(tokens, size, world, per_device, steps)
        seconds = (time.process_time() - begin) / (world * steps)
        milliseconds[key] = round(1000 * seconds, 2)
        for name, cost in COSTS.items():
            costs = cost(lengths)
            loads = [[float(costs[list(chain(*own))].sum()) for own in step] for step in micros]
            found[name][key] = spread(torch.tensor(loads))
        found[PADDED][key] = as_run(micros, tokens, ideal)
    return {**found, "milliseconds_a_step": milliseconds}


def one_by_one(lengths: torch.Tensor) -> torch.Tensor:
    """Return what examples cost alone by the cost model of transformers' sampler."""
    return lengths + BatchRebalanceSampler.QUADRATIC_COST_COEF * lengths**2


def as_run(
    micros: list[list[list[list[int]]]], tokens: list[int], ideal: torch.Tensor
) -> dict[str, Any]:
    """Return what micro-batches cost by that model, each padded to its longest example."""
    every = [micro for step in micros for rank in step for micro in rank]
    longest = [max(tokens[i] for i in micro) for micro in every]
    prices = iter(one_by_one(torch.tensor(longest, dtype=torch.float64)).tolist())
    loads = torch.tensor([[sum(len(m) * next(prices) for m in own) for own in s] for s in micros])
    slowest = loads.amax(dim=1) / ideal
    return {
        **spread(loads),
        "slowest": round(float(slowest.mean()), 4),
        "micro_batches": round(len(every) / loads.numel(), 2),
        "largest": max(len(micro) * most for micro, most in zip(every, longest, strict=True)),
    }


def cut(share: list[int], tokens: list[int], budget: int) -> list[list[int]]:
    """Return the micro-batches into which gradaccum cuts a share under a budget."""
    micros = split([tokens[i] for i in share], SIZE, gradaccum.Budget(budget))
    return [[share[i] for i in micro.examples] for micro in micros]


def plan(world: int) -> dict[str, Any]:
    """Plan one epoch; in a process of its own, for its memory."""
    lengths, size = lengths_of(EXAMPLES), 32 * world
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    begin = time.process_time()
    sampler = EffectiveBatchSampler(EXAMPLES, size, costs=lengths, rank=world // 2, world=world)
    sampler.batch(0)
    ordered = time.process_time() - begin
    begin = time.process_time()
    own_shares = list(sampler)
    dealt = time.process_time() - begin
    peak = peak_bytes() - before
    loads, num_micros, tokens = [], 0, lengths.int().tolist()
    for step, share in enumerate(own_shares[:-1]):  # the last one is short
        loads.append([float(lengths[s].sum()) for s in sampler.shares(step * size)])
        num_micros += len(cut(share, tokens, BUDGETS[1]))
    micros = num_micros / len(loads)
    whole = Group(2 * PARAMETERS, 4 * PARAMETERS)
    ways = [Spread(world, 1, None, (), whole, 1.0)]
    ways += [Spread(world, world, mode, (), whole, 1.0) for mode in MODES]
    return {
        "order_seconds": round(ordered, 3),
        "steps": len(own_shares),
        "milliseconds_a_step": round(1000 * dealt / len(own_shares), 2),
        "epoch_seconds": round(ordered + dealt, 2),
        "peak_bytes": peak,
        "balance": spread(torch.tensor(loads)),
        "micro_batches": round(micros, 2),
        "bytes_sent_a_step": {
            str(way.sync or "replicated"): round(micros * way.micro_bytes + way.step_bytes)
            for way in ways
        },
    }


def peak_bytes() -> int:
    """Return the peak memory of this process (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.plan:
        print(json.dumps(plan(args.plan)))
        return
    lengths = lengths_of(EXAMPLES)
    figures: dict[str, Any] = {
        "lengths": {
            "mean": round(float(lengths.mean()), 1),
            "p99": float(lengths.kthvalue(EXAMPLES * 99 // 100).values),
            "max": float(lengths.max()),
        },
        "steps": args.steps,
        "balance": {},
        "plan": {"examples": EXAMPLES, "parameters": PARAMETERS, "budget_tokens": BUDGETS[1]},
    }
    for size in (32, 256):
        for world in (2, 4, 8):
            print(f"E = {size}, W = {world}", file=sys.stderr)
            figures["balance"][f"E={size} W={world}"] = balance(size, world, args.steps)
    for world in (8, 64, 1024):
        print(f"plan for {world} ranks", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, __file__, "--plan", str(world)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        figures["plan"][f"W={world}"] = json.loads(done.stdout)
    publish(figures, args.out, transformers)


if __name__ == "__main__":
    main()
