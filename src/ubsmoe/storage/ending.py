"""Whether a run has ended, as what, and from which round it can be asked for more."""

import json
from pathlib import Path
from typing import cast

from ubsmoe.storage import disk
from ubsmoe.storage.events import read_events
from ubsmoe.storage.layout import ADAPTER, CONFIG, EVENTS, LOCK, SUMMARY, read_json
from ubsmoe.storage.record import Summary
from ubsmoe.storage.same_run import RunFolderError


def has_ended(path: Path) -> bool:
    """Whether a run has written its final figures. Those of fewer rounds than it is to have now are not final."""
    if not (path / SUMMARY).exists():
        return False
    return asked_rounds(path) == read_json(path / SUMMARY).get("rounds", asked_rounds(path))


def check_ended(path: Path) -> None:
    """Raise RunFolderError for a run that has no result yet."""
    if not (path / SUMMARY).exists():
        raise RunFolderError(f"{path} has no {SUMMARY}: the run has not ended; start it with the same --out to go on")


def is_running(path: Path) -> bool:
    """Whether a process carries out the run in this folder; taken for granted where that cannot be seen.

    Ask before reading the folder: a run writes its summary before it lets go.
    """
    return disk.is_locked(path / LOCK) is not False


def final_summary(path: Path, config_json: str) -> Summary | None:
    """The summary of a run that has ended with these very settings, its adapter intact; None if there is anything to do."""
    if not (path / CONFIG).exists() or not has_ended(path) or read_json(path / CONFIG) != json.loads(config_json):
        return None
    summary = cast(Summary, read_json(path / SUMMARY))
    adapter = path / ADAPTER
    return summary if adapter.exists() and disk.file_sha256(adapter) == summary["adapter_sha256"] else None


def rounds_so_far(path: Path) -> int:
    """The rounds of a run before more are asked for: those it ended with, or was begun for.

    Neither changes while the added rounds are under way, so that asking again does not add them twice.
    """
    if (path / SUMMARY).exists():
        return int(read_json(path / SUMMARY)["rounds"])
    events = read_events(path / EVENTS) if (path / EVENTS).exists() else []
    started = [event["rounds"] for event in events if event["event"] == "started"]
    return int(next(iter(started), None) or asked_rounds(path) or 0)


def asked_rounds(path: Path) -> int | None:
    """train.rounds of a run folder; None if it does not say."""
    rounds: int | None = read_json(path / CONFIG).get("train", {}).get("rounds") if (path / CONFIG).exists() else None
    return rounds
