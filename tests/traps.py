"""Loops that are wrong in the ways of the field, each with the name that `verify` has to report.

A trap is a function that makes a `Case`: a loop or a trainer, its model and batch. The number is
that of the row in the table of docs/guides/verify.md, where what is not reproduced here is listed.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import gradaccum
from tests import models

LENGTHS = [3, 9, 5, 12, 4, 7, 6, 11]
EXAMPLES = models.examples(LENGTHS)


@dataclass
class Case:
    """What is handed to `verify`."""

    loop: Any
    model: nn.Module | None = None
    batch: Any = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trap:
    number: int
    expected: str
    make: Callable[[], Case]

    def __str__(self) -> str:
        return f"{self.number}-{self.make.__name__}"


TRAPS: list[Trap] = []


def trap(number: int, expected: str):
    def register(make):
        TRAPS.append(Trap(number, expected, make))
        return make

    return register


# Hand-written loops over a causal language model.


def mean(model, micro):
    total, weight = models.oracle_loss(model, micro)
    return total["loss"] / weight["loss"]


def count(micros) -> int:
    return sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)


def language(loop, *, against_engine=False, examples=EXAMPLES, **options) -> Case:
    """Return a case of a loop(model, micros) over ragged token data."""
    options |= {"collate": models.collated}
    if against_engine:
        options["objective"] = gradaccum.causal_lm()
    return Case(loop, models.model(), examples, options)


def right(model, micros) -> None:
    """Do it right: a sum, divided once by what the whole effective batch trains."""
    total = count(micros)
    for micro in micros:
        (models.oracle_loss(model, micro)[0]["loss"] / total).backward()


def stepping(each=lambda i, num, model, optimizer: None, *, before=True, lr=0.1, after=None):
    """Return a case of a right loop that steps SGD at its end and does something at each micro."""
    net = models.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)

    def loop(model, micros):
        if before:
            optimizer.zero_grad()
        total = count(micros)
        for i, micro in enumerate(micros):
            (models.oracle_loss(model, micro)[0]["loss"] / total).backward()
            each(i, len(micros), model, optimizer)
        (after or optimizer.step)()

    return Case(loop, net, EXAMPLES, {"collate": models.collated})


@trap(9, "mean of means")
def mean_of_means() -> Case:
    def loop(model, micros):
        for micro in micros:
            (mean(model, micro) / len(micros)).backward()

    return language(loop)


@trap(9, "missing division")
def no_division() -> Case:
    def loop(model, micros):
        for micro in micros:
            mean(model, micro).backward()

    return language(loop)


@trap(9, "configured steps")
def short_last_window() -> Case:
    def loop(model, micros, steps=4):
        for micro in micros:
            (mean(model, micro) / steps).backward()

    return language(loop, against_engine=True)


@trap(9, "tail left unstepped")
def step_at_every_eighth_from_zero() -> Case:
    def each(i, num, model, optimizer):
        if i % 8 == 0:
            optimizer.step()
            optimizer.zero_grad()

    return stepping(each, after=lambda: None)


@trap(9, "doubled division")
def doubled_division() -> Case:
    def loop(model, micros):
        total = count(micros)
        for micro in micros:
            (models.oracle_loss(model, micro)[0]["loss"] / total / len(micros)).backward()

    return language(loop)


@trap(9, "wrong weights")
def weighed_by_rows() -> Case:
    def loop(model, micros):
        rows = sum(len(micro["labels"]) for micro in micros)
        for micro in micros:
            (mean(model, micro) * len(micro["labels"]) / rows).backward()

    return language(loop, splits=[(3, 3, 2), (5, 2, 1)])


@trap(9, "micro-batches left out")
def backward_of_the_last_loss_only() -> Case:
    def loop(model, micros):
        for micro in micros:
            loss = mean(model, micro) / len(micros)
        loss.backward()

    return language(loop)


@trap(9, "micro-batches left out")
def short_micro_batch_dropped() -> Case:
    def loop(model, micros):
        right(model, [m for m in micros if len(m["labels"]) == len(micros[0]["labels"])])

    return language(loop)


@trap(9, "mean of means")
def mean_of_means_clipped_at_the_end() -> Case:
    def loop(model, micros):
        for micro in micros:
            (mean(model, micro) / len(micros)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)

    return language(loop, against_engine=True)


@trap(2, "constant factor")
def multiplied_by_the_world_size() -> Case:
    def loop(model, micros):
        total = count(micros)
        for micro in micros:
            (2 * models.oracle_loss(model, micro)[0]["loss"] / total).backward()

    return language(loop, against_engine=True)


@trap(10, "over-count")
def count_without_the_shift() -> Case:
    def loop(model, micros):
        total = sum(int((micro["labels"] != -100).sum()) for micro in micros)
        for micro in micros:
            (models.oracle_loss(model, micro)[0]["loss"] / total).backward()

    examples = models.examples(LENGTHS, masked=lambda length: 0)
    return language(loop, against_engine=True, examples=examples)


@trap(7, "configured steps")
def accelerate_accumulate() -> Case:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=8)
    net = models.model()
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=0.1))

    def loop(model, micros):
        for micro in accelerator.prepare(DataLoader(micros, batch_size=None)):
            with accelerator.accumulate(model):
                accelerator.backward(mean(model, micro))
                optimizer.step()
                optimizer.zero_grad()

    objective = gradaccum.causal_lm()
    return Case(loop, net, EXAMPLES, {"collate": models.collated, "objective": objective})


@trap(8, "configured steps")
def lightning_accumulate_grad_batches() -> Case:
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, micro, _):
            return mean(self.model, micro)

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def loop(model, micros):
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, accumulate_grad_batches=8, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(model), DataLoader(micros, batch_size=None))

    return language(loop, against_engine=True)


@trap(12, "tail left unstepped")
def window_that_crosses_the_epoch() -> Case:
    seen = 0

    def each(i, num, model, optimizer):
        nonlocal seen
        seen += 1
        if seen % 5 == 0:
            optimizer.step()
            optimizer.zero_grad()

    return stepping(each, before=False, after=lambda: None)


@trap(14, "no trained label")
def window_without_a_label() -> Case:
    examples = [dict(example) for example in EXAMPLES]
    examples[2]["labels"] = [-100] * len(examples[2]["labels"])

    def loop(model, micros):
        for micro in micros:
            (mean(model, micro) * count([micro]) / count(micros)).backward()

    return language(loop, examples=examples)


@trap(16, "scheduler per micro-batch")
def scheduler_per_micro_batch() -> Case:
    schedulers = []

    def each(i, num, model, optimizer):
        schedulers[0].step()

    case = stepping(each)
    optimizer = case.loop.__closure__[_cell(case.loop, "optimizer")].cell_contents
    schedulers.append(torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=100))
    return case


def _cell(function, name: str) -> int:
    return function.__code__.co_freevars.index(name)


@trap(17, "gradients changed inside the window")
def clipped_per_micro_batch() -> Case:
    return stepping(lambda i, num, model, o: nn.utils.clip_grad_norm_(model.parameters(), 0.1))


@trap(17, "gradients changed inside the window")
def zeroed_per_micro_batch() -> Case:
    return stepping(lambda i, num, model, o: o.zero_grad() if i + 1 < num else None)


@trap(17, "gradients changed inside the window")
def decayed_per_micro_batch() -> Case:
    def each(i, num, model, optimizer):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.add_(p.detach(), alpha=1e-3)

    return stepping(each)


@trap(17, "weights changed inside the window")
def averaged_per_micro_batch() -> Case:
    @torch.no_grad()
    def each(i, num, model, optimizer):
        for p in model.parameters():
            p.mul_(0.999)

    return stepping(each)


@trap(17, "optimizer steps inside the window")
def stepped_per_micro_batch() -> Case:
    return stepping(lambda i, num, model, o: o.step() if i + 1 < num else None)


@trap(13, "gradients not zeroed")
def never_zeroed() -> Case:
    return stepping(before=False)


@trap(17, "penalty per micro-batch")
def penalty_per_micro_batch() -> Case:
    def loop(model, micros):
        total = count(micros)
        for micro in micros:
            penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
            (models.oracle_loss(model, micro)[0]["loss"] / total + 0.01 * penalty).backward()

    return language(loop)


@trap(31, "16-bit sum")
def bfloat16_buffers() -> Case:
    case = language(right)
    case.model = models.model(dtype=torch.bfloat16)
    return case


# Losses that no sum over micro-batches gives.


class Encoder(nn.Module):
    """Map features to vectors, with what the case puts in between."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(6, 8, dtype=torch.float64)
            self.between = between or nn.Identity()
            self.last = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x):
        return self.last(self.between(torch.tanh(self.first(x))))


