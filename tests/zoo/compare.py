"""Train one step of a head as the stock Trainer does and as an attached one; compare gradients.

The reference is the gradient of the model's own loss on all rows at once:

    model(**collate(rows)).loss.backward()
"""

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import gradaccum
from tests.zoo.catalog import Head
from tests.zoo.data import Row, collate
from tests.zoo.models import working_precision

Gradients = dict[str, Tensor]

# name: rows in the effective batch, rows in a micro-batch, micro-batches in a step
CASES = {"8x1": (8, 8, 1), "A": (8, 2, 4), "B": (7, 2, 4)}


class Keep(TrainerCallback):
    """Keep the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.gradients = left_in(given["model"])


def measure(head: Head, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return the record of a head: errors by way and case, or why it could not be built.

    `stock` and `ours` map each case to `[norm ratio, relative error]`, or to the error raised.
    """
    record: dict[str, Any] = {"name": head.name, "kind": head.kind, "variant": head.variant}
    record["dtype"] = str(dtype).removeprefix("torch.")
    with working_precision(dtype):
        try:
            model, rows = head.build(dtype=dtype)
            expected = {num: reference(model, rows[:num]) for num in (8, 7)}
            record |= soundness(model, rows, expected[8])
        except Exception as error:
            return record | {"unbuilt": said(error)}
        for way in ("stock", "ours"):
            record[way] = {
                case: outcome(model, rows[: CASES[case][0]], case, way, expected) for case in CASES
            }
    return record


def soundness(model: PreTrainedModel, rows: list[Row], expected: Gradients) -> dict[str, Any]:
    """Return the floor and whether the loss draws random numbers; refuse what shows nothing."""
    if not 0 < norm(expected) < float("inf"):
        raise ValueError(f"the gradient has norm {norm(expected):.3g}")
    found = {"floor": error(reference(model, rows[::-1]), expected)}
    again = error(reference(model, rows, seed=1), expected)
    return found | ({"random": again} if again > 0 else {})


def outcome(
    model: PreTrainedModel, rows: list[Row], case: str, way: str, expected: dict[int, Gradients]
) -> list[float] | str:
    try:
        found = trained(model, rows, case, way)
    except Exception as problem:
        return said(problem)
    full = expected[len(rows)]
    return [norm(found) / norm(full), error(found, full)]


def reference(model: PreTrainedModel, rows: list[Row], *, seed: int = 0) -> Gradients:
    """Return the gradient of the model's own loss on these rows at once."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs: Any = model(**collate(rows))
        loss = outputs.get("loss")
        if loss is None:
            raise ValueError("the model returns no loss")
        loss.backward()
    return left_in(model)


def trained(model: PreTrainedModel, rows: list[Row], case: str, way: str) -> Gradients:
    """Return the gradients of the one optimizer step that a Trainer makes of these rows."""
    num, size, steps = CASES[case]
    keep = Keep()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            copy.deepcopy(model),
            arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            data_collator=collate,
            callbacks=[keep],
        )
        trainer.remove_callback(PrinterCallback)
        if way == "ours":
            budget = gradaccum.Budget(examples=size)
            gradaccum.attach(trainer, effective_batch_size=num, budget=budget)
        trainer.train()
    return keep.gradients


def arguments(folder: str, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        optim="sgd",
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )


def left_in(model: torch.nn.Module) -> Gradients:
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def error(found: Gradients, expected: Gradients) -> float:
    """Return ||found - expected|| / ||expected||; a missing gradient is zero."""
    zero = torch.zeros(())
    names = found.keys() | expected.keys()
    difference = {n: found.get(n, zero) - expected.get(n, zero) for n in names}
    return norm(difference) / norm(expected)


def norm(gradients: Gradients) -> float:
    return sum(g.square().sum().item() for g in gradients.values()) ** 0.5


def said(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:400]}"
