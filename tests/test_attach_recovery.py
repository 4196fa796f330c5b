"""Trainers whose memory runs out: state, data and logs are those of the smaller budget."""

import json

import pytest
import torch

import gradaccum
from gradaccum.errors import DoesNotFit
from tests.hf_models import llama
from tests.trainers import build, logged

WHOLE, PART = gradaccum.Budget(tokens=400), 130


def short_of_memory(trainer, at=PART):
    """Run out of memory in forwards of more tokens, or, every second time, in their backward."""
    calls = []

    def before(module, args, kwargs):
        if kwargs["input_ids"].numel() > at:
            calls.append(1)
            if len(calls) % 2:
                raise torch.OutOfMemoryError("in forward")

    def after(module, args, kwargs, outputs):
        hidden = outputs[0]
        if kwargs["input_ids"].numel() > at and hidden.requires_grad:
            hidden.register_hook(fail)

    def fail(_):
        raise torch.OutOfMemoryError("in backward")

    body = trainer.model.model
    body.register_forward_pre_hook(before, with_kwargs=True)
    body.register_forward_hook(after, with_kwargs=True)
    return trainer


@pytest.mark.parametrize("kind", ["hf", "sft"])
def test_a_run_that_had_to_shrink_is_the_run_of_the_smaller_budget(
    tmp_path, kind, caplog, monkeypatch
):
    # Which layout is faster is measured by each run, and its bits are those of its layout.
    monkeypatch.setattr("gradaccum.integrations.hf.find_layout", lambda *_: None)
    trainers = {}
    for name in ("short", "small"):
        torch.manual_seed(0)
        trainer, record = build(
            tmp_path / name, kind, model=llama(attention_dropout=0.2), max_steps=4,
            attach={"effective_batch_size": 12, "budget": WHOLE},
        )  # fmt: skip
        if name == "short":
            short_of_memory(trainer)
        else:
            before = trainers["short"][0].accumulation.accumulator.limit
            trainer.accumulation.cut.set(WHOLE.within(before))
        trainer.train()
        trainers[name] = trainer, record
    (short, short_record), (small, small_record) = trainers["short"], trainers["small"]
    assert "runs again from its beginning" in caplog.text
    assert short.accumulation.accumulator.limit.tokens <= PART
    for found, expected in zip(short_record.gradients, small_record.gradients, strict=True):
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
    for key in (
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
    ):
        assert logged(short, key) == logged(small, key), key
    assert short.state.num_input_tokens_seen == small.state.num_input_tokens_seen
    assert short.state.global_step == 4


class Adam(torch.optim.Adam):
    """Runs out of memory in one of its steps."""

    fails_at, num = -1, 0

    def step(self, closure=None):
        # Its state is made one parameter at a time; a step has all gradients.
        self.num += sum(p.grad is not None for p in self.param_groups[0]["params"]) > 1
        if self.num == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory in the optimizer\nand more")
        return super().step(closure)


def with_adam(tmp_path, **kwargs):
    trainer, _ = build(tmp_path, attach={"effective_batch_size": 12}, max_steps=4, **kwargs)
    trainer.optimizer = Adam(trainer.model.parameters(), lr=1e-3)
    return trainer


def test_the_state_of_the_optimizer_is_there_before_the_first_step(tmp_path):
    trainer, seen = with_adam(tmp_path), []
    trainer.model.register_forward_pre_hook(lambda *_: seen.append(len(trainer.optimizer.state)))
    trainer.train()
    assert set(seen) == {sum(p.requires_grad for p in trainer.model.parameters())}


def test_a_step_of_the_optimizer_is_not_run_again(tmp_path):
    trainer = with_adam(tmp_path, save_strategy="steps", save_steps=2)
    Adam.fails_at = 3
    try:
        with pytest.raises(
            DoesNotFit, match="optimizer's step 3, which is not run again"
        ) as caught:
            trainer.train()
    finally:
        Adam.fails_at = -1
    assert "checkpoint-2" in str(caught.value) and "and more" not in str(caught.value)
    assert trainer.optimizer.optimizer.num == 3


def test_a_state_that_does_not_fit_is_said_before_any_step(tmp_path, monkeypatch):
    def fails(optimizer):
        raise torch.OutOfMemoryError("Tried to allocate 30 GiB")

    monkeypatch.setattr("gradaccum.integrations.accumulation.materialize", fails)
    with pytest.raises(DoesNotFit, match=r"state of .* does not fit into memory: Tried") as caught:
        with_adam(tmp_path).train()
    assert "adamw_8bit" in str(caught.value)


def test_a_resumed_run_begins_with_what_memory_had_left(tmp_path):
    """Not with the budget that was found before memory ran out, nor without one."""
    settings = {"attach": {"effective_batch_size": 12}, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = build(tmp_path, max_steps=2, **settings)
    trainer.accumulation.cut.set(WHOLE)
    short_of_memory(trainer).train()
    left = trainer.accumulation.cut.budget
    assert left.tokens <= PART
    resumed, _ = build(tmp_path, max_steps=3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.accumulation.cut.budget == left and resumed.accumulation.found is None
    resumed.train()  # a second run of the same trainer keeps it too
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())[
        "stateful_callbacks"
    ]["SameBatch"]["attributes"]["budget"] == [left.tokens, left.examples]
