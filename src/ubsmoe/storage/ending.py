"""Whether a run has ended, as what, and from which round it can be asked for more."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ubsmoe.errors import UserError
from ubsmoe.storage import disk
from ubsmoe.storage.events import read_events
from ubsmoe.storage.layout import ADAPTER, CONFIG, EVENTS, LOCK, SUMMARY, read_json
from ubsmoe.storage.record import Summary
from ubsmoe.storage.same_run import RunFolderError


def has_ended(path: Path) -> bool:
    """Whether a run has written its final figures. Those of fewer rounds than it is to have are not, unless it stopped early."""
    if not (path / SUMMARY).exists():
        return False
    return asked_rounds(path) == read_json(path / SUMMARY).get("rounds", asked_rounds(path)) or stopped_early(path)


def best_round(losses: Sequence[float]) -> int:
    """The first round with the lowest validation loss, counted from 1; NaN is never lower.

    >>> best_round([0.5, 0.25, 0.25, math.nan])
    2
    """
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    return 1 + known.index(min(known))


def is_out_of_patience(losses: Sequence[float], patience: int | None) -> bool:
    """Whether so many rounds have passed since the one with the lowest loss.

    It follows from the losses alone, so that a resumed run stops where a whole one does.

    >>> is_out_of_patience([0.5, 0.25, 0.3], 2), is_out_of_patience([0.5, 0.25, 0.3, 0.26], 2)
    (False, True)
    """
    return bool(losses and patience) and len(losses) - best_round(losses) >= (patience or math.inf)


def stopped_early(path: Path, patience: int | None = None) -> bool:
    """Whether the run ended out of patience: its own, as its settings are now, or this one."""
    if not (path / SUMMARY).exists() or not (path / CONFIG).exists():
        return False
    found, train = read_json(path / SUMMARY).get("validation"), read_json(path / CONFIG).get("train", {})
    return found is not None and is_out_of_patience(found["losses"], patience or train.get("patience"))


def refuse_more(path: Path, patience: int | None = None) -> None:
    """Raise UserError if more rounds would never be trained, since it stopped early."""
    if stopped_early(path, patience):
        raise UserError(
            f"{path} stopped early, after {read_json(path / SUMMARY)['rounds']} rounds: it would not train more of them; set "
            "train.patience higher to go on"
        )


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
