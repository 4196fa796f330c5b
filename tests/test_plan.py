"""Planned, measured, chosen: what fits, what is fastest, and what is said where nothing does."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

import gradaccum
from gradaccum.batch import as_batch
from gradaccum.cli.main import main
from gradaccum.errors import BadInput, DoesNotFit
from gradaccum.memory import auto, choose, forecast
from gradaccum.memory import probe as probes
from gradaccum.memory.cap import cap_of, held_bytes
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


def test_a_gpu_that_is_not_here_needs_an_amount(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
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
    taken = trace(job, 1, 16).peak_bytes + 5 * MIB - held_bytes(model)
    monkeypatch.setattr(forecast, "_probed", lambda *_: Probed((0, 0, 0), (taken, 0, 0)))
    assert forecast.beyond_tensors(job, 16) == 5 * MIB
    cap = cap_of("24GiB", torch.device("cuda"), beyond_bytes=5 * MIB)
    assumed = cap_of("24GiB", torch.device("cuda"))
    assert cap.num_bytes < assumed.num_bytes
    assert "5 MiB for those of kernels (measured)" in cap.assumptions[1]
    assert "kernels" not in assumed.assumptions[1]


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
    forecast = auto._Careful(probed, 0)
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
    host = as_batch([{"input_ids": [1] * 10}, {"input_ids": [1] * 9}], None)
    found = auto.find(accumulator, host, [10] * 8, 8, memory=memory, may_checkpoint=True)
    assert found.checkpointing is model.is_gradient_checkpointing is expected
    assert found.num_probes == (6 if expected else 3)
    assert ("gradient checkpointing on" in str(found)) is expected
    again = auto.find(accumulator, host, [10] * 8, 8, memory=memory, may_checkpoint=True)
    assert (again.budget, again.checkpointing, again.num_probes) == (found.budget, expected, 0)


@pytest.mark.parametrize(("num", "is_stated"), [(1, True), (3, False), (3, True)])
def test_what_fits_nowhere_is_refused_if_the_memory_is_stated(caplog, num, is_stated):
    """One micro-batch alone finds no gradients: it may fit all the same, and is tried."""
    choices = [auto.Choice(Budget(tokens=8), 1.0, num, 1, 8, size, 1.0) for size in (9, 8)]
    cap = cap_of("1GiB", CPU)
    if num > 1 and is_stated:
        with pytest.raises(DoesNotFit, match="even the smallest micro-batch, 1 example of 8"):
            auto._smallest(choices, cap, is_stated=is_stated)
        return
    assert auto._smallest(choices, cap, is_stated=is_stated) is choices[1]
    assert "it is tried all the same" in caplog.text


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
    assert any(option is one for option in found.options)  # the table tells of what was traced
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


def test_replicas_take_a_share_each_and_a_bucket():
    given = {"memory": "8GiB", "lengths": 64, "checkpointing": False}
    alone = gradaccum.plan(CONFIG, effective_batch=8, **given)
    four = gradaccum.plan(CONFIG, effective_batch=30, ranks=4, **given)
    held = 4 * LlamaForCausalLM(CONFIG).num_parameters()  # less than a bucket
    more = []
    for each in four.options:
        one = next(o for o in alone.options if (o.budget, o.chunk) == (each.budget, each.chunk))
        assert each.sync is None
        if each.budget not in (alone.budget, four.budget):  # confirmed by a trace of their own
            more.append(each.peak_bytes - one.peak_bytes)
    # Where the optimizer's step takes most, the bucket does not add to it.
    assert min(more) >= 0 and max(more) == held
    assert str(four).startswith("effective batch 30 on 4 ranks of 8.0 GiB: ")
    assert str(four.spread) == "4 replicas" and four.spread.micro_bytes == 0
    assert four.spread.step_bytes == pytest.approx(2 * held * 3 / 4)


def test_shards_are_gathered_and_reduced_as_memory_allows():
    deep = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
                       num_attention_heads=4, num_key_value_heads=2)  # fmt: skip

    def planned(memory, **how):
        given = {"memory": memory, "lengths": 64, "optimizer": "sgd", "checkpointing": False}
        return gradaccum.plan(deep, effective_batch=32, **given, **how)

    large = planned("8GiB", ranks=8, shard_ranks=8)
    least = {}
    for option in large.options:
        least.setdefault(option.sync, option)  # the smallest micro-batch
    assert list(least) == ["hold", "once", "each"]
    num = 4 * LlamaForCausalLM(deep).num_parameters()
    parts = {sync: option.categories for sync, option in least.items()}
    assert parts["each"]["gradients"] == pytest.approx(num / 8, rel=1e-3)
    assert parts["once"]["gradients"] == parts["hold"]["gradients"] == num
    assert num * 9 / 8 < parts["hold"]["parameters"] < num * 9 / 8 * 1.12  # and what is gathered
    assert parts["once"]["parameters"] == parts["each"]["parameters"] < parts["hold"]["parameters"]
    sums = [option.peak_bytes for option in least.values()]
    assert sums == sorted(sums, reverse=True)
    # Memory for one way alone: nothing but that fits.
    tight = planned(int(1.02 * sums[2] + 3 * MIB), ranks=8, shard_ranks=8)
    assert tight.chosen.sync == "each" and not any(
        o.fits for o in tight.options if o.sync == "hold"
    )
    two = planned("8GiB", ranks=8, shard_ranks=4)
    assert "sharded over 4 ranks, 2 copies" in str(two.spread)
    assert two.spread.step_bytes > large.spread.step_bytes == 0


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"ranks": 0}, "ranks=0 is not a whole number of at least 1"),
     ({"ranks": 8, "shard_ranks": 3}, "8 ranks cannot hold copies of the model on 3 ranks each"),
     ({"ranks": True}, "ranks=True")],
)  # fmt: skip
def test_ranks_that_make_no_sense(kwargs, said):
    with pytest.raises(BadInput, match=said):
        gradaccum.plan(CONFIG, effective_batch=8, memory="8GiB", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"effective_batch": 0}, "effective_batch"), ({"effective_batch": 2.5}, "effective_batch"),
     ({"lengths": []}, "lengths"), ({"lengths": [1]}, "lengths"), ({"lengths": "long"}, "lengths"),
     ({"optimizer": "adamwx"}, "optimizer"), ({"device": "mps"}, "for cpu or cuda")],
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
    pytest.importorskip("matplotlib")
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


def test_ranks_are_planned_for(command, config_file):
    words = [f"--model_name_or_path={config_file}", "--max_length=64", "--memory=1GiB"]
    many = ["--ranks=8", "--shard_ranks=4"]
    done = command(*words, "--effective_batch_size=64", *many)
    assert done.returncode == 0, done.stderr
    assert "effective batch 64 on 8 ranks of 1.0 GiB" in done.stdout
    assert "sharded over 4 ranks, 2 copies" in done.stdout
    assert "Accumulator(model, causal_lm(" in done.stdout and 'sync="' in done.stdout
    told = json.loads(command(*words, "--effective_batch_size=64", *many, "--json").stdout)
    assert (told["ranks"], told["shard_ranks"]) == (8, 4) and told["sent_bytes"]["step"] > 0
    done = command(*words, "--effective_batch_size=61", "--ranks=8")
    assert "torchrun --nproc-per-node 8 -m gradaccum train" in done.stdout
    assert "61 is no multiple of" in done.stdout and "x 8 ranks" in done.stdout
    assert "TrainingArguments" not in done.stdout  # no stock arguments give 61 on 8 ranks
    assert command(*words, "--ranks=8", "--shard_ranks=3").returncode == 2
    assert command(*words, "--ranks=two").returncode == 2


def test_a_four_bit_base_is_planned_for_a_gpu(command, config_file):
    done = command(f"--model_name_or_path={config_file}", "--use_peft", "--load_in_4bit",
                   "--memory=2GiB", "--device=cuda", "--optim=paged_adamw_8bit")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4-bit layers by shape" in done.stdout and "host's memory" in done.stdout


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [(["--memory=lots"], "no amount of memory", 2), (["--plot=a.txt"], "neither .png nor .svg", 2),
     (["--device=tpu"], "--device is cpu or cuda", 2), (["--memory=6MiB"], "takes at least", 1),
     (["--plot=nowhere/a.png"], "no directory nowhere", 2),
     (["--memory=24"], "did you mean \"24GiB\"?", 2), (["--device=cuda"], "no GPU here", 2),
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
    heads = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(heads))
    done = command(f"--model_name_or_path={tmp_path}")
    assert done.returncode == 2 and "is a BertForSequenceClassification" in done.stderr


def test_a_module_that_takes_no_tokens_needs_an_objective():
    with pytest.raises(BadInput, match="Linear fails on the inputs of the plan") as caught:
        gradaccum.plan(torch.nn.Linear(3, 1), effective_batch=4, memory="1GiB")
    assert "examples=" in str(caught.value)


def test_the_stock_arguments_fit_the_longest_rows():
    from gradaccum.cli.plan import _to_paste

    lengths = [16] * 40 + [64] * 24
    found = gradaccum.plan(CONFIG, effective_batch=8, lengths=lengths, memory="1GiB")
    tokens = found.budget.tokens
    rows = max(n for n in range(1, max(1, tokens // 64) + 1) if 8 % n == 0)
    assert f"per_device_train_batch_size={rows}," in "".join(_to_paste(found))


class Tabled(torch.nn.Module):
    """Holds a table as a plain attribute, and a buffer that is a slice of a larger one."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)
        self.table, self.parts = torch.randn(64, 8), [torch.ones(8)]
        self.register_buffer("slice", torch.randn(1024, 8)[:64])

    def forward(self, input_ids, **_):
        length = input_ids.shape[1]
        x = self.embed(input_ids) + self.table[:length] + self.slice[:length] * self.parts[0]
        return SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_plain_tensors_of_modules_are_traced_and_counted(place):
    with torch.device(place):
        model = Tabled().train()
    taken = sum(t.untyped_storage().nbytes() for t in (model.table, *model.parts, model.slice))
    found = gradaccum.plan(model, effective_batch=4, lengths=16, memory="1GiB", device="cpu")
    assert found.chosen.categories["buffers"] == taken == (64 * 8 + 8 + 1024 * 8) * 4


