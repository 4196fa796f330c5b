"""The same exactness on an accelerator, in float32, bf16 and under autocast.

    pytest tests/gpu

Skipped where there is no accelerator. Reference: the float64 oracle on the CPU; for bf16 the
bound is the floor that is measured there, two orders of the same full batch.
"""

import copy

import pytest
import torch

import gradaccum
from gradaccum.trees import map_tensors
from tests import oracle
from tests.models import collated, examples, model, oracle_loss

pytestmark = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="there is no accelerator"
)
LENGTHS = [5, 19, 3, 12, 8, 20, 2, 15, 11, 7]


def device():
    return torch.accelerator.current_accelerator()


def on_device(net):
    return copy.deepcopy(net).to(device())


def accumulate(net, batch, **kwargs):
    net.zero_grad()
    step = gradaccum.Accumulator(net, gradaccum.causal_lm(), **kwargs).backward(batch)
    return {n: None if g is None else g.cpu() for n, g in oracle.left_in(net).items()}, step


@pytest.mark.parametrize("form", ["list", "collated"])
def test_float32_against_the_float64_oracle(form):
    torch.backends.cuda.matmul.allow_tf32 = False
    net, batch = model(dtype=torch.float32), examples(LENGTHS)
    expected = oracle.gradients(net.double(), *oracle_loss(net.double(), collated(batch)))
    given = batch if form == "list" else collated(batch)
    net = on_device(net.float())
    found, step = accumulate(net, given, budget=gradaccum.Budget(tokens=40))
    assert step.num_micros > 2
    assert oracle.error(found, expected) <= 1e-6
    assert abs(oracle.signed_residual(found, expected)) <= 1e-6


def test_bf16_within_the_measured_floor():
    net, batch = on_device(model(dtype=torch.bfloat16)), examples(LENGTHS)
    whole = {"budget": gradaccum.Budget(examples=len(batch))}
    full, _ = accumulate(net, batch, **whole)
    cuts = [accumulate(net, batch, budget=gradaccum.Budget(examples=n))[0] for n in (1, 2, 3)]
    exact = oracle.gradients(net.cpu().double(), *oracle_loss(net.cpu().double(), collated(batch)))
    floor = oracle.error(full, exact)
    assert all(oracle.error(cut, exact) <= 2 * floor for cut in cuts)


def test_autocast_and_scaler():
    net, batch = on_device(model(dtype=torch.float32)), examples(LENGTHS)
    scaler = torch.amp.GradScaler(device().type, init_scale=2.0**8)
    with torch.autocast(device().type, dtype=torch.float16):
        scaled, step = accumulate(
            net,
            batch,
            budget=gradaccum.Budget(tokens=40),
            backward=lambda loss: scaler.scale(loss).backward(),
        )
        full, _ = accumulate(net, batch, budget=gradaccum.Budget(examples=len(batch)))
    unscaled = {n: None if g is None else g / 2**8 for n, g in scaled.items()}
    assert oracle.error(unscaled, full) < 2e-2 and step.nonfinite == []


def test_memory_does_not_grow_with_the_effective_batch():
    """Inputs stay on the host until their micro-batch runs."""
    net = on_device(model(dtype=torch.float32, width=64))
    peaks = []
    for count in (32, 256, 2048):
        batch = examples([20] * count)
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
        accumulate(net, batch, budget=gradaccum.Budget(examples=8))
        peaks.append(torch.accelerator.max_memory_allocated())
    assert max(peaks) <= 1.02 * min(peaks)


def test_the_window_never_waits_for_the_device():
    net, batch = on_device(model(dtype=torch.float32)), examples(LENGTHS)
    accumulator = gradaccum.Accumulator(
        net, gradaccum.causal_lm(), budget=gradaccum.Budget(tokens=40)
    )
    pinned = map_tensors(collated(batch), lambda leaf: leaf.pin_memory())
    accumulator.backward(pinned)  # warm up
    net.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = accumulator.backward(pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.loss > 0 and step.seconds > 0


def test_trainer_on_the_device(tmp_path):
    hf = pytest.importorskip("tests.hf_models")
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def run(attach, per_device):
        record = hf.Record()
        args = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=per_device, max_steps=2,
            learning_rate=0.0, max_grad_norm=0.0, report_to=[], save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            hf.llama(), args, train_dataset=hf.token_rows(), callbacks=[record],
            data_collator=DataCollatorForSeq2Seq(hf.tokenizer(), label_pad_token_id=-100),
        )  # fmt: skip
        if attach:
            gradaccum.attach(trainer, budget=gradaccum.Budget(tokens=90))
        trainer.train()
        return record.gradients

    for found, expected in zip(run(True, 16), run(False, 16), strict=True):
        assert oracle.error(found, expected) <= 1e-6
