"""Watching a run: what is written down, what is shown, and that nothing waits for it."""

import json
import math
import os
import pty
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradaccum
from gradaccum import live
from gradaccum.engine import Accumulator
from gradaccum.errors import BadInput
from gradaccum.integrations.watching import Watching
from gradaccum.metrics import SCHEMA, MetricsFile
from gradaccum.types import Budget
from gradaccum.watch import Watch
from tests.quadratics import PROBLEMS, accumulator
from tests.trainers import build, logged

PROBLEM = PROBLEMS[1]


def lines(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def run(watch, num, *, engine=None, seed=0, **more):
    engine, generator = engine or accumulator(PROBLEM), torch.Generator().manual_seed(seed)
    if watch.accumulator is None:
        watch.follow(engine)
    steps = []
    for _ in watch.reading(range(num)):
        steps.append(engine.backward(PROBLEM.batch(8, generator)))
        engine.model.zero_grad()
        watch.step(steps[-1], **more)
    return steps


def test_a_line_tells_what_the_step_tells(tmp_path):
    with Watch(folder=tmp_path / "new", live=False, num_steps=6) as watch:
        steps = run(watch, 6, learning_rate=0.1)
    found = lines(tmp_path / "new")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["samples"] for line in found] == [8, 16, 24, 32, 40, 48]
    for line, step in zip(found, steps, strict=True):
        assert line["schema"] == SCHEMA and line["loss"] == step.loss
        assert (line["weight"], line["unit"]) == (step.weight, "tokens")
        assert line["micros"] == [[len(m.examples), m.size, m.useful] for m in step.micros]
        assert (line["useful_tokens"], line["padded_tokens"]) == (step.useful, step.padded)
        assert (line["budget_tokens"], line["budget_examples"]) == (24, None)
        assert line["learning_rate"] == 0.1 and line["events"] == []
        assert 0 < line["compute_seconds"] <= line["seconds"]
        assert abs(line["time"] - time.time()) < 600


def test_one_step_in_so_many_is_measured_for_the_noise_scale(tmp_path):
    with Watch(folder=tmp_path, live=False, noise_every=5) as watch:
        run(watch, 25)
    assert [line["step"] for line in lines(tmp_path) if "noise" in line] == [25]
    assert lines(tmp_path)[-1]["noise"]["num_steps"] == 5
    assert watch.accumulator.parts is None, "what comes after runs as it would have"
    with Watch(folder=tmp_path, live=False, noise_every=None) as watch:
        run(watch, 25)
    assert not any("noise" in line for line in lines(tmp_path))


