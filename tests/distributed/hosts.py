"""Runs of attached trainers that ranks take part in; the results are compared by the tests."""

import tempfile
from pathlib import Path

from torch import Tensor

import gradaccum
from tests import trainers
from tests.hf_models import Record, prompts, token_rows

NUM, BATCH = 13, 8  # a last batch of 5
LISTENED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss")


class Seen:
    """Note which examples a data set was asked for."""

    def __init__(self, data) -> None:
        self.data, self.asked = data, list[int]()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        self.asked.append(int(index))
        return self.data[index]


def report(trainer, record: Record) -> dict:
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    logs = [{k: v for k, v in e.items() if k in LISTENED} for e in trainer.state.log_history]
    return {
        "weights": weights,
        "gradients": record.gradients,
        "logs": logs,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
    }


def hf(rank: int, world: int, **kwargs) -> dict:
    """Train a Trainer for two epochs; ranks have budgets of their own."""
    data = Seen(token_rows(NUM))
    budget = gradaccum.Budget(examples=1 + rank)
    trainer, record = trainers.build(
        Path(tempfile.mkdtemp()),
        data=data,
        attach={"effective_batch_size": BATCH, "budget": budget},
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        **{"num_train_epochs": 2, "per_device_train_batch_size": 2} | kwargs,
    )
    trainer.train()
    return report(trainer, record) | {"asked": data.asked}


def sft(rank: int, world: int, **kwargs) -> dict:
    budget = gradaccum.Budget(examples=1 + 2 * rank)
    trainer, record = trainers.build(
        Path(tempfile.mkdtemp()),
        "sft",
        data=prompts(NUM),
        attach={"effective_batch_size": BATCH, "budget": budget},
        **{"num_train_epochs": 2, "per_device_train_batch_size": 2} | kwargs,
    )
    trainer.train()
    return report(trainer, record)


def evaluated(rank: int, world: int, kind: str, **kwargs) -> dict:
    """Evaluate 13 rows in batches of 3: on ranks the last ones are filled up with others."""
    trainer, _ = trainers.build(
        Path(tempfile.mkdtemp()),
        kind,
        eval_dataset=prompts(NUM, seed=1) if kind == "sft" else token_rows(NUM, seed=1),
        attach={"budget": gradaccum.Budget(examples=2)},
        per_device_eval_batch_size=3,
        **kwargs,
    )
    return trainer.evaluate()


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    pairs = [(found[n].double(), expected[n].double()) for n in found if expected[n] is not None]
    difference = sum((a - b).square().sum() for a, b in pairs)
    return (difference / sum(b.square().sum() for _, b in pairs)).sqrt().item()
