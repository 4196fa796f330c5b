"""Race everybody's accumulation over some workloads: a process each, in turns; see `bench`.

    python benchmarks/speed.py ragged --rounds 5 --out benchmarks/results/speed_ragged.json

Workloads, of functions of the standard library, 32 a step, for the embedded model unless it says:

    ragged       prompt and completion, up to 1,024 tokens
    long-tailed  lengths from a lognormal distribution, up to 8,192 tokens
    uniform      256 tokens each: nobody has padding, nobody should win
    chat         one system prompt of about 300 tokens before each prompt
    100m         ragged, 16 a step, up to 512 tokens, a Llama of 98 million parameters
    qlora        ragged, 16 a step, up to 256 tokens, adapters on the embedded model in 4 bits
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import trl
from common import publish
from transformers import LlamaConfig, LlamaForCausalLM

from gradaccum.bench import Contender, race, rows
from gradaccum.cli import embedded
from gradaccum.cli.bench import _table

HERE = Path(__file__).parent
STOCK = [
    "stock 2x16", "stock 4x8", "stock 8x4", "stock 1x32", "stock 2x16 group_by_length",
    "stock 2x16 batch_rebalance", "stock 2x16 packing", "stock 2x16 padding_free",
]  # fmt: skip
OTHERS = ["accelerate 2x16", "lightning 2x16"]
ALL = [*STOCK, "loop", "loop 2x16", *OTHERS, "ours", "ours 512"]


def ragged(folder):
    return embedded.functions(2000), {"max_length": 1024}


def long_tailed(folder):
    """Completions joined until they have about as many characters as the lognormal says."""
    draw, found = random.Random(0), []
    texts = [pair["prompt"] + pair["completion"] for pair in embedded.functions(2000)]
    for number, text in enumerate(texts[:600]):
        wanted, parts = 4 * min(8192, draw.lognormvariate(5.5, 1.0)), [text]
        while sum(map(len, parts)) < wanted:
            parts.append(texts[(number * 7 + 31 * len(parts)) % len(texts)])
        found.append({"prompt": parts[0][:80], "completion": "".join(parts)[80 : int(wanted) + 80]})
    return [row for row in found if row["completion"]], {"max_length": 8192}


def uniform(folder):
    texts = [pair["prompt"] + pair["completion"] for pair in embedded.functions(2000)]
    joined = ["\n".join(texts[i : i + 8]) for i in range(0, len(texts), 4)]
    return [{"text": text} for text in joined if len(text) > 2400], {"max_length": 256}


def chat(folder):
    pairs = embedded.functions(2000)
    system = "You answer as this library does.\n" + "\n".join(p["prompt"] for p in pairs[-30:])
    rows = [{**pair, "prompt": system[:1200] + "\n" + pair["prompt"]} for pair in pairs]
    return rows, {"max_length": 1024}


def of_100m(folder):
    pairs = embedded.functions(2000)
    path = saved(folder, pairs, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    return pairs, {"model_name_or_path": path, "max_length": 512, "effective_batch_size": 16}


def qlora(folder):
    pairs = embedded.functions(2000)
    path = saved(folder, pairs, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
    return pairs, {
        "model_name_or_path": path, "max_length": 256, "load_in_4bit": True, "use_peft": True,
        "lora_target_modules": "all-linear", "effective_batch_size": 16,
    }  # fmt: skip


def saved(folder, pairs, **config):
    """Save a Llama with random weights and return where."""
    path = f"{folder}/model"
    tokenizer = embedded.tokenizer(p["prompt"] + p["completion"] for p in pairs)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = {"intermediate_size": config["hidden_size"] * 8 // 3, "vocab_size": len(tokenizer)}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**config, **shape, **special)).save_pretrained(path)
    return path


WORKLOADS = {
    "ragged": ragged, "long-tailed": long_tailed, "uniform": uniform, "chat": chat,
    "100m": of_100m, "qlora": qlora,
}  # fmt: skip


def command(name, flags, unsloth):
    """Return what runs a contender.

    "ours 512" and "unsloth 32x1 512" have a budget of 512 tokens; "ours" finds one.
    """
    if name in OTHERS:
        return [sys.executable, str(HERE / "racers.py"), name, *flags]
    if name.startswith("unsloth"):
        own = [f"UNSLOTH_TOKEN_BUDGET={tokens}" for tokens in name.split()[2:]]
        return ["env", *own, unsloth, str(HERE / "racers.py"), name, *flags]
    kind, _, budget = name.partition(" ") if name.startswith("ours") else (name, "", "")
    own = ["--budget", f"{budget} tokens"] if budget else []
    return [sys.executable, "-m", "gradaccum.cli.contenders", kind, *flags, *own]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=ALL, help="names of contenders")
    parser.add_argument("--unsloth", help="python of an environment that has it")
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, given = WORKLOADS[options.workload](folder)
        file = Path(folder) / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
        settings = {
            "dataset_name": file, "effective_batch_size": 32,
            "max_steps": options.steps * (options.rounds + 1), **given,
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in settings.items()]
        outcomes = race(
            [Contender(name, command(name, flags, options.unsloth)) for name in options.only],
            rounds=options.rounds,
            steps=options.steps,
            question={"name": "gradient error", "folder": folder},
            heard=lambda round_, name, turn: print(
                f"round {round_} {name}: "
                + (f"{sum(turn.seconds) / len(turn.seconds):.2f} s a step" if turn else "failed"),
                file=sys.stderr,
                flush=True,
            ),
        )
    base = options.only[0]
    found = rows(outcomes, base)
    print(*_table(found, base), sep="\n", file=sys.stderr)
    figures = {
        "workload": options.workload,
        "effective_batch_size": settings["effective_batch_size"],
        "rounds": options.rounds,
        "contenders": [row.to_json() for row in found],
    }
    publish(figures, options.out, transformers, trl)


if __name__ == "__main__":
    main()
