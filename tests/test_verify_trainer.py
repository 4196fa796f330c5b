"""`verify` on trainers: stock and attached, and through the command line."""

import copy
import json
import os

import datasets
import pytest
import torch
from transformers import TrainerCallback

import gradaccum
from gradaccum.cli.main import main
from gradaccum.errors import BadInput
from gradaccum.testing import assert_exact
from gradaccum.verify import verify
from tests import oracle, traps
from tests.hf_models import llama, prompts, token_rows, tokenizer
from tests.trainers import build


@pytest.mark.parametrize("kind", ["hf", "sft"])
@pytest.mark.parametrize("attach", [None, {}], ids=["stock", "attached"])
def test_a_llama_is_exact_stock_and_attached(tmp_path, kind, attach):
    trainer, _ = build(tmp_path, kind, attach=attach)
    verdict = assert_exact(trainer)
    assert verdict.num_examples == 8 and verdict.reference.startswith("the model's own loss")
    assert [c.cut for c in verdict.comparisons] == ["1 x 8", "8 x 1", "4 x 2", "7+1"]
    assert verdict.floor < 1e-6 and verdict.notes == ()


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}]
)
def test_settings(tmp_path, settings):
    trainer, _ = build(tmp_path, **settings)
    before = [set(vars(module)) for module in trainer.model.modules()]
    assert_exact(trainer, batch=list(trainer.train_dataset)[:5], splits=[(2, 2, 1)])
    assert [set(vars(module)) for module in trainer.model.modules()] == before


def test_a_stream_of_examples(tmp_path):
    rows = list(token_rows(20))
    data = datasets.IterableDataset.from_generator(lambda: iter(rows))
    trainer, _ = build(tmp_path, data=data, max_steps=2)
    assert_exact(trainer)


def trainers():
    return [trap for trap in traps.TRAPS if trap.make.__name__.startswith("trainer_")]


@pytest.mark.parametrize("trap", trainers(), ids=str)
def test_the_same_trainer_is_exact_once_attached(trap):
    assert_exact(gradaccum.attach(trap.make().loop))


def short_of_memory(trainer, rows):
    """Let the trainer's model run out of memory above so many rows."""

    def before(module, args, kwargs):
        if len(kwargs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("too many rows")

    trainer.model.register_forward_pre_hook(before, with_kwargs=True)
    return trainer


@pytest.mark.parametrize("kind", ["hf", "sft"])
@pytest.mark.parametrize("attach", [None, {}], ids=["stock", "attached"])
def test_a_full_batch_that_does_not_fit(tmp_path, kind, attach):
    trainer = short_of_memory(build(tmp_path, kind, attach=attach)[0], 3)
    before = copy.deepcopy(trainer.model.state_dict())
    verdict = assert_exact(trainer, splits=[(2, 2, 2, 2), (3, 3, 2)])
    assert "one example at a time in float64, as the full batch" in verdict.reference
    assert verdict.tolerance < 1e-5
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())


def test_a_wrong_trainer_whose_full_batch_does_not_fit():
    trap = next(trap for trap in trainers() if trap.expected == "missing division")
    trainer = short_of_memory(trap.make().loop, 3)
    verdict = verify(trainer, splits=[(2, 2, 2, 2)])
    assert verdict.names == ("missing division",)
    assert "in float64" in verdict.reference


@pytest.mark.parametrize("make", [traps.trainer_that_takes_no_count, traps.trainer_gpt2])
def test_the_remedy_of_a_trainer_is_one_that_its_user_can_follow(make):
    verdict = verify(make().loop)
    assert [d.remedy for d in verdict.diagnoses] == ["trainer = gradaccum.attach(trainer)"]


