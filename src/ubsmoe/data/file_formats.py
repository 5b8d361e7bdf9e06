"""Files of records as plain rows, each with the words that say where it stands.

    .json .jsonl    a JSON array, or one JSON object per line
    .csv            a header, then one record per line; an empty cell is a missing field, lists are written as JSON
    .parquet        one record per row; needs pyarrow (the extra "datasets" brings it)

All but Parquet may be gzipped (.gz).
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError
from ubsmoe.errors import require

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
_LISTS = {"messages", "candidates"}  # the fields of a record that are no text


def stem(name: str) -> str:
    """The name without folder or record suffix: a/ARC-Easy.json.gz gives ARC-Easy."""
    return re.sub(r"\.(jsonl?(\.gz)?|csv(\.gz)?|parquet)$", "", name.rsplit("/", 1)[-1])


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with the words that say where it stands. Raises UserError if the file cannot be read."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    text = _read_text(path)
    if path.name.removesuffix(".gz").endswith(".csv"):
        yield from _csv(text, path)
    elif text.lstrip().startswith("["):
        for number, record in enumerate(_parse(text, str(path)), 1):
            yield f"{path} record {number}", record
    else:
        # Not splitlines(): it also cuts at U+2028 and its like, which JSON strings may hold.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path} line {number}", _parse(line, f"{path} line {number}")


def _csv(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(f"{where}: expected {len(reader.fieldnames or ())} cells, as the header has")
            record: dict[str, Any] = {name: cell for name, cell in row.items() if cell}
            for name in sorted(_LISTS & record.keys()):
                record[name] = _parse(record[name], f"{where}: field {name!r}", "a list written as JSON")
            yield where, record
    except csv.Error as error:
        raise ConfigError(f"{path} after line {reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    require("pyarrow", "datasets")
    parquet = import_module("pyarrow.parquet")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", {name: value for name, value in row.items() if value is not None}


def _parse(text: str, where: str, expected: str = "one JSON object per line, or a JSON array") -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}); expected {expected}") from None


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(
            f"{path} cannot be read as UTF-8 text{' in gzip' * (path.suffix == '.gz')}: {error}"
        ) from None
