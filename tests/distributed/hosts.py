"""Runs of attached trainers that ranks take part in; the results are compared by the tests."""

import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

import gradaccum
from gradaccum.integrations.accelerate import backward_of
from tests import models, test_trl, trainers
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


def interrupted(rank: int, world: int, folder: str) -> list[int]:
    """Train to the middle of the second epoch, and save."""
    return resumed(rank, world, folder, 0, max_steps=3)["asked"]


def resumed(rank: int, world: int, folder: str, at: int = 3, **kwargs) -> dict:
    """Train to the end of the second epoch, from a checkpoint in the folder if `at` is not 0."""
    data = Seen(token_rows(NUM))
    trainer, record = trainers.build(
        Path(folder),
        data=data,
        attach={"effective_batch_size": BATCH, "budget": gradaccum.Budget(examples=2)},
        remove_unused_columns=False,
        save_strategy="no" if at else "steps",
        save_steps=3,
        lr_scheduler_type="constant",
        **{"num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 1e-3} | kwargs,
    )
    trainer.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{at}" if at else None)
    return report(trainer, record) | {"asked": data.asked}


def trl(rank: int, world: int, kind: str) -> tuple[dict, dict]:
    """Train one step of a trainer of TRL; without ranks as it is, on one batch."""
    attach, settings = (
        {"effective_batch_size": 8, "budget": gradaccum.Budget(examples=1 + rank)},
        {},
    )
    if world == 1:
        attach, settings = None, {"per_device_train_batch_size": 8}
    made, gradient = test_trl.run(kind, Path(tempfile.mkdtemp()), attach, **settings)
    return gradient, made.state.log_history[0]


def stream(rank: int, world: int) -> dict:
    data = token_rows(NUM).to_iterable_dataset()
    trainer, record = trainers.build(
        Path(tempfile.mkdtemp()),
        data=data,
        attach={"effective_batch_size": BATCH, "budget": gradaccum.Budget(examples=1 + rank)},
        max_steps=3,
    )
    trainer.train()
    return report(trainer, record)


def shuffled_apart(rank: int, world: int) -> str:
    trainer, _ = trainers.build(
        Path(tempfile.mkdtemp()), attach={"effective_batch_size": BATCH}, data_seed=rank
    )
    return refused(trainer.train)


def unshared(rank: int, world: int) -> str:
    class Unshared(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, BATCH, collate_fn=self.data_collator)

    trainer, _ = trainers.build(
        Path(tempfile.mkdtemp()), trainer=Unshared, attach={"effective_batch_size": BATCH}
    )
    return refused(trainer.train)


def unjoined(rank: int, world: int, port: int) -> str:
    """Without use_cpu the Trainer does not know of the other rank."""
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)  # accelerate joins there, before transformers forgets it
    return refused(
        lambda: trainers.build(
            Path(tempfile.mkdtemp()), attach={"effective_batch_size": BATCH}, use_cpu=False
        )
    )


def failing(rank: int, world: int) -> tuple[str, float]:
    """One rank's loss fails in the second step."""

    class Failing(Trainer):
        def compute_loss(self, *args, **kwargs):
            if rank == 1 and self.state.global_step == 1:
                raise ArithmeticError("no such loss")
            return super().compute_loss(*args, **kwargs)

    trainer, _ = trainers.build(
        Path(tempfile.mkdtemp()),
        trainer=Failing,
        attach={"effective_batch_size": BATCH, "budget": gradaccum.Budget(examples=2)},
    )
    begin = time.perf_counter()
    return refused(trainer.train), time.perf_counter() - begin


def out_of_memory(rank: int, world: int) -> dict:
    """One rank runs out of memory in each step, with dropout."""

    class Full(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if rank == 1 and self.is_in_train and len(inputs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("no memory left")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer, record = trainers.build(
        Path(tempfile.mkdtemp()),
        data=token_rows(NUM),
        trainer=Full,
        attach={"effective_batch_size": BATCH, "budget": gradaccum.Budget(examples=4)},
        num_train_epochs=2,
    )
    trainer.train()
    return report(trainer, record)


def accelerate_loop(rank: int, world: int) -> dict[str, Tensor]:
    """Train three steps of a plain loop with a prepared model."""
    accelerator, net = Accelerator(cpu=True), models.model().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    prepared, optimizer = accelerator.prepare(net, optimizer)
    data = models.examples([3, 9, 5, 2, 7, 11, 4, 6, 8, 3, 5])
    sampler = gradaccum.EffectiveBatchSampler(
        data, 4, costs=[len(row["input_ids"]) for row in data], seed=1
    )
    accumulator = gradaccum.Accumulator(
        prepared,
        gradaccum.causal_lm(),
        budget=gradaccum.Budget(tokens=12 + 6 * rank),
        backward=backward_of(accelerator),
    )
    for batch in DataLoader(data, batch_sampler=sampler, collate_fn=list):
        accumulator.backward(batch)
        accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        sampler.commit()
    return {n: p.detach() for n, p in net.named_parameters()}


def refused(run) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    pairs = [(found[n].double(), expected[n].double()) for n in found if expected[n] is not None]
    difference = sum((a - b).square().sum() for a, b in pairs)
    return (difference / sum(b.square().sum() for _, b in pairs)).sqrt().item()
