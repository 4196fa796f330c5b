"""Memory on an accelerator: predicted against allocated, real failures recovered, budgets found.

    pytest tests/gpu

Skipped where there is no CUDA device. What is predicted is what tensors take; the allocator's own
figures are `max_memory_allocated` (blocks of 512 bytes) and `max_memory_reserved` (segments).
"""

import copy
import gc
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradaccum
from gradaccum.memory.cap import WORKSPACE
from gradaccum.memory.predict import Job, trace
from gradaccum.optimizers import materialize
from tests import oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CONFIG = LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=6,
                     num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
LENGTH = 512
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as on Hopper anyway; deterministic products


def inputs(rows, length):
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def fused(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(dtype).train()
    model.config.use_cache = False
    return model


def rows(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(32, LENGTH, (num,), generator=generator).tolist()
    ids = [torch.randint(1, 8192, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture(autouse=True)
def nothing_left():
    """What a test that fails holds would count in the next one."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def measured(dtype, num_rows, checkpointing):
    """Return the bytes predicted, allocated and reserved."""
    model = net(dtype)
    job = Job(model, gradaccum.causal_lm(), fused, inputs, as_cuda=True,
              checkpointing=checkpointing)  # fmt: skip
    predicted = trace(job, num_rows, LENGTH).peak_bytes + WORKSPACE
    model.cuda()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = fused(model.parameters())
    materialize(optimizer)
    accumulator = gradaccum.Accumulator(
        model, gradaccum.causal_lm(), budget=gradaccum.Budget(examples=num_rows)
    )
    batch = [{"input_ids": [0] * LENGTH, "labels": [0] * LENGTH}] * (2 * num_rows)
    for _ in range(2):  # the first makes the workspaces
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        accumulator.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
    return predicted, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_rows", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_against_allocated(dtype, num_rows, checkpointing):
    predicted, allocated, reserved = measured(dtype, num_rows, checkpointing)
    print(f"{dtype} {num_rows} {checkpointing}: {predicted / allocated - 1:+.2%} of allocated, "
          f"{predicted / reserved - 1:+.2%} of reserved")  # fmt: skip
    assert abs(predicted / allocated - 1) < 0.02


def test_real_failures_are_recovered_bit_for_bit():
    torch.use_deterministic_algorithms(True)
    before = torch.cuda.memory_allocated() / torch.cuda.get_device_properties(0).total_memory
    batch, models = rows(48), [net().cuda() for _ in range(2)]
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            before + 2 * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
        short = gradaccum.Accumulator(
            models[0], gradaccum.causal_lm(), budget=gradaccum.Budget(examples=48)
        )
        step = short.backward(batch)
        torch.cuda.set_per_process_memory_fraction(1.0)
        small = gradaccum.Accumulator(models[1], gradaccum.causal_lm(), budget=short.limit)
        small.backward(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.use_deterministic_algorithms(False)
    assert step.recoveries and step.num_examples == 48
    expected = oracle.left_in(models[1])
    for name, found in oracle.left_in(models[0]).items():
        assert torch.equal(found, expected[name]), name


def test_a_budget_is_found_and_fits():
    model = net().cuda()
    materialize(fused(model.parameters()))
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), memory="6GiB")
    torch.cuda.reset_peak_memory_stats()
    step = accumulator.backward(rows(64))
    assert not step.recoveries and torch.cuda.max_memory_allocated() < 6 * 2**30
    whole = copy.deepcopy(model)
    whole.zero_grad()
    gradaccum.Accumulator(
        whole, gradaccum.causal_lm(), budget=gradaccum.Budget(tokens=2048)
    ).backward(rows(64))
    assert oracle.error(oracle.left_in(model), oracle.left_in(whole)) < 1e-5


def test_a_plan_is_calibrated_here_and_runs_within_it():
    found = gradaccum.plan(net(), effective_batch=16, lengths=LENGTH, memory="6GiB", device="cuda")
    assert any("those of kernels (measured)" in text for text in found.assumptions)
    model = net().cuda()
    if found.chosen.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = gradaccum.causal_lm(chunk=found.chosen.chunk)
    accumulator = gradaccum.Accumulator(model, objective, budget=found.budget)
    torch.cuda.reset_peak_memory_stats()
    accumulator.backward([{"input_ids": [0] * LENGTH, "labels": [0] * LENGTH}] * 16)
    assert torch.cuda.max_memory_reserved() < 6 * 2**30
