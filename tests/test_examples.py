"""Every example runs as it stands, learns, and is short enough to read."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_at_most_80_lines(path):
    assert len(path.read_text().splitlines()) <= 80


def test_plain_loop():
    losses = load(EXAMPLES[0]).main()
    assert EXAMPLES[0].stem == "plain_loop" and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "size"), [("qlora", 24), ("trl_sft", 32)])
def test_trainers(name, size):
    trainer = load(EXAMPLES[0].with_name(f"{name}.py")).main()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.accumulation.last.num_examples == size
