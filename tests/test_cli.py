"""The command line: a run from flags to a model that loads, and every wrong input."""

import ast
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

import gradaccum
from gradaccum.cli import arguments, embedded, final
from gradaccum.cli.main import main
from gradaccum.cli.signals import StopOnSignal
from gradaccum.errors import BadInput
from gradaccum.metrics import MetricsFile
from gradaccum.sync.alone import Alone
from gradaccum.types import Budget
from tests.hf_models import llama, prompts, tokenizer

# What a callback knows of a run on one process.
ALONE = SimpleNamespace(accumulator=SimpleNamespace(ranks=Alone()))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama(tie_word_embeddings=False).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    prompts(30).to_json(path)
    return path


def train(*words, **flags):
    return main(["train", *words, *(f"--{name}={value}" for name, value in flags.items())])


def run(model_dir, data_file, output, *words, **flags):
    common = {
        "model_name_or_path": model_dir,
        "dataset_name": data_file,
        "output_dir": output,
        "max_steps": 3,
        "effective_batch_size": 10,
        "gradient_checkpointing": False,
    }
    return train(*words, **common | flags)


def test_a_run_from_flags_to_a_model_that_loads(model_dir, data_file, tmp_path, capfd):
    output = tmp_path / "out"
    assert run(model_dir, data_file, output, budget="4 examples") == 0
    shown = capfd.readouterr()
    assert "effective batch 10 = about 3 micro-batches of up to 4 examples (--budget)" in shown.err
    assert "step 3/3 | 30 samples | loss" in shown.err and "tokens/s" in shown.err
    assert "relative gradient error" in shown.out and "from_pretrained" in shown.out
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["samples"] for line in lines] == [10, 20, 30]
    assert all(line["num_micros"] == 3 and line["grad_norm"] > 0 for line in lines)
    AutoTokenizer.from_pretrained(output)
    trained = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(model_dir)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)


def test_json_goes_to_stdout_alone(model_dir, data_file, tmp_path, capfd):
    assert run(model_dir, data_file, tmp_path / "out", "--json", max_steps=2) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["steps"] == 2 and summary["samples"] == 20
    flags = {"max_steps": 1, "effective_batch_size": 32}
    assert run(model_dir, data_file, tmp_path / "few", **flags) == 0
    assert "each step takes the 30 examples that there are" in capfd.readouterr().err
    assert 0 < summary["proof"]["relative_error"] < 1e-6


def test_resume_continues_the_very_run(model_dir, data_file, tmp_path, capfd):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(model_dir, data_file, whole, max_steps=4, lr_scheduler_type="constant") == 0
    settings = {"max_steps": 2, "lr_scheduler_type": "constant", "save_steps": 2}
    assert run(model_dir, data_file, halves, **settings) == 0
    assert run(model_dir, data_file, halves, max_steps=4, lr_scheduler_type="constant") == 2
    assert "is not empty, and nothing is overwritten" in capfd.readouterr().err
    settings |= {"max_steps": 4, "resume_from_checkpoint": "last"}
    assert run(model_dir, data_file, halves, **settings | {"effective_batch_size": 5}) == 2
    assert "effective batch of 10 examples, and this run has 5" in capfd.readouterr().err
    assert run(model_dir, data_file, halves, **settings) == 0
    one, other = (AutoModelForCausalLM.from_pretrained(p) for p in (whole, halves))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert logged(whole) == logged(halves)


