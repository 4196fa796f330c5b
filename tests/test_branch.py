"""Two branches of a run: what they find is what two loops find, and nothing is left of them."""

import copy
import math

import pytest
import torch

from gradaccum.errors import BadInput
from gradaccum.noise import Branch, branch
from gradaccum.objective import Objective
from tests.quadratics import PROBLEMS, accumulator, padded

PROBLEM = PROBLEMS[2]


def started(optimizer=torch.optim.AdamW, **options):
    """Return an accumulator and an optimizer in the middle of a run, data and data held out."""
    engine, generator = accumulator(PROBLEM), torch.Generator().manual_seed(5)
    made = optimizer(engine.model.parameters(), lr=0.05, **options)
    for _ in range(3):
        engine.backward(PROBLEM.batch(8, generator))
        made.step()
        made.zero_grad()
    return engine, made, PROBLEM.batch(40, generator), PROBLEM.batch(30, generator)


def test_model_optimizer_and_random_state_are_what_they_were():
    engine, optimizer, data, held = started()
    before = copy.deepcopy((engine.model.state_dict(), optimizer.state_dict()))
    state, engine.parts = torch.get_rng_state(), (3,)
    first = branch(engine, optimizer, data, held, sizes=(4, 8))
    assert torch.equal(engine.model.p, before[0]["p"]) and engine.model.p.grad is None
    found = optimizer.state_dict()
    assert found["param_groups"] == before[1]["param_groups"]
    for name, value in before[1]["state"][0].items():
        assert torch.equal(found["state"][0][name], value)
    assert torch.equal(torch.get_rng_state(), state) and engine.parts == (3,)
    assert engine.model.training
    assert branch(engine, optimizer, data, held, sizes=(4, 8)) == first


def test_it_is_what_two_loops_find():
    """By hand: SGD at both sizes over one order, the losses of each example, their spread."""
    engine, optimizer, data, held = started(torch.optim.SGD)
    calls = []
    options = {"sizes": (4, 8), "lr": "linear", "before_step": lambda: calls.append(1)}
    found = branch(engine, optimizer, data, held, **options)
    assert found.num_steps == (10, 5) and found.num_examples == 40 and len(calls) == 15
    start, order = engine.model.p.detach().clone(), []
    engine._after_micro = None
    own = engine.backward

    def spy(batch):
        order.extend(next(i for i, row in enumerate(data) if row is given) for given in batch)
        return own(batch)

    engine.backward = spy
    branch(engine, optimizer, data, held, sizes=(4, 8), lr="linear")
    assert order[:40] == order[40:] and sorted(order[:40]) == list(range(40))
    weights = torch.tensor([float(len(row["x"])) for row in held], dtype=torch.float64)
    each = []
    for size, rate in ((4, 0.05), (8, 0.1)):
        p = start.clone()
        for i in range(0, 40, size):
            x = torch.cat([data[j]["x"] for j in order[i : i + size]])
            p = p - rate * (p - x.mean(0))
        each.append(torch.stack([((p - row["x"]) ** 2).sum() / 2 for row in held]))
    losses = [float(one.sum() / weights.sum()) for one in each]
    assert found.losses == pytest.approx(losses, rel=1e-12)
    difference = losses[1] - losses[0]
    assert found.difference == pytest.approx(difference, rel=1e-9)
    rest = each[1] - each[0] - difference * weights
    error = math.sqrt(30 / 29 * float(rest.square().sum())) / float(weights.sum())
    assert found.error == pytest.approx(error, rel=1e-9)


def test_the_error_covers_the_difference_between_other_examples_held_out():
    engine, optimizer, data, held = started()
    whole = branch(engine, optimizer, data, held, sizes=(4, 20)).difference
    within = 0
    generator = torch.Generator().manual_seed(9)
    for _ in range(20):
        found = branch(engine, optimizer, data, PROBLEM.batch(30, generator), sizes=(4, 20))
        within += abs(found.difference - whole) < 2 * math.sqrt(2) * found.error
    assert within >= 17


def test_more_orders_are_averaged_and_told_in_the_error():
    engine, optimizer, data, held = started()
    one = branch(engine, optimizer, data, held, sizes=(4, 8))
    three = branch(engine, optimizer, data, held, sizes=(4, 8), repeats=3)
    assert three.num_repeats == 3 and three.losses != one.losses
    assert three.error != one.error > 0


def test_it_says_which_is_better_or_that_it_cannot_be_told():
    told = Branch((16, 32), (40, 20), 640, (5.0, 5.1), 0.1, 0.02, 1)
    assert str(told) == (
        "from 640 examples: loss 5.0000 after 40 steps of 16, loss 5.1000 after 20 steps of 32: "
        "+0.1000 +- 0.0200, 32 is worse"
    )
    unclear = Branch((16, 32), (4, 2), 64, (5.0, 5.01), 0.01, 0.02, 1)
    assert "no difference can be told" in str(unclear)


def test_wrong_arguments_are_refused_before_anything_runs():
    engine, optimizer, data, held = started()
    engine.backward = None
    for wrong, match in (
        ({"sizes": (4,)}, "sizes"),
        ({"sizes": (4, 0)}, "sizes"),
        ({"sizes": (4, 8), "repeats": 0}, "repeats"),
        ({"sizes": (4, 64)}, "too few"),
        ({"sizes": (4, 8), "lr": "cubic"}, "lr"),
    ):
        with pytest.raises(BadInput, match=match):
            branch(engine, optimizer, data, held, **wrong)


def test_a_loss_that_reports_its_weight_is_refused_and_all_put_back():
    engine, optimizer, data, held = started()
    before = engine.model.p.detach().clone()
    own = engine.objective
    engine.objective = Objective(
        lambda model, micro: (own.loss(model, micro), own.weight(micro)), None, own.size
    )
    with pytest.raises(BadInput, match="one weight"):
        branch(engine, optimizer, data, held, sizes=(4, 8))
    assert torch.equal(engine.model.p, before) and padded
