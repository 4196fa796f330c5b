"""A tiny run that may be killed anywhere and goes on on any number of ranks, sharded or not.

python -m tests.distributed.elastic_train FOLDER --steps 20 --every 3 --kill 0:1:7,1:0:12

What a step computes depends on the step alone: its examples come from an order that knows no rank,
gradients are sums over ranks, divided by the weight of the whole effective batch. `log.jsonl` has a
line for every step that was done, with its examples.
"""

import argparse
import json
import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from gradaccum.checkpoint import Checkpoints, export
from tests.distributed import launch

NUM_EXAMPLES, EFFECTIVE_BATCH, WIDTH, VOCAB = 43, 10, 30, 11


class Net(nn.Module):
    """Of odd sizes: tied weights, a frozen layer, a partly frozen one, an unused parameter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.partly = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.narrow = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(7))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        self.frozen.requires_grad_(False)
        self.partly.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in (self.frozen, self.partly, *self.inner):
            x = x + torch.tanh(self.dropout(layer(x)))
        return self.head(x) * torch.sigmoid(self.narrow(x)).sum(-1, keepdim=True)


class Order:
    """Yield the examples of each step; hold how many are consumed, and which."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def batch(self) -> list[int]:
        epoch, done = divmod(len(self.seen), NUM_EXAMPLES)
        order = random.Random(epoch).sample(range(NUM_EXAMPLES), NUM_EXAMPLES)
        return order[done : done + EFFECTIVE_BATCH]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


def examples() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (NUM_EXAMPLES,), generator=generator)
    labels = torch.randint(VOCAB, (NUM_EXAMPLES,), generator=generator)
    weights = torch.randint(1, 9, (NUM_EXAMPLES,), generator=generator).double()
    return tokens, labels, weights


def sharded(model: nn.Module, kind: str) -> nn.Module:
    """Return the model as it is ("replicated"), or sharded ("fsdp2", "hsdp")."""
    if kind == "replicated":
        return model
    shape = (2, dist.get_world_size() // 2) if kind == "hsdp" else (dist.get_world_size(),)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in [*model.inner, model]:  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        fully_shard(layer, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    return model


def backward(model: nn.Module, batch: list[int], rank: int, world: int, kind: str) -> Tensor:
    """Leave the gradient of the whole batch, and return its loss."""
    tokens, labels, weights = examples()
    total = weights[batch].sum()
    share = batch[rank::world]
    # Sharded ranks have to run equally often; an example without a weight stands in for none.
    size = 2 + rank % 2 if kind == "replicated" else len(batch)
    loss = torch.zeros((), dtype=torch.float64)
    for at in range(0, max(len(share), 1), size):
        ids = share[at : at + size] or batch[:1]
        factor = weights[ids] / total if share else torch.zeros(1, dtype=torch.float64)
        part = (F.cross_entropy(model(tokens[ids]), labels[ids], reduction="none") * factor).sum()
        part.backward()
        loss += part.detach()
    if world > 1:
        dist.all_reduce(loss)
    if world > 1 and kind == "replicated":
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
    return loss


def train(
    rank: int,
    world: int,
    folder: str,
    steps: int,
    *,
    kind: str = "replicated",
    every: int = 3,
    dropout: float = 0.0,
    kill: str = "",
    slow: float = 0.0,
    without: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    """Go on from the last checkpoint to `steps`; return weights, losses and where it went on.

    Args:
        rank: Of this process.
        world: Number of ranks.
        folder: Of checkpoints and log.
        steps: How many steps are done at the end.
        kind: "replicated", "fsdp2" or "hsdp".
        every: Save after so many steps, and at the end; 0: never.
        dropout: Probability.
        kill: "start:rank:step", with commas between several: who is killed after the backward of
            which step, at which start by the same torchrun.
        slow: Seconds to sleep in each step.
        without: What is not restored: a control that has to fail.
        options: Those of `Checkpoints`.
    """
    torch.manual_seed(rank)
    model = sharded(Net(dropout), kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9], gamma=0.5)
    order = Order()
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "order": order}
    for name in without:
        del objects[name]
    checkpoints = Checkpoints(folder, **options, **objects)
    step = begin = checkpoints.restore()
    losses = []
    while step < steps:
        batch = order.batch()
        loss = backward(model, batch, rank, world, kind)
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if f"{start}:{rank}:{step}" in kill.split(","):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(slow)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        model.num_steps += 1  # pyright: ignore[reportOperatorIssue]
        order.seen += batch
        step += 1
        losses.append(loss.item())
        if rank == 0:
            _log(folder, [step, loss.item(), world, begin, batch])
        if every and (step % every == 0 or step == steps):
            checkpoints.save(step)
    return {
        "weights": whole(model),
        "losses": losses,
        "begin": begin,
        "seen": order.seen,
        "drawn": torch.rand(3).tolist(),
    }


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights, from any sharding."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in model.state_dict().items()
    }