def normalising():
    def loss(model, x):
        return model(x).square().sum()

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    objective = gradaccum.Objective(loss, weight=len, size=lambda x: 1)
    options = {"effective_batch": 6, "examples": list(torch.randn(6, 3)), "collate": torch.stack,
               "memory": "1GiB", "device": "cpu"}  # fmt: skip
    return model, objective, options


def test_batch_norm_is_planned_as_it_runs():
    model, objective, options = normalising()
    whole = gradaccum.plan(model, objective, **options)
    assert whole.chosen.num_micros == 1 and "needs the whole batch" in whole.assumptions[-1]
    model[1].eval()
    frozen = gradaccum.plan(model, objective, **options)
    assert len(frozen.options) > 1 and not any("BatchNorm" in t for t in frozen.assumptions)
    assert not model[1].training and model.training


def test_a_whole_batch_finds_no_gradients_to_add_to():
    """It fits into less than what a second micro-batch would take, and the plan knows."""
    model = torch.nn.Sequential(torch.nn.Embedding(4096, 256), torch.nn.Linear(256, 64))
    objective = gradaccum.Objective(lambda m, x: m(x).square().sum(), len, size=len)
    options = {"examples": [torch.ones(8, dtype=torch.long)] * 4, "collate": torch.stack,
               "device": "cpu", "optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1)}  # fmt: skip
    wide = gradaccum.plan(model, objective, effective_batch=4, memory="1GiB", **options)
    alone = gradaccum.plan(model, objective, effective_batch=1, memory="1GiB", **options)
    assert wide.options[0].num_micros == 4
    assert alone.chosen.peak_bytes < wide.options[0].peak_bytes
    between = (alone.chosen.peak_bytes + wide.options[0].peak_bytes) // 2
    tight = gradaccum.plan(model, objective, effective_batch=4, memory=between + 4 * MIB, **options)
    assert tight.chosen.num_micros == 1 and not tight.options[0].fits


def test_an_unknown_optimizer_is_run_to_see_its_state():
    class Item(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models.model()

        def forward(self, input_ids, **given):
            assert input_ids.sum().item() >= 0
            return self.net(input_ids, **given)

    sizes = {}
    for name in ("AdamW", "NAdam"):
        make = getattr(torch.optim, name)
        place = "cuda" if name == "NAdam" else "cpu"
        plan = gradaccum.plan(Item().train(), effective_batch=4, lengths=[8, 4], memory="1GiB",
                              optimizer=make, device=place)  # fmt: skip
        sizes[name] = plan.chosen.categories["optimizer state"]
        assert any("measured on three short" in text for text in plan.assumptions)
    assert sizes["NAdam"] >= sizes["AdamW"] > 0


def found_in(cache, monkeypatch, objective=None, lengths=(16,) * 8, model=None, **options):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    accumulator = gradaccum.Accumulator(
        model or models.model(), objective or gradaccum.causal_lm(), **options
    )
    accumulator.prepare(models.examples(lengths))
    return accumulator.found


def test_what_was_measured_for_another_case_is_not_taken(tmp_path, monkeypatch):
    """One row tells nothing of many, and another loss, dtype or shape takes another time."""

    def closed(weight):
        def loss(model, micro):
            return gradaccum.causal_lm().loss(model, micro) * weight

        return gradaccum.Objective(loss, gradaccum.causal_lm().weight, len)

    cases = [
        {"lengths": (16,)},  # never kept
        {},
        {"lengths": (16, 15) * 4},
        {"accumulate_dtype": None},
        {"objective": gradaccum.causal_lm(chunk=64), "model": llama()},
        {"objective": gradaccum.causal_lm(chunk=128), "model": llama()},
        {"objective": gradaccum.from_mean(lambda m, x: m(**x).mean(), weight="rows")},
        {"objective": gradaccum.from_mean(lambda m, x: m(**x).sum(), weight="rows")},
    ]
    for case in cases:
        assert found_in(tmp_path, monkeypatch, **case).num_probes > 0, case
    assert found_in(tmp_path, monkeypatch, lengths=(16,)).num_probes == 1
    assert [found_in(tmp_path, monkeypatch, **case).num_probes for case in cases[1:]] == [0] * 7


def test_probes_that_do_not_fit_bound_the_budget_and_are_not_kept(tmp_path, monkeypatch):
    busy = [True]

    def loss(model, micro):
        if busy[0] and micro["input_ids"].numel() >= 100:
            raise torch.OutOfMemoryError("another process has it")
        return gradaccum.causal_lm().loss(model, micro)

    objective = gradaccum.Objective(loss, gradaccum.causal_lm().weight, gradaccum.causal_lm().size)
    lengths = [8] * 2 + [25] * 10 + [60] * 2
    first = found_in(tmp_path, monkeypatch, objective, lengths)
    assert first.num_probes == 2 and first.budget.tokens < 14 * 60
    busy[0] = False
    assert found_in(tmp_path, monkeypatch, objective, lengths).num_probes == 3


def test_the_state_of_an_optimizer_is_made_and_counted(tmp_path, monkeypatch):
    model = models.model()
    optimizer = torch.optim.AdamW(model.parameters())
    found_in(tmp_path, monkeypatch, model=model, optimizer=optimizer)
    assert optimizer.state
    held = sum(p.nbytes for p in model.parameters())
    caps = []

    def noting(memory, device, *, held_bytes=0):
        caps.append(held_bytes)
        return cap_of(memory, device, held_bytes=held_bytes)

    monkeypatch.setattr(auto, "cap_of", noting)
    found_in(tmp_path, monkeypatch, model=model, optimizer=optimizer, memory="1GiB")
    assert caps[-1] > 2.5 * held


@pytest.mark.parametrize(
    ("fastest", "beyond", "said", "expected"),
    [
        (16, 1, 128, (0, 32)), (64, 1, 128, (0, 64)), (128, 1, 128, (0, 128)),
        (1024, 1, 128, (0, 128)), (64, 0, 128, (0, 64)),
        (16, 1, 8, (16, sys.maxsize)), (8, 1, 8, (0, sys.maxsize)), (16, 1, 32, (0, sys.maxsize)),
        (16, 1, 12, (0, sys.maxsize)),
    ],
)  # fmt: skip
def test_what_a_line_says_is_tried(monkeypatch, fastest, beyond, said, expected):
    """A line through short micro-batches says that more is always better; caches end."""
    engine = gradaccum.engine.Accumulator(
        models.model(), gradaccum.causal_lm(), budget=Budget(tokens=8)
    )
    host = as_batch(models.examples([8] * 16), None)
    ran = []

    def attempt(self, window):
        tokens = window.micros[0].size
        ran.append(tokens)
        per_token = 1 / min(tokens, fastest) + beyond * max(0, tokens - fastest)
        return SimpleNamespace(seconds=tokens * per_token)

    monkeypatch.setattr(gradaccum.engine.Accumulator, "attempt", attempt)
    monkeypatch.setitem(probes.TOKENS, "cpu", 16)
    *found, num = probes.within(engine, host, gradaccum.measured.quiet, said)
    assert tuple(found) == expected and num == len(ran)
    assert engine.budget == Budget(tokens=8) and engine.objective.weight is not None
