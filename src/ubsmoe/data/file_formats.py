"""Files of records as plain rows, each with the words that say where it stands.

    .json .jsonl    a JSON array, or one JSON object per line
    .csv            a header, then one record per line, cut at commas; an empty cell is a missing field, lists are written as JSON
    .parquet        one record per row; needs pyarrow (the extra "datasets" brings it)

All but Parquet may be gzipped (.gz). In a folder, hidden files and the notes of the `datasets` library are no records, and
`train-00000-of-00002.parquet` and its like are one data set.
"""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError
from ubsmoe.errors import printable, require

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
NOTES = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
SPLITS = {"train", "test", "validation", "valid", "val", "dev"}
MAX_DIGITS = 4300  # of an integer, as Python's own int() has it
MOST_TIMES = 100  # text is packed to a fifth; the most that gzip packs is a thousandth
LEAST = 1 << 20  # bytes of a file that may hold so many times more however small it is
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_LISTS = {"messages", "candidates"}  # the fields of a record that are no text


class LongInteger(str):
    """An integer with more digits than `MAX_DIGITS`, as it was written."""


def stem(name: str) -> str:
    """The name without folder, record suffix or number of a shard: a/ARC-Easy.json.gz gives ARC-Easy."""
    return _SHARD.sub("", _without_suffix(name))


def record_files(folder: Path) -> list[Path]:
    """The record files of a folder, in the order of their names. Raises ConfigError if one is missing or sets are mixed."""
    named = [
        path for path in folder.iterdir()
        if path.name.endswith(SUFFIXES) and not path.name.startswith(".") and path.name not in NOTES
    ]  # fmt: skip
    if nowhere := sorted(path for path in named if not path.exists()):
        raise ConfigError(f"{nowhere[0]} is a link to a file that is not there; copy the file, or remove the link")
    paths = sorted(path for path in named if path.is_file())
    shards: dict[str, list[tuple[int, int]]] = {}
    for path in paths:
        if found := _SHARD.search(_without_suffix(path.name)):
            shards.setdefault(stem(path.name), []).append((int(found[1]), int(found[2])))
    for name, numbers in shards.items():
        there, count = {number for number, _ in numbers}, max(count for _, count in numbers)
        if len(sizes := sorted({size for _, size in numbers})) > 1:
            sets = " and ".join(f"{size:05d}" for size in sizes)
            raise ConfigError(f"{folder} holds shards of {sets} of {name}; remove those of the older data set")
        if missing := [number for number in range(count) if number not in there]:
            raise ConfigError(f"{folder} lacks shard {missing[0]:05d} of {count:05d} of {name}; copy all of them")
    if len(splits := sorted(SPLITS & shards.keys())) > 1:
        raise ConfigError(f"{folder} holds shards of {' and '.join(splits)}; put each split into a folder of its own")
    return paths


def _without_suffix(name: str) -> str:
    return re.sub(r"\.(jsonl?(\.gz)?|csv(\.gz)?|parquet)$", "", name.rsplit("/", 1)[-1])


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with the words that say where it stands. Raises UserError if the file cannot be read."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no plain file; expected records on the disk, since they are read more than once")
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
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 131,072 by default, which an article exceeds
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        header = _header(next(reader, []), path)
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if not cells:
                continue  # an empty line
            if len(cells) != len(header):
                raise ConfigError(f"{where}: expected {len(header)} cells, as the header has, got {len(cells)}")
            record: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            for name in sorted(_LISTS & record.keys()):
                record[name] = _parse(record[name], f"{where}: field {name!r}", "a list written as JSON")
            yield where, record
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: not CSV ({error})") from None


def _header(names: list[str], path: Path) -> list[str]:
    """The names of the columns. Raises ConfigError for one that comes twice or another separator than a comma."""
    _once(names, f"{path} line 1")
    if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
        raise ConfigError(f"{path} line 1: columns are separated by {other!r}; expected commas, so save it with those")
    return names


def _once(names: list[str], where: str) -> None:
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ConfigError(
            f"{where}: there are several columns {', '.join(map(repr, twice))}; rename or remove all but one"
        )


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    require("pyarrow", "datasets")
    parquet = import_module("pyarrow.parquet")
    try:
        names = parquet.read_schema(path).names
        _check_unpacked(path, parquet.read_metadata(path).num_rows, "rows")
        rows = parquet.read_table(path).to_pylist() if len(set(names)) == len(names) else []
    except (
        OSError,
        ValueError,
        NotImplementedError,
        ArithmeticError,
        MemoryError,
    ) as error:  # pyarrow's are among them
        raise ConfigError(f"{path} cannot be read as Parquet: {printable(str(error))}") from None
    _once(names, str(path))
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", {name: value for name, value in row.items() if value is not None}


def _parse(text: str, where: str, expected: str = "one JSON object per line, or a JSON array") -> Any:
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # a plain ValueError is that of an integer of thousands of digits
        reason = str(error).split(";")[0]
        raise ConfigError(f"{where}: not JSON that can be read ({reason}); expected {expected}") from None


def _integer(digits: str) -> int | LongInteger:
    return int(digits) if len(digits) <= MAX_DIGITS else LongInteger(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two fields of one name JSON would keep the last one silently."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {Counter(names).most_common(1)[0][0]!r} comes twice")
    return record


def _check_unpacked(path: Path, count: int, what: str) -> None:
    """Raise ConfigError if a packed file holds so much that it is made to fill the memory."""
    size = path.stat().st_size
    if count > MOST_TIMES * max(size, LEAST):
        raise ConfigError(
            f"{path}: its {size} bytes hold more than {MOST_TIMES} times as many {what}; unpack it if that is meant"
        )


def _unpacked(path: Path) -> Iterator[bytes]:
    count = 0
    with gzip.open(path, "rb") as file:
        while piece := file.read(1 << 20):
            _check_unpacked(path, count := count + len(piece), "bytes")
            yield piece


def _read_text(path: Path) -> str:
    try:
        raw = b"".join(_unpacked(path)) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(
            f"{path} cannot be read as UTF-8 text{' in gzip' * (path.suffix == '.gz')}: {error}"
        ) from None
