"""`gradaccum report`: what it reads, what it says of one run, and how it compares several."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gradaccum.cli.main import main
from gradaccum.errors import BadInput
from gradaccum.report import compare, facts, read, several, single, words
from gradaccum.report.read import Run
from tests import runs

FLOAT32 = 2.0**-23


@pytest.fixture
def folder(tmp_path):
    return runs.write(tmp_path / "run", runs.lines(25), runs.about())


def loaded(tmp_path, name, told, asked=None) -> Run:
    return read.read(runs.write(tmp_path / name, told, asked))


def pair(tmp_path, first, other, *asked):
    """Return two runs and how they compare."""
    asked = asked or (runs.about(), runs.about())
    a, b = (loaded(tmp_path, n, t, r) for n, t, r in zip("ab", (first, other), asked, strict=True))
    return a, b, compare.compare(a, b)


def test_a_run_is_read_as_columns(folder):
    run = read.read(folder)
    told = runs.lines(25)
    assert run.steps == list(range(1, 26)) and run.notes == []
    assert run.column("loss") == [line["loss"] for line in told]
    assert run.column("noise.high")[:4] == [None] * 3 + [told[3]["noise"]["high"]]
    assert run.points("eval_loss") == [(s, told[s - 1]["eval_loss"]) for s in (10, 20)]
    assert run.events == [(7, told[6]["events"][0])] and run.unit == "trained tokens"
    assert run.window.step == 25 and run.window.micros == told[24]["micros"]
    assert read.read(folder / "metrics.jsonl").steps == run.steps, "the file can be named as well"


def test_the_window_is_the_last_whole_one(tmp_path):
    told = runs.lines(4)
    told[3]["num_examples"] = 5  # the last of an epoch
    assert loaded(tmp_path, "a", told).window.step == 3


@pytest.mark.parametrize("cut", [1, 40])
def test_a_last_line_that_a_kill_cut_off_is_left_out_and_told(tmp_path, cut):
    folder = runs.write(tmp_path / "a", runs.lines(4), tail=json.dumps(runs.lines(5)[4])[:cut])
    run = read.read(folder)
    assert run.steps == [1, 2, 3, 4] and "the last line is cut off" in run.notes[0]


def test_other_lines_that_cannot_be_read_are_counted(tmp_path):
    told = [*runs.lines(2), "nonsense\n", "[1]\n", '{"loss": 1}\n', '{"step": true}\n', "\n"]
    run = loaded(tmp_path, "a", told)
    assert run.steps == [1, 2]
    assert run.notes == [
        "4 lines of metrics.jsonl could not be read and are left out (the first is line 3)"
    ]


def test_steps_that_a_resumed_run_took_again_count_once(tmp_path):
    again = runs.lines(4, start=3, seed=9)
    run = loaded(tmp_path, "a", [*runs.lines(5), *again])
    assert run.steps == [1, 2, 3, 4, 5, 6, 7]
    assert run.column("loss")[3:] == [line["loss"] for line in again]
    assert "2 steps ran again" in run.notes[0]


def test_what_is_not_finite_is_told_by_step_and_counts_in_no_mean(tmp_path):
    told = runs.lines(6)
    told[2]["loss"] = None  # as it is written now
    told[3]["loss"] = math.nan  # as json.dumps writes it
    told[4]["grad_norm"] = math.inf
    run = loaded(tmp_path, "a", told)
    assert run.nonfinite == [3, 4]
    assert run.column("grad_norm")[4] is None
    found = facts.facts(run)
    assert found["loss"]["after"] == pytest.approx(
        (told[1]["loss"] + told[4]["loss"] + told[5]["loss"]) / 3, abs=2
    )
    assert "the loss is not finite in 2 steps, first in step 3" in words.headline(run, found)
    json.dumps(found, allow_nan=False)


def test_a_newer_schema_is_refused(tmp_path):
    told = runs.lines(2)
    told[1]["schema"] = 2
    with pytest.raises(BadInput, match=r"line 2 of .* has schema 2, and this version .* up to 1"):
        loaded(tmp_path, "a", told)
    with pytest.raises(BadInput, match=r"run\.json has schema 7"):
        loaded(tmp_path, "b", runs.lines(1), runs.about(schema=7))


def test_lines_without_a_schema_and_with_unknown_fields_are_read(tmp_path):
    told = [{"step": 1, "loss": 2.0, "new": {"deep": [1]}}, {"step": 2, "loss": 1.0}]
    run = loaded(tmp_path, "a", told)
    assert run.column("loss") == [2.0, 1.0]
    single.page(run)


def test_what_is_no_run_is_refused_with_the_way_on(tmp_path):
    with pytest.raises(BadInput, match="there is no run directory"):
        read.read(tmp_path / "none")
    runs.write(tmp_path / "runs" / "a", runs.lines(1))
    with pytest.raises(BadInput, match=r"no metrics\.jsonl") as refused:
        read.read(tmp_path / "runs")
    assert refused.value.hint == f"gradaccum report {tmp_path / 'runs' / 'a'}"
    with pytest.raises(BadInput, match="has no step yet"):
        loaded(tmp_path, "empty", [])
    with pytest.raises(BadInput, match="the last line is cut off"):
        read.read(runs.write(tmp_path / "cut", [], tail='{"step"'))


def test_a_damaged_run_json_is_told_and_the_rest_reported(folder):
    (folder / "run.json").write_text('{"schema": 1, "comm')
    assert "run.json is cut off or damaged" in read.read(folder).notes[0]


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        runs.write(tmp_path / parent / "run", runs.lines(2))
    found = read.read_all([tmp_path / "x" / "run", tmp_path / "y" / "run"])
    assert [run.name for run in found] == ["x/run", "y/run"]
    with pytest.raises(BadInput, match="given twice"):
        read.read_all([tmp_path / "x" / "run", tmp_path / "x" / ".." / "x" / "run"])


@pytest.mark.parametrize("junk", ["text", None, [1], {"a": "b"}, True])
def test_fields_of_another_type_are_as_if_they_were_absent(tmp_path, junk):
    told = [
        {**dict.fromkeys(line, junk), "step": line["step"], "schema": 1} for line in runs.lines(3)
    ]
    asked = dict.fromkeys(runs.about(), junk) | {"schema": 1}
    run = loaded(tmp_path, "a", told, asked)
    single.page(run)
    words.markdown([run])
    several.page([run, loaded(tmp_path, "b", runs.lines(3), runs.about())])


def test_any_field_may_be_absent(tmp_path):
    told = runs.lines(3)
    for field in sorted(set(told[0]) - {"step"}):
        kept = [{name: v for name, v in line.items() if name != field} for line in told]
        words.markdown([loaded(tmp_path, field, kept)])
        if field in ("loss", "seconds", "samples", "num_micros", "effective_batch_size", "noise"):
            single.page(read.read(tmp_path / field))


def test_a_noise_scale_of_zero_is_drawn_where_it_is_more(tmp_path):
    told = runs.lines(4)
    told[1]["noise"] |= {"scale": 0.0, "low": 0.0}
    page = single.page(loaded(tmp_path, "a", told, runs.about()))
    (figure,) = next(s for s in page.sections if s.name == "noise").figures
    assert '"y":43.0' in json.dumps(figure.spec).replace("\\", "")
    told = [line | {"noise": line["noise"] | {"scale": 0.0, "low": 0.0}} for line in told]
    page = single.page(loaded(tmp_path, "b", told, runs.about()))
    assert not next(s for s in page.sections if s.name == "noise").figures


def test_the_figures_are_those_of_the_lines(folder):
    told, found = runs.lines(25), facts.facts(read.read(folder))
    losses = [line["loss"] for line in told]
    assert found["loss"]["before"] == pytest.approx(sum(losses[:5]) / 5)
    assert found["loss"]["after"] == pytest.approx(sum(losses[-5:]) / 5)
    assert found["samples"] == 800 and found["steps"] == 25
    useful, ran = (sum(line[n] for line in told) for n in ("useful_tokens", "padded_tokens"))
    assert found["tokens"] == {"useful": useful, "ran": ran, "padding": 1 - useful / ran}
    took = sum(line["seconds"] for line in told)
    split = found["seconds"]["of_steps"]
    assert sum(split.values()) == pytest.approx(took) == pytest.approx(found["seconds"]["steps"])
    assert split["other"] == pytest.approx(25 * 0.04)
    assert found["seconds"]["between"] == pytest.approx(22 * 0.01 + 2 * 0.8, abs=1e-3)
    assert (
        found["micros"]["recoveries"] == 1 and found["memory"]["predicted_bytes"] == 1_150_000_000
    )


def test_a_pause_before_a_resumed_run_is_not_between_steps(tmp_path):
    told = runs.lines(6)
    for line in told[3:]:
        line["time"] += 3600
    resumed = runs.about(resumed=[{"step": 3, "time": 0, "checkpoint": "checkpoint-3"}])
    paused = facts.facts(loaded(tmp_path, "a", told, resumed))
    assert paused["seconds"]["between"] == pytest.approx(4 * 0.01, abs=1e-3)
    text = words.markdown([read.read(tmp_path / "a")])
    assert "resumed after this step from checkpoint-3" in text


def test_the_effective_batch_is_told_with_its_changes(tmp_path):
    run = loaded(tmp_path, "a", runs.lines(20, change=(12, 64)))
    assert facts.batch_sizes(run) == [{"size": 32, "step": 1}, {"size": 64, "step": 12}]
    assert "effective batch 32 to 64" in words.headline(run, facts.facts(run))
    section = next(s for s in single.page(run).sections if s.name == "batch")
    assert "32 from step 1, 64 from step 12" in section.figures[0].finding


def test_sharing_is_no_padding(tmp_path):
    told = runs.lines(3)
    for line in told:
        line["padded_tokens"] = line["useful_tokens"] // 2
        line["micros"] = [[n, useful // 2, useful] for n, _, useful in line["micros"]]
    run = loaded(tmp_path, "a", told)
    assert facts.facts(run)["tokens"]["padding"] == pytest.approx(-0.5, abs=1e-3)
    cut = next(section for section in single.page(run).sections if section.name == "cut")
    assert "50% of the tokens shared" in cut.figures[0].finding
    assert [key.label for key in cut.figures[0].keys] == ["useful", "shared, so not run"]


def test_a_run_of_one_step_has_a_page(tmp_path):
    page = single.page(loaded(tmp_path, "a", runs.lines(1)))
    assert page.headline.startswith("1 step, 32 samples")


def test_a_long_run_is_thinned_and_keeps_its_extremes(tmp_path):
    told = runs.lines(3000)
    told[1234]["loss"] = 99.0
    run = loaded(tmp_path, "a", told)
    loss = single.page(run).sections[0].figures[0]
    drawn = [
        json.loads(loss.spec["datasets"][layer["data"]["name"]]) for layer in loss.spec["layer"]
    ]
    assert {"x": 1235, "y": 99.0} in drawn[0] and len(drawn[0]) < 700
    assert len(loss.table.rows) <= 60
    assert loss.table.rows[0][0] == "1" and loss.table.rows[-1][0] == "3,000"


def test_the_same_run_is_the_same_to_the_last_digit(tmp_path):
    _, _, found = pair(tmp_path, runs.lines(25), runs.lines(25))
    assert found.kind == "same" and found.largest == 0
    assert found.sentence == "the same to the last digit in all 25 steps"


def test_a_difference_that_grows_from_rounding_is_rounding(tmp_path):
    a, b, found = pair(tmp_path, runs.lines(25), runs.lines(25, nudge=3e-8))
    assert found.kind == "rounding" and 1e-6 < found.largest < 1e-5
    assert found.sentence.startswith("the same within rounding (float32; largest relative")
    assert "up to step 25" in found.sentence
    assert compare.explanation(a, b, found) == ""


def test_a_drift_is_told_with_the_step_at_which_half_of_the_digits_are_gone(tmp_path):
    _, _, found = pair(tmp_path, runs.lines(60), runs.lines(60, nudge=3e-8))
    first = next(s for s in range(1, 61) if 3e-8 * 1.2**s > math.sqrt(FLOAT32))
    assert found.kind == "drift" and abs(found.step - first) <= 1
    assert "drift apart without a jump" in found.sentence


def test_a_jump_of_the_loss_is_where_they_part(tmp_path):
    other = runs.lines(25, nudge=2e-8)
    for line in other[11:]:
        line["loss"] *= 1.002
    _, _, found = pair(tmp_path, runs.lines(25), other)
    assert (found.kind, found.step) == ("part", 12)
    a, b = runs.lines(25)[11]["loss"], other[11]["loss"]
    assert f"they part at step 12: loss {a:.4f} against {b:.4f}" in found.sentence
    assert "before it they differ by at most 1.5e-07" in found.sentence


def test_a_jump_is_judged_by_what_was_there_before(tmp_path):
    """What would be a jump at the first step is none where rounding has grown that far."""
    told = runs.lines(25)
    for nudge, kind in ((1.2e-6, "rounding"), (0.0, "part")):
        other = runs.lines(25)
        for step, line in enumerate(other, start=1):
            line["loss"] *= 1 + (nudge if step < 20 else 2e-5)
        _, _, found = pair(tmp_path / kind, told, other)
        assert found.kind == kind, nudge


def test_other_data_are_where_they_part_whatever_the_loss(tmp_path):
    other = runs.lines(25)
    other[4]["weight"] += 1
    _, _, found = pair(tmp_path, runs.lines(25), other)
    assert (found.kind, found.step) == ("part", 5)
    assert "trained tokens, so the data are not the same" in found.sentence


def test_another_batch_size_and_learning_rate_are_named_with_their_steps(tmp_path):
    other = runs.lines(25, change=(12, 64))
    for line in other[2:]:
        line["learning_rate"] *= 2
    a, b, found = pair(
        tmp_path, runs.lines(25), other,
        runs.about(), runs.about(schedule="32:0,64:11", settings={"learning_rate": 2e-3}),
    )  # fmt: skip
    assert found.step == 12
    assert "at that step the effective batch is 32 against 64" in found.sentence
    assert "since step 3 the learning rate is 0.001 against 0.002" in found.sentence
    reason = compare.explanation(a, b, found)
    assert "schedule not stated against 32:0,64:11" in reason
    assert "learning_rate 0.001 against 0.002" in reason


def test_runs_that_part_with_nothing_asked_but_rounding_are_told_of_dropout(tmp_path):
    other = runs.lines(25)
    other[9]["loss"] *= 1.1
    asked = runs.about(budget={"tokens": 512, "examples": None, "is_stated": True})
    a, b, found = pair(tmp_path, runs.lines(25), other, runs.about(), asked)
    reason = compare.explanation(a, b, found)
    assert "budget 2,048 tokens against 512 tokens" in reason and "dropout" in reason


def test_one_that_is_not_finite_parts_from_one_that_is(tmp_path):
    told, other = runs.lines(5), runs.lines(5)
    other[2]["loss"] = None
    _, _, found = pair(tmp_path, told, other)
    assert found.step == 3 and "against not finite" in found.sentence
    told[2]["loss"] = None
    _, _, found = pair(tmp_path / "both", told, other)
    assert found.kind == "same"


def test_runs_of_other_lengths_are_compared_where_both_are(tmp_path):
    _, _, found = pair(tmp_path, runs.lines(25), runs.lines(10))
    assert found.kind == "same" and found.num_common == 10
    assert found.sentence.endswith("; a has 15 steps more")
    _, _, found = pair(tmp_path / "apart", runs.lines(3), runs.lines(3, start=5))
    assert found.kind == "nothing in common" and "no step in common" in found.sentence


def test_sixteen_bits_round_by_more(tmp_path):
    """A difference of 2e-4 is a jump in float32, and rounding in bfloat16."""
    other = runs.lines(25)
    for line in other:
        line["loss"] *= 1 + 2e-4
    for settings, kind in (({"bf16": True}, "rounding"), ({"bf16": False}, "part")):
        asked = runs.about(settings=settings)
        _, _, found = pair(tmp_path / kind, runs.lines(25), other, asked, asked)
        assert found.kind == kind


def test_what_was_asked_differently_is_sorted_by_what_it_does(tmp_path):
    asked = runs.about(
        seed=1, settings={"learning_rate": 2e-3, "save_steps": 5, "warmup_steps": 3},
        budget={"tokens": 512, "examples": None},
    )  # fmt: skip
    a = loaded(tmp_path, "a", runs.lines(2), runs.about())
    b = loaded(tmp_path, "b", runs.lines(2), asked)
    found = [(d.name, d.effect) for d in compare.differences([a, b])]
    assert found == [
        ("seed", compare.CHANGES), ("settings.learning_rate", compare.CHANGES),
        ("settings.optim", compare.CHANGES), ("budget", compare.ROUNDS),
        ("settings.save_steps", compare.NEITHER),
    ]  # fmt: skip
    assert compare.differences([a, loaded(tmp_path, "c", runs.lines(2))]) == [], (
        "not known to differ"
    )


def test_runs_that_tell_only_their_flags_are_compared_by_them(tmp_path):
    told, other = runs.lines(3), runs.lines(3)
    other[2]["loss"] = 1.0
    for name, lines, extra in (("a", told, []), ("b", other, ["--learning_rate", "5e-4"])):
        folder = runs.write(tmp_path / name, lines)
        flags = ["--output_dir", f"runs/{name}", "--effective_batch_size", "32", *extra]
        (folder / "flags.json").write_text(json.dumps(flags))
    a, b = read.read_all([tmp_path / "a", tmp_path / "b"])
    reason = compare.explanation(a, b, compare.compare(a, b))
    assert reason == "What was asked differs in learning_rate not stated against 5e-4."
    assert "| learning_rate | - | 5e-4 |" in words.markdown([a, b])


def test_rounding_of_a_real_training_is_no_jump_and_one_percent_of_learning_rate_is():
    """The bound is held against a loop: other cuts of the same batches, and another rate."""
    torch = pytest.importorskip("torch")

    def trained(cut, rate):
        torch.manual_seed(0)
        inner = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)
        )
        optimizer = torch.optim.AdamW(inner.parameters(), lr=rate)
        told = []
        for step in range(1, 81):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            y, loss = x[:, :8].sin() * x[:, 8:], 0.0
            for rows, wanted in zip(x.split(cut), y.split(cut), strict=True):
                part = (inner(rows) - wanted).square().sum() / 32
                part.backward()
                loss += part.item()
            optimizer.step()
            optimizer.zero_grad()
            told.append((step, loss))
        return Run("a", Path("."), {}, [s for s, _ in told], {"loss": [v for _, v in told]})

    whole = trained(32, 1e-2)
    for cut in (1, 4, 8):
        found = compare.compare(whole, trained(cut, 1e-2))
        assert found.kind in ("rounding", "drift") and found.largest > 0, found.sentence
    found = compare.compare(whole, trained(32, 1.01e-2))
    assert (found.kind, found.step) == ("part", 2), found.sentence


def test_the_command_writes_a_page_and_prints_its_path(folder, capsys):
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()) == folder / "report.html"
    assert err.startswith("25 steps, 800 samples, effective batch 32: loss ")
    page = (folder / "report.html").read_text()
    assert len(page) < 2_000_000 and "Content-Security-Policy" in page
    main(["report", str(folder), "--out", str(folder / "again.html")])
    assert (folder / "again.html").read_text() == page, "the same run is the same page"


def test_text_from_a_run_is_text_on_the_page(tmp_path):
    evil = "</script><script>alert(1)</script><b>"
    told = runs.lines(3)
    told[1]["events"] = [evil]
    told[2]["terms"] = {evil: 1.0}
    folder = runs.write(tmp_path / "a", told, runs.about(command=evil))
    assert main(["report", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    assert "<script>alert" not in (tmp_path / "a.html").read_text()


def test_several_runs_as_json(tmp_path, capsys):
    for name, change in (("a", None), ("b", (12, 64))):
        runs.write(tmp_path / name, runs.lines(25, change=change), runs.about())
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["comparisons"][0]["kind"] == "part" and told["comparisons"][0]["step"] == 12
    assert [run["name"] for run in told["runs"]] == ["a", "b"]
    assert err.startswith("Against a: b parts at step 12.")
    assert not list(tmp_path.rglob("*.html")), "a page is written only where it is asked for"


def test_runs_without_a_common_loss_are_json_as_well(tmp_path, capsys):
    runs.write(tmp_path / "a", [{"step": 1}])
    runs.write(tmp_path / "b", [{"step": 2, "loss": 1.0}])
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_markdown_has_tables_and_no_html(folder, capsys):
    assert main(["report", str(folder), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("### run: gradaccum report\n\n**25 steps")
    assert "| loss |" in out and "relative error of the gradient is 1.4e-07" in out
    assert "```\ngradaccum train --learning_rate 1e-3" in out
    assert "<" not in out.replace("\\<", "") and len(out) < 5000
    for line in out.splitlines():
        assert line.count("|") in (0, 3, 4), line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "needs the directory of a run"),
        (["nowhere"], "there is no run directory nowhere"),
        (["--plot", "x"], "no flag --plot"),
        (["{run}", "--out", "x.pdf"], "is no .html file"),
        (["{run}", "--out", "nowhere/x.html"], "there is no directory nowhere"),
        (["{run}", "--out"], "expected one argument"),
        (["{run}", "--json", "--markdown"], "both print on stdout"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(folder, capsys, flags, said):
    words_given = ["report", *(flag.replace("{run}", str(folder)) for flag in flags)]
    assert main(words_given) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("error: ")


def test_help_teaches(capsys):
    assert main(["report", "--help"]) == 0
    assert "did they train the same?" in capsys.readouterr().out
    main(["--help"])
    assert "\n  report " in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["altair", "vl_convert"])
def test_without_the_extra_the_page_is_refused_before_work_and_the_text_is_not(
    folder, capsys, monkeypatch, missing
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a)
    )
    assert main(["report", str(folder)]) == 2
    err = capsys.readouterr().err
    assert f"needs the package '{missing}'" in err and 'pip install "gradaccum[report]"' in err
    assert main(["report", str(folder), "--json"]) == 0


def test_text_needs_neither_the_extra_nor_transformers(folder):
    code = (
        "import sys; from gradaccum.cli.main import main; "
        f"main(['report', {str(folder)!r}, '--markdown']); "
        "print([m for m in ('altair', 'vl_convert', 'jinja2', 'transformers', 'pandas') "
        "if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_steps_out_of_order_are_read_as_a_resumed_run(tmp_path):
    told = runs.lines(30)
    random.Random(0).shuffle(told)
    run = loaded(tmp_path, "a", told)
    assert run.steps == sorted(set(run.steps)) and run.steps[-1] == told[-1]["step"]
