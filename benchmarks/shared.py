"""Time what rows begin with alike, computed once, against the same in every row; interleaved.

Chat: functions of the standard library behind one system prompt of 300 tokens, through
`causal_lm()`. Pairs: a prompt with two completions, one of them of another function, through TRL's
DPOTrainer, attached. Ours as it is, without common beginnings ("packed"), and padded. The error is
that of the first step against one pass, row by row, in float64 (chat) or padded (pairs).

    python benchmarks/shared.py --rounds 7 --only chat --out benchmarks/results/shared.json
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings

import datasets
import torch
import torch.nn.functional as F
import transformers
import trl
from common import publish

import gradaccum
from gradaccum.cli import embedded
from gradaccum.engine import Accumulator
from gradaccum.integrations.accumulation import Examples
from gradaccum.packing.backbone import Packed

SYSTEM, EFFECTIVE, BUDGET = 300, 32, gradaccum.Budget(tokens=1024)
NEVER = 10**9  # tokens that rows would have to begin with alike
LAYOUTS = {
    "shared": lambda model: Packed(model),
    "packed": lambda model: Packed(model, shared=NEVER),
    "padded": lambda model: None,
}


def flat(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def chat(net, tokenizer, pairs):
    """Return a function for each layout that runs a step and returns its seconds and gradient."""
    system = tokenizer(" ".join(p["prompt"] for p in pairs[-40:]))["input_ids"][:SYSTEM]
    rows = []
    for pair in pairs[:EFFECTIVE]:
        prompt, own = (tokenizer(pair[k])["input_ids"] for k in ("prompt", "completion"))
        labels = [-100] * (SYSTEM + len(prompt)) + own
        rows.append(
            {"input_ids": (system + prompt + own)[: SYSTEM + 256], "labels": labels[: SYSTEM + 256]}
        )

    def run(layout):
        model = copy.deepcopy(net).train()
        accumulator = Accumulator(model, gradaccum.causal_lm(), budget=BUDGET)
        accumulator.layout = LAYOUTS[layout](model)

        def step():
            begin = time.perf_counter()
            accumulator.backward(rows)
            seconds, gradient = time.perf_counter() - begin, flat(model)
            model.zero_grad()
            return seconds, gradient

        return step

    wide = copy.deepcopy(net).double().train()
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        logits = wide(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        (F.cross_entropy(logits, labels, reduction="sum") / count).backward()
    return {layout: run(layout) for layout in LAYOUTS}, flat(wide)


def preferences(net, tokenizer, pairs):
    """Return the same for DPO: long prompts, two completions each."""
    wrong = pairs[1:] + pairs[:1]
    rows = [
        {"prompt": p["prompt"] + p["completion"][:600], "chosen": p["completion"][600:800] or "a",
         "rejected": q["completion"][:200]}
        for p, q in zip(pairs, wrong, strict=True)
        if len(p["completion"]) > 400
    ][:EFFECTIVE]  # fmt: skip

    def run(layout):
        args = trl.DPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], max_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=EFFECTIVE // 2,
            gradient_checkpointing=False, max_length=512, save_strategy="no", disable_tqdm=True,
            max_grad_norm=0.0, precompute_ref_log_probs=True, learning_rate=0.0, optim="sgd",
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            copy.deepcopy(net), args=args, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        gradaccum.attach(trainer, budget=BUDGET)
        trainer.train()  # what is made once
        accumulator = trainer.accumulation.accumulator
        accumulator.layout = LAYOUTS[layout](trainer.model)
        trainer.accumulation.is_laid_out = trainer.is_in_train = True
        batch = next(iter(trainer.get_train_dataloader())).examples

        def step():
            begin = time.perf_counter()
            window = trainer._prepare(trainer.model, Examples(list(batch)))
            accumulator.backward(window)
            seconds, gradient = time.perf_counter() - begin, flat(trainer.model)
            trainer.model.zero_grad()
            return seconds, gradient

        return step

    steps = {layout: run(layout) for layout in LAYOUTS}
    return steps, steps["padded"]()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("chat", "pairs"))
    parser.add_argument("--out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    pairs = embedded.functions(2000)
    tokenizer = embedded.tokenizer(p["prompt"] + p["completion"] for p in pairs)
    net, figures = embedded.model(tokenizer), {}
    for name, make in (("chat", chat), ("pairs", preferences)):
        if options.only not in (None, name):
            continue
        steps, truth = make(net, tokenizer, pairs)
        seconds, rows = {layout: [] for layout in steps}, {}
        for round_ in range(options.rounds + 1):  # the first warms up
            order = list(steps)
            first = round_ % len(order)
            for layout in order[first:] + order[:first]:
                taken, gradient = steps[layout]()
                rows[layout] = {
                    "gradient_error": float(f"{(gradient - truth).norm() / truth.norm():.1e}"),
                }
                if round_:
                    seconds[layout].append(taken)
            print(name, round_, {k: round(v[-1], 2) for k, v in seconds.items() if v}, flush=True)
        for layout, times in seconds.items():
            ratios = [b / a for a, b in zip(times, seconds["packed"], strict=True)]
            rows[layout] |= {
                "seconds_a_step": round(statistics.median(times), 3),
                "spread": [round(min(times), 3), round(max(times), 3)],
                "times_packed": round(statistics.median(ratios), 2),
            }
        figures[name] = rows
    publish({"workloads": figures}, options.out, transformers, trl)


if __name__ == "__main__":
    main()
