"""Benchmarks: turns, what becomes of workers, statistics, and `gradaccum bench` for real."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from gradaccum.bench import Contender, Outcome, Spread, Turn, WorkerFailed, race, rows
from gradaccum.cli import bench, contenders, reference
from gradaccum.cli.main import main
from gradaccum.errors import BadInput, GradaccumError
from tests.hf_models import llama, prompts, tokenizer

# Speaks the protocol without torch, whose import takes seconds; `Stage` has a test of its own.
WORKER = """
import json, os, sys
def tell(**message): print(json.dumps(message), flush=True)
tell(ready=True)
for turn, line in enumerate(sys.stdin):
    message = json.loads(line)
    if "steps" in message:
        if {dies} == turn: sys.exit("broken on purpose")
        if {hangs} == turn: os.kill(os.getppid(), 2); sys.stdin.read()
        counts = dict(trained=10, padded=8, useful=6, peak_bytes=100 + turn)
        tell(seconds=[0.5] * message["steps"], **counts)
    else:
        tell(answer=[os.getpid(), message["question"]["x"]])
"""
STAGE = """
import os
from gradaccum.bench import Stage
stage = Stage()
print("noise of a library"); os.system("echo noise of a process")
stage.wait("cpu", {"double": lambda x: 2 * x})
step = 0
while True:
    step += 1
    stage.stop()
    held = bytearray(64 * 2**20) if step == 2 else None
    stage.done(trained=step, padded=2 * step, useful=step)
