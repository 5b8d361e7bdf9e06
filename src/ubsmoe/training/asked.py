"""What a run is asked to be, by a run file, a run folder, a dict, keyword arguments, records in memory. Needs no torch."""

import json
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypedDict

from ubsmoe.config import MAIN_KEY, ConfigError, RunSettings, parse_table, read_toml
from ubsmoe.config.plug_ins import require_trusted
from ubsmoe.methods.table import check_names
from ubsmoe.storage.layout import RECORDS
from ubsmoe.storage.runfolder import is_run, read_config
from ubsmoe.storage.same_run import flatten

Section = Mapping[str, Any]
Records = Iterable[Mapping[str, Any]]
"""A list of records, a `datasets.Dataset`, or anything else that gives one dict after another."""


class Sections(TypedDict, total=False):
    """The sections of a run file as keyword arguments; what is left out keeps its default."""

    seed: int
    label: str | None
    threads: int | None
    keep_checkpoints: int
    model: str | Path | Section
    adapter: Section
    tiers: Section
    clients: Section
    data: str | Path | Section | Records
    method: str | Section
    train: Section
    rounds: Section
    wire: Section
    robust: Section
    privacy: Section | None
    secure_aggregation: Section | None
    simulation: Section | None
    evaluate: Section


def asked_settings(
    run: str | Path | Section | RunSettings | None, sections: Mapping[str, Any], place: Path
) -> tuple[RunSettings, dict[Path, bytes]]:
    """The settings of a run, and the files that its records have to be in before it starts.

    Args:
        run: a run file, a run folder, its tables as a dict, settings, or nothing.
        sections: what replaces parts of it; `Sections`, or dotted keys.
        place: the run folder, where records go.

    Raises:
        UserError: for what cannot be read, or is no setting.
    """
    if isinstance(run, str | Path):
        table, folder = _table_of(Path(run))
    else:
        table, folder = run.model_dump(mode="json") if isinstance(run, RunSettings) else dict(run or {}), Path()
    changes = {key: value for name, given in sections.items() for key, value in _by_key(name, given).items()}
    files: dict[Path, bytes] = {}
    for key in ("data.train", "data.test"):
        records = changes.get(key)
        if isinstance(records, Path):
            changes[key] = str(records)
        elif records is not None and not isinstance(records, str):
            path = (place / RECORDS / f"{key.removeprefix('data.')}.jsonl").absolute()
            files[path], changes[key] = _lines(records, key), str(path)
    settings = parse_table(table, changes, folder)
    check_names(settings.method.name, settings.method.settings)
    return settings, files


def _table_of(path: Path) -> tuple[dict[str, Any], Path]:
    """The tables of a run file or a run folder, and what its paths are relative to."""
    if not is_run(path):
        return read_toml(path), path.parent
    table = read_config(path)
    require_trusted(table, path)
    for key in ("train", "test"):  # the folder may have been copied since
        own = path.absolute() / RECORDS / f"{key}.jsonl"
        if own.exists():
            table["data"][key] = str(own)
    return table, Path()


def _by_key(name: str, given: Any) -> dict[str, Any]:
    """A section as dotted keys. A part of [method] is replaced as a whole: it may be true or false before."""
    splits = set(given) if isinstance(given, Mapping) and hasattr(given, "column_names") else set()  # of a DatasetDict
    if other := splits - {"train", "test"}:
        raise ConfigError(f"{name}: a DatasetDict may have train and test, and has {', '.join(sorted(other))} too")
    if isinstance(given, Mapping) and "." not in name:
        inner = given if name == "method" else flatten(dict(given))
        return {f"{name}.{key}": value for key, value in inner.items()}
    single = MAIN_KEY.get(name)
    return {f"{name}.{single}" if single else name: str(given) if name == "model" else given}


def _iso(value: Any) -> str:
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"a value is a {type(value).__name__}")


def _lines(records: Any, key: str) -> bytes:
    """Records as JSON lines, missing values left out as Parquet has them, times as ISO 8601."""
    if hasattr(records, "with_format"):  # a data set that is set to give tensors
        records = records.with_format(None)
    try:
        kept = [
            {name: value for name, value in one.items() if value is not None} if isinstance(one, Mapping) else one
            for one in records
        ]
        return "".join(f"{json.dumps(one, default=_iso)}\n" for one in kept).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}: expected a path, a hub id or records of plain values, got {type(records).__name__} ({error})"
        ) from None
