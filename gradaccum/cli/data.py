"""Load a data set from a local file, a directory or the hub, and say what is wrong with it.

Reading is left to the `datasets` library; here is only what a user needs to hear before training.
What a row becomes (chat template, tokens, labels) is TRL's. Tested with datasets 5.2 and TRL 1.16.
"""

import contextlib
import difflib
import glob
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from gradaccum.errors import BadInput

Data = datasets.Dataset | datasets.IterableDataset

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# Columns of other common formats, and how to come from there.
FOREIGN = {
    "conversations": "ShareGPT: rename it to messages, and in it from to role (user, assistant) "
    "and value to content",
    "instruction": "Alpaca: join instruction and input to prompt, and rename output to completion",
}
FORMATS = '"text", or "prompt" and "completion", or "messages"'


def load(
    name: str, *, split: str = "train", config: str | None = None, streaming: bool = False
) -> Data:
    """Return one split of a data set.

    Args:
        name: A `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file (one example a line), a
            directory (also one made by `save_to_disk`), or a hub id.
        split: Which split; a single file has only "train".
        config: Configuration of a hub data set.
        streaming: Read while training instead of before; the data set then has no length, and only
            its beginning is checked.

    Raises:
        BadInput: The file is missing, of an unknown kind, malformed or empty; the split is not
            there; the hub cannot be reached.
    """
    path = Path(name).expanduser()
    try:
        with _quiet(local=path.exists()):
            dataset = _read(path, name, split=split, config=config, streaming=streaming)
            empty = next(iter(dataset), None) is None
    except BadInput:
        raise
    except ConnectionError as error:
        raise BadInput(
            f"{name} is no file or directory here, and the hub cannot be reached",
            hint=near(path)
            or "check the spelling, or give a local .jsonl, .json, .csv, .parquet or .txt file",
        ) from error
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, DatasetsError) as error:
        cause = _fault(path) or _cause(error)
        if "corresponds to no data" in cause:  # datasets' words for a file without a row
            raise BadInput(f"{name} has no examples") from error
        raise BadInput(f"{name} cannot be read: {cause}") from error
    if empty:
        raise BadInput(f"{name} has no examples")
    return dataset


def check_columns(dataset: Data, *, text_field: str = "text") -> str:
    """Return the format of a data set, by its columns, as TRL's SFTTrainer will take it.

    The first example is looked at; in a data set with a length also every other that may differ.

    Args:
        dataset: As `load` returns it.
        text_field: Name of the column of plain text.

    Returns:
        "input_ids" (already tokenized), "prompt and completion", "messages", or `text_field`.

    Raises:
        BadInput: The columns are those of no format, or do not hold what the format says.
    """
    first = next(iter(dataset), {})
    columns = dataset.column_names or list(first)
    formats = {
        "input_ids": ["input_ids"],
        "prompt and completion": ["prompt", "completion"],
        "messages": ["messages"],
        text_field: [text_field],
    }
    found = next((name for name, needed in formats.items() if {*needed} <= {*columns}), None)
    # TRL reads "prompt" first, whatever else is there, and then fails without its completion.
    half = found in ("messages", text_field) and "prompt" in columns
    if found is None or half:
        raise BadInput(
            f"the data has the columns {_listed(columns)}, and needs "
            + FORMATS.replace('"text"', f'"{text_field}"'),
            hint=f'remove the column "prompt", or {found} is not read'
            if half
            else FOREIGN.get(
                next((name for name in FOREIGN if name in columns), ""),
                "rename a column, or name the text with --dataset_text_field",
            ),
        )
    if first:
        _check_values(dataset, formats[found], first)
    return found


def _check_values(dataset: Data, columns: list[str], first: Mapping[str, Any]) -> None:
    """Refuse a column whose values are not all of the kind that its format needs."""
    wanted = {"input_ids": "token ids", "messages": "messages"}.get(columns[0], "text")
    if columns[0] == "prompt" and _kind(first["prompt"]) == "messages":
        wanted = "messages"
    for column in columns:
        # Arrow counts nulls without reading; a column of one type needs no look at each value.
        one_by_one = isinstance(dataset, datasets.Dataset) and (
            dataset.data.column(column).null_count > 0
            or isinstance(dataset.features[column], datasets.Json)
        )
        values = dataset[column] if one_by_one else [first.get(column)]
        for number, value in enumerate(values, start=1):
            if (kind := _kind(value)) != wanted:
                raise BadInput(
                    f"the column {column!r} holds {kind} in example {number}, and needs {wanted}",
                    hint="messages are a list of objects with role and content"
                    + (", and so is the completion of such a prompt" * (column == "completion"))
                    if wanted == "messages"
                    else "",
                )


