"""The folder of one run: what was asked, with which versions, what happened, and the result.

    config.json          the resolved settings; written last, so a folder without it is no run yet
    data.json            the data card: sources, hashes, sizes
    costs.json           what a client of each tier costs, as planned
    versions.json        python, torch, transformers, ubsmoe, platform, commit of a checkout
    events.jsonl         one line per event
    checkpoints/         the newest states
    adapter.safetensors  the final adapter
    summary.json         the final figures
    releases.jsonl       of a private run: every attempt at a round, every model that went out
    records/             train.jsonl and test.jsonl of a run whose records were given in Python
    .lock                held by the process that writes here

`RunFolder` is for the one process that runs; `read_run` looks at a folder without touching it.
"""

import errno
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ubsmoe.storage import checkpoints, disk, json_text, tensors
from ubsmoe.storage.checkpoints import Checkpoint
from ubsmoe.storage.client_memory import ClientMemory
from ubsmoe.storage.disk import atomic_write as atomic_write
from ubsmoe.storage.ending import check_ended
from ubsmoe.storage.ending import has_ended as has_ended
from ubsmoe.storage.events import EventLog, read_events
from ubsmoe.storage.layout import (
    ADAPTER,
    CHECKPOINTS,
    CLIENTS,
    CONFIG,
    COSTS,
    DATA,
    LOCK,
    RELEASES,
    SUMMARY,
    VERSIONS,
    read_json,
    read_versions,
    refuse_foreign,
)
from ubsmoe.storage.layout import EVENTS as EVENTS
from ubsmoe.storage.record import RunRecord
from ubsmoe.storage.releases import Releases
from ubsmoe.storage.same_run import (
    ORIGIN,
    changed_settings,
    differing_settings,
    refuse_change,
    refuse_other_run,
    settings_of_origin,
)
from ubsmoe.storage.same_run import RunFolderError as RunFolderError
from ubsmoe.storage.versions import current_versions

if TYPE_CHECKING:
    from torch import Tensor


class RunFolder:
    """A run folder that `open_or_create` opened for writing; it is locked against every other process until `close`."""

    def __init__(
        self, path: Path, lock: disk.Lock, config_json: str, versions_changed: dict[str, list[str | None]]
    ) -> None:
        self.path = path
        self.events = EventLog(path / EVENTS)
        self._lock = lock
        self._origin: dict[str, Any] = settings_of_origin(config_json)
        self._versions_changed = versions_changed
        self.settings_changed: dict[str, list[Any]] = {}

    @classmethod
    def open_or_create(cls, path: str | Path, config_json: str, versions: Mapping[str, str] | None = None) -> Self:
        """Start a run, or open the one that is there if its settings are the same.

        Args:
            path: the folder; created when missing.
            config_json: the resolved settings, as `config.to_json` gives them.
            versions: what the run depends on; `current_versions()` when left out.

        Raises:
            RunFolderError: if the folder holds a run with other settings (the message names them) or of an older ubsmoe, or
                anything else, is in use, or cannot be written.
        """
        path, now = Path(path), dict(versions or current_versions())
        lock = None
        try:
            refuse_foreign(path)
            disk.make_folder(path)
            if (path / CHECKPOINTS).is_symlink():
                raise RunFolderError(
                    f"{path / CHECKPOINTS} is a link, and links in a run folder are not followed; remove it"
                )
            lock = disk.Lock(path / LOCK)
            exists = (path / CONFIG).exists() and (path / VERSIONS).exists()
            before = _go_on(path, config_json, now) if exists else _begin(path, config_json, now)
            return cls(path, lock, config_json, differing_settings(before, now))
        except (OSError, ValueError) as error:
            if lock:
                lock.close()
            if isinstance(error, BlockingIOError):
                raise RunFolderError(f"{path} is {error.strerror}; stop it or choose another --out") from None
            if isinstance(error, OSError) and error.errno == errno.ELOOP:
                raise RunFolderError(f"{error.filename} {error.strerror}, or choose another --out") from None
            if isinstance(error, OSError):
                raise RunFolderError(f"cannot write in {path}: {error}; choose another --out") from error
            raise

    @cached_property
    def releases(self) -> Releases:
        """What a private run has to remember of its attempts. Raises EventError if the file is damaged."""
        return Releases(self.path / RELEASES)

    def resume(self, origin: Mapping[str, str] | None = None, most: int | None = None) -> Checkpoint | None:
        """Go back to the newest usable checkpoint; events of later rounds are forgotten and the return noted as one.

        Args:
            origin: hashes of what the run is made of, by name; every checkpoint carries them and the settings.
            most: how many of the newest checkpoints may be gone back to; all when left out.

        Returns:
            The checkpoint, or None if the run has none yet and starts from the beginning.

        Raises:
            RunFolderError: if the checkpoint is of a run with other settings, or was made of something else; it names what.
            CheckpointError: if there are checkpoints and none is usable.
            EventError: if the event file is damaged.
        """
        self._origin |= origin or {}
        checkpoint = checkpoints.load_newest(self.path / CHECKPOINTS, most)
        if checkpoint:
            refuse_other_run(self.path, checkpoint, self._origin)
        self.events.truncate_after(checkpoint.round if checkpoint else -1)
        ClientMemory(self.path / CLIENTS, 1).go_back(checkpoint.round if checkpoint else 0)
        if checkpoint:
            self.settings_changed = changed_settings(checkpoint, self._origin)
            self.events.append(
                "resumed",
                checkpoint.round,
                skipped=list(checkpoint.skipped),
                versions_changed=self._versions_changed,
                settings_changed=self.settings_changed,
            )
        return checkpoint

    def save_checkpoint(
        self,
        round: int,
        tensors: Mapping[str, "Tensor"],
        facts: Mapping[str, Any],
        keep: int,
        spared: Collection[int] = (),
    ) -> Path:
        """Save the state after a round; the events up to it become durable first. As `checkpoints.save_checkpoint`."""
        self.events.sync()
        facts = {**facts, ORIGIN: self._origin}
        return checkpoints.save_checkpoint(self.path / CHECKPOINTS, round, tensors, facts, keep, spared)

    def write_adapter(self, adapter: Mapping[str, "Tensor"], facts: Mapping[str, Any] | None = None) -> str:
        """Write the final adapter; `facts`, such as alpha, go into its header. Returns its SHA-256."""
        atomic_write(self.path / ADAPTER, tensors.tensor_parts(adapter, facts))
        return disk.file_sha256(self.path / ADAPTER)

    def write_data_card(self, card: Mapping[str, Any]) -> None:
        """Write what the run's data are."""
        atomic_write(self.path / DATA, json_text.encode_json(dict(card), indent=2))

    def write_costs(self, costs: Sequence[Mapping[str, Any]]) -> None:
        """Write what a client of each tier costs, as planned: a report then needs no model to say it."""
        atomic_write(self.path / COSTS, json_text.encode_json(list(costs), indent=2))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures; once this file is there the run has ended."""
        self.events.sync()
        atomic_write(self.path / SUMMARY, json_text.encode_json(dict(summary), indent=2))

    def close(self) -> None:
        """Let another process have the folder; closing twice is fine."""
        self.events.close()
        if "releases" in self.__dict__:
            self.releases.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / VERSIONS).is_file()


def read_run(path: str | Path) -> RunRecord:
    """Read a run folder, finished or not, without locking or changing it.

    Raises:
        RunFolderError: if there is no run, an older ubsmoe wrote it, or a file of it is damaged.
        EventError: if the event file is damaged.
    """
    path, versions = Path(path), read_versions(Path(path))
    summary = read_json(path / SUMMARY) if has_ended(path) else None
    events = read_events(path / EVENTS) if (path / EVENTS).exists() else []
    costs = read_json(path / COSTS, list) if (path / COSTS).exists() else None
    return RunRecord(path, read_json(path / CONFIG), versions, events, summary, costs)


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings of a run folder. Raises RunFolderError if there is no run, or an older ubsmoe wrote it."""
    read_versions(Path(path))
    config: dict[str, Any] = read_json(Path(path) / CONFIG)
    return config


