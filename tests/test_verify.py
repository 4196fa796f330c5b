"""`verify`: what is wrong is named, what is right raises no alarm, and nothing is disturbed."""

import copy
import json
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradaccum
from gradaccum import measures
from gradaccum.audit import default_splits
from gradaccum.errors import BadInput
from gradaccum.objective import Objective
from gradaccum.testing import assert_exact
from gradaccum.verify import verify
from tests import models, traps

DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def test_gradients_are_taken_and_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    unused = nn.Parameter(torch.ones(2))
    net.register_parameter("unused", unused)
    x = torch.randn(4, 2)
    found = measures.gradients(net, lambda: net(x).sum().backward())
    assert all(p.grad is None for p in net.parameters()) and net[1].num_batches_tracked == 0
    again = measures.gradients(net, lambda: (2 * net(x).sum()).backward())
    assert all(g.dtype == torch.float64 for g in found) and not found[0].any()
    assert measures.relative_error(again, found) == pytest.approx(1.0, rel=1e-5)
    assert measures.relative_error(found, found) == 0.0
    zeros = [torch.zeros_like(g) for g in found]
    assert measures.relative_error(zeros, zeros) == 0.0
    assert measures.relative_error(found, zeros) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_rounding_that_is_foreseen_is_that_which_occurs(dtype):
    net = nn.Linear(200, 200, dtype=dtype)
    g = [torch.randn(p.shape, dtype=torch.float64) for p in net.parameters()]
    one, other = ([(t * f).to(dtype).double() / f for t in g] for f in (1.0, 1.37))
    foreseen = measures.rounding(net, g)
    assert foreseen == pytest.approx(measures.relative_error(one, other), rel=0.1)
    assert measures.rounding(net.double(), g, dtype) == foreseen
    assert measures.rounding(net, [torch.zeros_like(t) for t in g]) == 0.0


@pytest.mark.parametrize("trap", traps.TRAPS, ids=str)
def test_every_trap_is_named(trap):
    case = trap.make()
    verdict = verify(case.loop, case.model, case.batch, **case.options)
    assert not verdict.exact
    assert verdict.names[0] == trap.expected, str(verdict)
    assert trap.expected in str(verdict) and "remedy: " in str(verdict)
    read = json.loads(verdict.to_json())
    assert read["exact"] is False and read["diagnoses"][0]["name"] == trap.expected


