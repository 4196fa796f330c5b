"""The noise scale: unbiased by enumeration, right where it is known, honest about its error."""

import copy
import itertools
import math
import random
from statistics import fmean, stdev

import pytest
import torch
from torch import nn

import gradaccum
from gradaccum.engine import Accumulator
from gradaccum.errors import BadInput
from gradaccum.noise import Noise, NoiseScale, advise
from gradaccum.noise.scale import fieller, quantile
from gradaccum.objective import Objective
from gradaccum.parts import drawn, unpaired
from gradaccum.types import Budget
from tests import oracle
from tests.models import collated, examples, model, oracle_loss
from tests.quadratics import PROBLEMS, accumulator


@pytest.mark.parametrize("num", [1, 2, 3, 5, 6])
def test_the_mean_over_all_draws_is_the_sum_of_squares(num):
    gradients = torch.randn(num, 3, dtype=torch.float64) + 0.5
    ends = list(itertools.accumulate(len(part) for part in drawn(num, 0)))
    found = [
        unpaired(
            torch.stack([gradients[list(order[:n])].sum(0).square().sum() for n in ends]), ends
        )
        for order in itertools.permutations(range(num))
    ]
    assert float(torch.stack(found).mean()) == pytest.approx(float(gradients.square().sum()))


@pytest.mark.parametrize("num", [0, 1, 2, 7, 8, 33, 1000])
def test_parts_hold_each_example_once_and_others_are_drawn_for_other_numbers(num):
    one, other = drawn(num, 1), drawn(num, 2)
    assert sorted(i for part in one for i in part) == list(range(num)) and all(one)
    assert one == drawn(num, 1)
    assert num < 3 or one != other


def per_example(net, batch):
    """Return what each example adds to the gradient of the batch, and its weight."""
    _, total = oracle_loss(net, collated(batch))
    gradients, weights = [], []
    for example in batch:
        loss, weight = oracle_loss(net, collated([example]))
        gradients.append(oracle.gradients(net, loss, total))
        weights.append(weight["loss"] / total["loss"])
    return gradients, weights


def square(gradients):
    return sum(float(g.double().square().sum()) for g in gradients.values() if g is not None)