def read_adapter(path: str | Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The final adapter of a run and the facts written with it (method, alpha, the base's hash).

    Raises:
        RunFolderError: if the run has not ended, an older ubsmoe wrote it, or the file is not the one that its summary tells of.
    """
    file, summary = Path(path) / ADAPTER, Path(path) / SUMMARY
    check_ended(Path(path))
    read_versions(Path(path))
    expected = read_json(summary).get("adapter_sha256")
    try:
        data = disk.read_file(file)
        if expected not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError(f"its SHA-256 is not the one in {SUMMARY}")
        return tensors.read_tensors(data), tensors.read_facts(data)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(f"{file} is damaged: {error}") from error


def read_states(path: str | Path) -> Iterator[Checkpoint]:
    """Every checkpoint that a run has kept, oldest first, one in memory at a time.

    Raises:
        RunFolderError: if it has none, or an older ubsmoe wrote them.
        CheckpointError: on the way, if one is damaged.
    """
    read_versions(Path(path))
    found = checkpoints.saved_checkpoints(Path(path) / CHECKPOINTS)
    if not found:
        raise RunFolderError(f"{path} has no checkpoint yet; let it run on")
    return map(checkpoints.load_checkpoint, found)


def saved_round(path: str | Path) -> int | None:
    """The round of the newest checkpoint, by its name alone; None if there is none."""
    return checkpoints.newest_round(Path(path) / CHECKPOINTS)


def _begin(path: Path, config_json: str, versions: dict[str, str]) -> dict[str, str]:
    """config.json comes last: from then on the folder is a run. One that was lost comes back for the same settings only."""
    if checkpoint := checkpoints.load_newest(path / CHECKPOINTS):
        refuse_other_run(path, checkpoint, settings_of_origin(config_json))
    disk.make_folder(path / CHECKPOINTS)
    atomic_write(path / VERSIONS, json_text.encode_json(versions, indent=2))
    atomic_write(path / CONFIG, config_json.encode())
    return versions


def _go_on(path: Path, config_json: str, versions: dict[str, str]) -> dict[str, str]:
    """The versions the run was started with, if it is the run that `config_json` asks for.

    A start that was refused or killed with nothing saved begins again, with whatever settings.
    """
    before, theirs, ours = read_versions(path), read_json(path / CONFIG), json.loads(config_json)
    if theirs == ours:
        return before
    if checkpoints.newest_round(path / CHECKPOINTS) is None:
        return _begin(path, config_json, versions)
    refuse_change(path, theirs, ours)
    _refuse_past(path, ours)
    atomic_write(path / CONFIG, config_json.encode())
    return before


def _refuse_past(path: Path, config: Mapping[str, Any]) -> None:
    """Raise RunFolderError if the run has done more rounds than it is to have."""
    done, rounds = saved_round(path) or 0, config.get("train", {}).get("rounds", math.inf)
    if done > rounds:
        raise RunFolderError(f"{path} has done {done} rounds, train.rounds is {rounds}; set {done} or more")
