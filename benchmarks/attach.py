"""Time an attached SFTTrainer against the stock one and against a plain loop, interleaved.

One process, one contender after the other in every round, in an order that turns, so that a slow
minute of the machine hits all of them. Same model, data, optimizer and effective batch of 32; every
`train()` starts from the same weights and takes the same examples. What an attached trainer takes
to measure its loss, once in a run, is given apart: it would be a tenth of six steps.

    python benchmarks/attach.py --rounds 5 --steps 6 --out benchmarks/results/attach.json
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings

import datasets
import torch
import transformers
import trl
from common import publish, timed
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import gradaccum
from gradaccum.cli import embedded
from gradaccum.measured import Measured

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()


MEASURING = [timed(Measured, "_measure"), timed(Measured, "look_again")]


class Clock(TrainerCallback):
    """Seconds of each step, and the gradient of the first."""

    def __init__(self):
        self.seconds, self.gradient = [], None

    def on_step_begin(self, *args, **kwargs):
        self.begin = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.begin)


class OfTrainer:
    """A contender that is an SFTTrainer with these arguments, attached or not."""

    def __init__(self, net, tokenizer, data, steps, attach=None, **settings):
        args = SFTConfig(
            output_dir=tempfile.mkdtemp(), max_steps=steps, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, save_strategy="no", logging_steps=1, disable_tqdm=True,
            learning_rate=1e-3, lr_scheduler_type="constant", dataloader_pin_memory=False,
            **settings,
        )  # fmt: skip
        self.start = net
        self.trainer = SFTTrainer(
            copy.deepcopy(net), args, train_dataset=data, processing_class=tokenizer
        )
        self.trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        if attach is not None:
            gradaccum.attach(self.trainer, **attach)
        self.tokens = 0
        compute_loss = self.trainer.compute_loss

        def counted(model, inputs, *args, **kwargs):
            if self.trainer.is_in_train:  # not where an attached one measures its loss
                self.tokens += int((inputs["labels"][:, 1:] != -100).sum())
            return compute_loss(model, inputs, *args, **kwargs)

        self.trainer.compute_loss = counted

    def run(self):
        trainer, clock = self.trainer, Clock()
        trainer.model.load_state_dict(self.start.state_dict())
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.add_callback(clock)
        self.tokens = 0
        trainer.train()
        trainer.remove_callback(clock)
        return clock.seconds, clock.gradient, self.tokens


class Bound:
    """A plain loop: stock model and loss, one sequence at a time, no padding."""

    def __init__(self, net, prepared, batches):
        self.start, self.rows, self.batches = net, prepared, batches

    def run(self):
        net = copy.deepcopy(self.start).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        seconds, gradient, trained = [], None, 0
        for batch in self.batches:
            begin = time.perf_counter()
            rows = [self.rows[i] for i in batch]
            count = sum(label != -100 for row in rows for label in row["labels"][1:])
            for row in rows:
                net(
                    input_ids=torch.tensor([row["input_ids"]]),
                    labels=torch.tensor([row["labels"]]),
                    num_items_in_batch=torch.tensor(count),
                    use_cache=False,
                ).loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            if gradient is None:
                gradient = torch.cat([p.grad.flatten().double() for p in net.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - begin)
            trained += count
        return seconds, gradient, trained


def drawn_batches(trainer, steps):
    """Return the positions of the examples that the trainer draws for its first steps."""
    keys = {tuple(row["input_ids"]): i for i, row in enumerate(trainer.train_dataset)}
    loader = iter(trainer.get_train_dataloader())
    return [[keys[tuple(e["input_ids"])] for e in next(loader).examples] for _ in range(steps)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--out")
    options = parser.parse_args()

    pairs = embedded.functions(options.examples)
    tokenizer = embedded.tokenizer(p["prompt"] + p["completion"] for p in pairs)
    net, data = embedded.model(tokenizer), datasets.Dataset.from_list(pairs)
    common = (net, tokenizer, data, options.steps)
    stock, accumulate = "per_device_train_batch_size", "gradient_accumulation_steps"
    makers = {
        "stock 2x16": lambda: OfTrainer(*common, **{stock: 2, accumulate: 16}),
        "stock 4x8": lambda: OfTrainer(*common, **{stock: 4, accumulate: 8}),
        "stock 1x32": lambda: OfTrainer(*common, **{stock: 1, accumulate: 32}),
        "stock 2x16 batch_rebalance": lambda: OfTrainer(
            *common, train_sampling_strategy="batch_rebalance", **{stock: 2, accumulate: 16}
        ),
        "attached 2x16": lambda: OfTrainer(*common, attach={}, **{stock: 2, accumulate: 16}),
    }
    makers = {k: v for k, v in makers.items() if not options.only or k in options.only}
    contenders = {name: make() for name, make in makers.items()}
    probe = OfTrainer(*common, attach={}, **{stock: 2, accumulate: 16}).trainer
    batches = drawn_batches(probe, options.steps)
    contenders["bound"] = Bound(net, probe.train_dataset, batches)

    seconds, measuring = {name: [] for name in contenders}, {name: [] for name in contenders}
    gradients, tokens = {}, {}
    for round_ in range(options.rounds + 1):  # the first warms up
        names = list(contenders)
        first = round_ % len(names)  # each runs after another one in every round
        for name in names[first:] + names[:first]:
            for spent in MEASURING:
                spent.clear()
            taken, gradients[name], tokens[name] = contenders[name].run()
            once = sum(map(sum, MEASURING))
            each = (sum(taken) - once) / len(taken)
            if round_:
                seconds[name].append(each)
                measuring[name].append(once)
            print(f"round {round_} {name}: {each:.2f} s a step", flush=True)

    rows = {}
    for name, times in seconds.items():
        difference = (gradients[name] - gradients["bound"]).norm() / gradients["bound"].norm()
        ratios = [t / b for t, b in zip(times, seconds["bound"], strict=True)]
        rows[name] = {
            "seconds_per_step": round(statistics.median(times), 3),
            "spread": [round(min(times), 3), round(max(times), 3)],
            "of_bound": round(1 / statistics.median(ratios), 3),
            "trained_tokens_per_second": round(
                tokens[name] / options.steps / statistics.median(times)
            ),
            "measuring_seconds_of_a_run": round(statistics.median(measuring[name]), 3),
            "gradient_difference": float(f"{difference:.1e}"),
        }
    if "stock 2x16" in rows:
        for name in rows:
            speedups = zip(seconds["stock 2x16"], seconds[name], strict=True)
            rows[name]["times_stock_2x16"] = round(statistics.median(a / b for a, b in speedups), 2)
    publish({"contenders": rows}, options.out, transformers, trl)


if __name__ == "__main__":
    main()
