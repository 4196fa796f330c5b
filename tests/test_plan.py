"""Planned, measured, chosen: what fits, what is fastest, and what is said where nothing does."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

import gradaccum
from gradaccum.cli.main import main
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.memory import auto, choose, forecast
from gradaccum.memory.cap import cap_of
from gradaccum.memory.predict import Job, trace
from gradaccum.memory.probe import Probed, _fitted, probe
from gradaccum.memory.recipes import optimizer_of
from gradaccum.types import GIB, Budget
from tests import models, oracle
from tests.hf_models import llama

CONFIG = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
CPU, MIB = torch.device("cpu"), 2**20


@pytest.mark.parametrize(
    ("memory", "num_bytes"),
    [("20GiB", 20 * GIB), ("24 GB", 24 * 10**9), ("1.5g", 1.5 * GIB), ("512MiB", 512 * MIB),
     (3 * GIB, 3 * GIB), ("1e9", 10**9)],
)  # fmt: skip
def test_amounts_of_memory(memory, num_bytes):
    assert cap_of(memory, CPU).stated_bytes == num_bytes
    assert cap_of(memory, CPU).num_bytes < num_bytes


@pytest.mark.parametrize("memory", [0.5, "0.5", "50%"])
def test_parts_of_the_device(memory):
    total = gradaccum.memory.cap.total_bytes(CPU)
    assert cap_of(memory, CPU).stated_bytes == pytest.approx(total / 2)


@pytest.mark.parametrize("memory", ["lots", "20 GiB of it", -1, "0", "150%", "7", True, "12 pc"])
def test_nonsense_is_refused(memory):
    with pytest.raises(BadInput, match="memory="):
        cap_of(memory, CPU)


def test_a_gpu_that_is_not_here_needs_an_amount():
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(BadInput, match="no GPU here"):
        cap_of(None, torch.device("cuda"))
    cap = cap_of("24GiB", torch.device("cuda"))
    assert cap.num_bytes < 24 * GIB / 1.06 and "context" in cap.assumptions[1]


def test_a_gpu_that_is_here_is_measured_for_what_no_tensor_holds(monkeypatch):
    def inputs(rows, length):
        ids = torch.zeros(rows, length, dtype=torch.long)
        return {"input_ids": ids, "labels": ids.clone()}

    model = llama()
    job = Job(model, gradaccum.causal_lm(), torch.optim.SGD, inputs, as_cuda=True)
    taken = trace(job, 1, 16).peak_bytes + 5 * MIB
    monkeypatch.setattr(forecast, "_probed", lambda *_: Probed((0, 0, 0), (taken, 0, 0)))
    assert forecast.beyond_tensors(job, 16) == 5 * MIB
    cap = cap_of("24GiB", torch.device("cuda"), beyond_bytes=5 * MIB)
    assumed = cap_of("24GiB", torch.device("cuda"))
    assert cap.num_bytes > assumed.num_bytes
    assert "5 MiB for the workspace of cuBLAS and of kernels (measured)" in cap.assumptions[1]
    assert "kernels (assumed)" in assumed.assumptions[1]


class Linear:
    """Time and memory as they are told."""

    def __init__(self, t0=0.0, t1=1.0, t2=0.0, fixed=0):
        self.times, self.fixed = (t0, t1, t2), fixed

    def seconds(self, rows, length):
        t0, t1, t2 = self.times
        return t0 + t1 * rows * length + t2 * rows * length**2

    def peak_bytes(self, rows, length):
        return self.fixed + rows * length


def chosen(lengths, batch, forecast, cap=10**9):
    drawn = choose.windows(lengths, batch)
    choices = [choose.weigh(b, drawn, forecast) for b in choose.budgets(lengths, batch)]
    return choose.best(choices, cap)


def test_the_smallest_within_two_percent_is_chosen_not_the_largest_that_fits():
    """With a start of 10 a micro-batch and 1 a token, 500 tokens lose 2%."""
    found = chosen([100], 64, Linear(t0=10))
    assert found.budget == Budget(examples=5) and found.rows == 5 and found.num_micros == 13


def test_without_a_start_one_row_at_a_time_is_enough():
    assert chosen([100], 64, Linear()).budget == Budget(examples=1)


def test_memory_bounds_the_choice():
    assert chosen([100], 64, Linear(t0=50), cap=300).budget == Budget(examples=3)
    assert chosen([100], 64, Linear(t0=10), cap=99) is None


def test_padding_is_weighed_against_starts():
    lengths = [10] * 50 + [1000] * 4
    found = chosen(lengths, 32, Linear(t0=30))
    assert 100 <= found.budget.tokens <= 2000
    assert found.peak_bytes >= 1000  # the longest row counts, in the worst window


def test_the_worst_window_is_among_those_looked_at():
    drawn = choose.windows(list(range(1, 101)), 10)
    assert drawn[-1] == list(range(91, 101)) and len(drawn) == 11


def test_three_probes_give_time_and_memory_back():
    shapes = [(1, 10), (8, 100), (1, 400)]
    found = {s: 5 + 2 * s[0] * s[1] + 0.5 * s[0] * s[1] ** 2 for s in shapes}
    assert _fitted(found) == pytest.approx((5, 2, 0.5))
    assert min(_fitted({(1, 10): 3.0, (8, 100): 2.0, (1, 400): 1.0})) >= 0
    assert _fitted({}) == (0, 0, 0)


def test_probing_leaves_no_trace():
    model = models.model(dropout=0.3, dtype=torch.float32)
    objective = gradaccum.causal_lm()
    accumulator = gradaccum.Accumulator(
        model, objective, budget=Budget(examples=2), after_micro=lambda micro: pytest.fail("ran")
    )
    host = gradaccum.batch.as_batch(models.examples([4, 9, 20, 6, 5]), None)
    before = torch.get_rng_state()
    probed, num = probe(accumulator, host, gradaccum.measured.quiet)
    assert num == 3 and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert accumulator.budget == Budget(examples=2) and accumulator.objective is objective
    assert probed.seconds(4, 20) > 0 and probed.peak_bytes(4, 20) > probed.peak_bytes(1, 4)


def test_a_budget_is_found_at_the_first_batch_and_remembered():
    examples = models.examples([9, 5, 12, 4, 7, 6, 11, 3])
    whole = gradaccum.Accumulator(models.model(), gradaccum.causal_lm(), budget=Budget(examples=8))
    whole.backward(examples)
    expected = oracle.left_in(whole.model)
    found = []
    for _ in range(2):
        accumulator = gradaccum.Accumulator(models.model(), gradaccum.causal_lm())
        accumulator.backward(examples)
        found.append(accumulator.found)
    assert [f.num_probes for f in found] == [3, 0] and found[0].budget == found[1].budget
    assert "measured in " in str(found[0]) and "remembered" in str(found[1])
    assert oracle.error(oracle.left_in(accumulator.model), expected) < 1e-12


def test_memory_that_is_stated_bounds_what_is_found():
    probed = Probed((1.0, 1e-3, 0.0), (100 * MIB, MIB, 0.0))
    forecast = auto._Careful(probed)
    assert forecast.peak_bytes(1, 10) == round((100 + 11) * MIB)
    accumulator = gradaccum.Accumulator(models.model(), gradaccum.causal_lm(), memory="1GiB")
    accumulator.backward(models.examples([9, 5]))
    assert accumulator.found.cap.stated_bytes == GIB


@pytest.mark.parametrize(("memory", "expected"), [("1GiB", False), ("20MiB", True)])
def test_checkpointing_is_chosen_where_memory_costs_speed(monkeypatch, tmp_path, memory, expected):
    """Many rows at once are fast and large; with checkpointing slower, and small."""
    model = llama()

    def probed(accumulator, host, aside):
        on = accumulator.model.is_gradient_checkpointing
        return Probed((1.0, 1e-3 * (1.3 if on else 1), 0.0), (0.0, MIB / (8 if on else 1), 0.0)), 3

    monkeypatch.setattr(auto, "probe", probed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    accumulator = gradaccum.Accumulator(model, gradaccum.causal_lm(), budget=Budget(examples=1))
    found = auto.find(accumulator, [], [10] * 8, 8, memory=memory, may_checkpoint=True)
    assert found.checkpointing is model.is_gradient_checkpointing is expected
    assert found.num_probes == (6 if expected else 3)
    assert ("gradient checkpointing on" in str(found)) is expected
    again = auto.find(accumulator, [], [10] * 8, 8, memory=memory, may_checkpoint=True)
    assert (again.budget, again.checkpointing, again.num_probes) == (found.budget, expected, 0)


def test_batch_norm_takes_the_whole_batch():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    objective = gradaccum.from_mean(lambda m, x: m(x).square().mean(), weight="rows")
    step = gradaccum.Accumulator(model, objective).backward(torch.randn(6, 3))
    assert step.num_micros == 1


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"budget": "full"}, "neither"), ({"budget": 512}, "no gradaccum.Budget"),
     ({"budget": Budget(tokens=8), "memory": "1GiB"}, "for budget"),
     ({"memory": "much"}, "no amount")],
)  # fmt: skip
def test_wrong_budgets(kwargs, said):
    with pytest.raises(BadInput, match=said):
        gradaccum.Accumulator(models.model(), gradaccum.causal_lm(), **kwargs)


def test_what_runs_out_all_the_same_is_recovered():
    model = models.model(dtype=torch.float32)

    def grudging(module, args, kwargs):
        if kwargs["input_ids"].numel() > 12:
            raise torch.OutOfMemoryError("more than 12 tokens")

    model.register_forward_pre_hook(grudging, with_kwargs=True)
    step = gradaccum.Accumulator(model, gradaccum.causal_lm()).backward(
        models.examples([9, 5, 12, 4, 7, 6, 11, 3])
    )
    assert step.num_examples == 8 and max(m.size for m in step.micros) <= 12


def test_a_plan_is_what_a_trace_of_it_takes():
    found = gradaccum.plan(CONFIG, effective_batch=8, lengths=64, memory="2GiB")
    one = found.chosen
    assert one.fits and one.peak_bytes <= found.cap.num_bytes
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG).train()
    model.config.use_cache = False

    def inputs(rows, length):
        ids = torch.zeros(rows, length, dtype=torch.long)
        return {"input_ids": ids, "labels": ids.clone()}

    work = Job(model, gradaccum.causal_lm(chunk=one.chunk), optimizer_of("adamw")[0], inputs,
               checkpointing=one.checkpointing)  # fmt: skip
    num_micros = 1 if one.num_micros == 1 else 2
    assert trace(work, one.rows, 64, num_micros=num_micros).peak_bytes == one.peak_bytes
    assert str(found).startswith("effective batch 8 on 2.0 GiB: ")


def test_less_memory_takes_checkpointing_or_chunks_and_in_the_end_nothing_fits(monkeypatch):
    monkeypatch.setattr("gradaccum.memory.forecast.SMALL", 0)  # times by what operations take
    wide = gradaccum.plan(CONFIG, effective_batch=8, lengths=2048, memory="2GiB")
    assert not wide.chosen.checkpointing and wide.chosen.chunk is None
    options = {(o.checkpointing, o.chunk) for o in wide.options}
    assert options == {(False, None)}  # what computes more cannot be faster
    least = min(o.peak_bytes for o in wide.options)
    tight = gradaccum.plan(CONFIG, effective_batch=8, lengths=2048, memory=round(0.75 * least))
    assert tight.chosen.checkpointing or tight.chosen.chunk
    assert tight.chosen.peak_bytes < 0.75 * least
    with pytest.raises(DoesNotFit, match="one micro-batch of 1 x 2,048 tokens takes at least"):
        gradaccum.plan(CONFIG, effective_batch=8, lengths=2048, memory="8MiB")
    with pytest.raises(DoesNotFit, match="the parameters alone take"):
        gradaccum.plan(CONFIG, effective_batch=8, lengths=2048, memory="3MiB")


def test_checkpointing_that_is_stated_stays():
    found = gradaccum.plan(CONFIG, effective_batch=4, lengths=64, memory="1GiB", checkpointing=True)
    assert all(option.checkpointing for option in found.options)


def test_ragged_lengths_give_a_budget_in_tokens():
    lengths = [20, 30, 25, 400, 60, 35, 22] * 4
    found = gradaccum.plan(CONFIG, effective_batch=8, lengths=lengths, memory="1GiB")
    assert found.budget.tokens and found.chosen.length <= 400


def test_examples_of_any_kind_can_be_planned():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    images = [{"x": torch.zeros(3, 8, 8), "y": 1} for _ in range(4)]
    objective = gradaccum.from_mean(
        lambda m, b: torch.nn.functional.cross_entropy(m(b["x"]), b["y"]), weight="rows"
    )
    found = gradaccum.plan(model, objective, effective_batch=16, examples=images, memory="1GiB")
    assert found.budget.examples


def test_a_gpu_is_planned_for_without_one():
    found = gradaccum.plan(CONFIG, effective_batch=8, lengths=64, memory="4GiB", device="cuda")
    text = " ".join(found.assumptions)
    assert "cuBLAS" in text and "relative" in text and "s a step" not in str(found)
    on_cpu = gradaccum.plan(CONFIG, effective_batch=8, lengths=64, memory="4GiB", device="cpu")
    same = next(o for o in found.options if o.budget == on_cpu.options[0].budget)
    assert same.peak_bytes > on_cpu.options[0].peak_bytes


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"effective_batch": 0}, "effective_batch"), ({"effective_batch": 2.5}, "effective_batch"),
     ({"lengths": []}, "lengths"), ({"lengths": [1]}, "lengths"), ({"lengths": "long"}, "lengths"),
     ({"optimizer": "adamwx"}, "optimizer"), ({"device": "mps"}, "neither cpu nor cuda")],
)  # fmt: skip
def test_wrong_arguments_of_plan(kwargs, said):
    with pytest.raises(BadInput, match=said):
        gradaccum.plan(CONFIG, **{"effective_batch": 4, "lengths": 16, "memory": "1GiB"} | kwargs)


def test_what_cannot_be_planned_is_said():
    with pytest.raises(BadInput, match="a module or a configuration"):
        gradaccum.plan("llama", effective_batch=4)
    with pytest.raises(BadInput, match="no causal language model"):
        gradaccum.plan(T5Config(), effective_batch=4, lengths=16, memory="1GiB")

    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, **_):
            return self.inner(input_ids) if input_ids.sum().item() >= 0 else None

    model = Looks()
    found = gradaccum.plan(model, effective_batch=4, lengths=16, memory="1GiB", optimizer="sgd")
    assert "measured on three" in found.assumptions[-1] and found.chosen.fits
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(BadInput, match="Looks cannot be traced") as caught:
        gradaccum.plan(model.to("meta"), effective_batch=4, lengths=16, memory="1GiB")
    assert "with its weights" in str(caught.value)


@pytest.fixture
def command(capsys):
    def run(*words):
        code = main(["plan", *words])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    CONFIG.save_pretrained(path)
    return path / "config.json"


def test_the_command_needs_a_config_alone(command, config_file, tmp_path):
    picture = tmp_path / "plan.svg"
    done = command(f"--model_name_or_path={config_file}", "--effective_batch_size=64",
                   "--max_length=128", "--memory=1GiB", f"--plot={picture}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("effective batch 64 on 1.0 GiB: ")
    assert (
        "<- this" in done.stdout and "TrainingArguments(per_device_train_batch_size=" in done.stdout
    )
    assert "every example has 128 tokens" in done.stdout
    assert picture.read_text().lstrip().startswith("<?xml")


def test_a_target_that_does_not_divide_is_told_both_ways(command, config_file):
    done = command(f"--model_name_or_path={config_file.parent}", "--effective_batch_size=31",
                   "--max_length=64", "--memory=1GiB", "--json", "--use_peft")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["effective_batch"] == 31 and found["chosen"]["fits"]
    assert sum(found["chosen"]["categories"].values()) == found["chosen"]["peak_bytes"]


def test_a_four_bit_base_is_planned_for_a_gpu(command, config_file):
    done = command(f"--model_name_or_path={config_file}", "--use_peft", "--load_in_4bit",
                   "--memory=2GiB", "--device=cuda", "--optim=paged_adamw_8bit")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4-bit layers by shape" in done.stdout and "host's memory" in done.stdout


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [(["--memory=lots"], "no amount of memory", 2), (["--plot=a.txt"], "neither .png nor .svg", 2),
     (["--device=tpu"], "--device is cpu or cuda", 2), (["--memory=6MiB"], "takes at least", 1),
     (["--load_in_4bit"], "add --use_peft", 2), (["--optim=galore_adamw"], "not known", 2)],
)  # fmt: skip
def test_wrong_flags_of_the_command(command, config_file, words, said, code):
    done = command(f"--model_name_or_path={config_file}", "--max_length=64", *words)
    assert said in done.stderr and done.returncode == code


def test_unknown_architectures(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    done = command(f"--model_name_or_path={tmp_path}")
    assert done.returncode == 2 and "names no model that is known" in done.stderr
    assert command("--model_name_or_path=./nowhere").returncode == 2
