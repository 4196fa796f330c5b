"""A loop of accelerate against one pass over the whole batch, and its own `accumulate()`."""

import copy

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import gradaccum
from gradaccum.errors import BadInput
from gradaccum.integrations.accelerate import backward_of
from tests import models, oracle

LENGTHS = [3, 30, 4, 17, 5, 2, 26, 9, 11, 3, 22, 6, 8, 2, 14, 31]
BUDGET = gradaccum.Budget(tokens=60)


@pytest.fixture(autouse=True)
def alone():
    """Forget what an earlier Accelerator of this process has set for all later ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class WithLoss(nn.Module):
    """A model that returns its loss, a mean over trained tokens, as those of transformers do."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net = models.model(**kwargs)

    def forward(self, **batch):
        loss, weight = models.oracle_loss(self.net, batch)
        return loss["loss"] / weight["loss"]


def loss(model, micro):
    return model(**micro)


def whole(model, batch):
    terms, weight = models.oracle_loss(model.net, batch)
    grads = oracle.gradients(model.net, terms, weight)
    return {f"net.{name}": grad for name, grad in grads.items()}


def accumulated(accelerator, model, batch, **kwargs):
    objective = gradaccum.from_mean(loss, weight="shifted_tokens")
    step = gradaccum.Accumulator(
        model, objective, budget=BUDGET, backward=backward_of(accelerator), **kwargs
    ).backward(batch)
    assert step.num_micros > 3
    return oracle.left_in(model)


@pytest.mark.parametrize("is_prepared", [True, False])
def test_the_gradient_of_one_pass(is_prepared):
    batches = torch.utils.data.DataLoader(
        models.examples(LENGTHS), batch_size=16, collate_fn=models.collated
    )
    accelerator, model = Accelerator(cpu=True), WithLoss()
    expected = whole(model, next(iter(batches)))
    model = accelerator.prepare(model)
    loader = accelerator.prepare(batches) if is_prepared else batches
    found = accumulated(accelerator, model, next(iter(loader)))
    assert oracle.error(found, expected) <= 1e-12


def test_accumulate_is_not_that_gradient():
    """Means of means; and the short last window is divided by the full number of steps."""
    batch = models.examples(LENGTHS)
    for size in (16, 12):
        accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=8), WithLoss()
        expected = whole(model, models.collated(batch[:size]))
        loader = torch.utils.data.DataLoader(batch[:size], 2, collate_fn=models.collated)
        model, loader = accelerator.prepare(model, loader)
        for micro in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**micro))
        assert accelerator.sync_gradients
        found = oracle.left_in(model)
        assert oracle.error(found, expected) > 0.05
    assert oracle.signed_residual(found, expected) < -0.2  # 6 of 8


def train(net, batches, run):
    """A user's loop: clipping, a scheduler, momentum; `run` leaves gradients."""
    accelerator, model = Accelerator(cpu=True), WithLoss()
    model.load_state_dict(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    norms = []
    for batch in batches:
        run(accelerator, model, batch)
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return norms, scheduler.get_last_lr(), {n: p.detach() for n, p in model.named_parameters()}


def test_a_loop_with_clipping_and_a_scheduler():
    data = models.examples(LENGTHS * 5)
    batches = [models.collated(data[i : i + 16]) for i in range(0, len(data), 16)]
    net = WithLoss().state_dict()
    full = train(net, batches, lambda accelerator, model, b: accelerator.backward(model(**b)))
    ours = train(net, batches, accumulated)
    assert ours[0] == pytest.approx(full[0], rel=1e-12) and ours[1] == full[1]
    assert oracle.error(ours[2], full[2]) <= 1e-12


def test_the_scaler_scales_each_micro_batch_and_unscales_once():
    batch = models.collated(models.examples(LENGTHS))
    accelerator, model = Accelerator(cpu=True), WithLoss()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as with fp16 on a GPU
    expected = whole(model, batch)
    before = copy.deepcopy(dict(model.named_parameters()))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    found = accumulated(accelerator, model, batch)
    scaled = {n: None if g is None else 1024 * g for n, g in expected.items()}
    assert oracle.error(found, scaled) <= 1e-12
    optimizer.step()
    moved = {n: before[n] - p for n, p in model.named_parameters() if expected.get(n) is not None}
    assert oracle.error(moved, {n: expected[n] for n in moved}) <= 1e-6  # it unscales in float32


def test_mixed_precision_is_off_by_rounding_alone():
    data = models.examples(LENGTHS)

    def gradient(examples, run):
        accelerator, model = Accelerator(cpu=True, mixed_precision="bf16"), WithLoss()
        model = accelerator.prepare(model.float())
        run(accelerator, model, models.collated(examples))
        return oracle.left_in(model)

    def one_pass(accelerator, model, batch):
        accelerator.backward(model(**batch))

    expected = gradient(data, one_pass)
    floor = oracle.error(gradient(data[::-1], one_pass), expected)
    exact = whole(WithLoss().float(), models.collated(data))
    rounding = oracle.error(expected, exact)
    found = gradient(data, accumulated)
    assert 0 < floor < rounding < 0.05
    assert oracle.error(found, expected) <= 2 * rounding  # both are off by that
    assert oracle.error(found, exact) <= 1.2 * rounding
    assert abs(oracle.signed_residual(found, expected)) <= rounding


def test_division_is_refused_when_it_begins_and_when_it_is_set_later():
    with pytest.raises(BadInput, match="divides each loss by 4"):
        backward_of(Accelerator(cpu=True, gradient_accumulation_steps=4))
    accelerator, model = Accelerator(cpu=True), WithLoss()
    backward = backward_of(accelerator)
    accelerator.gradient_accumulation_steps = 2
    with pytest.raises(BadInput, match="divides each loss by 2"):
        backward(model(**models.collated(models.examples([5, 9]))))


def test_several_processes_are_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(BadInput, match="DEEPSPEED on 1"):
        backward_of(accelerator)