def test_the_checkpoint_alone_resumes_the_run_with_its_flags(model_dir, data_file, tmp_path, capfd):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(model_dir, data_file, whole, max_steps=4, lr_scheduler_type="constant") == 0
    settings = {"max_steps": 2, "lr_scheduler_type": "constant", "save_steps": 2}
    assert run(model_dir, data_file, halves, **settings) == 0
    capfd.readouterr()
    (halves / "run.json").write_text('{"schema": 1, "comm')  # by something else than us
    assert train(resume_from_checkpoint=halves / "checkpoint-2", max_steps=4) == 0
    assert json.loads((halves / "run.json").read_text())["status"] == "finished"
    told = capfd.readouterr().err
    assert f"flags     of the run, from {halves / 'flags.json'}: --model_name_or_path=" in told
    assert logged(whole) == logged(halves)
    before = (halves / "model.safetensors").stat().st_mtime_ns
    assert train(resume_from_checkpoint="last", output_dir=halves) == 0
    assert "is the end of the run, 4 of 4 steps" in capfd.readouterr().err
    assert (halves / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("moment", ["writing", "renaming"])
@pytest.mark.parametrize("is_best", [False, True])
def test_a_model_that_a_killed_run_did_not_write_is_written_later(
    moment, is_best, model_dir, tmp_path, capfd, monkeypatch
):
    """A kill is a KeyboardInterrupt, since what comes after it would come after any."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        prompts(30).to_json(data / f"{split}.jsonl")
    flags = {"max_steps": 4, "save_steps": 1, "lr_scheduler_type": "constant"}
    if is_best:  # the first step, since the loss falls
        flags |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
        flags |= {"metric_for_best_model": "loss", "greater_is_better": True}
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert run(model_dir, data, whole, **flags) == 0
    assert run(model_dir, data, output, **flags | {"max_steps": 2}) == 0
    weights = "model.safetensors"
    first = (output / weights).read_bytes()
    save, flush = SFTTrainer.save_model, final.flush

    def killed_writing(trainer, folder, **words):
        save(trainer, folder, **words)
        if "checkpoint-" not in folder:
            (Path(folder) / weights).write_bytes(b"half")
            raise KeyboardInterrupt

    def killed_renaming(path):
        flush(path)
        if path == output:
            raise KeyboardInterrupt

    flags |= {"resume_from_checkpoint": "auto"}
    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(SFTTrainer, "save_model", killed_writing)
        else:
            patch.setattr(final, "flush", killed_renaming)
        assert run(model_dir, data, output, **flags) == 128 + signal.SIGINT
    if moment == "writing":
        assert (output / weights).read_bytes() == first, "whole until the next one is"
    capfd.readouterr()
    (output / weights).write_bytes(b"half")
    assert run(model_dir, data, output, **flags) == 0
    assert "writing the model: " in capfd.readouterr().err
    assert (output / weights).read_bytes() == (whole / weights).read_bytes()
    best = AutoModelForCausalLM.from_pretrained(output / "checkpoint-1").lm_head.weight
    assert is_best == torch.equal(AutoModelForCausalLM.from_pretrained(output).lm_head.weight, best)
    assert not (output / ".writing").exists()
    assert run(model_dir, data, output, **flags) == 0
    assert "nothing to do: " in capfd.readouterr().err


def test_memory_into_which_nothing_fits_is_refused(model_dir, data_file, tmp_path, capfd):
    assert run(model_dir, data_file, tmp_path / "out", memory="1.1MiB") == 1
    told = capfd.readouterr().err
    assert "even the smallest micro-batch, 1 example of " in told and "of the 1.1 MiB" in told


def logged(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["samples"], line["loss"]) for line in lines]


def test_sigterm_saves_a_checkpoint_and_says_how_to_go_on(model_dir, data_file, tmp_path):
    output = tmp_path / "out"
    words = [
        sys.executable, "-m", "gradaccum", "train", f"--model_name_or_path={model_dir}",
        f"--dataset_name={data_file}", f"--output_dir={output}", "--max_steps=100000",
        "--effective_batch_size=4",
    ]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=60)
    assert code == 128 + signal.SIGTERM, "".join(seen[-40:])
    assert "stopped by SIGTERM, saved" in seen[-2]
    saved = sorted(output.glob("checkpoint-*"))
    assert len(saved) == 1 and (saved[0] / "optimizer.pt").is_file()
    command = shlex.split(seen[-1].removeprefix("go on with: "))
    assert command[:2] == ["gradaccum", "train"] and command[-1] == str(saved[0])
    step = int(saved[0].name.removeprefix("checkpoint-"))
    assert main([*command[1:], f"--max_steps={step + 1}"]) == 0  # the words are the command's


def test_a_signal_inside_of_a_print_is_no_error(monkeypatch, capfd):
    """A buffered stderr refuses a second write from a handler that came during the first."""

    class Printing:
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    stopping = StopOnSignal(ALONE)
    monkeypatch.setattr("sys.stderr", Printing())
    stopping._receive(signal.SIGTERM, None)
    stopping.on_step_end(None, SimpleNamespace(global_step=1, max_steps=2), SimpleNamespace())
    assert stopping.received == signal.SIGTERM
    assert "stopping after this step" in capfd.readouterr().err


def test_a_second_signal_stops_at_once(model_dir, data_file, tmp_path):
    words = [
        sys.executable, "-m", "gradaccum", "train", f"--model_name_or_path={model_dir}",
        f"--dataset_name={data_file}", f"--output_dir={tmp_path / 'out'}", "--max_steps=100000",
        "--effective_batch_size=4096", "--budget=1 example",
    ]  # fmt: skip
    pairs = data_file.read_text()
    data_file.write_text(pairs * 140)  # a step of many seconds
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("output"):
            time.sleep(4)
            process.send_signal(signal.SIGINT)
        if line.startswith("stopping after this step"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert seen[-1] == "stopped at once: nothing more was saved\n"
    assert "Traceback" not in "".join(seen)


@pytest.mark.parametrize("quantised", [False, True])
def test_lora_and_qlora(model_dir, data_file, tmp_path, quantised, capfd):
    peft = pytest.importorskip("peft")
    flags = {"load_in_4bit": True} if quantised else {}
    if quantised:
        pytest.importorskip("bitsandbytes")
    output = tmp_path / "out"
    flags |= {"lora_target_modules": "all-linear", "lora_r": 2, "learning_rate": 1e-2}
    assert run(model_dir, data_file, output, "--use_peft", "--json", **flags) == 0
    proof = json.loads(capfd.readouterr().out)["proof"]
    # TRL keeps the adapters of a quantised model in bf16, whose rounding alone is about 2e-3.
    assert proof["floor"] < (1e-2 if quantised else 1e-6)
    assert 0 < proof["relative_error"] < (1e-2 if quantised else 1e-6)
    peft.AutoPeftModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "txt"])
def test_local_formats(model_dir, tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    rows = prompts(12)
    if kind == "txt":
        path.write_text("\n".join(row["prompt"] + row["completion"] for row in rows))
    else:
        getattr(rows, f"to_{kind}")(path)
    assert run(model_dir, path, tmp_path / "out", max_steps=1, effective_batch_size=3) == 0


def test_messages_with_the_embedded_model(tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 6)
    flags = {"dataset_name": path, "output_dir": tmp_path / "out", "max_steps": 1}
    assert train("--assistant_only_loss", **flags) == 0


def test_a_config_file_gives_defaults_that_flags_override(model_dir, data_file, tmp_path, capfd):
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: {model_dir}\neffective_batch_size: 6\nmax_steps: 1\n")
    flags = {"dataset_name": data_file, "output_dir": tmp_path / "out", "max_steps": 2}
    assert train("--config", str(config), "--json", **flags) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["effective_batch_size"] == 6 and summary["steps"] == 2


def test_samples_are_counted_as_they_are_drawn(model_dir, data_file, tmp_path, capfd):
    """30 examples in steps of 8 are 8, 8, 8 and 6; also after a resume."""
    flags = {"effective_batch_size": 8, "max_steps": 6, "save_steps": 3}
    assert run(model_dir, data_file, tmp_path / "out", **flags) == 0
    assert "step 4/6 | 30 samples" in capfd.readouterr().err
    assert [samples for _, samples, _ in logged(tmp_path / "out")] == [8, 16, 24, 30, 38, 46]
    flags |= {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-3", "max_steps": 5}
    assert run(model_dir, data_file, tmp_path / "out", **flags) == 0
    shown = capfd.readouterr()
    assert "step 5/5 | 38 samples" in shown.err and "trained   2 steps, 14 samples" in shown.out
    assert [samples for _, samples, _ in logged(tmp_path / "out")] == [8, 16, 24, 30, 38]


def test_a_run_with_a_schedule_goes_on_as_if_it_had_not_stopped(
    model_dir, data_file, tmp_path, capfd
):
    """30 examples in steps of 4, 4, 9, 9 and 4, and then of 9."""
    flags = {"model_name_or_path": model_dir, "dataset_name": data_file, "save_steps": 1}
    flags |= {"effective_batch_schedule": "4:0,9:2", "lr_rule": "sqrt", "beta2_rule": True}
    flags |= {"max_steps": 7, "gradient_checkpointing": False, "learning_rate": 1e-3}
    flags |= {"lr_scheduler_type": "constant"}
    assert train(**flags, output_dir=tmp_path / "whole") == 0
    said = capfd.readouterr()
    assert "effective batch 4:0,9:2, learning rate sqrt, beta2 too; at first 4" in said.err
    assert "step 5/7 | 30 samples" in said.err and "trained   7 steps, 48 samples" in said.out
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert train(resume_from_checkpoint=checkpoint, output_dir=tmp_path / "again") == 0
    whole, again = ((tmp_path / name / "metrics.jsonl") for name in ("whole", "again"))
    lines = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in (whole, again)
    ]
    assert [line["samples"] for line in lines[0]] == [4, 8, 17, 26, 30, 39, 48]
    rates = [1e-3] * 2 + [1.5e-3] * 5
    assert [line["learning_rate"] for line in lines[0]] == pytest.approx(rates)
    for name in ("samples", "loss", "learning_rate", "grad_norm", "epoch"):
        assert [line[name] for line in lines[0][3:]] == [line[name] for line in lines[1]]
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--effective_batch_size=8"], "says how large the effective batch is, and so does --eff"),
        (["--gradient_accumulation_steps=8"], "and so does --gradient_accumulation_steps"),
        (["--effective_batch_schedule=4:0,8"], "'8' is no size with its begin"),
        (["--lr_rule=cubic"], "--lr_rule: there is no 'cubic'"),
    ],
)
def test_a_schedule_that_contradicts_is_refused(flags, said):
    with pytest.raises(BadInput) as refused:
        arguments.parse(["--effective_batch_schedule", "4:0,8:2k", *flags])
    assert said in str(refused.value)


def test_a_schedule_from_flags():
    words = ["--effective_batch_schedule", "4:0,32:2k,8:1M", "--lr_rule", "linear", "--beta2_rule"]
    parsed = arguments.parse(words)
    assert parsed.effective_batch_size == 32
    assert str(parsed.schedule) == "4:0,32:2k,8:1M" and parsed.schedule.lr == "linear"
    assert parsed.schedule.beta2
    assert arguments.parse([]).schedule is None
    for flag in ("--lr_rule=sqrt", "--beta2_rule"):
        with pytest.raises(BadInput, match="is for sizes that change, and there is no schedule"):
            arguments.parse([flag])


def test_bench_and_a_schedule_do_not_go_together(capfd):
    assert main(["bench", "--effective_batch_schedule=4:0,32:2k"]) == 2
    assert "hint: --effective_batch_size 32, the largest" in capfd.readouterr().err


def test_a_run_that_diverges_says_so(model_dir, data_file, tmp_path, capfd):
    flags = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    assert run(model_dir, data_file, tmp_path / "out", **flags) == 1
    shown = capfd.readouterr()
    assert "the loss is not finite: what was saved is of no use" in shown.out
    assert "UserWarning" not in shown.err and "warning: the loss of the last step" in shown.err


WRONG = {
    "a missing file": ({"dataset_name": "nowhere.jsonl"}, "there is no nowhere.jsonl"),
    "an unknown kind of file": ({"dataset_name": "{kind}"}, "is none of .jsonl"),
    "a malformed file": ({"dataset_name": "{malformed}"}, "cannot be read"),
    "an empty file": ({"dataset_name": "{empty}"}, "is empty"),
    "a file of blank lines": ({"dataset_name": "{blank}"}, "has no examples"),
    "a missing column": ({"dataset_name": "{columns}"}, "has the columns 'question', 'answer'"),
    "a missing split": ({"dataset_train_split": "dev"}, "has no split 'dev', only 'train'"),
    "labels that are all masked": ({"max_length": 2}, "masked"),
    "an effective batch of 0": ({"effective_batch_size": 0}, "--effective_batch_size 0 is below 1"),
    "a negative effective batch": ({"effective_batch_size": -8}, "is below 1"),
    "an effective batch that is no number": (
        {"effective_batch_size": "many"},
        "--effective_batch_size: invalid int value: 'many'",
    ),
    "an unknown value": ({"optim": "adamw_torc"}, "did you mean adamw_torch?"),
    "a value that looks like a flag": ({"learning_rate": None, "-1e-3": None}, "no value follows"),
    "what is no flag": ({"{pairs}": None}, "hint: --dataset_name"),
    "a value without its quotes": ({"budget": "4", "examples": None}, "'examples' is no flag"),
    "wrong JSON": (
        {"lr_scheduler_kwargs": None, "{{bad": None},
        "--lr_scheduler_kwargs {bad is no",
    ),
    "a learning rate without end": ({"learning_rate": "inf"}, "--learning_rate inf is not finite"),
    "no length": ({"max_length": -5}, "--max_length -5 leaves no token"),
    "a model that is not there": ({"model_name_or_path": "./nope"}, "there is no directory ./nope"),
    "weights that are cut off": ({"model_name_or_path": "{corrupt}"}, "SFTTrainer refuses this"),
    "a model without a tokenizer": ({"model_name_or_path": "{bare}"}, "hint: save the tokenizer"),
    "a quantised model alone": ({"load_in_4bit": True}, "hint: add --use_peft"),
    "labels of another model": (
        {"dataset_name": "{labels}"},
        "labels of the data hold the token 99",
    ),
    "labels of another length": ({"dataset_name": "{ragged}"}, "has 3 input_ids and 2 labels"),
    "evaluation without data": ({"eval_strategy": "steps"}, "train.jsonl and test.jsonl"),
    "the format of Alpaca": ({"dataset_name": "{alpaca}"}, "hint: Alpaca: join instruction"),
    "an empty config": ({"config": "{empty}"}, "holds no flags"),
    "a wrong config": ({"config": "{yaml}"}, "is no YAML: line 2: mapping values are not allowed"),
    "a reporter that is not installed": ({"report_to": "wandb"}, "pip install wandb"),
    "a kernel that is not installed": ({"use_liger_kernel": True}, "pip install liger-kernel"),
    "an unknown flag": ({"efective_batch_size": 8}, "there is no flag --efective_batch_size"),
    "a wrong budget": ({"budget": "lots"}, "neither auto nor a number of tokens"),
    "a wrong value": ({"learning_rate": "fast"}, "--learning_rate"),
    "contradicting flags": (
        {
            "effective_batch_size": 9,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        },
        "--effective_batch_size 9 contradicts 2 rows x 4 steps = 8",
    ),
    "an unwritable output directory": (
        {"output_dir": "{empty}/out"},
        "cannot write to --output_dir",
    ),
    "a directory that is no model": ({"model_name_or_path": "{here}"}, "has no config.json"),
    "no such checkpoint": ({"resume_from_checkpoint": "{here}"}, "is no checkpoint"),
    "no epoch": ({"num_train_epochs": 0, "max_steps": -1}, "--num_train_epochs 0.0 is not above 0"),
    "no step": ({"max_steps": 0}, "--max_steps 0 is below 1"),
    "a negative learning rate": ({"learning_rate": -1}, "Invalid learning rate: -1.0"),
    "a shrinking batch": ({"auto_find_batch_size": True}, "--budget says how large"),
    "strategies that do not match": ({"load_best_model_at_end": True}, "but found - Evaluation"),
    "tokens of another model": (
        {"dataset_name": "{foreign}"},
        "input_ids of the data hold the token 64, and the model",
    ),
    "rows of one token": ({"dataset_name": "{short}"}, "every label of the data is masked"),
    "no such config": ({"config": "none.yaml"}, "No such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_exits_with_2_before_any_work(name, model_dir, tmp_path, capfd, monkeypatch):
    flags, message = WRONG[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = {name: tmp_path / name for name in ("kind.xyz", "malformed.jsonl", "empty.jsonl")}
    files |= {name: tmp_path / name for name in ("blank.txt", "columns.jsonl", "pairs.jsonl")}
    files |= {name: tmp_path / name for name in ("foreign.jsonl", "short.jsonl")}
    files["kind.xyz"].write_text("x")
    files["malformed.jsonl"].write_text('{"prompt": "a", "completion": "b"}\n{"prompt": oops\n')
    files["empty.jsonl"].touch()
    files["blank.txt"].write_text("\n \n")
    files["foreign.jsonl"].write_text('{"input_ids": [1, 64]}\n')
    files["short.jsonl"].write_text('{"input_ids": [5]}\n' * 2)
    more = {
        "labels.jsonl": '{"input_ids": [1, 2], "labels": [-100, 99]}\n',
        "ragged.jsonl": '{"input_ids": [1, 2, 3], "labels": [1, 2]}\n',
        "alpaca.jsonl": '{"instruction": "a", "input": "b", "output": "c"}\n',
        "yaml.yaml": "max_steps: 1\na: b: c\n",
    }
    files |= {name: tmp_path / name for name in more}
    for file, text in more.items():
        files[file].write_text(text)
    for kind in ("corrupt", "bare"):
        files[kind] = tmp_path / kind
        shutil.copytree(model_dir, files[kind])
    weights = files["corrupt"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for file in files["bare"].glob("token*"):
        file.unlink()
    files["columns.jsonl"].write_text('{"question": "a", "answer": "b"}\n')
    prompts(9).filter(lambda row: len(row["prompt"]) > 9).to_json(files["pairs.jsonl"])
    places = {path.stem: str(path) for path in files.values()} | {"here": str(tmp_path)}
    common = {
        "model_name_or_path": str(model_dir),
        "dataset_name": places["pairs"],
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
    }
    words = []
    for flag, value in (common | flags).items():
        if value is None:  # a word as it is, or a flag whose value follows
            words.append(f"--{flag}" if flag in ("learning_rate", "lr_scheduler_kwargs") else flag)
        else:
            words.append(f"--{flag}={value}")
    words = [word.format(**places) for word in words]
    assert main(["train", *words]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and message in shown.err and "Traceback" not in shown.err
    assert not (tmp_path / "out").exists()


def test_unknown_flags_name_the_nearest(capfd):
    assert train("--efective_batch_size=8") == 2
    assert "did you mean --effective_batch_size?" in capfd.readouterr().err


def test_help_teaches_and_commands_are_checked(capsys):
    assert main(["--help"]) == 0 and "train" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--effective_batch_size N" in shown and "gradaccum train --config" in shown
    assert train("--help-all") == 0 and "--weight_decay" in capsys.readouterr().out
    assert main(["--version"]) == 0 and gradaccum.__version__ in capsys.readouterr().out
    assert main(["tarin"]) == 2 and main([]) == 2
    assert "no command 'tarin'" in capsys.readouterr().err


def test_the_effective_batch_follows_from_stock_flags():
    parsed = arguments.parse(["--per_device_train_batch_size=3", "--gradient_accumulation_steps=5"])
    assert parsed.effective_batch_size == 15 and parsed.budget == "auto"
    parsed = arguments.parse(["--budget=2_048 tokens", "--model_name_or_path=x"])
    assert parsed.effective_batch_size == 8 and parsed.budget == Budget(tokens=2048)
    assert arguments.parse([]).effective_batch_size == 32


def test_embedded_data_is_real_ragged_and_the_same_each_time():
    pairs = embedded.functions(50)
    assert pairs == embedded.functions(50) and len(pairs) == 50
    for pair in pairs:
        assert pair["prompt"].lstrip().startswith(("def ", "async def "))
        assert pair["completion"].startswith("\n") and pair["completion"].strip()
        ast.parse(pair["prompt"] + pair["completion"])  # a nested one may name its outer variables
    tok = embedded.tokenizer([p["prompt"] + p["completion"] for p in pairs], vocab_size=600)
    for pair in pairs[:9]:
        whole = tok(pair["prompt"] + pair["completion"])["input_ids"]
        prompt = tok(pair["prompt"])["input_ids"]
        assert tok.decode(whole) == pair["prompt"] + pair["completion"]
        assert whole[: len(prompt)] == prompt
    state = torch.get_rng_state()
    one, other = embedded.model(tok, seed=1), embedded.model(tok, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a pseudo terminal")
def test_a_terminal_gets_a_view_that_stays_in_place(model_dir, data_file, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    words = [
        sys.executable, "-m", "gradaccum", "train", f"--model_name_or_path={model_dir}",
        f"--dataset_name={data_file}", f"--output_dir={tmp_path / 'out'}", "--max_steps=2",
        "--effective_batch_size=4",
    ]  # fmt: skip
    process = subprocess.Popen(words, stderr=follower, stdout=subprocess.DEVNULL)
    os.close(follower)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end has closed
            break
        shown += chunk
    assert process.wait(timeout=10) == 0
    text = shown.decode(errors="replace")
    assert "step 2/2, 8 samples" in text and "tokens/s" in text and "head-room" in text
    assert Path(tmp_path / "out" / "model.safetensors").is_file()


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert MetricsFile(path).resume(2) == {"step": 2}
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_signal_after_the_last_step_stops_nothing():
    """The model is saved as after any run, not left behind without a checkpoint."""
    for step, is_stopped in ((1, True), (2, False)):
        stop, control = StopOnSignal(ALONE), SimpleNamespace()
        stop._receive(signal.SIGTERM, None)
        stop.on_step_end(None, SimpleNamespace(global_step=step, max_steps=2), control)
        assert stop.stopped == is_stopped == hasattr(control, "should_save")