def _kind(value: Any) -> str:
    """Return what a value is, in the words of a message."""
    if isinstance(value, str):
        return "text"
    if value is None:
        return "nothing (null)"
    if not isinstance(value, list) or not value:
        return f"{value!r:.40}"
    if all(isinstance(item, int) for item in value):
        return "token ids"
    if all(isinstance(i, dict) and "role" in i and {"content", "tool_calls"} & {*i} for i in value):
        return "messages"
    return "a list of something else"


def _read(path: Path, name: str, *, split: str, config: str | None, streaming: bool) -> Data:
    if path.is_file():
        return _file(path, split, streaming)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _saved(path, name, split, streaming)
    _refuse_missing(path, name)
    where = str(path) if path.is_dir() else name
    return _pick(datasets.load_dataset(where, config, streaming=streaming), split, name)


def _file(path: Path, split: str, streaming: bool) -> Data:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path} is none of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty")
    files = glob.escape(str(path))  # datasets takes the name for a pattern
    loaded = datasets.load_dataset(reader, data_files=files, streaming=streaming)
    dataset = _pick(loaded, split, str(path))
    if isinstance(dataset, datasets.Dataset):
        dataset.data.validate(full=True)  # the JSON reader takes bytes that are not UTF-8
    if reader == "text":
        dataset = dataset.filter(lambda row: bool(row["text"].strip()))
    return dataset


def _saved(path: Path, name: str, split: str, streaming: bool) -> Data:
    """Load what `save_to_disk` wrote; the copy in the cache keeps its directory as it is.

    `load_from_disk` alone maps the files in place, and every later `map` (TRL tokenizes with one)
    writes its result beside them.
    """
    has_splits = (path / "dataset_dict.json").is_file()
    if has_splits:
        folders = {state.parent.name: state.parent for state in sorted(path.glob("*/state.json"))}
        path = _pick(folders, split, name)
    try:
        dataset: Any = datasets.load_from_disk(str(path))
    except IndexError as error:  # datasets cannot read a set that it saved without rows
        raise BadInput(f"{name} has no examples") from error
    if not has_splits:  # one data set, for training unless it says otherwise
        _pick(dict.fromkeys(["train", str(dataset.split or "train")]), split, name)
    files = [glob.escape(file["filename"]) for file in dataset.cache_files]
    return datasets.load_dataset("arrow", data_files=files, split="train", streaming=streaming)


def _pick(loaded: Mapping[Any, Any], split: str, name: str) -> Any:
    if split not in loaded:
        raise BadInput(
            f"{name} has no split {split!r}, only {_listed(map(str, loaded))}",
            hint="--dataset_train_split and --dataset_test_split name the splits; of local files, "
            "give a directory with train.jsonl and test.jsonl",
        )
    return loaded[split]


def _refuse_missing(path: Path, name: str) -> None:
    """Refuse what can only have been meant as a local path."""
    looks_local = path.suffix.lower() in READERS or name.startswith((".", "/", "~"))
    if not path.is_dir() and (looks_local or name.count("/") > 1):
        raise BadInput(f"there is no {name}", hint=near(path))


def near(path: Path) -> str:
    """Return the question whether a file or directory of a like name is meant, or ""."""
    siblings: list[str] = []
    with contextlib.suppress(OSError):
        siblings = sorted(sibling.name for sibling in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else ""


@contextlib.contextmanager
def _quiet(*, local: bool) -> Iterator[None]:
    """Hide the progress bars of `datasets` and, for local files, what it logs before it raises."""
    hidden, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    if local:
        datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()


def _fault(path: Path) -> str:
    """Return the file and line that are not JSON or not UTF-8, or "" where nothing is found."""
    with contextlib.suppress(OSError):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            is_text = READERS.get(file.suffix.lower()) in ("json", "csv", "text")
            if is_text and file.is_file() and (line := _bad_line(file)):
                return line if file == path else f"{file.relative_to(path)}, {line}"
    return ""


def _bad_line(file: Path) -> str:
    if file.suffix.lower() == ".json":
        try:
            json.loads(file.read_bytes())
            return ""
        except UnicodeDecodeError:
            pass  # found below, with its line
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # that is one value a line, which is read as well
                return f"line {error.lineno}: {error.msg}"
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                is_json = READERS[file.suffix.lower()] == "json"
                if is_json and text and not isinstance(json.loads(text), dict):
                    return f"line {number} is not a JSON object"
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8"
            except json.JSONDecodeError as error:
                return f"line {number}: {error.msg}"
    return ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "(none)"


def _cause(error: BaseException) -> str:
    """Return the first line of what the reader underneath says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
