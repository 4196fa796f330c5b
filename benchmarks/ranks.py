"""Measure training on several ranks: exactness, what is sent, time, and how a failure is noticed.

python benchmarks/ranks.py --out benchmarks/results/ranks.json

Ranks are processes of this machine that talk over gloo, with one thread each.

"trajectory": 50 steps of AdamW with clipping and a cosine schedule on ragged data, effective batch
16, shares by `EffectiveBatchSampler`, another budget on each rank, everything in float64. Figures
are the largest relative difference of a tensor of the final weights, and of a loss, from the run
on one process. "2 then 3" goes on after half of the steps from the states of weights, optimizer,
schedule and sampler; "1 rank" is one process again, in larger micro-batches. The bias of the
attention's keys is frozen: its gradient is zero but for rounding, and AdamW makes steps of that.

"traffic": collectives of one step in its steady state as the dispatcher of torch sees them, and the
bytes that a rank hands to them. "stock" is DistributedDataParallel, its loss divided by the weight
of the whole batch, which takes one sum; "no_sync" accumulates as it should, "sync" reduces in each
backward.

"time": one step on two ranks with the same examples in the same micro-batches, ours and stock with
no_sync, in rounds of one step each in turn. The ratio is the median of those of the rounds, beside
their quartiles. "control" is one exchange of messages, "reduce" all sums of a step, both measured
where ranks begin them together.

"load_average" tells how busy the machine was with this and with others when that was timed.

"noticed": seconds from an error that one of four ranks raises, or from its SIGKILL, until the last
of the others has raised PeerFailed. After a kill the others stay alive for some seconds, so that
none is told by another's end.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from common import publish, timed

from gradaccum.batch import as_batch
from gradaccum.causal import causal_lm
from gradaccum.engine import Accumulator
from gradaccum.errors import PeerFailed
from gradaccum.sampler import EffectiveBatchSampler
from gradaccum.split import split
from gradaccum.sync.replicated import Replicated
from gradaccum.types import Budget
from tests import models
from tests.distributed import launch

BUDGETS = (40, 64, 24, 96)  # tokens in a micro-batch, by rank


def on_ranks(name: str, world: int, *args: Any, **options: Any) -> list[Any]:
    given = {"deadline": 3600, "timeout": 600} | options
    return launch.values(launch.run(f"benchmarks.ranks:{name}", world, *args, **given))


def trajectory(
    rank: int, world: int, file: str, begin: int, end: int, steps: int, factor: int = 1
) -> Any:
    """Take steps from `begin` to `end`, from the states that are kept in the file."""
    data = models.examples([3 + 7 * i % 23 for i in range(150)])
    model = models.model(width=16)
    model.qkv.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    costs = [len(e["input_ids"]) for e in data]
    sampler = EffectiveBatchSampler(len(data), 16, costs=costs, rank=rank, world=world)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler}
    if begin:
        states = torch.load(file)
        for name, part in parts.items():
            part.load_state_dict(states[name])
    accumulator = Accumulator(
        model, causal_lm(), budget=Budget(tokens=factor * BUDGETS[rank]), collate=models.collated
    )
    losses: list[float] = []
    while True:
        for share in sampler:
            losses.append(accumulator.backward([data[i] for i in share]).loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            sampler.commit()
            if begin + len(losses) == end:
                if rank == 0:
                    torch.save({n: part.state_dict() for n, part in parts.items()}, file)
                return losses, model.state_dict()


def run_of(worlds: Sequence[int], steps: int, factor: int = 1) -> tuple[list[float], Any]:
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, world in enumerate(worlds):
            begin, end = i * steps // len(worlds), (i + 1) * steps // len(worlds)
            file = f"{folder}/states"
            found = on_ranks("trajectory", world, file, begin, end, steps, factor, warm=True)
            for more, weights in found[1:]:
                assert more == found[0][0] and all(
                    map(torch.equal, weights.values(), found[0][1].values())
                )
            losses += found[0][0]
    return losses, found[0][1]


def trajectories(steps: int) -> dict[str, Any]:
    (losses, weights), figures = run_of((1,), steps), {}
    for worlds in ((1,), (2,), (3,), (4,), (2, 3)):
        others, found = run_of(worlds, steps, factor=3 if worlds == (1,) else 1)
        apart = [((found[n] - w).norm() / w.norm()).item() for n, w in weights.items()]
        name = " then ".join(map(str, worlds))
        figures[f"{name} rank{'s' * (name != '1')}"] = {
            "weights": max(apart),
            "losses": max(abs(a - b) / a for a, b in zip(losses, others, strict=True)),
        }
    return {"steps": steps, "first_loss": losses[0], "last_loss": losses[-1], **figures}


class Collectives(TorchDispatchMode):
    """Hold name and bytes of each collective that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given = args[1] if func._opname.startswith("allgather") else args[0]
            num = sum(x.nbytes for x in given if isinstance(x, Tensor))
            self.found.append((func._opname.rstrip("_"), num))
        return func(*args, **(kwargs or {}))


