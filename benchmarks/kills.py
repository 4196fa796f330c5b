"""Kill runs at random moments, and see what is left of them: lost samples, other trajectories.

python benchmarks/kills.py --n 100 --growth --out benchmarks/results/kills.json

All ranks get SIGKILL at once, at a moment drawn uniformly from the time that a run takes, while it
starts, trains or writes a checkpoint, which it does after each step. It is started again until it
is done, then the next one begins. `--growth` adds a run under torchrun whose second agent is killed
and then replaced by a larger one: 3, 2, 4 ranks. Last, saving is timed against writing as many
bytes.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import publish

sys.path.insert(0, str(Path(__file__).parent.parent))

from safetensors.torch import load_file
from torch import Tensor

from gradaccum.checkpoint import Checkpoints
from tests.distributed import launch
from tests.distributed.elastic_train import survive, train

SCENES: dict[str, dict[str, Any]] = {
    "replicated on 2 ranks": {"kind": "replicated", "worlds": (2,)},
    "replicated on 1 to 4 ranks": {"kind": "replicated", "worlds": (1, 2, 3, 4)},
    "FSDP2 on 1 to 4 ranks": {"kind": "fsdp2", "worlds": (1, 2, 3, 4)},
}


def distance(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the largest difference; tied weights may be in one of them only once."""
    return max((weights[k] - others[k]).abs().max().item() for k in weights.keys() & others.keys())


def killed(folder: Path, num: int, steps: int, seed: int, scene: dict[str, Any]) -> dict[str, Any]:
    alone = train(0, 1, str(folder / "alone"), steps, every=0)["weights"]
    found = survive(folder, random.Random(seed), num_kills=num, steps=steps, every=1, **scene)
    weights = found.pop("weights")
    found["largest_difference_from_one_process"] = max(distance(w, alone) for w in weights)
    if len(scene["worlds"]) == 1:  # the first run was left alone
        equal = sum(distance(each, weights[0]) == 0.0 for each in weights)
        found["runs_equal_in_every_bit"] = equal
    return found


def agent(folder: Path, port: int, nproc: int, host: bool, steps: int) -> subprocess.Popen[bytes]:
    """Start an agent of torchrun; the one that holds the rendezvous has to survive."""
    conf = f"is_host={int(host)},last_call_timeout=4,timeout=120"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node",
        str(nproc), "--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-endpoint",
        f"127.0.0.1:{port}", "--rdzv-conf", conf, "--rdzv-id", "growth", "--local-addr",
        "127.0.0.1", "-m", "tests.distributed.elastic_train", str(folder), "--steps", str(steps),
        "--slow", "0.5",
    ]  # fmt: skip
    env = {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    with (folder / f"agent-{nproc}-{int(host)}.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=launch.ROOT, env=os.environ | env, stdout=log, stderr=log
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill an agent and what it has started."""
    for pid in [*launch.descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def log_of(folder: Path) -> list[Any]:
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(folder: Path, world: int, deadline: float) -> None:
    """Wait for two steps on so many ranks."""
    begin = time.monotonic()
    while sum(line[2] == world for line in log_of(folder)) < 2:
        assert time.monotonic() - begin < deadline, f"no steps on {world} ranks: see {folder}"
        time.sleep(0.1)


def grown(folder: Path, steps: int) -> dict[str, Any]:
    """Go from 3 ranks to 2 and to 4 while it runs."""
    folder.mkdir()
    alone = train(0, 1, str(folder / "alone"), steps, every=0)
    port = launch.free_port()
    agents = [agent(folder, port, 2, True, steps), agent(folder, port, 1, False, steps)]
    try:
        until(folder, 3, 120)
        end(agents.pop())
        begin = time.monotonic()
        until(folder, 2, 200)
        recovered = time.monotonic() - begin
        agents.append(agent(folder, port, 2, False, steps))
        begin = time.monotonic()
        until(folder, 4, 200)
        grew = time.monotonic() - begin
        agents[0].wait(300)
    finally:
        for each in agents:
            end(each)
    lines = log_of(folder)
    last = {line[0]: line for line in lines}
    losses = [abs(last[step][1] - alone["losses"][step - 1]) for step in range(1, steps + 1)]
    return {
        "ranks": [line[2] for i, line in enumerate(lines) if not i or lines[i - 1][2] != line[2]],
        "steps": steps,
        "redone": len(lines) - steps,
        "seconds_to_two_steps_after_the_kill": round(recovered, 1),
        "seconds_to_two_steps_after_the_larger_agent": round(grew, 1),
        "lost_or_doubled": int([i for s in sorted(last) for i in last[s][4]] != alone["seen"]),
        "largest_difference_of_a_loss": max(losses),
        "largest_difference_from_one_process": distance(
            load_file(folder / "model.safetensors"), alone["weights"]
        ),
    }


def saving(folder: Path, rounds: int) -> dict[str, Any]:
    """Time a save of a model with Adam's state, and the same bytes written and flushed."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2048)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    checkpoints = Checkpoints(folder, model=model, optimizer=optimizer)
    data = bytes(3 * sum(p.nbytes for p in model.parameters()))
    spent: dict[str, list[float]] = {"save": [], "write": [], "restore": []}
    for step in range(1, rounds + 1):
        begin = time.perf_counter()
        checkpoints.save(step)
        spent["save"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with (folder / "plain").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        spent["write"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        checkpoints.restore()
        spent["restore"].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(spent["save"], spent["write"], strict=True)]
    return {
        "bytes": len(data),
        **{f"{name}_seconds": round(statistics.median(s), 3) for name, s in spent.items()},
        "median_ratio_of_save_to_write": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="kills of each scene")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", action="store_true", help="3, 2, 4 ranks under torchrun")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, scene in SCENES.items():
            inner = Path(folder, name.replace(" ", "-"))
            figures[name] = killed(inner, args.n, args.steps, args.seed, scene)
        if args.growth:
            figures["torchrun, 3 to 2 to 4 ranks"] = grown(Path(folder, "growth"), 60)
        figures["saving"] = saving(Path(folder, "saving"), 9)
    publish(figures, args.out)


if __name__ == "__main__":
    main()
