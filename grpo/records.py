"""Rows as plain dictionaries from JSONL, JSON, CSV (each also .gz), parquet, a folder or hub name for `datasets`, or reasoning-gym.

Leaves out what the columns mean (grpo/data.py, grpo/sft_data.py). Every fault is one error that names file and row.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from grpo.gym_data import PREFIX, read_gym

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def read_records(path_or_name: str | Path, *, split: str = "train", limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, columns) for each row; place names file and row for error messages ("rows.jsonl, row 3").

    JSONL rows count from 1 by line, blank lines included but not yielded; other formats count their rows.

    Raises:
        FileNotFoundError: a path that is not there (near names are suggested).
        ValueError: unknown file type, broken content, or a hub dataset that cannot be loaded.
    """
    name = str(path_or_name)
    if name.startswith(PREFIX):
        return islice(read_gym(name), limit)
    path = Path(name).expanduser()
    if path.is_file():
        records = _read_file(path)
    elif path.is_dir() or not _looks_like_path(name):
        records = ((f"{name}[{split}], row {number}", record) for number, record in enumerate(_read_hub(name, path, split), 1))
    else:
        raise FileNotFoundError(_missing(path))
    return islice(records, limit)


def _looks_like_path(name: str) -> bool:
    stem = name.lower().removesuffix(".gz")
    return stem.endswith(_SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no file {path}: the folder {path.parent} does not exist"
    return f"no file {path}{_near(path)}"


def _near(path: Path) -> str:
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; near it: {', '.join(near)}" if near else ""


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = next((suffix for suffix in _SUFFIXES if path.name.lower().removesuffix(".gz").endswith(suffix)), None)
    if kind is None:
        raise ValueError(f"{path}: unknown type of data file; known are {', '.join(_SUFFIXES)} (.gz too, parquet excepted)")
    if kind == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if kind == ".csv":
        return _read_csv(path, text)
    return _read_json(path, text) if kind == ".json" else _read_json_lines(path, text)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): U+2028, U+0085 and form feeds may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, row {number}"
            yield place, _as_record(place, _parse_json(place, line))


def _read_json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _read_json_lines(path, text)  # many .json files hold one object a line
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise ValueError(f'{path}: must hold a list of objects (or {{"data": [...]}}), got {type(content).__name__}')
    return ((f"{path}, row {number}", _as_record(f"{path}, row {number}", item)) for number, item in enumerate(content, 1))


def _parse_json(place: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error


def _as_record(place: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{place}: must be an object with columns, got {type(item).__name__}")
    return item


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        for number, record in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
            if None in record:
                raise ValueError(f"{path}, row {number}: more fields than the header has")
            yield f"{path}, row {number}", dict(record)
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error})") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from error


def _read_hub(name: str, path: Path, split: str) -> Iterator[dict[str, Any]]:
    """A `datasets` dataset: a folder, one saved by save_to_disk, or `owner/name[:configuration]` on the hub."""
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            dataset = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            dataset = datasets.load_dataset(name if path.is_dir() else repository, None if path.is_dir() else configuration or None, split=split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        # Covers no network (ConnectionError), no such dataset, no such split, a missing configuration, a damaged folder.
        reason = " ".join(str(error).split())[:300]
        what = "folder" if path.is_dir() else "neither a file here nor a dataset that the Hugging Face hub (or its offline cache) gives"
        raise ValueError(f"data {name!r} (split {split!r}): {what}{_near(path)}; {type(error).__name__}: {reason}") from error
    return iter(dataset)  # type: ignore[arg-type]
