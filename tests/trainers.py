"""Stock and attached trainers for the tests, and when two runs of them count as the same."""

import pytest
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import gradaccum
from tests import oracle
from tests.hf_models import Record, llama, prompts, token_rows, tokenizer

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    # Not Adam: it divides small gradients by their own size, and so turns a rounding difference in
    # one step's gradient (1e-7) into one in the weights that the next step's shows (5e-6 seen).
    "optim": "sgd",
    "learning_rate": 0.1,
    "num_train_epochs": 1,
    "max_grad_norm": 0.5,
    "seed": 3,
}


def build(
    tmp_path,
    kind="hf",
    *,
    attach=None,
    model=None,
    data=None,
    trainer=None,
    eval_dataset=None,
    **kwargs,
):
    """Make a trainer that records; attached where `attach` holds the arguments of attach."""
    compute_loss_func = kwargs.pop("compute_loss_func", None)
    settings = COMMON | {"output_dir": str(tmp_path / "out")} | kwargs
    record = Record()
    common = {"model": model or llama(), "callbacks": [record], "eval_dataset": eval_dataset}
    common["compute_loss_func"] = compute_loss_func
    if kind == "sft":
        args = SFTConfig(**{"gradient_checkpointing": False, "max_length": 40} | settings)
        data = data if data is not None else prompts()
        made = SFTTrainer(args=args, train_dataset=data, processing_class=tokenizer(), **common)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer(), label_pad_token_id=-100)
        data = data if data is not None else token_rows()
        made = (trainer or Trainer)(
            args=TrainingArguments(**settings), train_dataset=data, data_collator=collator, **common
        )
    if attach is not None:
        assert gradaccum.attach(made, **attach) is made
    return made, record


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same(ours, theirs, ours_record, theirs_record):
    """The two runs took the same steps with the same gradients, and say the same."""
    assert len(ours_record.gradients) == len(theirs_record.gradients) > 0
    for found, expected in zip(ours_record.gradients, theirs_record.gradients, strict=True):
        assert oracle.error(found, expected) <= 1e-6
        assert abs(oracle.signed_residual(found, expected)) <= 1e-6
    for key in ("loss", "grad_norm"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-6)
    for key in ("learning_rate", "epoch"):
        assert logged(ours, key) == logged(theirs, key)
    for field in ("global_step", "max_steps", "epoch", "num_train_epochs"):
        assert getattr(ours.state, field) == getattr(theirs.state, field)
    ours_weights, theirs_weights = (dict(t.model.named_parameters()) for t in (ours, theirs))
    assert oracle.error(ours_weights, theirs_weights) <= 1e-6