def test_a_run_that_goes_on_drops_later_lines_and_another_one_keeps_the_file(tmp_path):
    with Watch(folder=tmp_path, live=False) as watch:
        run(watch, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('5\n{}\n{"step": 5, "los')  # no lines of ours, and one cut off by a kill
    with Watch(folder=tmp_path, live=False, first_step=2) as watch:
        run(watch, 2, seed=1)
    assert [(line["step"], line["samples"]) for line in lines(tmp_path)] == [
        (1, 8), (2, 16), (3, 24), (4, 32),
    ]  # fmt: skip
    before = (tmp_path / "metrics.jsonl").read_text()
    with Watch(folder=tmp_path, live=False) as watch:
        run(watch, 1)
    (kept,) = tmp_path.glob("metrics-*.jsonl")
    assert kept.read_text() == before and len(lines(tmp_path)) == 1


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    MetricsFile(tmp_path / "m").write({"step": 1, "loss": math.nan, "more": [math.inf, {"a": 1.0}]})
    assert json.loads((tmp_path / "m").read_text()) == {
        "step": 1, "loss": None, "more": [None, {"a": 1.0}],
    }  # fmt: skip


def test_other_ranks_write_and_show_nothing(tmp_path, capsys):
    with Watch(folder=tmp_path / "new", rank=1) as watch:
        run(watch, 2)
    assert not (tmp_path / "new").exists() and capsys.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write to"):
        Watch(folder=tmp_path / "file")


class Running:
    """A step that the device has not finished; reading its loss would wait."""

    num_examples = 8
    is_over = False

    def __getattr__(self, name):
        raise AssertionError(f"{name} was read, which waits for the device")


def test_taking_a_step_waits_for_nothing():
    watch = Watch(live=False)
    watch.step(Running())
    watch.add(grad_norm=1.0)
    watch.flush(waits=False)
    with pytest.raises(AssertionError, match="waits for the device"):
        watch.flush()


LINE = {
    "step": 12, "samples": 384, "time": 100.0, "loss": 2.5, "weight": 1234.0,
    "unit": "trained tokens", "num_examples": 32, "num_micros": 7, "useful_tokens": 900,
    "padded_tokens": 1000, "seconds": 2.0, "compute_seconds": 1.5, "data_seconds": 0.25,
    "peak_bytes": 2**30, "total_bytes": 24 * 2**30, "cap_bytes": 20 * 2**30, "grad_norm": 1.25,
    "learning_rate": 1e-3, "budget_tokens": 512, "budget_examples": None,
    "events": ["out of memory at 2 examples"],
    "noise": {"scale": 90.0, "low": 70.0, "high": 120.0, "gradient_squared": 1.0, "variance": 90.0,
              "num_steps": 9},
}  # fmt: skip


def test_piped_a_step_is_one_line_and_events_are_lines_of_their_own(capsys):
    log = live.Log(20, 10)
    log.show(LINE)
    log.show(LINE | {"step": 13, "samples": 416, "time": 103.0, "events": []})
    event, first, second = capsys.readouterr().err.splitlines()
    assert event == "step 12/20: out of memory at 2 examples"
    assert first == (
        "step 12/20 | 384 samples | loss 2.5000 | 1,234 trained tokens in 7 micro-batches | "
        "padding 10% | 617 trained tokens/s | peak 1.0 GiB of 20.0 GiB, 19.0 GiB head-room | "
        "0:16 left"
    )
    assert second.startswith("step 13/20 | 416 samples") and second.endswith("0:18 left")


def test_where_a_step_has_no_loss_that_is_finite_it_is_shown_all_the_same(capsys):
    live.Log(None).show(LINE | {"loss": math.nan, "step": 1})
    assert "step 1 | 384 samples | loss nan" in capsys.readouterr().err


def test_in_a_notebook_one_bar_moves(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    bar = live.view(20, 10)
    assert isinstance(bar, live.Bar)
    bar.show(LINE)
    bar.close()
    shown = capsys.readouterr().err
    assert "step 12/20: out of memory" in shown and "loss 2.5000" in shown


TERMINAL = """
import sys
from gradaccum import live
from tests.test_watch import LINE
view = live.view(20, 10)
assert isinstance(view, live.Board), view
print("to stdout")
for step in range(11, 15):
    view.show(LINE | {"step": step, "loss": 3 - step / 10, "time": float(step)})
view.close()
"""


def test_on_a_terminal_a_table_stays_in_place_and_stdout_is_left_alone():
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL],
        stderr=follower,
        stdout=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end has closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait() == 0 and process.stdout.read() == b"to stdout\n"
    text = shown.decode()
    for expected in (
        "step 14/20, 384 samples", "smoothed", "gradient norm 1.25", "learning rate 0.001",
        "617 trained tokens/s", "32 examples = 7 micro-batches of up to 512 tokens, padding 10%",
        "peak 1.0 GiB of 20.0 GiB, 19.0 GiB head-room", "scale about 90 examples (70 to 120)",
        "step 14/20: out of memory at 2 examples", "0:06 left",
    ):  # fmt: skip
        assert expected in text, (expected, text)
    assert "\x1b[1A" in text, "it is drawn over itself"


def test_a_trainer_is_watched_and_its_own_reports_have_the_figures(tmp_path):
    flags = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4}
    trainer, _ = build(tmp_path, "sft", attach={"effective_batch_size": 8}, **flags)
    trainer.add_callback(Watching(trainer, live=False))
    trainer.train()
    found = lines(tmp_path / "out")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert all(line["seconds"] >= line["compute_seconds"] > 0 for line in found)
    assert all(line["optimizer_seconds"] > 0 and line["prepare_seconds"] > 0 for line in found)
    assert "budget found: " in found[0]["events"][0] and found[0]["measuring_seconds"] > 0
    assert [line["step"] for line in found if "grad_norm" in line] == [2, 4, 6]
    assert not any(name.startswith("gradaccum/") for line in found for name in line)
    assert len(logged(trainer, "gradaccum/num_micros")) == 3
    assert all(n == 8 for n in logged(trainer, "gradaccum/num_examples"))


def test_a_step_that_the_optimizer_skipped_is_an_event(tmp_path, monkeypatch):
    trainer, _ = build(tmp_path, attach={"budget": Budget(examples=2)}, max_steps=3)
    trainer.add_callback(Watching(trainer, live=False))
    monkeypatch.setattr(  # a scaler of 16 bits needs an accelerator
        type(trainer.accelerator),
        "optimizer_step_was_skipped",
        property(lambda _: trainer.state.global_step == 2),
    )
    trainer.train()
    found = [line["events"] for line in lines(tmp_path / "out")]
    assert found == [[], ["the optimizer skipped this step: a gradient was not finite"], []]


def test_a_trainer_that_is_not_attached_is_refused(tmp_path):
    with pytest.raises(BadInput, match="not attached"):
        Watching(build(tmp_path)[0])


def test_a_resumed_trainer_goes_on_with_the_noise_scale_and_the_same_losses(tmp_path):
    def trained(**flags):
        settings = {"max_steps": 30, "save_strategy": "steps", "save_steps": 13}
        attached = {"effective_batch_size": 8, "budget": Budget(examples=2)}
        trainer, _ = build(tmp_path, attach=attached, **settings)
        trainer.add_callback(Watching(trainer, live=False, noise_every=5))
        trainer.train(**flags)
        found = lines(tmp_path / "out")
        return [(line["step"], line["loss"], line.get("noise")) for line in found]

    whole = trained()
    assert whole[-1][2]["num_steps"] == 6
    last = str(tmp_path / "out" / "checkpoint-13")
    assert trained(resume_from_checkpoint=last) == whole


def test_an_error_in_training_leaves_no_view_behind(tmp_path):
    trainer, _ = build(tmp_path, attach={}, max_steps=3)
    trainer.add_callback(Watching(trainer))
    trainer.compute_loss = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.accumulation.watch._view is None


def test_a_sharded_or_empty_model_is_no_reason_to_fail():
    engine = Accumulator(nn.Linear(2, 1), gradaccum.causal_lm(), budget=Budget(examples=1))
    assert Watch(engine, live=False).noise is not None
    assert Watch(engine, live=False, noise_every=None).noise is None
