"""Plan an 8-billion-parameter Llama for GPUs that are not here, each in a process of its own.

python benchmarks/plans.py --out benchmarks/results/plans.json --page docs/plans.md

Seconds and resident memory are those of the whole command. Nothing is run on a GPU: what is told of
one rests on the assumptions that each plan names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers as hf
from common import publish

GIB = 2**30
SHAPE = hf.LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_r=16"]
RUNS = {
    "full, bf16, AdamW": (["--dtype=bfloat16"], "141GiB"),
    "full, bf16, 8-bit AdamW": (["--dtype=bfloat16", "--optim=adamw_8bit"], "80GiB"),
    "LoRA r16, bf16": (["--dtype=bfloat16", *LORA], "48GiB"),
    "QLoRA r16, 4-bit nested": (
        [*LORA, "--load_in_4bit", "--use_bnb_nested_quant", "--optim=paged_adamw_8bit"], "24GiB",
    ),
    "full, bf16, AdamW, 8 ranks (FSDP2)": (
        ["--dtype=bfloat16", "--ranks=8", "--shard_ranks=8", "--effective_batch_size=256"], "80GiB",
    ),
    "full, bf16, AdamW, 64 ranks (HSDP, 8 copies)": (
        ["--dtype=bfloat16", "--ranks=64", "--shard_ranks=8", "--effective_batch_size=2048"],
        "80GiB",
    ),
    "full, bf16, AdamW, 1,024 ranks (HSDP, 16 copies)": (
        ["--dtype=bfloat16", "--ranks=1024", "--shard_ranks=64", "--effective_batch_size=32768"],
        "80GiB",
    ),
}  # fmt: skip
PAGE = """\
# Plans for a Llama of 8 billion parameters

Made on two CPU cores without weights and without a GPU, by `{command}`:
`gradaccum plan --effective_batch_size 64 --max_length 2048 --device cuda --memory ...` with the
flags of each row; on several ranks 32 examples for each, all told of one rank. Times are relative
to the fastest option that fits; peaks are what tensors take, with the backward of flash attention
and blocks of 512 bytes, and fit beside context, workspace and fragments (assumed, see
[guides/memory.md](guides/memory.md)).

{heads}
{rows}

The options of each, by memory and time. A setting of which one row is too much has no more than
that; checkpointing is not looked at where it cannot be faster.

{options}
"""
HEADS = ["run", "memory", "chosen micro-batch", "accumulation steps", "checkpointing", "peak GiB",
         "parameters", "gradients", "optimizer", "activations", "sync", "sent GiB a step",
         "planned in", "with"]  # fmt: skip
OPTIONS = ["micro-batch", "accumulation steps", "checkpointing", "sync", "peak GiB", "time", "fits"]


def head(names: list[str]) -> str:
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def planned(folder: str, flags: list[str], memory: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "gradaccum", "plan", f"--model_name_or_path={folder}",
               "--effective_batch_size=64", "--max_length=2048", "--device=cuda",
               f"--memory={memory}", "--json", *flags]  # fmt: skip
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, said
    return json.loads(said) | {
        "plan_seconds": round(time.perf_counter() - begin, 1),
        "resident_gib": round(usage.ru_maxrss * 1024 / GIB, 2),
        "flags": " ".join(flags),
    }


def row(name: str, memory: str, found: dict[str, Any]) -> str:
    one, parts = found["chosen"], found["chosen"]["categories"]
    held = sum(parts[k] for k in ("activations", "temporaries", "inputs", "buffers"))
    sizes = [one["peak_bytes"], parts["parameters"], parts["gradients"], parts["optimizer state"]]
    sent = found["sent_bytes"]["micro_batch"] * one["num_micros"] + found["sent_bytes"]["step"]
    cells = [name, memory, f"{one['rows']} x {one['length']:,}", str(one["num_micros"]),
             "on" if one["checkpointing"] else "off",
             *(f"{n / GIB:.1f}" for n in (*sizes, held)), one["sync"] or "", f"{sent / GIB:.0f}",
             f"{found['plan_seconds']:.0f} s", f"{found['resident_gib']:.2f} GiB"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def options(name: str, found: dict[str, Any]) -> str:
    lines = [f"**{name}**", "", head(OPTIONS)]
    for o in found["options"]:
        if o["rows"] in (1, 2, 4, 8, 16, 64) or o["budget"] == found["chosen"]["budget"]:
            lines.append(
                f"| {o['rows']} x {o['length']:,} | {o['num_micros']} | "
                f"{'on' if o['checkpointing'] else 'off'} | {o['sync'] or ''} | "
                f"{o['peak_bytes'] / GIB:.1f} | {o['time']:.2f}x | {'yes' if o['fits'] else 'no'} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--page")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        SHAPE.save_pretrained(folder)
        for name, (flags, memory) in RUNS.items():
            found[name] = planned(folder, flags, memory)
            one = found[name]["chosen"]
            print(name, found[name]["plan_seconds"], one["rows"], one["peak_bytes"] / GIB,
                  file=sys.stderr)  # fmt: skip
    if args.page:
        rows = "\n".join(row(name, RUNS[name][1], plan) for name, plan in found.items())
        tables = "\n\n".join(options(name, plan) for name, plan in found.items())
        text = PAGE.format(
            command="python benchmarks/plans.py", heads=head(HEADS), rows=rows, options=tables
        )
        Path(args.page).write_text(text)
    publish({"plans": found}, args.out, hf)


if __name__ == "__main__":
    main()