def features(loss, between: nn.Module | None = None) -> Case:
    """Return a case of a right loop around a loss that is a mean over rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=g, dtype=torch.float64)
    y = torch.randn(8, 4, generator=g, dtype=torch.float64)

    def loop(model, micros):
        rows = sum(len(x) for x, _ in micros)
        for x, y in micros:
            (loss(model, x, y) * len(x) / rows).backward()

    return Case(loop, Encoder(between), (x, y))


def squares(model, x, y):
    return (model(x) - y).square().mean()


@trap(26, "BatchNorm in training mode")
def batch_norm() -> Case:
    case = features(squares, nn.BatchNorm1d(8, dtype=torch.float64))
    case.options["splits"] = [(2, 2, 2, 2), (5, 3)]  # one row has no variance
    return case


@trap(26, "BatchNorm in training mode")
def batch_norm_of_one_row() -> Case:
    return features(squares, nn.BatchNorm1d(8, dtype=torch.float64))


@trap(26, "BatchNorm in training mode")
def batch_norm_that_only_the_full_batch_passes() -> Case:
    case = features(squares, nn.BatchNorm1d(8, dtype=torch.float64))
    net = case.model
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def loop(model, micros):
        case.loop(model, micros)
        optimizer.step()

    return Case(loop, net, tuple(part[:3] for part in case.batch))


@trap(27, "rows depend on each other")
def in_batch_negatives() -> Case:
    def loss(model, x, y):
        return F.cross_entropy(model(x) @ y.T, torch.arange(len(x)))

    return features(loss)


@trap(28, "rows depend on each other")
def load_balancing() -> Case:
    def loss(model, x, y):
        routed = (model(x) + y).softmax(dim=-1)
        chosen = F.one_hot(routed.argmax(dim=-1), 4).double().mean(dim=0)
        return squares(model, x, y) + (chosen * routed.mean(dim=0)).sum()

    return features(loss)


@trap(29, "random")
def functional_dropout() -> Case:
    def loss(model, x, y):
        return squares(model, F.dropout(x, 0.3), y)

    return features(loss)


@trap(30, "rows depend on each other")
def batch_normalised_advantages() -> Case:
    def loss(model, x, y):
        reward = y.sum(dim=1)
        advantage = (reward - reward.mean()) / (reward.std(unbiased=False) + 1e-6)
        return -(advantage * model(x).log_softmax(dim=-1)[:, 0]).mean()

    return features(loss)


# Stock trainers of transformers.


def bert(**kwargs):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, pad_token_id=0, **kwargs,
    )  # fmt: skip


def trainer(model, rows, cls=None, collator=None, **kwargs):
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from tests.hf_models import tokenizer
    from tests.trainers import COMMON

    settings = COMMON | {"output_dir": tempfile.gettempdir(), "per_device_train_batch_size": 2}
    made = (cls or Trainer)(
        model=model,
        args=TrainingArguments(**settings, gradient_accumulation_steps=4),
        train_dataset=rows,
        data_collator=collator or DataCollatorWithPadding(tokenizer()),
        **kwargs,
    )
    return Case(made)


def classified(label: Callable[[int], Any], num: int = 12) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (num,), generator=g).tolist()
    return [
        {"input_ids": torch.randint(3, 60, (n,), generator=g).tolist(), "labels": label(i)}
        for i, n in enumerate(lengths)
    ]


def padded():
    from transformers import DataCollatorForSeq2Seq

    from tests.hf_models import tokenizer

    return DataCollatorForSeq2Seq(tokenizer(), label_pad_token_id=-100)


def seeded(make):
    torch.manual_seed(0)
    return make()


@trap(1, "missing division")
def trainer_bert_classification() -> Case:
    from transformers import BertForSequenceClassification

    model = seeded(lambda: BertForSequenceClassification(bert()))
    return trainer(model, classified(lambda i: i % 2))


@trap(1, "missing division")
def trainer_bert_masked_lm() -> Case:
    from transformers import BertForMaskedLM

    from tests.hf_models import token_rows

    return trainer(seeded(lambda: BertForMaskedLM(bert())), token_rows(12), collator=padded())


@trap(1, "missing division")
def trainer_t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    from tests.hf_models import token_rows

    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = seeded(lambda: T5ForConditionalGeneration(config))
    return trainer(model, token_rows(12), collator=padded())


@trap(3, "missing division")
def trainer_regression() -> Case:
    from transformers import BertForSequenceClassification

    model = seeded(lambda: BertForSequenceClassification(bert(num_labels=1)))
    return trainer(model, classified(lambda i: i / 4))


@trap(3, "missing division")
def trainer_multi_label() -> Case:
    from transformers import BertForSequenceClassification

    config = bert(num_labels=3, problem_type="multi_label_classification")
    model = seeded(lambda: BertForSequenceClassification(config))
    return trainer(model, classified(lambda i: [1.0, 0.0, float(i % 2)]))


@trap(4, "rows depend on each other")
def trainer_router_loss() -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.hf_models import token_rows

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
        output_router_logits=True, router_aux_loss_coef=0.1, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = seeded(lambda: MixtralForCausalLM(config))
    return trainer(model, token_rows(12), collator=padded())


@trap(5, "mean of means")
def trainer_that_takes_no_count() -> Case:
    from tests.hf_models import llama, token_rows

    made = trainer(llama(), token_rows(12), collator=padded())
    made.loop.model_accepts_loss_kwargs = False
    return made


@trap(6, "missing division")
def trainer_custom_compute_loss() -> Case:
    from transformers import Trainer

    from tests.hf_models import llama, token_rows

    class Custom(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    return trainer(llama(), token_rows(12), cls=Custom, collator=padded())


@trap(11, "doubled division")
def trainer_that_divides_beside_its_own_loss() -> Case:
    from transformers import BertForSequenceClassification, Trainer

    class Custom(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss / self.args.gradient_accumulation_steps
            return (loss, outputs) if return_outputs else loss

    model = seeded(lambda: BertForSequenceClassification(bert()))
    made = trainer(model, classified(lambda i: i % 2), cls=Custom)
    made.loop.model_accepts_loss_kwargs = False
    return made


@trap(10, "over-count")
def trainer_gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.hf_models import token_rows

    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return trainer(seeded(lambda: GPT2LMHeadModel(config)), token_rows(12), collator=padded())
