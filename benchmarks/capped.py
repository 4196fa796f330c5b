"""Run steps under a real cap of memory, at random sizes: exact, or `DoesNotFit`, and nothing else.

python benchmarks/capped.py --caps 60 --out benchmarks/results/capped.json

Linux. Each cap is a process of its own: RLIMIT_DATA is set to what it has plus some MiB, and a step
whose budget holds the whole batch runs into it. Its gradient is compared, bit for bit, with that of
a fresh process without a cap that begins with the budget at which it ended.
"""

import argparse
import ctypes
import dataclasses
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradaccum
from gradaccum.errors import DoesNotFit

MIB = 2**20
LENGTHS = (16, 256)


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, attention_dropout=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch(seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(*LENGTHS, (24,), generator=generator).tolist()
    rows = [torch.randint(1, 4096, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def digest(net: torch.nn.Module) -> str:
    import hashlib

    found = hashlib.sha256()
    for p in net.parameters():
        found.update(p.grad.numpy().tobytes())
    return found.hexdigest()


def data_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmData"].split()[0]) * 1024


def one(seed: int, mib: int | None, limit: dict[str, int] | None) -> dict[str, Any]:
    """Run one step, with that many MiB left or without a cap; in a process of its own."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 64 * 1024), libc.mallopt(-1, 64 * 1024)  # what is freed goes back at once
    net, rows = model(), batch(seed)
    accumulator = gradaccum.Accumulator(
        net, gradaccum.causal_lm(), budget=gradaccum.Budget(examples=24)
    )
    warm = gradaccum.Accumulator(net, gradaccum.causal_lm(), budget=gradaccum.Budget(examples=1))
    warm.backward(rows[:1])
    net.zero_grad()
    accumulator.limit = None if limit is None else gradaccum.Budget(**limit)
    torch.manual_seed(seed)
    if mib is not None:
        libc.malloc_trim(0)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + mib * MIB, hard))
    try:
        step = accumulator.backward(rows)
    except DoesNotFit as error:
        return {"ended": "DoesNotFit", "said": str(error).splitlines()[0][:160]}
    finally:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return {
        "ended": "exact",
        "num_recoveries": len(step.recoveries),
        "limit": accumulator.limit and dataclasses.asdict(accumulator.limit),
        "num_micros": step.num_micros,
        "num_examples": step.num_examples,
        "digest": digest(net),
    }


def run(seed: int, mib: int | None, limit: dict[str, int] | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", json.dumps([seed, mib, limit])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return {"ended": f"crashed with {done.returncode}", "said": done.stderr[-400:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caps", type=int, default=60)
    parser.add_argument("--out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*json.loads(args.one))))
        return
    from common import publish

    draw, runs = random.Random(0), []
    for seed in range(args.caps):
        mib = draw.randint(4, 900)
        found = run(seed, mib, None)
        if found["ended"] == "exact":
            plain = run(seed, None, found["limit"])
            if plain["digest"] != found["digest"] or found["num_examples"] != 24:
                found["ended"] = "NOT EXACT"
        runs.append({"mib": mib, **found})
        print(f"{seed + 1}/{args.caps} {mib} MiB: {found}", file=sys.stderr)
    kinds = {run["ended"] for run in runs}
    publish(
        {
            "ended": {kind: sum(run["ended"] == kind for run in runs) for kind in sorted(kinds)},
            "recovered": sum(run.get("num_recoveries", 0) > 0 for run in runs),
            "runs": [{k: v for k, v in run.items() if k != "digest"} for run in runs],
        },
        args.out,
    )


if __name__ == "__main__":
    main()
