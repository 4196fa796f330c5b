"""`gradaccum train` under torchrun: one run, on any number of ranks, whatever becomes of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launch import ROOT, descendants, free_port
from tests.hf_models import llama, prompts, tokenizer

STEPS = 24
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    llama(tie_word_embeddings=False).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    prompts(45).to_json(folder / "pairs.jsonl")
    return folder


def started(inputs, output, nproc, *words, restarts=2):
    flags = [
        f"--model_name_or_path={inputs / 'model'}", f"--dataset_name={inputs / 'pairs.jsonl'}",
        f"--output_dir={output}", f"--max_steps={STEPS}", "--effective_batch_size=10",
        "--gradient_checkpointing=False", "--save_steps=3", "--learning_rate=1e-3", "--json",
        "--budget=3 examples", "--optim=sgd", *words,
    ]  # fmt: skip
    torchrun = [
        "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), "--max-restarts",
        str(restarts), "--monitor-interval", "0.2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}",
    ]  # fmt: skip
    command = [*(torchrun if nproc > 1 else ()), "-m", "gradaccum", "train", *flags]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, err = process.communicate(timeout=240)
    return out, err


def lines(output):
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(process, condition):
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < 200
        time.sleep(0.02)


def workers(process):
    """Return the ranks, whose command line has train in it."""
    return [
        pid
        for pid in descendants(process.pid)
        if b"gradaccum\0train" in open(f"/proc/{pid}/cmdline", "rb").read()
    ]


def same(output, whole):
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (output, whole))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6), name
    told = [[(x["step"], x["samples"], x["weight"]) for x in lines(p)] for p in (output, whole)]
    assert told[0] == told[1]
    assert [x["loss"] for x in lines(output)] == pytest.approx([x["loss"] for x in lines(whole)])


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    process = started(inputs, output, 1)
    _, err = ended(process)
    assert process.returncode == 0, err
    return output


def test_two_ranks_say_and_write_once_what_one_does(inputs, whole, tmp_path):
    process = started(inputs, tmp_path / "out", 2)
    out, err = ended(process)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["steps"] == STEPS and summary["proof"]["relative_error"] < 1e-6
    assert err.count(f"step {STEPS}/{STEPS} |") == 1 and "on 2 ranks" in err
    same(tmp_path / "out", whole)


def test_a_killed_rank_is_started_anew_and_nothing_is_lost(inputs, whole, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    process = started(inputs, output, 2, "--resume_from_checkpoint=auto")
    wait_for(process, lambda: len(lines(output)) > 4)
    os.kill(workers(process)[-1], signal.SIGKILL)
    out, err = ended(process)
    assert process.returncode == 0, err
    assert "resume " in err and json.loads(out)["step"] == STEPS
    same(output, whole)


def test_a_restart_does_not_take_the_folder_of_another_run(inputs, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    before = {path: path.stat() for path in output.rglob("*") if path.is_file()}
    process = started(inputs, output, 2, restarts=1)
    _, err = ended(process)
    assert process.returncode != 0
    assert err.count("is not empty, and nothing is overwritten") == 2, "at each start"
    assert {path: path.stat() for path in output.rglob("*") if path.is_file()} == before


def test_restarts_that_would_be_refused_are_told_before(inputs, tmp_path):
    for words, told in (((), True), (("--resume_from_checkpoint=auto",), False)):
        output = tmp_path / str(told)
        process = started(inputs, output, 2, "--max_steps=1", *words)
        _, err = ended(process)
        assert process.returncode == 0, err
        assert ("warning: after a restart by torchrun" in err) == told


def test_a_signal_to_one_rank_stops_all_and_another_number_goes_on(inputs, whole, tmp_path):
    output = tmp_path / "out"
    process = started(inputs, output, 2)
    wait_for(process, lambda: len(lines(output)) > 4)
    os.kill(workers(process)[-1], signal.SIGTERM)
    _, err = ended(process)
    assert "stopped by SIGTERM, saved" in err
    process = started(inputs, output, 1, "--resume_from_checkpoint=last")
    _, err = ended(process)
    assert process.returncode == 0, err
    same(output, whole)


def test_the_whole_job_is_killed_at_once_and_again(inputs, whole, tmp_path):
    """At any moment, while it writes a checkpoint as well."""
    output = tmp_path / "out"
    for least, nproc in ((2, 2), (7, 1), (11, 2), (0, 1)):
        process = started(inputs, output, nproc, "--resume_from_checkpoint=auto")
        if least:
            wait_for(process, lambda least=least: len(lines(output)) > least)
            for pid in [*descendants(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.communicate()
    _, err = ended(process)
    assert process.returncode == 0, err
    assert not (output / ".writing").exists()
    same(output, whole)


def test_what_all_refuse_is_said_once(inputs, tmp_path):
    process = started(inputs, tmp_path / "out", 2, "--max_length=1", restarts=0)
    out, err = ended(process)
    assert process.returncode != 0 and not out
    assert err.count("leaves no token to predict") == 1