def stock(net: Any, batch: list[Any], budget: Budget, *, each: bool = False) -> None:
    """Accumulate by DistributedDataParallel as it should be done, in the same micro-batches."""
    objective, world = causal_lm(), dist.get_world_size()
    assert objective.weight is not None, "it counts tokens"
    host = as_batch(batch, None, trim=True)
    inputs = [host.take(micro.examples) for micro in split(host, objective, budget)]
    total = torch.stack([torch.as_tensor(objective.weight(part)) for part in inputs]).sum()
    dist.all_reduce(total)
    for i, part in enumerate(inputs):
        with nullcontext() if each or i == len(inputs) - 1 else net.no_sync():
            (objective.loss(net, part) * (world / total)).backward()


def llama(width: int, layers: int, vocab: int) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, use_cache=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).train()


SIZES = {"1 million parameters": (128, 4, 1024), "8 million parameters": (256, 4, 8192)}


def texts(rank: int, num: int, longest: int) -> list[dict[str, Any]]:
    """Return ragged examples."""
    draw = random.Random(rank)
    lengths = [longest - draw.randrange(longest // 4) for _ in range(num)]
    rows = [[draw.randrange(1, 1000) for _ in range(length)] for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def traffic(rank: int, world: int, num_micros: int) -> dict[str, Any]:
    batch, budget = texts(rank, 16, 32), Budget(examples=16 // num_micros)
    own, wrapped = (
        llama(*SIZES["1 million parameters"]),
        DistributedDataParallel(llama(*SIZES["1 million parameters"])),
    )
    accumulator = Accumulator(own, causal_lm(), budget=budget)
    ways = {
        "ours": (own, lambda: accumulator.backward(batch)),
        "stock, no_sync": (wrapped, lambda: stock(wrapped, batch, budget)),
        "stock, sync": (wrapped, lambda: stock(wrapped, batch, budget, each=True)),
    }
    figures = {}
    for name, (model, step) in ways.items():
        for _ in range(3):
            model.zero_grad()
            with Collectives() as seen:
                step()
        calls = [name for name, _ in seen.found]
        figures[name] = {call: calls.count(call) for call in sorted(set(calls))} | {
            "bytes": sum(num for _, num in seen.found)
        }
    num = sum(p.numel() for p in own.parameters())
    return {"parameters": num, "gradient_bytes": 4 * num, **figures}


def times(rank: int, world: int, size: str, rounds: int) -> dict[str, Any]:
    batch, budget = texts(rank, 16, 64), Budget(examples=4)
    own, wrapped = llama(*SIZES[size]), DistributedDataParallel(llama(*SIZES[size]))
    accumulator = Accumulator(own, causal_lm(), budget=budget)
    ways = {
        "ours": (own, lambda: accumulator.backward(batch)),
        "stock": (wrapped, lambda: stock(wrapped, batch, budget)),
    }
    reduce, draw, spent = timed(Replicated, "reduce"), random.Random(0), {n: [] for n in ways}
    for i in range(rounds + 2):
        for name in draw.sample(list(ways), 2):
            model, step = ways[name]
            model.zero_grad()
            dist.barrier()
            begin = time.perf_counter()
            step()
            if i >= 2:
                spent[name].append(time.perf_counter() - begin)
    worst = max(
        ((p.grad - q.grad).norm() / q.grad.norm()).item()
        for p, q in zip(own.parameters(), wrapped.parameters(), strict=True)
    )
    ratios = [a / b for a, b in zip(spent["ours"], spent["stock"], strict=True)]
    control = []
    for _ in range(20 * rounds):
        dist.barrier()
        begin = time.perf_counter()
        accumulator.ranks.exchange({"share": [4, 16, 1024, 1000], "weights": {"loss": 1000.0}})
        control.append(time.perf_counter() - begin)
    return {
        "parameters": sum(p.numel() for p in own.parameters()),
        "rounds": rounds,
        "ours_seconds": round(statistics.median(spent["ours"]), 5),
        "stock_seconds": round(statistics.median(spent["stock"]), 5),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios)[::2]],
        "control_seconds": round(statistics.median(control), 6),
        "reduce_seconds": round(statistics.median(reduce[2:]), 6),
        "gradients_apart": worst,
    }


class Broken(Exception):
    """What a rank raises here."""


def small(rank: int, world: int) -> tuple[Accumulator, list[Any]]:
    batch = texts(rank, 6, 8)
    for example in batch:
        example["input_ids"] = example["labels"] = [i % models.VOCAB for i in example["labels"]]
    return Accumulator(models.model(), causal_lm(), budget=Budget(examples=2)), batch


def errors(rank: int, world: int, tries: int) -> list[float]:
    """Raise on one rank after the other; return when each was raised here."""
    accumulator, batch = small(rank, world)
    accumulator.backward(batch)
    found, calls = [], [0]

    def fail(module: nn.Module, args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2 and culprit == rank:
            found.append(time.time())
            raise Broken("here")

    accumulator.model.register_forward_pre_hook(fail)
    for i in range(tries):
        accumulator.model.zero_grad()
        culprit, calls[0] = i % world, 0
        dist.barrier()
        try:
            accumulator.backward(batch)
        except PeerFailed:
            found.append(time.time())
        except Broken:
            continue
    return found


def killed(rank: int, world: int, file: str, alive: float) -> float:
    """Kill rank 1 in its window; return when that was noticed here."""
    accumulator, batch = small(rank, world)
    accumulator.backward(batch)
    accumulator.model.zero_grad()
    dist.barrier()

    def kill(module: nn.Module, args: Any) -> None:
        Path(file).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        accumulator.model.register_forward_pre_hook(kill)
    try:
        accumulator.backward(batch)
    except PeerFailed:
        at = time.time()
        time.sleep(alive)
        return at
    raise AssertionError("nobody was missed")


def noticed(tries: int, alive: float) -> dict[str, Any]:
    raised = on_ranks("errors", 4, tries, warm=True)
    after_error = []
    for i, moments in enumerate(zip(*raised, strict=True)):
        after_error.append(max(moments) - moments[i % 4])
    after_kill = []
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            results = launch.run(
                "benchmarks.ranks:killed", 4, f"{folder}/at", alive, warm=True, timeout=300
            )
            at = float(Path(folder, "at").read_text())
            left = launch.values([result for result in results if result.rank != 1])
            after_kill.append(max(left) - at)
    return {
        name: {
            "tries": len(found),
            "median_seconds": round(statistics.median(found), 4),
            "largest_seconds": round(max(found), 4),
        }
        for name, found in (("error", after_error), ("SIGKILL", after_kill))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, rounds and tries")
    parser.add_argument("--out")
    args = parser.parse_args()
    import transformers as hf

    rounds, tries = (4, 3) if args.quick else (30, 20)
    figures = {
        "trajectory": trajectories(10 if args.quick else 50),
        "traffic of one step, 2 ranks": {
            f"{num} micro-batches": on_ranks("traffic", 2, num)[0] for num in (1, 4, 16)
        },
        "time of one step, 2 ranks": {s: on_ranks("times", 2, s, rounds)[0] for s in SIZES},
        "load_average": os.getloadavg()[0],
        "noticed by all of 4 ranks": noticed(tries, alive=1.0 if args.quick else 3.0),
    }
    publish(figures, args.out, hf)


if __name__ == "__main__":
    main()
