"""Memory that runs out anywhere in a window: the same gradient, bit for bit, nothing left over."""

import functools
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradaccum
from gradaccum.device import is_out_of_memory, suppressing_out_of_memory
from gradaccum.errors import DoesNotFit
from tests import models, oracle

LENGTHS = [9, 5, 12, 4, 7, 6, 11, 3]
EXAMPLES = models.examples(LENGTHS)
WHOLE = gradaccum.Budget(tokens=8 * 12)


class Counting(models.CausalLM):
    """Draws masks, counts in buffers, caches a table, and computes a part again in backward."""

    def __init__(self, **kwargs):
        super().__init__(dropout=0.2, **kwargs)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("running", torch.zeros(8, dtype=torch.float64))
        self.widest = 0

    def forward(self, input_ids, **inputs):
        self.seen += len(input_ids)
        self.widest = max(self.widest, input_ids.shape[1])
        x = self.embed(input_ids)
        self.running.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return checkpoint(super().forward, input_ids, use_reentrant=False, **inputs)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Counting()


class Fails(TorchDispatchMode):
    """Run out of memory at one operation; count them."""

    def __init__(self, at=-1, error=None):
        super().__init__()
        self.error = error or torch.OutOfMemoryError("injected")
        self.at, self.num, self.phase = at, 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += 1
        if self.num - 1 == self.at:
            inside = torch._C._current_graph_task_id() != -1
            again = inside and torch.is_grad_enabled()
            self.phase = "recomputation" if again else "backward" if inside else "forward"
            raise self.error
        return func(*args, **(kwargs or {}))


def ran(budget, *, fails=None, make=net, limit=None, **options):
    """Return model, step, what random numbers come next, of one window."""
    model = make()
    accumulator = gradaccum.Accumulator(
        model, gradaccum.causal_lm(), budget=budget, collate=models.collated, **options
    )
    accumulator.limit = limit
    torch.manual_seed(1)
    if fails is None:
        step = accumulator.backward(EXAMPLES)
    else:
        with fails:
            step = accumulator.backward(EXAMPLES)
    return model, step, torch.rand(2).tolist(), accumulator


def same(one, other):
    (model, step, drawn, _), (expected, plain, expected_drawn, _) = one, other
    assert step.micros == plain.micros and step.loss == plain.loss and drawn == expected_drawn
    found, wanted = oracle.left_in(model), oracle.left_in(expected)
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None)
        assert gradient is None or torch.equal(found[name], gradient), name
    for (name, buffer), (_, own) in zip(
        model.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, own), name
    assert model.widest == expected.widest


def adapted():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["head"])
        model = peft.get_peft_model(Counting(), config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        return model


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"backward": lambda loss: scaler.scale(loss).backward()}


