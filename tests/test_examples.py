"""Every example runs as it stands, learns, and is short enough to read; its gradient is exact."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import gradaccum
from gradaccum.report.read import read
from tests import oracle

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
LOOPS = ("plain_loop", "vision", "speech", "graphs", "accelerate_loop", "fabric_loop")


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_at_most_80_lines(path):
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name, capsys):
    if name == "fabric_loop":
        pytest.importorskip("lightning")
    AcceleratorState._reset_state(reset_partial_state=True)  # others have set it for the process
    losses = load(name).main()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[-1] < 0.7 * losses[0]
    assert capsys.readouterr().out.count(" micro-batches") == len(losses)


def test_audit(capsys):
    assert load("audit").main() == (False, True)
    assert "missing division: gradient 8.00 times too large" in capsys.readouterr().out


def test_lightning_module(capsys):
    pytest.importorskip("lightning")
    trainer = load("lightning_module").main()
    assert trainer.global_step == 20
    steps = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[1]) for line in (steps[0], steps[-1]) if "loss" in line)
    assert last < 0.7 * first


@pytest.mark.parametrize(("name", "size"), [("qlora", 24), ("trl_sft", 32)])
def test_trainers(name, size):
    trainer = load(name).main()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.accumulation.last.num_examples == size


def in_float64(tree):
    if isinstance(tree, dict):
        return {key: in_float64(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(in_float64, tree))
    return tree.double() if tree.is_floating_point() else tree


def vision(example):
    batch = list(example.images(30).tensors)
    objective = gradaccum.from_mean(example.loss, weight=example.counted)
    parts = [[part[i : i + 6] for part in batch] for i in range(0, 30, 6)]
    return example.model(), objective, batch, batch, parts


def speech(example):
    batch = example.recordings(20)
    objective = gradaccum.from_mean(
        example.loss, weight="rows", size=lambda example: len(example["frames"])
    )
    # 8, 8 and 4 recordings: with a mean over recordings only the short last one is weighed wrong.
    parts = [example.collate(batch[i : i + 8]) for i in range(0, 20, 8)]
    return example.Recognizer(), objective, batch, example.collate(batch), parts


def graphs(example):
    batch = example.trees(20)
    objective = gradaccum.from_mean(
        example.loss, weight="tokens", size=lambda example: example["edges"].shape[1]
    )
    parts = [example.collate(batch[i : i + 4]) for i in range(0, 20, 4)]
    return example.GraphNet(), objective, batch, example.collate(batch), parts


@pytest.mark.parametrize("make", [vision, speech, graphs])
def test_other_fields_against_one_pass_and_the_mean_of_means(make):
    torch.manual_seed(0)
    example = load(make.__name__)
    net, objective, batch, whole, parts = make(example)
    net.double()

    def run(loss):
        net.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in net.named_parameters()}

    expected = run(example.loss(net, in_float64(whole)))
    means = run(sum(example.loss(net, in_float64(part)) for part in parts) / len(parts))
    net.zero_grad()
    accumulator = gradaccum.Accumulator(
        net,
        objective,
        budget=gradaccum.Budget(tokens=300, examples=8),
        collate=getattr(example, "collate", None),
    )
    assert accumulator.backward(in_float64(batch)).num_micros >= 3
    assert oracle.error(oracle.left_in(net), expected) <= 1e-12
    assert oracle.error(means, expected) > 0.01


def test_noise(capsys):
    found = load("noise").main()
    assert found.num_steps == (32, 16) and found.num_examples == 1024
    assert "effective batch 32; noise scale " in capsys.readouterr().out


def test_branch(capsys):
    found = load("branch").main()
    assert found.num_steps == (12, 6) and found.num_examples == 96 and found.error > 0
    assert str(found) in capsys.readouterr().out


def test_growing_batch():
    steps = load("growing_batch").main()
    assert [num for num, _ in steps] == [16] * 10 + [32] * 5 + [64] * 7 + [32]
    assert steps[-1][1] < 0.7 * steps[0][1]


def test_watched_trainer():
    run = read(load("watched_trainer").main())
    assert run.column("num_examples") == [8] * 4 + [16] * 4
    loss = run.known("loss")
    assert loss[-1] < loss[0] and "the effective batch is 16 examples" in run.events[-1][1]
