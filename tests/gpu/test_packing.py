"""Packed micro-batches on an accelerator: its kernel, precision, and nothing that waits.

    pytest tests/gpu

Skipped where there is no accelerator. Reference: float64 on the CPU, one row at a time.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

import gradaccum
from gradaccum.packing import attention
from gradaccum.packing.plan import Segment
from tests import oracle

pytestmark = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="there is no accelerator"
)
hf = pytest.importorskip("tests.hf_models")
packing = pytest.importorskip("tests.test_packing")
TREE = [Segment(0, 40), Segment(40, 47, ((0, 40),)), Segment(47, 80, ((0, 40), (40, 47))),
        Segment(80, 95, ((0, 40),)), Segment(95, 130)]  # fmt: skip


def device():
    return torch.accelerator.current_accelerator()


def attended(parts, dtype, where, **kwargs):
    leaves = [x.to(where, dtype).detach().requires_grad_() for x in parts]
    found = attention.Attention(TREE)(SimpleNamespace(), *leaves, scaling=0.2, **kwargs)
    (found.double().cpu() * torch.linspace(-1, 1, found.shape[-1])).sum().backward()
    return {str(i): x.double().cpu() for i, x in enumerate([found, *(x.grad for x in leaves)])}


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_a_tree(heads, size, window, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    query = torch.randn(1, 4, 130, size).to(dtype)
    parts = [query, *torch.randn(2, 1, heads, 130, size).to(dtype)]
    expected = attended(parts, torch.float64, "cpu", sliding_window=window)
    found = attended(parts, dtype, device(), sliding_window=window)
    assert oracle.error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_the_one_kernel_is_taken():
    query = torch.zeros(1, 4, 10, 64, dtype=torch.bfloat16, device=device())
    assert attention._has_kernel(query, query[:, :2])
    assert not attention._has_kernel(query.float(), query[:, :2].float())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_gradients_are_those_of_each_row_by_itself(kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = hf.llama(initializer_range=0.2)
    expected = packing.truth(copy.deepcopy(model).double(), packing.EXAMPLES)
    errors = {}
    for budget in (gradaccum.Budget(tokens=80), gradaccum.Budget(examples=1)):
        net = copy.deepcopy(model).to(device()).train()
        net = net.bfloat16() if kind == "bfloat16" else net
        accumulator = gradaccum.Accumulator(net, gradaccum.causal_lm(), budget=budget)
        with torch.autocast(device().type, torch.bfloat16, enabled=kind == "autocast"):
            accumulator.backward(packing.EXAMPLES)
        found = {name: grad.cpu() for name, grad in oracle.left_in(net).items()}
        errors[type(accumulator.layout)] = oracle.error(found, expected)
    assert len(errors) == 2, "one of them ran packed"
    padded, packed = errors[type(None)], errors[packing.Packed]
    assert packed <= (1e-6 if kind == "float32" else 1.5 * padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_window_never_waits_for_the_device(dtype):
    net = hf.llama().to(device(), dtype).train()
    accumulator = gradaccum.Accumulator(
        net, gradaccum.causal_lm(), budget=gradaccum.Budget(tokens=80)
    )
    accumulator.backward(packing.EXAMPLES)  # finds out that it runs packed
    assert accumulator.layout is not None
    net.zero_grad()
    window = accumulator.prepare(packing.EXAMPLES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = accumulator.backward(window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.loss > 0
