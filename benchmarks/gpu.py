"""Hold what a plan says of CUDA against a GPU; run into its memory; time ragged micro-batches.

python benchmarks/gpu.py --out benchmarks/results/gpu.json

- predicted: the peak that is predicted, with the workspaces of cuBLAS, against what torch allocates
  at most, against what it reserves, and against the smallest bound on what it reserves under which
  two steps run (searched to 1%).
- capped: effective batches under random bounds. Each ends exactly, bit for bit as from the start
  with the budget that memory left, or in `DoesNotFit`.
- ragged: a step of ragged micro-batches with cuDNN's attention and without, on shapes that are new
  and on the same ones again.
"""

import argparse
import gc
import os
import random
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what Hopper has anyway; deterministic

import torch
import transformers
from common import publish

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradaccum
from gradaccum import engine
from gradaccum.errors import DoesNotFit
from gradaccum.memory.cap import WORKSPACE
from gradaccum.memory.predict import Job, switch, trace
from gradaccum.optimizers import materialize

LENGTH, VOCABULARY = 512, 8192
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}  # 0.8 billion
CONFIGS = (  # dtype, heads of keys and values of 8, rows of a micro-batch, checkpointing, size
    (torch.float32, 4, 1, False, SMALL),
    (torch.float32, 4, 4, True, SMALL),
    (torch.float32, 8, 4, False, SMALL),
    (torch.float32, 8, 16, False, SMALL),
    (torch.bfloat16, 4, 4, False, SMALL),
    (torch.bfloat16, 4, 16, True, SMALL),
    (torch.bfloat16, 8, 4, False, LARGE),
    (torch.bfloat16, 4, 16, False, LARGE),
    (torch.bfloat16, 4, 32, True, LARGE),
)
OBJECTIVE = gradaccum.causal_lm()


def llama(dtype: torch.dtype, heads: int = 4, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=8, num_key_value_heads=heads, use_cache=False,
        **{**SMALL, **kwargs},
    )  # fmt: skip
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config).to(dtype).train()


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def ragged(num: int, shortest: int, longest: int, seed: int) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(num)]
    ids = [[draw.randrange(1, VOCABULARY) for _ in range(n)] for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def bound(num_bytes: int | None) -> None:
    """Bound what torch may reserve from now on."""
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0 if num_bytes is None else num_bytes / total)


def predicted(
    dtype: torch.dtype, heads: int, rows: int, checkpointing: bool, size: dict[str, int]
) -> dict[str, Any]:
    model = llama(dtype, heads, **size)
    job = Job(model, OBJECTIVE, adamw, inputs, as_cuda=True, checkpointing=checkpointing)
    expected = trace(job, rows, LENGTH).peak_bytes + WORKSPACE
    switch(model, checkpointing)
    optimizer = adamw(model.parameters())
    materialize(optimizer)
    accumulator = gradaccum.Accumulator(model, OBJECTIVE, budget=gradaccum.Budget(examples=rows))
    batch = [{"input_ids": [0] * LENGTH, "labels": [0] * LENGTH}] * (2 * rows)

    def step() -> None:
        accumulator.attempt(batch)
        optimizer.step()
        optimizer.zero_grad()

    def runs_in(num_bytes: int) -> bool:
        bound(num_bytes)
        try:
            step(), step()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            return False
        return True

    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    low, high = int(0.9 * allocated), int(1.5 * allocated)
    while high - low > 0.01 * allocated:
        middle = (low + high) // 2
        low, high = (low, middle) if runs_in(middle) else (middle, high)
    bound(None)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "key_value_heads": heads,
        "rows": rows,
        "checkpointing": checkpointing,
        "predicted": expected,
        "allocated": allocated,
        "reserved": reserved,
        "smallest_bound": high,
        "of_allocated": round(expected / allocated - 1, 4),
        "of_reserved": round(expected / reserved - 1, 4),
        "of_smallest_bound": round(expected / high - 1, 4),
    }


def capped(num: int) -> dict[str, Any]:
    """Run effective batches under random bounds, and again with the budget that was left."""
    torch.use_deterministic_algorithms(True)
    draw, ends, recoveries = random.Random(0), Counter[str](), Counter[int]()
    for seed in range(num):
        batch, limit, left = ragged(48, 32, LENGTH, seed), None, []
        mib = draw.randint(150, 3500)
        for memory in (mib * 2**20, None):
            model = llama(torch.float32, attention_dropout=0.1)
            bound(None if memory is None else torch.cuda.memory_reserved() + memory)
            accumulator = gradaccum.Accumulator(
                model, OBJECTIVE, budget=gradaccum.Budget(examples=48)
            )
            accumulator.limit = limit
            torch.manual_seed(seed)
            try:
                step = accumulator.backward(batch)
            except DoesNotFit:
                ends["DoesNotFit"] += 1
                break
            finally:
                bound(None)
            limit = accumulator.limit
            recoveries[len(step.recoveries)] += memory is not None
            left.append([p.grad for p in model.parameters()])
            assert step.num_examples == 48
        else:
            same = all(map(torch.equal, *left))
            ends["exact" if same else "NOT EXACT"] += 1
        print(f"{seed + 1}/{num} {mib} MiB: {dict(ends)}", file=sys.stderr)
    torch.use_deterministic_algorithms(False)
    return {"ended": dict(ends), "by_recoveries": dict(sorted(recoveries.items()))}


def attention(num: int) -> dict[str, Any]:
    """Time ragged steps in bf16; each shape is new in the first round and known in the second."""
    found: dict[str, Any] = {}
    own = engine._is_ragged
    for name, leaves in (("with cuDNN's attention", False), ("without", True)):
        model = llama(torch.bfloat16)
        accumulator = gradaccum.Accumulator(
            model, OBJECTIVE, budget=gradaccum.Budget(tokens=16_384)
        )
        engine._is_ragged = own if leaves else lambda _: False
        batches = [ragged(32, 64, 2048, seed) for seed in range(num)]
        accumulator.backward(ragged(32, 2048, 2048, 0))
        model.zero_grad()
        for which in ("new", "known"):
            spent = []
            for batch in batches:
                spent.append(accumulator.backward(batch).seconds)
                model.zero_grad()
            found[f"{name}, {which} shapes"] = round(statistics.median(spent), 4)
    engine._is_ragged = own
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caps", type=int, default=40)
    parser.add_argument("--out")
    args = parser.parse_args()
    figures: dict[str, Any] = {"median_seconds_of_a_step": attention(6)}
    free, total = torch.cuda.mem_get_info()
    figures["context_bytes"] = total - free - torch.cuda.memory_reserved()
    figures["capped"] = capped(args.caps)
    runs = figures["predicted"] = []
    for config in CONFIGS:
        runs.append(predicted(*config))
        keys = ("of_allocated", "of_reserved", "of_smallest_bound")
        figures["largest"] = {key: max((run[key] for run in runs), key=abs) for key in keys}
        publish(figures, args.out, transformers)


if __name__ == "__main__":
    main()
