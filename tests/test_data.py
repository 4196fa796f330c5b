"""Data sets of the user: what is read, and what is said of what cannot be."""

import json

import datasets
import huggingface_hub
import pytest

from gradaccum.cli import data
from gradaccum.errors import BadInput

ROWS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory, monkeypatch):
    """Keep the cache of this test to itself, and the hub out of reach."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(**columns):
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "lines.json", "a.csv", "a.parquet", "a.txt", "a[1].JSONL"]
)
def test_every_kind_of_file(tmp_path, name, streaming):
    path = tmp_path / name
    write(tmp_path / "a1.jsonl", '{"text": "not this one"}\n')
    if name.endswith("parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif name == "a.json":
        write(path, json.dumps(ROWS, indent=1))
    elif name == "a.csv":
        write(path, "text\none\ntwo\nthree\n")
    elif name == "a.txt":
        write(path, "one\n\ntwo\n   \nthree\n\n")
    else:
        write(path, LINES)
    loaded = data.load(str(path), streaming=streaming)
    assert list(loaded) == ROWS
    assert isinstance(loaded, datasets.IterableDataset if streaming else datasets.Dataset)
    assert data.check_columns(loaded) == "text"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_of_files_has_their_splits(tmp_path, streaming):
    write(tmp_path / "set" / "train.jsonl", LINES)
    write(tmp_path / "set" / "test.jsonl", '{"text": "four"}\n')
    load = {"streaming": streaming}
    assert list(data.load(str(tmp_path / "set"), **load)) == ROWS
    assert list(data.load(str(tmp_path / "set"), split="test", **load)) == [{"text": "four"}]


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "set" / "train.jsonl", LINES)
    assert list(data.load("~/set")) == list(data.load("~/set/train.jsonl")) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("with_splits", [False, True])
def test_a_saved_data_set_is_left_as_it_is(tmp_path, with_splits, streaming):
    saved = datasets.Dataset.from_list(ROWS)
    place = tmp_path / "saved[1]"
    (datasets.DatasetDict(train=saved) if with_splits else saved).save_to_disk(place)
    before = sorted(place.rglob("*"))
    loaded = data.load(str(place), streaming=streaming)
    assert isinstance(loaded, datasets.IterableDataset if streaming else datasets.Dataset)
    mapped = loaded.map(lambda row: {"size": len(row["text"])})
    assert [row["size"] for row in mapped] == [3, 3, 5]
    assert sorted(place.rglob("*")) == before


def test_a_saved_split_is_never_taken_for_another(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "plain")
    datasets.Dataset.from_list(ROWS, split="test").save_to_disk(tmp_path / "named")
    with pytest.raises(BadInput, match="has no split 'test', only 'train'"):
        data.load(str(tmp_path / "plain"), split="test")
    assert list(data.load(str(tmp_path / "named"), split="test")) == ROWS
    with pytest.raises(BadInput, match="only 'train', 'test'"):
        data.load(str(tmp_path / "named"), split="dev")


def test_nothing_is_shown_and_the_settings_stay(tmp_path, capfd):
    level, hidden = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    datasets.logging.set_verbosity_error()  # neither the default nor what load sets meanwhile
    try:
        data.load(write(tmp_path / "a.txt", "one\n\ntwo\n"))
        with pytest.raises(BadInput):
            data.load(write(tmp_path / "b.jsonl", "oops\n"))
        assert not datasets.are_progress_bars_disabled()
        assert datasets.logging.get_verbosity() == datasets.logging.ERROR
    finally:
        datasets.logging.set_verbosity(level)
        if hidden:
            datasets.disable_progress_bars()
    assert capfd.readouterr() == ("", "")


FILES = {
    "an unknown suffix": ("a.xml", "<a/>", "a.xml is none of .jsonl, .json, .csv, .parquet, .txt"),
    "no bytes": ("a.csv", "", "a.csv is empty"),
    "blank lines": ("a.txt", " \n\n", "a.txt has no examples"),
    "an empty list": ("a.json", "[]", "a.json has no examples"),
    "a header alone": ("a.csv", "text\n", "a.csv has no examples"),
    "a bad line": ("a.jsonl", LINES + "\n{oops\n", "a.jsonl cannot be read: line 5: Expecting"),
    "a bad value": ("a.json", '[{"text": "a"},\n oops]', "cannot be read: line 2: Expecting value"),
    "a bad line of .json": ("a.json", LINES + "{oops\n", "cannot be read: line 4: Expecting"),
    "no objects": ("a.jsonl", "1\n2\n", "cannot be read: line 1 is not a JSON object"),
    "a ragged table": ("a.csv", "a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
    "no parquet": ("a.parquet", "text", "a.parquet cannot be read: Parquet"),
    "latin text": ("a.txt", b"one\n\xfc\n", "cannot be read: line 2 is not UTF-8"),
    "latin JSON": ("a.jsonl", LINES.encode() + b'{"text": "\xfc"}\n', "line 4 is not UTF-8"),
    "a directory": ("train.jsonl", LINES + "{oops\n", "cannot be read: train.jsonl, line 4: Exp"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path, case):
    name, content, message = FILES[case]
    path = write(tmp_path / "set" / name, content)
    with pytest.raises(BadInput) as caught:
        data.load(str(tmp_path / "set") if case == "a directory" else path)
    assert message in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("case", ["blank lines", "an empty list", "a bad line", "latin text"])
def test_a_stream_is_refused_at_its_beginning(tmp_path, case):
    name, content, message = FILES[case]
    with pytest.raises(BadInput) as caught:
        data.load(write(tmp_path / name, content), streaming=True)
    assert message in caught.value.message


def test_a_missing_file_names_the_nearest(tmp_path):
    path = write(tmp_path / "pairs.jsonl", LINES)
    with pytest.raises(BadInput) as caught:
        data.load(str(tmp_path / "pair.jsonl"))
    assert caught.value.message == f"there is no {tmp_path / 'pair.jsonl'}"
    assert caught.value.hint == f"did you mean {path}?"
    for missing in (tmp_path / "nowhere" / "pairs.jsonl", tmp_path / "zzz"):
        with pytest.raises(BadInput, match="there is no") as caught:
            data.load(str(missing))
        assert caught.value.hint == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_split_lists_those_that_exist(tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", LINES)
    with pytest.raises(BadInput, match="has no split 'dev', only 'train'"):
        data.load(path, split="dev", streaming=streaming)
    write(tmp_path / "set" / "train.jsonl", LINES)
    write(tmp_path / "set" / "test.jsonl", LINES)
    with pytest.raises(BadInput, match="only 'train', 'test'"):
        data.load(str(tmp_path / "set"), split="dev", streaming=streaming)


def test_saved_data_sets_that_hold_nothing(tmp_path):
    table(text=[]).save_to_disk(tmp_path / "none")
    with pytest.raises(BadInput, match="has no examples"):
        data.load(str(tmp_path / "none"))
    datasets.DatasetDict(test=table(text=["a"]), train=table(text=[])).save_to_disk(tmp_path / "d")
    assert len(data.load(str(tmp_path / "d"), split="test")) == 1
    write(tmp_path / "broken" / "dataset_info.json", "{")
    (tmp_path / "bare").mkdir()
    for name in ("broken", "bare"):
        with pytest.raises(BadInput, match=f"{name} cannot be read: "):
            data.load(str(tmp_path / name))


def test_a_hub_id_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "nobody/nothing is no file or directory here, and the hub cannot be reached"
    with pytest.raises(BadInput) as caught:
        data.load("nobody/nothing")
    assert caught.value.message == message and "check the spelling" in caught.value.hint
    write(tmp_path / "nobody" / "nothing.jsonl", LINES)
    with pytest.raises(BadInput) as caught:
        data.load("nobody/nothing")
    assert caught.value.hint == "did you mean nobody/nothing.jsonl?"


ACCEPTED = {
    "plain text": ({"text": ["a"], "n": [1]}, "text"),
    "text by another name": ({"body": ["a"]}, "body"),
    "pairs": ({"prompt": ["a"], "completion": ["b"], "text": ["c"]}, "prompt and completion"),
    "chat pairs": ({"prompt": [CHAT[:1]], "completion": [CHAT[1:]]}, "prompt and completion"),
    "messages": ({"messages": [CHAT]}, "messages"),
    "tokens": ({"input_ids": [[1, 2]], "text": ["a"]}, "input_ids"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_columns(case, streaming):
    columns, format_ = ACCEPTED[case]
    dataset = table(**columns)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    field = "body" if "body" in columns else "text"
    assert data.check_columns(dataset, text_field=field) == format_


THREE = 'and needs "text", or "prompt" and "completion", or "messages"'
REFUSED = {
    "no known column": ({"a": ["x"], "b": ["y"]}, f"the data has the columns 'a', 'b', {THREE}"),
    "no column": ({}, f"the data has the columns (none), {THREE}"),
    "half a pair": ({"prompt": ["x"]}, f"the data has the columns 'prompt', {THREE}"),
    "half a pair and messages": ({"prompt": ["x"], "messages": [CHAT]}, THREE),
    "numbers": ({"text": [1]}, "'text' holds 1 in example 1, and needs text"),
    "a pair of two kinds": ({"prompt": ["x"], "completion": [CHAT]}, "'completion' holds messages"),
    "messages of text": ({"messages": ["x"]}, "'messages' holds text in example 1, and needs mess"),
    "messages of another form": ({"messages": [[{"from": "a", "value": "b"}]]}, "something else"),
    "no messages": ({"messages": [[]]}, "holds [] in example 1"),
    "tokens as text": ({"input_ids": ["x"]}, "'input_ids' holds text in example 1, and needs tok"),
    "a null": ({"text": ["x", "y", None]}, "'text' holds nothing (null) in example 3"),
    "half a null": ({"prompt": ["x", "y"], "completion": ["z", None]}, "(null) in example 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_columns(case):
    columns, message = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        data.check_columns(table(**columns))
    assert message in caught.value.message


def test_refused_columns_of_files(tmp_path):
    mixed = data.load(write(tmp_path / "a.jsonl", LINES + '{"text": [1]}\n'))
    with pytest.raises(BadInput, match="'text' holds token ids in example 4, and needs text"):
        data.check_columns(mixed)
    empty_cell = data.load(write(tmp_path / "a.csv", 'text,n\none,1\n"",2\n'))
    with pytest.raises(BadInput, match=r"'text' holds nothing \(null\) in example 2"):
        data.check_columns(empty_cell)
    stream = data.load(write(tmp_path / "b.jsonl", '{"foo": 1}\n'), streaming=True)
    with pytest.raises(BadInput, match="the data has the columns 'foo'"):
        data.check_columns(stream)
