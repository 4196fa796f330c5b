"""Race the stock Trainer, a hand-written loop and ours on classification: a process each, in turns.

    python benchmarks/classify.py encoder --rounds 5 --out benchmarks/results/speed_encoder.json

Workloads, 32 examples a step, models without dropout, built from their configs:

    encoder  BERT of 6 layers; the beginnings of functions, mean 60 tokens, up to 256
    vision   ViT of 6 layers; images of 64 x 64 pixels, which nobody pads
"""

import argparse
import copy
import sys
import tempfile

import torch
import torch.nn.functional as F
import transformers
from common import publish
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from transformers.models.bert.modeling_bert import BertLayer

import gradaccum
from gradaccum.bench import Contender, Stage, race, rows
from gradaccum.cli import embedded
from gradaccum.cli.bench import _table
from gradaccum.integrations.accumulation import Examples

EFFECTIVE, CLASSES = 32, 4
CONTENDERS = {
    "encoder": [
        "stock 2x16", "stock 8x4", "stock 32x1", "stock 8x4 group_by_length", "loop 1x32",
        "loop 8x4", "ours",
    ],
    "vision": ["stock 2x16", "stock 8x4", "stock 32x1", "loop 8x4", "ours"],
}  # fmt: skip


def encoder():
    pairs = embedded.functions(2000)
    tokenizer = embedded.tokenizer(p["prompt"] for p in pairs)
    longest = sorted(len(p["completion"]) for p in pairs)
    limits = [longest[len(longest) * i // CLASSES] for i in range(1, CLASSES)]
    data = [
        {
            "input_ids": tokenizer(p["prompt"])["input_ids"][:256],
            "labels": sum(len(p["completion"]) > limit for limit in limits),
        }
        for p in pairs
    ]
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=1024, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return BertForSequenceClassification(config), data, DataCollatorWithPadding(tokenizer)


def vision():
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 64, 64, generator=draw)
    data = [
        {
            "pixel_values": patterns[i % CLASSES] + torch.randn(3, 64, 64, generator=draw),
            "labels": i % CLASSES,
        }
        for i in range(512)
    ]
    config = ViTConfig(
        image_size=64, patch_size=8, hidden_size=192, num_hidden_layers=6, num_attention_heads=3,
        intermediate_size=768, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config), data, default_data_collator


class Watch(TrainerCallback):
    """Tell the stage what each step was; keep the first step's examples and gradient."""

    def __init__(self, model, collate, stage):
        self.model, self.collate, self.stage = model, collate, stage
        self.start = copy.deepcopy(model)
        self.first, self.gradient, self.delivered, self.padded = [], None, [], 0
        for layer in [m for m in model.modules() if isinstance(m, BertLayer)][:1]:
            layer.register_forward_pre_hook(self._count)

    def _count(self, layer, given):
        if layer.training and torch.is_grad_enabled():
            self.padded += given[0].shape[:2].numel()

    def deliver(self, inputs):
        """Note the examples of a micro-batch, or of the whole step, each by itself."""
        if isinstance(inputs, Examples):
            self.delivered += [self.collate([example]) for example in list(inputs.examples)]
        else:
            num = len(inputs["labels"])
            each = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(num)]
            self.delivered += [self._bare(example) for example in each]

    def _bare(self, example):
        if "attention_mask" not in example:
            return example
        num = int(example["attention_mask"].sum())
        return {k: v if k == "labels" else v[:, :num] for k, v in example.items()}

    def on_pre_optimizer_step(self, *_, **__):
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def on_step_end(self, *_, **__):
        self.stage.stop()
        self.first = self.first or self.delivered
        useful = sum(e["input_ids"].numel() for e in self.delivered if "input_ids" in e)
        num, padded, self.delivered, self.padded = len(self.delivered), self.padded, [], 0
        # Tokens where there are any: batches grouped by length have more in one step than another.
        self.stage.done(trained=useful or num, useful=useful, padded=padded)

    def error(self, folder):
        wide = self.start.double().train()
        for example in self.first:
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
            labels = inputs.pop("labels")
            (F.cross_entropy(wide(**inputs).logits, labels) / len(self.first)).backward()
        truth = torch.cat([p.grad.flatten() for p in wide.parameters()])
        error = float((self.gradient.double() - truth).norm() / truth.norm())
        return {"error": error, "why_not": "", "is_float32": True}


def compete(workload, name):
    """Be one contender."""
    stage = Stage()
    torch.manual_seed(0)
    model, data, collate = {"encoder": encoder, "vision": vision}[workload]()
    kind, *rest = name.split()
    per_device, steps = map(int, rest[0].split("x")) if rest else (EFFECTIVE, 1)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=per_device if kind == "stock" else 32,
            gradient_accumulation_steps=steps if kind == "stock" else 1, max_steps=1000,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-4,
            max_grad_norm=0.0, logging_steps=100, remove_unused_columns=False,
            train_sampling_strategy=rest[1] if len(rest) > 1 else "random",
        )  # fmt: skip
        trainer = Trainer(model, args, data_collator=collate, train_dataset=data)
        watch = Watch(model, collate, stage)
        if kind != "stock":
            trainer = gradaccum.attach(trainer)
        set_seed(0)
        stage.wait("cpu", {"gradient error": watch.error})
        if kind == "loop":
            loop(trainer, watch, per_device, collate)
        trainer.add_callback(watch)
        take = trainer.training_step

        def training_step(model, inputs, *given, **named):
            watch.deliver(inputs if isinstance(inputs, Examples) else dict(inputs))
            return take(model, inputs, *given, **named)

        trainer.training_step = training_step
        trainer.train()


def loop(trainer, watch, num, collate):
    model = trainer.model.train()
    optimizer = trainer.create_optimizer()
    while True:
        for examples in trainer.get_train_dataloader():
            given = examples.examples
            watch.deliver(examples)
            for i in range(0, len(given), num):
                part = given[i : i + num]
                (model(**collate(part)).loss * len(part) / len(given)).backward()
            watch.on_pre_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
            watch.on_step_end()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--racer", help="be this contender")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.racer:
        compete(options.workload, options.racer)
        return
    names = options.only or CONTENDERS[options.workload]
    command = [sys.executable, __file__, options.workload, "--racer"]
    outcomes = race(
        [Contender(name, [*command, name]) for name in names],
        rounds=options.rounds,
        steps=options.steps,
        question={"name": "gradient error", "folder": ""},
    )
    found = rows(outcomes, names[0])
    print(*_table(found, names[0]), sep="\n", file=sys.stderr)
    figures = {
        "workload": options.workload,
        "effective_batch_size": EFFECTIVE,
        "rounds": options.rounds,
        "contenders": [row.to_json() for row in found],
    }
    publish(figures, options.out, transformers)


if __name__ == "__main__":
    main()