class Correct:
    """A correct loop on a random architecture and random ragged data, in one of four precisions."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.kind = ("float64", "float32", "autocast", "bfloat16")[seed % 4]
        self.dtype = DTYPES.get(self.kind, torch.float32)
        num = self.draw(2, 14)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model, self.batch, self.collate = (
                self.tokens(num, seed) if self.draw(0, 2) else self.classes(num)
            )

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self.generator))

    def tokens(self, num: int, seed: int):
        lengths = [self.draw(2, 40) for _ in range(num)]
        batch = models.examples(lengths, seed, masked=lambda length: self.draw(0, length - 1))
        net = models.CausalLM(width=8 * self.draw(1, 9), dtype=self.dtype)
        return net, batch, models.collated

    def classes(self, num: int):
        width = self.draw(2, 40)
        layers: list[nn.Module] = [nn.Linear(6, width)]
        for _ in range(self.draw(1, 5)):
            layers += [(nn.GELU, nn.Tanh, nn.ReLU, nn.SiLU)[self.draw(0, 4)]()]
            layers += [nn.Linear(width, width)] + [nn.LayerNorm(width)] * self.draw(0, 2)
        net = nn.Sequential(*layers, nn.Linear(width, 3)).to(self.dtype)
        x = torch.randn(num, 6, generator=self.generator) * 10.0 ** self.draw(-2, 3)
        return net, (x.to(self.dtype), torch.randint(0, 3, (num,), generator=self.generator)), None

    def loss_and_weight(self, micro):
        if isinstance(micro, dict):
            loss, weight = models.oracle_loss(self.model, micro)
            return loss["loss"], weight["loss"]
        logits = self.model(micro[0])
        logits = logits if logits.dtype is torch.float64 else logits.float()
        return F.cross_entropy(logits, micro[1], reduction="sum"), len(micro[1])

    def loop(self, model, micros):
        with torch.no_grad():
            total = sum(self.loss_and_weight(micro)[1] for micro in micros)
        parameters = [p for p in model.parameters() if p.requires_grad]
        low = self.dtype is torch.bfloat16
        for p in parameters:
            p.grad_dtype = torch.float32 if low else p.dtype
        for micro in micros:
            with torch.autocast("cpu", enabled=self.kind == "autocast"):
                loss = self.loss_and_weight(micro)[0]
            (loss / total).backward()
        for p in parameters:
            grad, p.grad, p.grad_dtype = p.grad, None, p.dtype
            p.grad = None if grad is None else grad.to(p.dtype)


@pytest.mark.parametrize("seed", range(60))
def test_a_correct_loop_raises_no_alarm(seed):
    case = Correct(seed)
    verdict = assert_exact(case.loop, case.model, case.batch, collate=case.collate)
    assert verdict.names == () and ["cannot be seen" in note for note in verdict.notes] == [True]
    assert verdict.num_passes <= 2 + len(default_splits(verdict.num_examples))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float64, 1 + 1e-13), (torch.float32, 1 + 1e-5)]
)
def test_a_factor_near_one_is_seen(dtype, factor):
    def loop(model, micros):
        total = traps.count(micros)
        for micro in micros:
            loss = models.oracle_loss(model, micro)[0]["loss"] / total
            (loss * (factor if len(micros) > 1 else 1)).backward()

    net = models.model(dtype=dtype)
    verdict = verify(loop, net, traps.EXAMPLES, collate=models.collated)
    assert not verdict.exact
    for comparison in verdict.comparisons:
        assert comparison.signed_residual == pytest.approx(factor - 1, rel=0.2)


def test_the_same_task_through_our_accumulator_is_exact():
    net = models.model()
    for budget in (gradaccum.Budget(tokens=30), gradaccum.Budget(examples=3)):
        accumulator = gradaccum.Accumulator(
            net, gradaccum.causal_lm(), budget=budget, collate=models.collated
        )
        verdict = assert_exact(accumulator, batch=traps.EXAMPLES, objective=gradaccum.causal_lm())
        assert accumulator.budget == budget and verdict.floor < 1e-14
        assert_exact(accumulator, batch=models.collated(traps.EXAMPLES))


def test_our_accumulator_is_exact_in_bfloat16_where_a_loop_is_not():
    net = models.model(dtype=torch.bfloat16)
    accumulator = gradaccum.Accumulator(
        net, gradaccum.causal_lm(), budget=gradaccum.Budget(examples=1), collate=models.collated
    )
    assert_exact(accumulator, batch=traps.EXAMPLES)


def test_everything_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))
    net[3].eval(), net[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    x, y = torch.randn(6, 4), torch.randn(6, 1)

    def loop(model, micros):
        model.train()
        optimizer.zero_grad()
        for x, y in micros:
            ((model(x) - y).square().sum() / 6 + random.random() + numpy.random.rand()).backward()
            with torch.no_grad():
                model[0].weight.mul_(0.9)
        optimizer.step()
        scheduler.step()

    loop(net, [(x, y)])
    net[3].eval()
    optimizer.zero_grad()
    net(x).sum().backward()
    grads = [p.grad for p in net.parameters()]
    before = _everything(net, optimizer, scheduler)
    verdict = verify(loop, net, (x, y), splits=[(4, 2)])
    assert "weights changed inside the window" in verdict.names
    assert "dropout was switched off to compare (2)" in verdict.notes[0]
    assert all(a is b for a, b in zip((p.grad for p in net.parameters()), grads, strict=True))
    _assert_same(_everything(net, optimizer, scheduler), before)


def _everything(net, optimizer, scheduler):
    return copy.deepcopy(
        {
            "state": net.state_dict(),
            "grads": [p.grad for p in net.parameters()],
            "modes": [(m.training, getattr(m, "p", 0)) for m in net.modules()],
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": numpy.random.get_state()[1].tolist(),
            "hooks": [len(m._forward_pre_hooks) for m in net.modules()],
        }
    )


def _assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            _assert_same(found[key], expected[key])
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other)
    else:
        assert found == expected


def test_a_loop_that_fails_leaves_everything_as_it_was():
    net = models.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())

    def loop(model, micros):
        traps.mean(model, micros[0]).backward()
        optimizer.step()
        raise KeyError("the loop's own")

    with pytest.raises(KeyError, match="the loop's own"):
        verify(loop, net, traps.EXAMPLES, collate=models.collated)
    _assert_same(dict(net.state_dict()), dict(before))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("calls", [1, 4])
def test_a_closure_is_looked_into(calls):
    torch.manual_seed(0)  # LBFGS stops early on some weights
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=calls)
    batch = (torch.randn(4, 3), torch.randn(4, 1))

    def loop(model, micros, scale=1.0, num_steps=1):
        called = 0

        def closure():
            nonlocal called
            called += 1
            optimizer.zero_grad()
            parts = [(model(x) - y).square().sum() / 4 for x, y in micros]
            for part in parts:
                (part * (scale if len(micros) > 1 else 1)).backward()
            return sum(parts)

        for _ in range(num_steps):
            optimizer.step(closure)
        assert called >= calls

    assert_exact(loop, net, batch)
    wrong = verify(lambda model, micros: loop(model, micros, scale=3.0), net, batch)
    assert wrong.names == ("constant factor",)
    twice = verify(lambda model, micros: loop(model, micros, num_steps=2), net, batch)
    assert twice.names[0] == "optimizer steps inside the window"


def squared(model, micros, divisor=5):
    """Leave the right gradient of five rows, or a multiple of it."""
    for x, y in micros:
        ((model(x) - y).square().sum() / divisor).backward()


def five_rows():
    return nn.Linear(3, 1), (torch.randn(5, 3), torch.randn(5, 1))


MEAN_OF_5 = Objective(lambda m, b: (m(b[0]) - b[1]).square().sum(), lambda b: len(b[1]))


def test_gradients_that_no_backward_added_up_are_compared():
    def loop(model, micros, by_hand=1):
        parameters = list(model.parameters())
        sums = [torch.zeros_like(p) for p in parameters]
        for x, y in micros:
            loss = (model(x) - y).square().sum() / 5 * (by_hand if len(micros) > 1 else 1)
            for total, grad in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += grad
        for p, total in zip(parameters, sums, strict=True):
            p.grad = total

    assert_exact(loop, *five_rows())
    wrong = verify(lambda model, micros: loop(model, micros, 2), *five_rows())
    assert wrong.names == ("constant factor",)


def test_a_clip_at_the_end_is_no_alarm_and_is_said():
    def clipped(model, micros, divisor=5, norm=1e-2):
        squared(model, micros, divisor)
        nn.utils.clip_grad_norm_(model.parameters(), norm)

    verdict = assert_exact(clipped, *five_rows(), objective=MEAN_OF_5)
    assert "rescaled by" in verdict.notes[0] and "compared is what was there" in verdict.notes[0]
    assert_exact(clipped, *five_rows())
    free = assert_exact(lambda m, b: clipped(m, b, norm=1e9), *five_rows(), objective=MEAN_OF_5)
    assert free.notes == ()

    def undivided(model, micros):
        clipped(model, micros, divisor=sum(len(y) for _, y in micros[:1]))

    hidden = verify(undivided, *five_rows(), splits=[(1, 1, 1, 1, 1)])
    assert "if that is a clip, it hides a missing division" in hidden.notes[0]
    seen = verify(undivided, *five_rows(), splits=[(1, 1, 1, 1, 1)], objective=MEAN_OF_5)
    assert seen.names == ("missing division",)


def test_a_division_after_the_last_backward_is_part_of_the_gradient():
    def loop(model, micros, divisor=5):
        squared(model, micros, divisor=1)
        for p in model.parameters():
            p.grad /= divisor

    assert assert_exact(loop, *five_rows(), objective=MEAN_OF_5).notes == ()
    assert "cannot be seen" in assert_exact(loop, *five_rows()).notes[0]
    wrong = verify(lambda m, b: loop(m, b, 10), *five_rows(), objective=MEAN_OF_5)
    assert wrong.names == ("constant factor",) and "steps of 2?" in str(wrong)
    assert "rescaled by 0.1" in wrong.notes[0]


@pytest.mark.parametrize(("factor", "guess"), [(4, True), (21498.18, False), (4.002, False)])
def test_a_number_of_steps_is_guessed_where_it_is_whole_and_not_large(factor, guess):
    wrong = verify(
        lambda m, b: squared(m, b, divisor=5 * factor), *five_rows(), objective=MEAN_OF_5
    )
    assert wrong.names == ("constant factor",) and ("a world size" in str(wrong)) is guess


def test_a_fixed_divisor_and_none_look_alike_against_the_own_full_batch():
    def fixed(model, micros):
        for x, y in micros:
            ((model(x) - y).square().mean() / 4).backward()

    own = verify(fixed, *five_rows())
    assert own.names == ("missing division",) and "a fixed divisor or none at all" in str(own)
    assert "pass objective= to see it" in own.notes[-1]
    seen = verify(fixed, *five_rows(), objective=MEAN_OF_5)
    assert seen.names == ("configured steps",) and seen.notes == ()


def test_what_is_left_out_is_shown():
    case = traps.backward_of_the_last_loss_only()
    assert "only the last micro-batch counts: [7 x 0, 0.125] where" in str(
        verify(case.loop, case.model, case.batch, **case.options)
    )
    case = traps.short_micro_batch_dropped()
    assert "of 2 micro-batches, 1 counts nothing (number 2): [1, 0] where" in str(
        verify(case.loop, case.model, case.batch, **case.options)
    )


def test_a_weight_that_is_no_function_is_refused():
    with pytest.raises(BadInput, match=r"function, and this is 'rows'\n\nhint: from_mean"):
        Objective(MEAN_OF_5.loss, weight="rows")


def failing(rows, wide_fails=False):
    """Return a summed loss that runs out of memory above so many rows, or in float64."""

    def summed(model, micro):
        if len(micro["x"]) > rows or (wide_fails and micro["x"].dtype is torch.float64):
            raise torch.OutOfMemoryError("too many rows")
        return (model(micro["x"]) - micro["y"]).square().sum()

    return Objective(summed, lambda micro: len(micro["y"]))


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if x.dtype is torch.float64 else 1)


def batch_of_8(dtype=torch.float32):
    return {"x": torch.randn(8, 3, dtype=dtype), "y": torch.randn(8, 1, dtype=dtype)}


def loop_of(objective, divisor=8):
    def loop(model, micros):
        for micro in micros:
            (objective.loss(model, micro) / divisor).backward()

    return loop


SPLITS = [(2, 2, 2, 2), (3, 3, 2)]


@pytest.mark.parametrize(
    ("net", "wide_fails", "precision"),
    [
        (nn.Linear(3, 1), False, "in float64"),
        (nn.Linear(3, 1), True, "in the model's own precision"),
        (Doubling(3, 1), False, "in the model's own precision"),
    ],
    ids=["fits", "float64 does not fit", "another function in float64"],
)
def test_a_batch_that_does_not_fit_is_run_by_our_engine_one_by_one(net, wide_fails, precision):
    objective, batch = failing(3, wide_fails), batch_of_8()
    with pytest.raises(BadInput, match=r"8 examples does not fit.*\n\nhint: pass objective="):
        verify(loop_of(objective), net, batch, splits=SPLITS)
    before = copy.deepcopy(net.state_dict())
    verdict = assert_exact(loop_of(objective), net, batch, splits=SPLITS, objective=objective)
    assert f"one example at a time {precision}, as the full batch does not" in verdict.reference
    assert verdict.tolerance < 1e-5
    _assert_same(dict(net.state_dict()), dict(before))
    assert all(p.grad is None for p in net.parameters())
    wrong = verify(loop_of(objective, 2), net, batch, splits=SPLITS, objective=objective)
    assert wrong.names == ("constant factor",)
    assert "4.00 times too large" in str(wrong)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accumulator_whose_full_batch_does_not_fit_needs_no_objective(listed, dtype):
    net = nn.Linear(3, 1, dtype=dtype)
    accumulator = gradaccum.Accumulator(net, failing(3), budget=gradaccum.Budget(examples=2))
    batch = batch_of_8(dtype)
    if listed:
        batch = [{"x": x, "y": y} for x, y in zip(batch["x"], batch["y"], strict=True)]
    assert "in float64" in assert_exact(accumulator, batch=batch, splits=SPLITS).reference


def test_an_example_that_does_not_fit_is_said():
    objective = failing(0)
    with pytest.raises(BadInput, match="of 8 examples, not even one at a time fits into memory"):
        verify(loop_of(objective), nn.Linear(3, 1), batch_of_8(), objective=objective)


def test_two_optimizers_that_step_once_each_are_no_alarm():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in net]

    def loop(model, micros):
        for x, y in micros:
            ((model(x) - y).square().sum() / 5).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    assert_exact(loop, net, (torch.randn(5, 3), torch.randn(5, 1)))


def test_parameters_that_only_some_micro_batches_use_are_no_alarm():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))

        def forward(self, x):
            return torch.cat([self.experts[int(row[0] > 0)](row[None]) for row in x])

    def loop(model, micros):
        for x, y in micros:
            ((model(x) - y).square().sum() / 5).backward()

    assert_exact(loop, Routed(), (torch.randn(5, 3), torch.randn(5, 1)))


def test_hooks_of_the_user_and_gradients_that_are_not_added_up_are_no_alarm():
    net = nn.Linear(3, 1)
    net.weight.register_hook(lambda grad: 2 * grad)

    def loop(model, micros):
        for x, y in micros:
            loss = (model(x) - y).square().sum() / 5
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            loss.backward()

    assert_exact(loop, net, (torch.randn(5, 3), torch.randn(5, 1)))


def test_a_sparse_gradient_is_compared_too():
    net = nn.Embedding(9, 4, sparse=True)

    def loop(model, micros, scale=1):
        for ids in micros:
            (model(ids["input_ids"]).square().sum() / (scale if len(micros) > 1 else 1)).backward()

    batch = {"input_ids": torch.randint(0, 9, (5, 4))}
    assert_exact(loop, net, batch)
    assert verify(lambda m, b: loop(m, b, 2), net, batch).names == ("constant factor",)


def test_wrong_arguments_are_refused():
    net = nn.Linear(3, 1)
    batch = (torch.randn(4, 3), torch.randn(4, 1))

    def loop(model, micros):
        for x, y in micros:
            (model(x) - y).square().mean().backward()

    for arguments, message in (
        ((loop,), "needs a model and a batch"),
        ((3, net, batch), "takes a loop or a Trainer, not int"),
        ((lambda model, micros: None, net, batch), "left no gradient"),
        ((lambda model, micros: (0 * model(micros[0][0]).sum()).backward(), net, batch), "is zero"),
        ((loop, copy.deepcopy(net).requires_grad_(False), batch), "no parameter that requires"),
    ):
        with pytest.raises(BadInput, match=message):
            verify(*arguments)
    for split in ((2, 1), (4, 0), (2.0, 2.0)):
        with pytest.raises(BadInput, match=r"does not cut 4 examples"):
            verify(loop, net, batch, splits=[split])
    with pytest.raises(BadInput, match="1 example is no split"):
        verify(loop, net, (batch[0][:1], batch[1][:1]))


def test_the_assertion_says_what_the_verdict_says():
    case = traps.mean_of_means()
    with pytest.raises(AssertionError, match="mean of means: the weights of 2 micro-batches"):
        assert_exact(case.loop, case.model, case.batch, **case.options)