def survive(
    folder: Path,
    chance: random.Random,
    *,
    num_kills: int,
    steps: int,
    every: int,
    worlds: tuple[int, ...],
    kind: str = "replicated",
) -> dict[str, Any]:
    """Run again and again, and kill all ranks at random moments; return what became of the runs.

    The first run is left alone: it shows how long one takes, and what it should arrive at.

    Args:
        folder: Where each run gets its own.
        chance: Of which the moments and the numbers of ranks are drawn.
        num_kills: How often.
        steps: Of each run.
        every: Save after so many steps.
        worlds: Numbers of ranks, one of which is drawn for each start.
        kind: Of sharding.
    """
    found: dict[str, Any] = {
        "kills": 0, "completed": 0, "half_written": 0, "lost_or_doubled": 0, "checkpoints_lost": 0,
        "redone": 0, "weights": [],
    }  # fmt: skip
    launch.run("operator:add", 1, warm=True, deadline=150)  # starting the fork server takes seconds
    expected, seconds = consumed(steps), 0.0
    while not seconds or found["kills"] < num_kills:
        run = folder / f"run-{found['completed']}"
        latest, results = 0, None
        while results is None:
            begin, born = time.monotonic(), time.time()
            scene = (_killable, (str(run), steps, kind, every))
            job = launch.Job([scene], chance.choice(worlds), deadline=150, timeout=120, warm=True)
            left_alone = not seconds or found["kills"] >= num_kills
            moment = chance.uniform(0, seconds)
            while not job.done() and (left_alone or time.monotonic() - begin < moment):
                time.sleep(0.002)
            if job.done():
                results = launch.values(job.wait()[0])
                if results[0]["begin"] == 0:  # others use the machine, too
                    seconds = time.monotonic() - begin
            else:
                job.kill()
                found["kills"] += 1
                half = [path.stat().st_ctime for path in run.glob("*.writing")]
                found["half_written"] += any(changed >= born for changed in half)
            there = [int(path.name[5:]) for path in run.glob("step-*") if path.suffix == ""]
            found["checkpoints_lost"] += max(there, default=0) < latest
            latest = max(there, default=0)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        last = {line[0]: line[4] for line in lines}
        done = [i for step in range(1, steps + 1) for i in last[step]]
        found["lost_or_doubled"] += (done != expected) + (results[0]["seen"] != expected)
        found["redone"] += len(lines) - steps
        found["weights"].append(results[0]["weights"])
        found["completed"] += 1
    return found


def _killable(rank: int, world: int, folder: str, steps: int, kind: str, every: int) -> Any:
    return train(rank, world, folder, steps, kind=kind, every=every)


def consumed(steps: int) -> list[int]:
    """Return the examples that so many steps take, without a checkpoint."""
    order = Order()
    for _ in range(steps):
        order.seen += order.batch()
    return order.seen


def _log(folder: str, line: list[Any]) -> None:
    """Append a line at once: a run that is killed leaves whole lines."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = os.open(f"{folder}/log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{json.dumps(line)}\n".encode())
    os.close(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--kind", default="replicated")
    parser.add_argument("--kill", default="")
    parser.add_argument("--slow", type=float, default=0.0)
    args = vars(parser.parse_args())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = train(dist.get_rank(), dist.get_world_size(), **args)
    model = Net()
    model.load_state_dict(found["weights"])
    export(args["folder"], model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