def test_a_step_in_parts_leaves_the_same_gradient_and_measures_the_examples():
    net, batch = model(0), examples([3, 9, 14, 2, 7, 7, 11, 5, 20, 4], 1, masked=lambda n: n // 3)
    engine = Accumulator(net, gradaccum.causal_lm(), budget=Budget(tokens=24))
    expected = oracle.gradients(net, *oracle_loss(net, collated(batch)))
    each, weights = per_example(net, batch)
    squares = []
    for draw in range(300):
        net.zero_grad()
        engine.parts = (draw,)
        step = engine.backward(batch)
        assert oracle.error(oracle.left_in(net), expected) <= 1e-12
        squares.append(step.squares)
    assert squares[0].gradient == pytest.approx(square(expected), rel=1e-12)
    for found, truth in (
        ([s.examples for s in squares], sum(map(square, each))),
        ([s.weights for s in squares], sum(w * w for w in weights)),
    ):
        error = stdev(found) / math.sqrt(len(found))
        assert abs(fmean(found) - truth) < 4 * error < 0.5 * truth
    engine.parts = None
    net.zero_grad()
    assert engine.backward(batch).squares is None


def test_weights_that_a_loss_reports_and_several_terms_are_measured_too():
    net, batch = nn.Linear(3, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    rows = [{"x": row} for row in batch]

    def squared(net, micro):
        return net(micro["x"]).square().sum()

    def reported(net, micro):
        return squared(net, micro), 3.0 * len(micro["x"])

    def terms(net, micro):
        return {"a": squared(net, micro), "b": net(micro["x"]).sum()}

    for loss, weight in (
        (squared, lambda micro: 3.0 * len(micro["x"])),
        (reported, None),
        (terms, lambda micro: {"a": float(len(micro["x"])), "b": 1.0}),
    ):
        engine, found = Accumulator(net, Objective(loss, weight), budget=Budget(examples=1)), {}
        for draw in range(20):
            net.zero_grad()
            engine.parts = (draw,)
            step = engine.backward(rows)
            found[step.micros[0].examples] = step.squares
        assert len(found) == 2  # both draws that there are, so that nothing is left to chance
        gradients = []
        for row in rows:
            lone = {"x": row["x"][None]}
            value = loss(net, lone)
            if isinstance(value, dict):
                value = value["a"] / 2 + value["b"] / 2
            else:
                value = (value[0] if isinstance(value, tuple) else value) / 6
            gradients.append(torch.autograd.grad(value, [*net.parameters()]))
        squares = [float(sum(g.square().sum() for g in grads)) for grads in gradients]
        whole = float(sum(sum(g).square().sum() for g in zip(*gradients, strict=True)))
        assert all(s.gradient == pytest.approx(whole, rel=1e-12) for s in found.values())
        assert fmean(s.examples for s in found.values()) == pytest.approx(sum(squares), rel=1e-12)
        assert fmean(s.weights for s in found.values()) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_it_is_that_of_the_closed_form(problem):
    """Once, within its error; the benchmark counts how often it is."""
    engine, generator = accumulator(problem), torch.Generator().manual_seed(1)
    noise = NoiseScale(engine, every=1, decay=1.0)
    means, truths = [], (problem.distance**2, problem.scale * problem.distance**2)
    for _ in range(150):
        step = engine.backward(problem.batch(32, generator))
        engine.model.zero_grad()
        noise.update(step)
        found = step.squares
        mean = (found.gradient - found.examples) / (1 - problem.uneven / 32)
        means.append((mean, 32 * found.examples - problem.uneven * mean))
    for values, truth in zip(zip(*means, strict=True), truths, strict=True):
        assert abs(fmean(values) - truth) < 4 * stdev(values) / math.sqrt(150) < 1.5 * truth
    found = noise.estimate
    assert found.num_steps == 150
    assert found.low <= problem.scale <= found.high
    assert found.high - found.low < 1.2 * problem.scale


def test_the_old_way_by_counts_would_be_wrong_where_examples_are_ragged():
    """The mean of micro-batch gradients by count, as if micro-batches were drawn at random."""
    problem = PROBLEMS[2]
    engine, generator = accumulator(problem), torch.Generator().manual_seed(2)
    sums, small, large = [], 0.0, 0.0
    engine._after_micro = lambda _: sums.append(engine.model.p.grad.clone())
    for _ in range(60):
        sums.clear()
        step = engine.backward(problem.batch(32, generator))
        shares = torch.stack(sums).diff(dim=0, prepend=torch.zeros(1, problem.dim))
        fractions = [len(micro.examples) / 32 for micro in step.micros]
        means = [share / f for share, f in zip(shares, fractions, strict=True)]
        small += fmean(float(mean.square().sum()) for mean in means) / 60
        large += float(sums[-1].square().sum()) / 60
        num = 32 / len(means)
        engine.model.zero_grad()
    variance = (small - large) / (1 / num - 1 / 32)
    by_counts = variance / ((32 * large - num * small) / (32 - num))
    assert not 0.8 * problem.scale < by_counts < 1.25 * problem.scale


def run(noise, engine, problem, num, generator):
    for _ in range(num):
        step = engine.backward(problem.batch(16, generator))
        engine.model.zero_grad()
        noise.update(step)


def test_a_resumed_estimate_is_that_of_the_uninterrupted_run():
    problem, generator = PROBLEMS[1], torch.Generator().manual_seed(3)
    engine = accumulator(problem)
    noise = NoiseScale(engine, every=3)
    run(noise, engine, problem, 17, generator)
    state, at = copy.deepcopy(noise.state_dict()), generator.get_state()
    run(noise, engine, problem, 23, generator)
    again = accumulator(problem)
    resumed = NoiseScale(again, every=3)
    resumed.load_state_dict(state)
    generator.set_state(at)
    run(resumed, again, problem, 23, generator)
    assert resumed.estimate == noise.estimate and noise.estimate.num_steps == 13


def test_nothing_is_said_before_five_steps_and_steps_that_are_not_finite_do_not_count():
    problem, generator = PROBLEMS[0], torch.Generator().manual_seed(3)
    engine = accumulator(problem)
    noise = NoiseScale(engine, every=1)
    run(noise, engine, problem, 4, generator)
    assert noise.estimate is None
    broken = problem.batch(16, generator)
    broken[3]["x"][:] = math.inf
    noise.update(engine.backward(broken))
    engine.model.zero_grad()
    with pytest.warns(UserWarning, match="not finite"):
        run(noise, engine, problem, 1, generator)
    assert noise.estimate.num_steps == 5


def test_a_step_that_ran_out_of_memory_is_measured_by_the_same_draw():
    problem, generator = PROBLEMS[1], torch.Generator().manual_seed(4)
    batch = problem.batch(16, generator)
    engine, calls = accumulator(problem), []

    def run_out(loss):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("injected")
        loss.backward()

    engine.parts = (7,)
    engine._backward = run_out
    step = engine.backward(batch)
    assert len(step.recoveries) == 1
    plain = accumulator(problem)
    plain.parts = (7,)
    assert step.squares == pytest.approx(plain.backward(batch).squares, rel=1e-12)


def test_gradients_of_16_bits_are_measured_in_the_sums():
    net = nn.Linear(64, 64, bias=False)
    rows = [{"x": x} for x in torch.randn(16, 64)]
    objective = Objective(
        lambda net, micro: net(micro["x"].to(net.weight.dtype)).float().square().sum(),
        lambda micro: float(len(micro["x"])),
    )
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = Accumulator(copy.deepcopy(net).to(dtype), objective, budget=Budget(examples=2))
        engine.parts = (1,)
        found[dtype] = engine.backward(rows).squares
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=2e-2)


def test_sparse_gradients_are_measured():
    def squares(*, sparse):
        torch.manual_seed(0)
        net = nn.Embedding(10, 4, sparse=sparse)
        objective = Objective(
            lambda net, micro: net(micro["ids"]).square().sum(), lambda micro: len(micro["ids"])
        )
        engine = Accumulator(net, objective, budget=Budget(examples=1))
        engine.parts = (1,)
        return engine.backward([{"ids": torch.tensor(i)} for i in (1, 1, 4, 7)]).squares

    assert squares(sparse=True) == pytest.approx(squares(sparse=False))


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.776), (10, 2.228), (1e9, 1.960)])
def test_quantiles_are_those_of_students_table(freedom, expected):
    assert quantile(0.95, freedom) == pytest.approx(expected, rel=5e-3)


