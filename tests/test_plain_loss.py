"""SFT's loss without its metrics: the same steps, and the same metrics where they are logged."""

import pytest
import torch
from trl import SFTTrainer

from tests import oracle
from tests.hf_models import llama
from tests.trainers import build, logged, same

KEYS = ("entropy", "mean_token_accuracy", "num_tokens")
EIGHT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 6}


def calls(trainer, monkeypatch):
    """Count the micro-batches that run the trainer's own loss in training."""
    found, own = [], SFTTrainer.compute_loss

    def counted(self, *args, **kwargs):
        if self is trainer and self.is_in_train:
            found.append(self.state.global_step + 1)
        return own(self, *args, **kwargs)

    counted.__module__ = own.__module__
    monkeypatch.setattr(SFTTrainer, "compute_loss", counted)
    return found


@pytest.mark.parametrize("first", [False, True])
def test_metrics_of_logged_steps_are_those_of_one_big_batch(tmp_path, monkeypatch, first):
    big = {"per_device_train_batch_size": 8, "max_steps": 6}  # stock takes means of means
    theirs, theirs_record = build(tmp_path, "sft", logging_steps=1, **big)
    theirs.train()
    settings = {"logging_steps": 3, "logging_first_step": first}
    ours, record = build(tmp_path, "sft", attach={}, **settings, **EIGHT)
    seen = calls(ours, monkeypatch)
    ours.train()
    steps = [1, 3, 6] if first else [3, 6]
    assert ours._is_plain and sorted(set(seen)) == steps
    for key in KEYS:
        expected = [logged(theirs, key)[step - 1] for step in steps]
        assert logged(ours, key) == pytest.approx(expected, rel=1e-5)
    for found, expected in zip(record.gradients, theirs_record.gradients, strict=True):
        assert oracle.error(found, expected) <= 1e-6


def test_logged_at_each_step_it_is_the_trainers_own(tmp_path, monkeypatch):
    theirs, theirs_record = build(tmp_path, "sft", **EIGHT)
    theirs.train()
    ours, record = build(tmp_path, "sft", attach={}, **EIGHT)
    seen = calls(ours, monkeypatch)
    ours.train()
    assert set(seen) == {1, 2, 3, 4, 5, 6}
    same(ours, theirs, record, theirs_record)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_too(tmp_path, autocast):
    """TRL's head rounds otherwise than torch's product, by no more than 16 bits do."""
    net = llama(initializer_range=0.2).to(torch.float32 if autocast else torch.bfloat16)
    settings = {"logging_steps": 4, "bf16": autocast, **EIGHT}
    ours, _ = build(tmp_path, "sft", attach={}, model=net, **settings)
    ours.train()
    assert ours._is_plain


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_another_loss_is_left_alone(tmp_path, settings):
    theirs, theirs_record = build(tmp_path, "sft", logging_steps=4, **settings, **EIGHT)
    theirs.train()
    ours, record = build(tmp_path, "sft", attach={}, logging_steps=4, **settings, **EIGHT)
    ours.train()
    assert ours._is_plain is False
    same(ours, theirs, record, theirs_record)


def test_a_loss_of_the_user_is_left_alone(tmp_path):
    ours, _ = build(tmp_path, "sft", attach={}, logging_steps=4, **EIGHT)
    own, seen = ours.compute_loss, []

    def mine(*args, **kwargs):
        seen.append(ours.state.global_step)
        return own(*args, **kwargs)

    ours.compute_loss = mine
    ours.train()
    assert ours._is_plain is False and set(seen) >= {0, 1, 2, 3, 4, 5}