def test_an_evaluation_loss_that_depends_on_its_batches_is_said(tmp_path):
    """TRAPS 35: it leaves no gradient, so it is a note."""
    rows = token_rows(9, seed=1)
    for data in (rows, {"held out": rows}):
        trainer, _ = build(tmp_path, eval_dataset=data)
        before = dict(vars(trainer.accelerator)), dict(vars(trainer)), trainer.model.training
        verdict = assert_exact(trainer, splits=[(4, 4)])
        assert before == (vars(trainer.accelerator), vars(trainer), trainer.model.training)
        (note,) = verdict.notes
        assert "depends on per_device_eval_batch_size" in note and "attach" in note
        one, three = _eval_losses(trainer, rows)
        assert f"{one:.4g} in batches of 1 and {three:.4g} in batches of 3" in note


@pytest.mark.parametrize("kind", ["hf", "sft"])
def test_an_evaluation_loss_that_does_not_is_not(tmp_path, kind):
    rows = prompts(9, seed=1) if kind == "sft" else token_rows(9, seed=1)
    trainer, _ = build(tmp_path, kind, eval_dataset=rows, attach={"effective_batch_size": 8})
    assert assert_exact(trainer, splits=[(4, 4)]).notes == ()
    assert trainer.accumulation.evaluating is None
    alike = [token_rows(1, seed=1)[0]] * 9
    trainer, _ = build(tmp_path, eval_dataset=alike)
    assert assert_exact(trainer, splits=[(4, 4)]).notes == ()


def test_an_evaluation_that_does_not_fit_is_not_judged(tmp_path):
    trainer, _ = build(tmp_path, eval_dataset=token_rows(9, seed=1))
    trainer.model.register_forward_pre_hook(_fail_in_evaluation)
    assert assert_exact(trainer, splits=[(4, 4)]).notes == ()


def _fail_in_evaluation(module, args):
    if not module.training:
        raise torch.OutOfMemoryError("evaluation")


def _eval_losses(trainer, rows):
    for size in (1, 3):
        trainer.args.per_device_eval_batch_size = size
        yield trainer.evaluate(rows.select(range(8)))["eval_loss"]


class Count(TrainerCallback):
    def __init__(self):
        self.calls = 0

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.calls += 1
        return super().__getattribute__(name)


def test_a_trainer_in_use_is_left_as_it_was(tmp_path):
    trainer, record = build(tmp_path, "sft", optim="adamw_torch", max_steps=3)
    trainer.train()
    count = Count()
    trainer.add_callback(count)
    trainer.model.lm_head.weight.grad = torch.ones_like(trainer.model.lm_head.weight)
    before, objects = _everything(trainer), dict(vars(trainer))
    calls, files = count.calls, sorted(os.walk(tmp_path))
    assert_exact(trainer)
    found = _everything(trainer)
    for key, value in before.items():
        assert found[key] == value, key
    assert vars(trainer).keys() == objects.keys()
    assert all(vars(trainer)[name] is value for name, value in objects.items())
    assert count.calls == calls and sorted(os.walk(tmp_path)) == files
    assert len(record.gradients) == 3


def _everything(trainer):
    model, accelerator = trainer.model, trainer.accelerator

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return copy.deepcopy(
        {
            "weights": plain(dict(model.state_dict())),
            "grads": [plain(p.grad) for p in model.parameters()],
            "optimizer": plain(trainer.optimizer.state_dict()),
            "scheduler": plain(trainer.lr_scheduler.state_dict()),
            "random": plain(torch.get_rng_state()),
            "modes": [m.training for m in model.modules()],
            "log": trainer.state.log_history,
            "state": (trainer.state.global_step, trainer.state.epoch),
            "args": trainer.args.to_dict(),
            "metrics": plain(trainer._metrics),
            "prepared": [len(accelerator._models), len(accelerator._optimizers)],
            "sync": accelerator.gradient_state.sync_gradients,
            "dataloaders": len(accelerator.gradient_state.dataloader_references),
        }
    )


def test_training_goes_on_as_if_it_had_not_been_verified(tmp_path):
    alone, expected = build(tmp_path, max_steps=3)
    verified, found = build(tmp_path, max_steps=3)
    alone.train()
    verify(verified)
    verified.train()
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert oracle.error(one, other) == 0.0


