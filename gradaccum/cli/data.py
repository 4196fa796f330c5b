"""Load a data set from a local file, a directory or the hub, and say what is wrong with it.

Reading is left to the `datasets` library; here is only what a user needs to hear before training.
"""

import difflib
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from gradaccum.errors import BadInput

Data = datasets.Dataset | datasets.IterableDataset

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
FORMATS = '"text", or "prompt" and "completion", or "messages"'


def load(
    name: str, *, split: str = "train", config: str | None = None, streaming: bool = False
) -> Data:
    """Return one split of a data set.

    Args:
        name: A `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file (one example a line), a
            directory (also one made by `Dataset.save_to_disk`), or a hub id.
        split: Which split; a single file has only "train".
        config: Configuration of a hub data set.
        streaming: Read while training instead of before; the data set then has no length.

    Raises:
        BadInput: The file is missing, of an unknown kind, malformed or empty; the split is not
            there; the hub cannot be reached.
    """
    path = Path(name).expanduser()
    try:
        if path.is_file():
            dataset = _file(path, split, streaming)
        elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            dataset = _pick(datasets.load_from_disk(str(path)), split, name)
        else:
            _refuse_missing(path, name)
            dataset = _pick(datasets.load_dataset(name, config, streaming=streaming), split, name)
    except BadInput:
        raise
    except ConnectionError as error:
        raise BadInput(
            f"{name} is no file or directory here, and the hub cannot be reached",
            hint="check the spelling, or give a local .jsonl, .json, .csv, .parquet or .txt file",
        ) from error
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise BadInput(f"{name} cannot be read: {_cause(error)}") from error
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise BadInput(f"{name} has no examples")
    return dataset


def check_columns(dataset: Data, *, text_field: str = "text") -> str:
    """Return the format of a data set, by its columns.

    Args:
        dataset: As `load` returns it.
        text_field: Name of the column of plain text.

    Returns:
        "input_ids" (already tokenized), "messages", "prompt and completion", or `text_field`.

    Raises:
        BadInput: The columns are those of no format.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "input_ids" in columns:
        return "input_ids"
    if "messages" in columns:
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        return "prompt and completion"
    if text_field in columns:
        return text_field
    raise BadInput(
        f"the data has the columns {', '.join(map(repr, columns)) or '(none)'}, and needs "
        + FORMATS.replace('"text"', f'"{text_field}"'),
        hint="rename a column, or name the text with --dataset_text_field",
    )


def _file(path: Path, split: str, streaming: bool) -> Data:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path} is none of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty")
    loaded = datasets.load_dataset(reader, data_files=str(path), streaming=streaming)
    dataset = _pick(loaded, split, str(path))
    if reader == "text":
        dataset = dataset.filter(lambda row: bool(row["text"].strip()))
    return dataset


def _pick(loaded: Any, split: str, name: str) -> Data:
    if isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        return loaded
    if split not in loaded:
        raise BadInput(
            f"{name} has no split {split!r}, only {', '.join(map(repr, loaded))}",
            hint="--dataset_train_split and --dataset_test_split name the splits",
        )
    return loaded[split]


def _refuse_missing(path: Path, name: str) -> None:
    """Refuse what can only have been meant as a local path."""
    looks_local = path.suffix.lower() in READERS or name.startswith((".", "/", "~"))
    if path.is_dir() or not (looks_local or name.count("/") > 1):
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    raise BadInput(
        f"there is no {name}", hint=f"did you mean {path.parent / near[0]}?" if near else ""
    )


def _cause(error: BaseException) -> str:
    """Return the first line of what the reader underneath says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
