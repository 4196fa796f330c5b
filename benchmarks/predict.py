"""Compare predicted peaks of memory with those of real steps, and with where a real cap is hit.

python benchmarks/predict.py --out benchmarks/results/predict.json

Each case is one steady step: two micro-batches and the optimizer. "predicted" is traced without
data; "tracked" counts every tensor of the real step; "capped" is the smallest RLIMIT_DATA, found by
bisection to 1 MiB, under which the real step runs (Linux).
"""

import argparse
import ctypes
import itertools
import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from common import publish
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradaccum
from gradaccum.device import suppressing_out_of_memory
from gradaccum.memory.predict import Envelope, Job, run_step, trace
from gradaccum.memory.recipes import quantise
from gradaccum.memory.tracker import Tracker
from gradaccum.optimizers import materialize

MIB = 2**20
ROWS, LENGTH = (1, 4), 64
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = (
    "Llama",
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Gemma",
    "Gemma2",
    "Phi3",
    "Olmo2",
    "Cohere",
    "Granite",
    "SmolLM3",
    "StableLm",
)


def made(name: str, **changes: Any) -> nn.Module:
    config = getattr(hf, f"{name}Config")(**SMALL | changes)
    return getattr(hf, f"{name}ForCausalLM")(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {name: partial(made, name) for name in PLAIN}
ARCHITECTURES |= {
    "Gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL)),
    "GPT2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    ),
    "Bert": lambda: hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "Mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=16,
            expand=2,
            state_size=16,
            n_groups=1,
        )
    ),
    "Qwen3Moe": partial(
        made, "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "Mixtral": partial(made, "Mixtral", num_local_experts=4),
}


def inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 500, (rows, length))
    return {"input_ids": ids, "labels": ids}


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def prepared(model: nn.Module, *, lora: bool, checkpointing: bool) -> nn.Module:
    model.config.use_cache = False
    model.train()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def tracked(job: Job, rows: int) -> int:
    """Return the peak of one real step."""
    optimizer = job.optimizer([p for p in job.model.parameters() if p.requires_grad])
    materialize(optimizer)
    tracker = Tracker()
    run_step(job, job.model, optimizer, job.window(rows, LENGTH, 2), tracker)
    return tracker.peak_bytes


def compared(name: str, *, lora: bool, checkpointing: bool) -> list[dict[str, Any]]:
    model = prepared(ARCHITECTURES[name](), lora=lora, checkpointing=checkpointing)
    job = Job(model, gradaccum.causal_lm(), adamw, inputs)
    envelope, found = Envelope(job, LENGTH), []
    for rows in ROWS:
        predicted, real = trace(job, rows, LENGTH).peak_bytes, tracked(job, rows)
        found.append(
            {
                "model": name,
                "lora": lora,
                "checkpointing": checkpointing,
                "rows": rows,
                "tracked_bytes": real,
                "error": predicted / real - 1,
                "envelope_error": envelope.peak_bytes(rows) / real - 1,
            }
        )
    return found


def quantised() -> dict[str, Any]:
    """Compare a 4-bit base with adapters: layers of bitsandbytes against their stand-ins."""
    import tempfile

    config = hf.LlamaConfig(**SMALL | {"hidden_size": 256, "intermediate_size": 512})
    with tempfile.TemporaryDirectory() as folder:
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        four = hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        real = hf.LlamaForCausalLM.from_pretrained(
            folder, quantization_config=four, dtype=torch.bfloat16
        )
    with torch.device("meta"):
        twin = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = {}
    adapters = LoraConfig(r=4, target_modules="all-linear")
    for checkpointing in (False, True):
        for model, is_real in ((real, True), (twin, False)):
            if not hasattr(model, "peft_config"):
                model = get_peft_model(model, adapters)
                for p in model.parameters():
                    if p.requires_grad:
                        p.data = p.data.to(torch.bfloat16)
                if not is_real:
                    quantise(model, nested=True)
            model = prepared(model, lora=False, checkpointing=checkpointing)
            job = Job(model, gradaccum.causal_lm(), adamw, inputs)
            key = f"checkpointing {'on' if checkpointing else 'off'}"
            if is_real:
                real, found[key] = model, [tracked(job, 4)]
            else:
                twin = model
                found[key].append(trace(job, 4, LENGTH).peak_bytes)
    return {key: {"tracked_bytes": a, "error": b / a - 1} for key, (a, b) in found.items()}


def boundary(rows: int, checkpointing: bool) -> dict[str, Any]:
    """Bisect the cap under which a step of this many rows runs; in a process of its own."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 64 * 1024), libc.mallopt(-1, 64 * 1024)  # what is freed goes back at once
    config = hf.LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = prepared(hf.LlamaForCausalLM(config), lora=False, checkpointing=checkpointing)
    job = Job(model, gradaccum.causal_lm(), adamw, inputs)
    predicted = trace(job, rows, 128)
    optimizer = adamw(list(model.parameters()))
    materialize(optimizer)
    held = sum(predicted.peak[name] for name in ("parameters", "optimizer state", "buffers"))

    def step() -> bool:
        window = job.window(rows, 128, 2)
        with suppressing_out_of_memory():
            job.accumulator(model, Tracker()).attempt(window)
            model.zero_grad()
            return True
        return False

    assert step(), "without a cap"
    low, high = 0, 2 * (predicted.peak_bytes - held) // MIB
    while high - low > 1:
        middle = (low + high) // 2
        libc.malloc_trim(0)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + middle * MIB, hard))
        fits = step()
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        low, high = (low, middle) if fits else (middle, high)
    real = held + high * MIB
    return {
        "rows": rows,
        "length": 128,
        "checkpointing": checkpointing,
        "predicted_mib": round(predicted.peak_bytes / MIB, 1),
        "capped_mib": round(real / MIB, 1),
        "error": predicted.peak_bytes / real - 1,
    }


def data_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmData"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(ARCHITECTURES))
    parser.add_argument("--out")
    parser.add_argument("--boundary", help=argparse.SUPPRESS)
    args = parser.parse_args()
    hf.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if args.boundary:
        print(json.dumps(boundary(*json.loads(args.boundary))))
        return
    cases, failed = [], []
    for name, lora, checkpointing in itertools.product(
        args.models.split(","), (False, True), (False, True)
    ):
        try:
            cases += compared(name, lora=lora, checkpointing=checkpointing)
        except Exception as error:
            failed.append(
                {
                    "model": name,
                    "lora": lora,
                    "checkpointing": checkpointing,
                    "said": f"{type(error).__name__}: {str(error)[:200]}",
                }
            )
        print(name, lora, checkpointing, file=sys.stderr)
    capped = []
    for rows, checkpointing in itertools.product((2, 8, 16), (False, True)):
        command = [sys.executable, __file__, "--boundary", json.dumps([rows, checkpointing])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        capped.append(json.loads(done.stdout.splitlines()[-1]))
    publish(
        {
            "cases": len(cases),
            "architectures": len({case["model"] for case in cases}),
            "exact_to_the_byte": sum(case["error"] == 0 for case in cases),
            "largest_error": max(abs(case["error"]) for case in cases),
            "largest_envelope_error": max(abs(case["envelope_error"]) for case in cases),
            "largest_error_at_a_cap": max(abs(case["error"]) for case in capped),
            "quantised": quantised(),
            "capped": capped,
            "failed": failed,
            "runs": cases,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