def test_wrong_use_is_refused(tmp_path):
    trainer, _ = build(tmp_path)
    for arguments, message in (
        ({"model": trainer.model}, "brings its own model"),
        ({"batch": {"labels": 1}}, "on a list of examples, not dict"),
        ({"splits": [(1, 7)]}, r"cannot make micro-batches of \(1, 7\) rows"),
    ):
        with pytest.raises(BadInput, match=message):
            verify(trainer, **arguments)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify")
    llama(tie_word_embeddings=False).save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    prompts(12).to_json(path / "pairs.jsonl")
    return [f"--model_name_or_path={path / 'model'}", f"--dataset_name={path / 'pairs.jsonl'}"]


@pytest.mark.parametrize("stock", [[], ["--stock"]], ids=["ours", "stock"])
def test_the_command_verifies_the_trainer_of_the_flags(flags, stock, capfd):
    assert main(["verify", *flags, *stock, "--effective_batch_size=5", "--json"]) == 0
    shown = capfd.readouterr()
    verdict = json.loads(shown.out)
    assert verdict["exact"] is True and verdict["num_examples"] == 5
    assert ("attached" in verdict["subject"]) is not bool(stock)
    assert "passes over 5 examples" in shown.err


MODULE = """
import torch
from torch import nn

import gradaccum

def loop(model, micros, wrong=True):
    for x, y in micros:
        (model(x) - y).square().sum().div(4 if not wrong else len(x)).backward()

def wrong():
    return loop, nn.Linear(3, 1), (torch.arange(12.0).reshape(4, 3), torch.ones(4, 1))

def right():
    return (lambda model, micros: loop(model, micros, wrong=False), *wrong()[1:])

def measured():
    mean = gradaccum.Objective(
        lambda model, b: (model(b[0]) - b[1]).square().sum(), lambda b: 2 * len(b[1])
    )
    return *right(), mean

def failing():
    return (lambda model, micros: micros["x"]), *right()[1:]

def made_wrong(x):
    return x

nothing = 3
"""


def test_the_command_verifies_a_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audited_loops.py").write_text(MODULE)
    assert main(["verify", "audited_loops:wrong"]) == 1
    shown = capsys.readouterr()
    assert "gradient 4.00 times too large at 4 micro-batches: nothing divides" in shown.out
    assert "NOT exact" in shown.out and "passes over 4 examples" in shown.err
    assert main(["verify", "audited_loops:right", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["diagnoses"] == [] and "4 x 1            error" in shown.err
    assert main(["verify", "audited_loops:measured"]) == 1
    assert "constant factor: gradient 2.00 times too large" in capsys.readouterr().out
    for words, message in (
        (["audited_loops:none"], "has no 'none'"),
        (["audited_loops:nothing"], "audited_loops:nothing returns int"),
        (["no_such_module:loop"], "there is no module 'no_such_module'"),
        (["audited_loops:right", "--stock"], "'--stock' does not go with audited_loops:right"),
        (["--no_such_flag"], "there is no flag --no_such_flag"),
        (["--stok"], "did you mean --stock?"),
        (["audited_loops"], "hint: gradaccum verify audited_loops:FUNCTION"),
        (["./audited_loops.py:right"], "hint: gradaccum verify audited_loops:right"),
        (["audited_loops.py:right"], "hint: gradaccum verify audited_loops:right"),
        (["audited_loops:failing"], "failing failed with TypeError, so nothing was judged"),
        (["audited_loops:failing"], "audited_loops.py"),
        (["audited_loops:made_wrong"], "missing 1 required positional argument"),
    ):
        assert main(["verify", *words]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and shown.out == ""
    assert main(["verify", "--help"]) == 0
    assert "exit codes: 0 exact, 1 not exact" in capsys.readouterr().out