"""


def contender(name, *, dies=-1, hangs=-1):
    return Contender(name, [sys.executable, "-c", WORKER.format(dies=dies, hangs=hangs)])


def has_ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_turns_are_interleaved_and_the_order_rotates():
    heard = []
    found = race(
        [contender(name) for name in "abc"],
        rounds=3,
        steps=2,
        question={"name": "any", "x": 7},
        heard=lambda round_, name, turn: heard.append((round_, name)),
    )
    order = ["abc", "abc", "bca", "cab"]  # the first warms up
    assert heard == [(round_, name) for round_, names in enumerate(order) for name in names]
    assert [outcome.name for outcome in found] == ["a", "b", "c"]
    for outcome in found:
        peaks = [turn.peak_bytes for turn in outcome.turns]
        assert peaks == [101, 102, 103], "one process took all turns, the first uncounted"
        assert outcome.turns[0] == Turn((0.5, 0.5), 10, 8, 6, 101) and outcome.failure is None
        assert outcome.answer[1] == 7 and has_ended(outcome.answer[0])
    assert len({outcome.answer[0] for outcome in found}) == 3


def test_a_worker_that_dies_is_reported_and_the_others_go_on():
    heard = []
    found = race(
        [contender("a"), contender("b", dies=2), contender("c")],
        rounds=3,
        steps=1,
        question={"name": "any", "x": 7},
        heard=lambda *told: heard.append(told),
    )
    dead = found[1]
    assert [turn is None for turn in dead.turns] == [False, True, True] and dead.answer is None
    assert "b ended with exit code 1: broken on purpose" in dead.failure.message
    assert dead.failure.code == 1 and (2, "b", None) in heard
    assert sum(name == "b" for _, name, _ in heard) == 3, "once it is dead nothing is told of it"
    assert all(len(o.turns) == 3 and all(o.turns) and o.answer for o in (found[0], found[2]))


def test_a_worker_that_never_begins_is_reported():
    wrong = Contender("wrong", [sys.executable, "-c", "import sys; sys.exit(2)"])
    loud = Contender("loud", [sys.executable, "-c", "print('hello'); input()"])
    found = race([wrong, contender("a"), loud], rounds=1, steps=1)
    assert found[0].failure.code == 2 and "it said nothing" in found[0].failure.message
    assert "it printed 'hello'" in found[2].failure.message
    assert found[1].failure is None and all(found[1].turns)


def test_fresh_workers_live_for_one_turn():
    found = race([contender("a"), contender("b", dies=1)], rounds=2, steps=3, is_fresh=True)
    assert [len(turn.seconds) for turn in found[0].turns] == [3, 3]
    assert [turn.peak_bytes for turn in found[0].turns] == [101, 101], "after one that warms up"
    assert found[1].turns == (None, None) and found[1].failure is not None


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_no_worker_is_left_after_an_interrupt():
    pids = []
    before = subprocess.Popen

    def started(*args, **kwargs):
        process = before(*args, **kwargs)
        pids.append(process.pid)
        return process

    # A shell starts what runs in its background deaf to interrupts: the race would wait forever.
    as_was = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", started)
            begin = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                race([contender("a"), contender("b", hangs=1)], rounds=9, steps=1)
    finally:
        signal.signal(signal.SIGINT, as_was)
    assert time.monotonic() - begin < 10
    assert len(pids) == 2 and all(map(has_ended, pids))


def test_a_stage_keeps_its_line_clean_and_measures():
    found = race(
        [Contender("a", [sys.executable, "-c", STAGE])],
        rounds=2,
        steps=2,
        question={"name": "double", "x": 21},
    )[0]
    assert found.failure is None and found.answer == 42
    assert [turn.trained for turn in found.turns] == [3 + 4, 5 + 6]
    assert [(turn.padded, turn.useful) for turn in found.turns] == [(14, 7), (22, 11)]
    assert all(0 < s < 1 for turn in found.turns for s in turn.seconds)
    if sys.platform == "linux":
        assert 60 * 2**20 < found.turns[0].peak_bytes < 100 * 2**20


def turn(seconds, trained=100, padded=200, useful=150, peak_bytes=7):
    return Turn(tuple(seconds), trained, padded, useful, peak_bytes)


def test_ratios_are_taken_within_rounds():
    slow = [1.0, 10.0, 2.0]  # the machine was slow in the second round
    base = Outcome("base", tuple(turn([s, s]) for s in slow))
    fast = Outcome("fast", tuple(turn([s / 2, s / 2], peak_bytes=int(s)) for s in slow))
    failed = WorkerFailed("gone", code=1)
    gone = Outcome("gone", (turn([4.0, 4.0], trained=800, padded=0), None, None), None, failed)
    found = {row.name: row for row in rows([base, fast, gone], "base")}
    assert found["fast"].speed == Spread(2.0, 2.0, 2.0)
    assert found["base"].seconds == Spread(2.0, 1.0, 10.0)
    assert found["base"].padding == 0.25 and found["fast"].peak_bytes == 10
    assert found["gone"].speed.median == pytest.approx(800 / 8 / (100 / 2))
    assert found["gone"].padding is None and found["gone"].failure == "gone"
    assert rows([base, Outcome("none", (None,) * 3)], "base")[1].speed is None
    json.dumps([row.to_json() for row in found.values()])


def test_what_is_said_is_what_was_measured():
    def said(speed, *, error=1e-7, is_float32=True):
        answer = {"error": error, "why_not": "", "is_float32": is_float32}
        ours = bench.Row("ours", None, None, speed, None, None, answer, None)
        loop = bench.Row("loop", None, None, Spread(2.0, 2.0, 2.0), None, None, None, None)
        return " ".join(bench._sentences([ours, loop], "stock 2x4", 3))

    assert "ours is 1.50 times as fast as stock 2x4" in said(Spread(1.5, 1.2, 1.6))
    assert "at 0.75 of the speed of the loop" in said(Spread(1.5, 1.2, 1.6))
    assert "ours is slower than stock 2x4: 0.80 times" in said(Spread(0.8, 0.7, 0.9))
    assert "equally fast" in said(Spread(1.1, 0.9, 1.2))
    assert "All gradients are those of the whole batch" in said(Spread(1.5, 1.2, 1.6))
    assert "The gradient of ours is not that of its batch" in said(None, error=1e-2)
    assert "The gradient of ours is not that of its batch" in said(None, error=float("nan"))
    assert "low precision" in said(None, error=1e-2, is_float32=False)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ours", "ours"),
        ("loop", "loop"),
        ("stock", "stock 3x5"),
        ("stock 2x16", "stock 2x16"),
        ("  stock   4x8  packing ", "stock 4x8 packing"),
        ("stock group_by_length", "stock 3x5 group_by_length"),
    ],
)
def test_names(text, name):
    assert contenders.read(text, (3, 5)).name == name
    assert contenders.read(name).name == name, "a worker reads it the same way"


@pytest.mark.parametrize(
    "text", ["", "our", "ours 2x4", "loop packing", "stock 0x4", "stock 2x", "stock 2x4 fast",
             "stock 2x4 packing padding_free", "stock2x4"]
)  # fmt: skip
def test_wrong_names(text):
    with pytest.raises(BadInput, match="there is no contender") as found:
        contenders.read(text)
    assert "stock 2x16" in found.value.hint and "batch_rebalance" in found.value.hint


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        ([], (2, 16)),
        (["--effective_batch_size=8"], (2, 4)),
        (["--effective_batch_size=7"], (1, 7)),
        (["--effective_batch_size=12", "--per_device_train_batch_size=4"], (4, 3)),
        (["--per_device_train_batch_size=3", "--gradient_accumulation_steps=5"], (3, 5)),
        (["--model_name_or_path=x", "--gradient_accumulation_steps=3"], (8, 3)),
        (["--model_name_or_path=x"], (8, 1)),
    ],
)
def test_the_stock_trainer_of_the_flags(words, shape):
    parsed = bench.parse(words)
    assert contenders.defaults(parsed) == shape
    names = [spec.name for spec in bench._specs(None, parsed)]
    one = f"stock 1x{parsed.effective_batch_size}"
    expected = [f"stock {shape[0]}x{shape[1]}", one, "loop", "ours"]
    assert names == list(dict.fromkeys(expected))


WRONG = {
    "a contender": (["--contenders=ours,theirs"], "there is no contender 'theirs'"),
    "no round": (["--rounds=0"], "--rounds 0 is below 1"),
    "no number": (["--steps=two"], "--rounds and --steps take a number"),
    "a picture": (["--plot=bench.pdf"], "neither .png nor .svg"),
    "a directory": (["--plot=none/bench.png"], "there is no directory none for --plot"),
    "a flag": (["--contender=ours"], "did you mean --contenders?"),
    "a resumed run": (["--resume_from_checkpoint=last"], "bench begins anew"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_exit_with_2_as_wasany_work(name, capfd, monkeypatch):
    words, message = WRONG[name]
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a worker was started"))
    assert main(["bench", *words]) == 2
    shown = capfd.readouterr()
    assert (
        shown.out == ""
        and message in shown.err
        and "hint:" in shown.err + "hint:" * ("contender" not in name)
    )


def test_help(capsys):
    assert main(["bench", "--help"]) == 0
    assert "--contenders LIST" in capsys.readouterr().out


def test_sequences_leave_padding_and_cut_what_is_packed():
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 3, 4, 2]])
    labels = torch.tensor([[-100, 6, 7, -100, -100], [-100, -100, 3, 4, 2]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = reference.sequences({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert [row.ids.tolist() for row in found] == [[5, 6, 7], [8, 9, 3, 4, 2]]
    assert [row.trained for row in found] == [2, 3]
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = {"input_ids": ids[1:], "labels": labels[1:], "position_ids": positions}
    found = reference.sequences(packed)
    assert [row.ids.tolist() for row in found] == [[8, 9, 3], [4, 2]]
    assert [row.trained for row in found] == [1, 1], "the first of each sequence is no target"


def test_a_wrong_gradient_is_seen(tmp_path):
    model = llama()
    model.forward = lambda **_: pytest.fail("a forward on the instance runs another model")
    ids = torch.arange(3, 15)
    data = [reference.Sequence(ids[:n], ids[:n]) for n in (4, 12)]
    own = reference.pristine(model)
    for row in data:  # the mean of means, where sequences have different lengths
        (own(input_ids=row.ids[None], labels=row.labels[None]).loss / 2).backward()
    wrong = reference.kept_gradient(own)
    own.zero_grad()
    for row in data:
        loss = own(input_ids=row.ids[None], labels=row.labels[None]).loss
        (loss * row.trained / 14).backward()
    right = reference.kept_gradient(own)
    errors = [reference.error(g, reference.pristine(model), data, tmp_path) for g in (wrong, right)]
    assert errors[0] > 1e-2 and errors[1] < 1e-5
    assert len(list(tmp_path.iterdir())) == 1, "the same sequences and weights share a reference"
    reference.error(right, reference.pristine(model), data[:1], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_where_no_gradient_is_measured():
    def told(model, **args):
        settings = {"loss_type": "nll", "label_smoothing_factor": 0.0, "neftune_noise_alpha": None}
        settings |= {"device": torch.device("cpu")} | args
        trainer = SimpleNamespace(
            model=model, args=SimpleNamespace(**settings), aux_loss_enabled=False
        )
        return reference.why_not(trainer)

    assert told(llama()) == ""
    assert "dropout" in told(llama(attention_dropout=0.1))
    assert "dropout" in told(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)))
    assert "not the mean" in told(llama(), label_smoothing_factor=0.1)
    assert "not the mean" in told(llama(), loss_type="dft")
    assert "CPU only" in told(llama(), device=torch.device("cuda"))


@pytest.fixture
def flags(tmp_path):
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    llama().save_pretrained(model)
    tokenizer().save_pretrained(model)
    prompts(40).to_json(data)
    return [
        "bench", f"--model_name_or_path={model}", f"--dataset_name={data}", "--budget=3 examples",
        "--effective_batch_size=8", "--gradient_checkpointing=False", "--rounds=1", "--steps=1",
    ]  # fmt: skip


def test_a_benchmark_from_flags_to_figures(flags, tmp_path, capfd):
    names = ["stock 2x4", "loop", "ours", "stock 2x4 padding_free"]
    plot = tmp_path / "bench.png"
    words = ["--json", f"--contenders={','.join(names)}", "--max_length=48", f"--plot={plot}"]
    assert main([*flags, *words]) == 0
    shown = capfd.readouterr()
    told = json.loads(shown.out)
    assert told["effective_batch_size"] == 8 and told["base"] == "stock 2x4"
    assert [row["name"] for row in told["contenders"]] == names
    assert "round 1/1 ours: " in shown.err and "warm-up   loop: " in shown.err
    found = {row["name"]: row for row in told["contenders"]}
    for name, row in found.items():
        assert 0 < row["gradient_error"] < 1e-5, name
        assert row["seconds"]["median"] > 0 and row["rate"]["median"] > 0 and not row["failure"]
    trained = {
        name: round(row["rate"]["median"] * row["seconds"]["median"]) for name, row in found.items()
    }
    assert len(set(trained.values())) == 1, "the same examples"
    assert found["loop"]["padding"] == found["stock 2x4 padding_free"]["padding"] == 0
    assert found["stock 2x4"]["padding"] > 0.05
    assert found["stock 2x4"]["speed"]["median"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_every_worker_refuses_is_refused_as_in_train():
    said = "loop ended with exit code 2: data      reading x ...\nerror: there is no x\nhint: near"
    refused = Outcome("loop", (None,), None, WorkerFailed(said, code=2))
    with pytest.raises(BadInput) as found:
        bench._raise_if_none_ran([refused, refused])
    assert str(found.value) == "there is no x\nhint: near"
    broken = Outcome("loop", (None,), None, WorkerFailed("loop ended with exit code 1: x", code=1))
    with pytest.raises(GradaccumError, match="exit code 1") as found:
        bench._raise_if_none_ran([broken])
    assert not isinstance(found.value, BadInput)
    bench._raise_if_none_ran([broken, Outcome("ours", (turn([1.0]),))])  # there is one to show
