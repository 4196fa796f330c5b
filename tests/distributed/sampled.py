"""Trainers whose loader has an `EffectiveBatchSampler`, and trainers on ranks of other speeds."""

import statistics
import tempfile
from pathlib import Path

from accelerate.state import PartialState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

import gradaccum
from gradaccum.integrations import hf
from gradaccum.integrations.accumulation import lengths_of
from gradaccum.integrations.shares import Shares
from gradaccum.integrations.swap import replaced
from gradaccum.schedule import BatchSchedule
from gradaccum.types import Step
from tests import trainers
from tests.distributed.hosts import BATCH, NUM, Seen, refused, report
from tests.hf_models import token_rows

WAYS = ("plain", "prepared", "hook")
CONSTANT = {"lr_scheduler_type": "constant", "optim": "adamw_torch", "learning_rate": 1e-3}


def sampler(**kwargs):
    rows = token_rows(NUM)
    return gradaccum.EffectiveBatchSampler(
        rows, **{"effective_batch_size": BATCH, "costs": lengths_of(rows), "seed": 1} | kwargs
    )


def build(
    way: str = "plain",
    folder: str | None = None,
    *,
    size: int | None = BATCH,
    attached: bool = True,
    own: gradaccum.EffectiveBatchSampler | None = None,
    **kwargs,
):
    """Make a trainer; how its loader comes to its sampler is one of WAYS."""
    data = Seen(token_rows(NUM))
    own = own or sampler()

    class Own(Trainer):
        def get_train_dataloader(self):
            if way == "hook":
                return super().get_train_dataloader()
            loader = DataLoader(
                data,
                batch_sampler=own,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
            return self.accelerator.prepare(loader) if way == "prepared" else loader

        def _get_train_sampler(self, train_dataset=None):
            return own

    attach = {"effective_batch_size": size, "budget": gradaccum.Budget(examples=2)}
    trainer, record = trainers.build(
        Path(folder or tempfile.mkdtemp()),
        data=data,
        trainer=Own,
        attach=attach if attached else None,
        remove_unused_columns=False,
        **{"num_train_epochs": 3} | CONSTANT | kwargs,
    )

    def told() -> dict:
        return report(trainer, record) | {"asked": data.asked, "position": own.state_dict()}

    return trainer, told


def train(rank: int, world: int, way: str = "plain", **kwargs) -> dict:
    trainer, told = build(way, **kwargs)
    trainer.train()
    return told()


def interrupted(rank: int, world: int, folder: str) -> dict:
    """Train to the middle of the second epoch, and save after each step."""
    return train(rank, world, folder=folder, max_steps=3, save_strategy="steps", save_steps=1)


def resumed(rank: int, world: int, folder: str, at: int, way: str = "plain", **kwargs) -> dict:
    trainer, told = build(way, folder, **kwargs)
    trainer.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{at}")
    return told()


SCHEDULE = BatchSchedule.parse("4:0,7:2", lr="sqrt", beta2=True)  # 4, 4, 5; 7, 6; 7, 6 examples


def scheduled(rank: int, world: int, folder: str, at: int = 0, **kwargs) -> dict:
    """Train by a schedule, from a checkpoint in the folder if `at` is not 0.

    Each rank measures which layout is faster, and a checkpoint keeps that of the first: here all
    are padded, so that a resumed run adds in the same order.
    """
    data = Seen(token_rows(NUM))
    trainer, record = trainers.build(
        Path(folder if not at else tempfile.mkdtemp()),
        data=data,
        attach={"effective_batch_size": SCHEDULE, "budget": gradaccum.Budget(examples=2)},
        remove_unused_columns=False,
        **{"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1} | CONSTANT | kwargs,
    )
    with replaced(hf, "find_layout", lambda *_: None):
        trainer.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{at}" if at else None)
    found = report(trainer, record) | {"asked": data.asked, "epoch": trainer.state.epoch}
    return found | {"position": trainer.accumulation.sampler.state_dict()}


def wrong(rank: int, world: int) -> dict[str, str]:
    """Try samplers that do not fit the trainer, or those of other ranks."""
    givens = {"seed": {"seed": rank}, "costs": {"costs": [1.0 + rank * i for i in range(NUM)]}}
    givens["rank"] = {"rank": 0, "world": 1}
    return {name: refused(build(own=sampler(**given))[0].train) for name, given in givens.items()}


class Steps(TrainerCallback):
    """Note how many examples each rank had in each step, and how fast it was in the one before."""

    def __init__(self, trainer) -> None:
        self.trainer, self.shares, self.rates = trainer, [], []
        trainer.add_callback(self)

    def on_step_end(self, *args, **kwargs):
        step = self.trainer.accumulation.last
        self.shares.append([share.num_examples for share in step.shares])
        self.rates.append(step.rates)


def uneven(rank: int, world: int, full_determinism: bool = False) -> dict:
    """Train eight epochs of five steps; by its clock the second rank takes thrice as long."""
    data = Seen(token_rows(40))
    trainer, record = trainers.build(
        Path(tempfile.mkdtemp()),
        data=data,
        attach={"effective_batch_size": BATCH, "budget": gradaccum.Budget(examples=2)},
        remove_unused_columns=False,
        num_train_epochs=8,
    )
    trainer.args.full_determinism = full_determinism
    steps = Steps(trainer)
    # What measures runs alone, as the only share.
    seconds = property(lambda step: float(step.shares[step.rank].useful * (1 + 2 * rank)))
    with replaced(Step, "seconds", seconds):
        trainer.train()
    return report(trainer, record) | {"asked": data.asked, "shares": steps.shares}


def measured(rank: int, world: int) -> tuple[float, list[float]]:
    """Return by what factor equal ranks differ: at most in a step, in medians of 16 (log.md)."""
    trainer, _ = trainers.build(
        Path(tempfile.mkdtemp()),
        data=token_rows(640),
        num_train_epochs=4,
        attach={"effective_batch_size": 16, "budget": gradaccum.Budget(examples=4)},
    )
    steps = Steps(trainer)
    trainer.train()
    rates = steps.rates[1:]
    medians = [
        list(map(statistics.median, zip(*rates[i : i + 16], strict=True)))
        for i in range(0, len(rates) - 15, 16)
    ]
    return max(max(r) / min(r) for r in rates), [round(max(m) / min(m), 3) for m in medians]


def followed(rank: int, world: int) -> dict:
    """Read shares of which the ranks have read ahead differently when they are told of speeds."""
    PartialState(cpu=True)
    shares = Shares(range(80), 8, False, costs=[], rank=rank, world=world)
    read, reading = [], iter(shares)

    def after(rates, num):
        for _ in range(num):
            shares.follow(rates)

    read += [next(reading) for _ in range(1 + 3 * rank)]
    after([0.0, 0.0], 1)
    after([2.0, 1.0], 16)  # a single round of noise
    after([1.2, 1.0], 32)  # not enough to follow
    after([2.0, 1.0], 31)
    after([1.0, 9.0], 1)  # one of a round
    read += reading
    after([1.9, 1.0], 32)  # as they are dealt already
    again = list(shares)
    after([1.0, 1.1], 32)  # the same again
    return {"read": read, "again": again, "even": list(shares)}