def normalised():
    """BatchNorm in training mode, whose running statistics each forward moves."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Counting()
        norm = nn.BatchNorm1d(8).double()
        model.embed.register_forward_hook(lambda m, i, x: norm(x.transpose(1, 2)).transpose(1, 2))
        model.embed.norm = norm
        return model


def mean_loss(model, batch):
    return nn.functional.cross_entropy(
        model(**batch).flatten(0, 1), batch["labels"].roll(-1, 1).flatten(), ignore_index=-100
    )


SCENES = {
    "checkpointed": {},
    "LoRA": {"make": adapted},
    "scaler": {"options": scaled},
    "BatchNorm": {"make": normalised},
}


@pytest.mark.parametrize("scene", SCENES)
def test_every_operation_may_run_out_of_memory(scene, monkeypatch):
    """In forward, backward and recomputation: as if the smaller budget had been there at once."""
    make, options = SCENES[scene].get("make", net), SCENES[scene].get("options", dict)
    # Hundreds of full collections take minutes where a process has run many other tests.
    young = functools.partial(gc.collect, 1)
    monkeypatch.setattr("gradaccum.device.gc.collect", young)
    if scene == "BatchNorm":  # it is refused for good reasons, but its buffers come back
        monkeypatch.setattr("gradaccum.engine.batch_norms", lambda model: [])
    counted = Fails()
    ran(WHOLE, fails=counted, make=make, **options())
    half = ran(WHOLE, limit=gradaccum.Budget(tokens=48), make=make, **options())
    phases = []
    for at in range(counted.num):
        fails = Fails(at)
        found = None
        with suppressing_out_of_memory():
            found = ran(WHOLE, fails=fails, make=make, **options())
        if found is None:  # what is to be put back is copied, or the host sorts and counts
            assert not phases
            continue
        assert len(found[1].recoveries) == 1
        same(found, half)
        phases.append(fails.phase)
    assert {"forward", "backward", "recomputation"} == set(phases)
    assert len(phases) >= counted.num - 30  # of the four scenes


def test_batch_norm_that_does_not_fit_at_once_is_refused_with_its_buffers_put_back():
    model, before = normalised(), normalised().state_dict()
    accumulator = gradaccum.Accumulator(
        model, gradaccum.causal_lm(), budget=WHOLE, collate=models.collated
    )
    with pytest.raises(gradaccum.errors.NotDecomposable, match="BatchNorm"), Fails(60):
        accumulator.backward(EXAMPLES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_halves_until_it_fits_and_stays_there(caplog):
    def grudging(model, args, kwargs):
        if kwargs["input_ids"].numel() > 20:
            raise torch.OutOfMemoryError("more than 20 tokens")

    def make():
        model = net()
        model.register_forward_pre_hook(grudging, with_kwargs=True)
        return model

    with caplog.at_level(logging.WARNING):
        model, step, _, accumulator = found = ran(WHOLE, make=make)
    assert [recovery.limit.tokens for recovery in step.recoveries] == [48, 18]
    assert accumulator.limit == gradaccum.Budget(tokens=18) and accumulator.budget == WHOLE
    same(found, ran(gradaccum.Budget(tokens=18)))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "8 examples of size 96" in said[0] and "up to 48 tokens" in said[0]
    assert "out of memory, now 18 tokens" in str(step)
    model.zero_grad()
    assert not accumulator.backward(EXAMPLES).recoveries


def test_a_measured_loss_shrinks_as_well_and_is_measured_once():
    def loss(model, batch):
        if batch["input_ids"].numel() > 30:
            raise torch.OutOfMemoryError("more than 30 tokens")
        calls.append(batch["input_ids"].numel())
        return mean_loss(model, batch)

    calls = []
    objective = gradaccum.from_mean(loss, weight=None)
    accumulator = gradaccum.Accumulator(
        models.model(), objective, budget=WHOLE, collate=models.collated
    )
    step = accumulator.backward(EXAMPLES)
    assert [r.limit.tokens for r in step.recoveries] == [48, 18] and accumulator.limit.tokens == 18
    once = len(calls)
    accumulator.model.zero_grad()
    assert accumulator.backward(EXAMPLES).loss == step.loss
    assert len(calls) - once == step.num_micros


def test_memory_that_does_not_suffice_to_measure_a_loss():
    def loss(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 B")

    accumulator = gradaccum.Accumulator(
        models.model(), gradaccum.from_mean(loss), budget=WHOLE, collate=models.collated
    )
    with pytest.raises(DoesNotFit, match=r"measured how .* 4 B"):
        accumulator.backward(EXAMPLES)


def test_one_example_that_does_not_fit():
    def make():
        model = net()
        model.register_forward_pre_hook(lambda *_: fail())
        return model

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB\nand more")

    with pytest.raises(DoesNotFit, match="example 2 of the effective batch, of size 12") as caught:
        ran(WHOLE, make=make)
    assert "20 MiB" in str(caught.value) and "hint: gradient checkpointing" in str(caught.value)
    assert "and more" not in str(caught.value)


def test_nothing_of_a_failed_attempt_is_kept_alive():
    kept = []

    class Heavy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            h = self.inner(x)
            kept.append(weakref.ref(h))
            if len(x) > 2:
                raise torch.OutOfMemoryError("too many rows")
            gc.collect()
            alive.append(sum(ref() is not None for ref in kept))
            return h

    alive = []
    objective = gradaccum.from_mean(lambda m, x: m(x).square().mean(), weight="rows")
    accumulator = gradaccum.Accumulator(Heavy(), objective, budget=gradaccum.Budget(examples=8))
    accumulator.backward(torch.randn(8, 4))
    assert len(kept) == 6 and alive == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                     "allocate memory: you tried to allocate 4096 bytes. Error code 12"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        MemoryError(),
    ],
)  # fmt: skip
def test_errors_that_only_look_like_others(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("compiled")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)
    found = ran(WHOLE, fails=Fails(60, error))
    assert len(found[1].recoveries) == 1
    same(found, ran(WHOLE, limit=gradaccum.Budget(tokens=48)))


@pytest.mark.parametrize("text", ["shapes differ", "out of resource: shared memory"])
def test_other_errors_are_raised_as_they_are(text):
    with pytest.raises(RuntimeError, match=text):
        ran(WHOLE, fails=Fails(60, RuntimeError(text)))


def test_a_collator_draws_the_same_numbers_again():
    def collate(batch):
        drawn = models.collated(batch)
        keep = torch.rand(drawn["labels"].shape) < 0.7
        return drawn | {"labels": drawn["labels"].where(keep, -100)}

    def once(budget, limit=None, fails=None):
        model = net()
        accumulator = gradaccum.Accumulator(
            model, gradaccum.causal_lm(), budget=budget, collate=collate
        )
        accumulator.limit = limit
        torch.manual_seed(1)
        window = accumulator.prepare(EXAMPLES)  # RNG is that before preparing, not before backward
        with fails or Fails():
            step = accumulator.backward(window)
        return model, step, torch.rand(2).tolist(), accumulator

    same(once(WHOLE, fails=Fails(60)), once(WHOLE, limit=gradaccum.Budget(tokens=48)))


def test_windows_that_were_prepared_ahead_draw_on_from_where_the_last_one_ended():
    def twice(budget, limit=None, fails=None):
        model = net()
        accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=budget)
        accumulator.limit = limit
        torch.manual_seed(1)
        windows = [accumulator.prepare(EXAMPLES) for _ in range(2)]
        accumulator.backward(windows[0])
        if fails is None:
            accumulator.limit = gradaccum.Budget(tokens=48)
            windows[1] = accumulator.prepare(EXAMPLES)
        model.zero_grad()
        with fails or Fails():
            step = accumulator.backward(windows[1])
        return model, step, torch.rand(2).tolist(), accumulator

    short = twice(WHOLE, fails=Fails(60))
    assert len(short[1].recoveries) == 1
    same(short, twice(WHOLE))


def test_a_budget_of_examples_shrinks_in_examples():
    _, step, _, accumulator = ran(gradaccum.Budget(examples=8), fails=Fails(60))
    assert accumulator.limit == gradaccum.Budget(examples=4)
    assert "micro-batches of up to 4 examples" in str(step.recoveries[0])
