"""Models that torch.compile has been at: the same gradient, and few graphs."""

import random

import pytest
import torch

import gradaccum
from gradaccum import Budget
from tests import oracle
from tests.hf_models import llama
from tests.trainers import build, same

ROWS = ([9, 3, 17, 30, 5, 22], [12, 12, 1, 33, 8], [40, 2, 6, 6, 21, 10, 4], [31, 2])


@pytest.fixture
def compiler():
    """A backend of torch.compile that lists what it is given."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backend.graphs = graphs
    yield backend
    torch._dynamo.reset()


def examples(lengths, seed=0):
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 60) for _ in range(n + 1)] for n in lengths]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]


def truth(net, rows):
    """The gradient of one row after the other, in float64."""
    net = llama().double()
    count = sum(len(row["input_ids"]) - 1 for row in rows)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = net(input_ids=ids).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / count).backward()
    return oracle.left_in(net)


@pytest.mark.parametrize(
    ("dynamic", "is_in_place"), [(None, False), (False, False), (True, False), (None, True)]
)
def test_all_shapes_are_two_graphs(compiler, dynamic, is_in_place):
    net = llama()
    if is_in_place:
        net.compile(backend=compiler, dynamic=dynamic)
        model = net
    else:
        model = torch.compile(net, backend=compiler, dynamic=dynamic)
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=Budget(tokens=64))
    told, shapes = [], set()
    for seed, lengths in enumerate(ROWS):
        rows = examples(lengths, seed)
        step = accumulator.backward(rows)
        told.append(step.num_graphs)
        shapes |= {(len(m.examples), m.size) for m in step.micros}
        assert oracle.error(oracle.left_in(net), truth(net, rows)) <= 1e-6
        net.zero_grad()
    # One row is another graph than several; nothing is compiled once both have run.
    assert len(compiler.graphs) == sum(told) == 2 and sum(told[1:]) == 0 and len(shapes) > 8
    assert "compiled 2 graphs" not in str(step)


def test_the_budget_is_found_by_what_runs(compiler):
    net = llama()
    model = torch.compile(net, backend=compiler)
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm())
    step = accumulator.backward(examples(ROWS[0]))
    assert accumulator.layout is None and accumulator.found.num_probes
    assert len(compiler.graphs) <= 2 and step.num_examples == 6


@pytest.mark.parametrize("kind", ["hf", "sft"])
def test_a_trainer_that_compiles(tmp_path, kind):
    torch._dynamo.reset()
    settings = {"max_steps": 5}
    big, expected = build(tmp_path, kind, per_device_train_batch_size=16, **settings)
    big.train()
    ours, found = build(
        tmp_path,
        kind,
        attach={"budget": gradaccum.Budget(tokens=70), "effective_batch_size": 16},
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **settings,
    )
    graphs = []
    take = ours.training_step

    def training_step(*args):
        loss = take(*args)
        graphs.append(ours.accumulation.last.num_graphs)
        return loss

    ours.training_step = training_step
    ours.train()
    same(ours, big, found, expected)
    assert graphs[0] > 0 and sum(graphs[2:]) == 0, graphs


def test_models_that_widen_their_logits(compiler):
    """Heads take what their weights are, whatever the model makes of what they return."""

    class Widened(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = llama().bfloat16()

        def get_output_embeddings(self):
            return self.net.lm_head

        def forward(self, **given):
            return self.net(**given).logits.float()

    rows, found = examples(ROWS[0]), []
    for compiled in (False, True):
        net = Widened()
        model = torch.compile(net, backend=compiler) if compiled else net
        accumulator = gradaccum.engine.Accumulator(
            model, gradaccum.causal_lm(), budget=Budget(tokens=64)
        )
        for _ in range(2):
            accumulator.backward(rows)
            found.append(oracle.left_in(net))
            net.zero_grad()
    assert all(oracle.error(gradient, found[0]) <= 1e-6 for gradient in found)
