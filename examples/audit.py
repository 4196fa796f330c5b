"""Audit a stock Trainer: is its accumulated gradient that of the full batch?

gradaccum verify examples.audit:audited
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import gradaccum
from gradaccum.padding import pad_collate


def audited() -> tuple[Trainer, None, None]:
    """Return what is audited: a loop or a Trainer, the model, a batch (a Trainer has its own)."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    rows = [{"input_ids": [5 + i] * (4 + i), "labels": i % 2} for i in range(8)]
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[])
    return Trainer(model, args, train_dataset=rows, data_collator=pad_collate), None, None


def main() -> tuple[bool, bool]:
    trainer, *_ = audited()
    stock = gradaccum.verify(trainer)
    ours = gradaccum.verify(gradaccum.attach(trainer))
    print(stock, ours, sep="\n\n")
    return stock.exact, ours.exact


if __name__ == "__main__":
    main()
