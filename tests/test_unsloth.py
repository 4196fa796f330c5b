"""Trainers made by Unsloth, stock and attached, against the whole batch at once.

Unsloth changes transformers and TRL for the whole process, so it gets one of its own: this file,
run as a script, prints what it measured.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = 3


def report(tmp_path, *words):
    environment = os.environ | {
        "UNSLOTH_SKIP_TORCHVISION_CHECK": "1",
        # Of weights in float32 its trainers then make no mixed precision, as it does on a GPU.
        "UNSLOTH_MIXED_PRECISION": "bfloat16",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs unsloth")
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_gradient_of_the_whole_batch(tmp_path, kind):
    found = json.loads(report(tmp_path, __file__, kind).splitlines()[-1])
    assert len(found["ours"]) == STEPS and found["micros"] > 1
    assert len(found["automatic"]) == STEPS and max(found["automatic"]) <= 1e-6
    assert max(found["ours"]) <= 1e-6 and max(map(abs, found["drift"])) <= 1e-6
    assert max(found["stock"]) <= 1e-6  # Unsloth divides by the count too
    assert found["losses"] == pytest.approx(found["whole_losses"], rel=1e-6)
    assert found["settled"] == (STEPS if kind == "gpu" else 0)


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs unsloth")
def test_the_example(tmp_path):
    printed = report(tmp_path, ROOT / "examples" / "unsloth_sft.py")
    assert " micro-batches" in printed.splitlines()[-1]


def main(kind):
    import torch
    import trl
    from unsloth import FastLanguageModel

    from tests import oracle
    from tests.hf_models import Record, llama, prompts, tokenizer
    from tests.trainers import logged

    settled = as_on_a_gpu(trl) if kind == "gpu" else []
    import gradaccum

    base = tempfile.mkdtemp()
    llama().save_pretrained(base), tokenizer().save_pretrained(base)

    def run(rows, steps, budget=None):
        model, _ = FastLanguageModel.from_pretrained(
            base, max_seq_length=64, load_in_4bit=False, dtype=torch.float32
        )
        model = FastLanguageModel.get_peft_model(
            model, r=4, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing=False
        )
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then so is the gradient of lora_A
                torch.nn.init.normal_(p, std=0.1)
        record = Record()
        args = trl.SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_steps=STEPS,
            max_length=40,
            logging_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            bf16=False,
            report_to=[],
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=args,
            train_dataset=prompts(),
            processing_class=tokenizer(),
            callbacks=[record],
        )
        if budget is not None:
            gradaccum.attach(trainer, budget=budget)
        trainer.train()
        return trainer, record.gradients

    whole, expected = run(8, 1)
    _, stock = run(2, 4)
    del settled[:]
    ours, found = run(2, 4, gradaccum.Budget(tokens=80))
    num_settled = len(settled)
    _, automatic = run(2, 4, "auto")

    def errors(gradients, measure=oracle.error):
        return [measure(a, b) for a, b in zip(gradients, expected, strict=True)]

    figures = {
        "trainer": type(ours).__name__,
        "stock": errors(stock),
        "ours": errors(found),
        "automatic": errors(automatic),
        "drift": errors(found, oracle.signed_residual),
        "micros": ours.accumulation.last.num_micros,
        "losses": logged(ours, "loss"),
        "whole_losses": logged(whole, "loss"),
        "settled": num_settled,
    }
    print(json.dumps(figures))


def as_on_a_gpu(trl):
    """Make Unsloth change transformers and TRL as it does where it finds a GPU.

    Returns:
        A list that grows whenever it settles which functions it stops compiling.
    """
    plain = trl.SFTTrainer.__mro__[1]  # without what it does for a CPU
    for module in (trl, trl.trainer, trl.trainer.sft_trainer):
        module.SFTTrainer = plain
    import unsloth.models.rl
    from transformers import Trainer
    from unsloth.models._utils import patch_gradient_accumulation_fix
    from unsloth_zoo.temporary_patches import utils

    patch_gradient_accumulation_fix(Trainer)
    unsloth.models.rl._patch_trl_rl_trainers("sft_trainer")
    assert trl.SFTTrainer.__name__ == "UnslothSFTTrainer"
    assert Trainer.get_batch_samples.__module__ == "unsloth.models._utils"
    settled, settle = [], utils.apply_pending_eager_fallbacks

    def counting():
        settled.append(1)
        return settle()

    utils.apply_pending_eager_fallbacks = counting
    return settled


if __name__ == "__main__":
    import unsloth  # noqa: F401  before all that it changes

    main(sys.argv[1])