def test_the_interval_holds_the_ratios_that_the_means_do_not_refute():
    rng = random.Random(0)
    for _ in range(200):
        x, y = rng.uniform(-0.5, 2), rng.uniform(0.5, 3)
        of_x, of_y = rng.uniform(0.01, 0.5), rng.uniform(0.01, 0.3)
        of_xy = rng.uniform(-0.9, 0.9) * math.sqrt(of_x * of_y)
        low, high = fieller(x, y, of_x, of_xy, of_y, 2.0)
        assert 0 <= low <= high
        for ratio in [rng.uniform(0, 20) for _ in range(50)]:
            variance = of_y - 2 * ratio * of_xy + ratio**2 * of_x
            is_held = (y - ratio * x) ** 2 <= 4 * variance
            # Without an upper end, the lower one is that of the ratios above 0.
            if is_held:
                assert low - 1e-9 <= ratio <= high + 1e-9 or math.isinf(high)
            elif low < ratio < high:
                assert math.isinf(high)


def test_wrong_arguments_are_refused():
    engine = accumulator(PROBLEMS[0])
    for wrong in ({"every": 0}, {"every": 2.5}, {"decay": 0.0}, {"decay": 1.1}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            NoiseScale(engine, **wrong)


def test_the_advice_says_what_the_noise_scale_says():
    clear = Noise(900.0, 700.0, 1100.0, 1.0, 900.0, 40)
    advice = advise(clear, 32, learning_rate=1e-3, beta2=0.999)
    assert "noise scale about 900 examples (700 to 1,100)" in advice.summary
    assert "cut the steps by about 1.9 (1.92 to 1.95)" in advice.summary
    assert "beyond about 900 more accumulation buys little" in advice.summary
    half, double = advice.settings
    assert (half.effective_batch_size, double.effective_batch_size) == (16, 64)
    assert double.num_steps == pytest.approx((1 + 900 / 64) / (1 + 900 / 32))
    assert double.num_examples == pytest.approx(double.num_steps * 2)
    assert half.beta2 == pytest.approx(0.999**0.5) and double.beta2 == pytest.approx(0.999**2)
    assert double.learning_rate == pytest.approx(1e-3 * math.sqrt(2))
    assert "2505.23971" in str(advice) and "2507.07101" in str(advice)
    above = advise(Noise(10.0, 7.0, 14.0, 1.0, 10.0, 40), 32).summary
    assert "the batch is above it" in above and "0.62 times the examples" in above
    unknown = Noise(None, 300.0, math.inf, -1.0, 900.0, 40)
    assert "above 300 examples" in advise(unknown, 32).summary
    assert "noise scale not known: too few steps" in advise(None, 32).summary
    assert (
        "not known after 5 measured steps: their differences drown it"
        in advise(Noise(None, 0.0, math.inf, -1.0, 9.0, 5), 32).summary
    )
