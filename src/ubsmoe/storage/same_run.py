"""Whether a folder or a checkpoint is of the run that is asked for: the same settings, made of the same things."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubsmoe.errors import UserError
from ubsmoe.storage.checkpoints import Checkpoint

ORIGIN = "origin"  # the fact of a checkpoint that says of which run it is
RESUMABLE_CHANGE = "rounds.quorum"
"""The one setting that may be another when a run goes on: where dropping out is seeded, the same round would stop it again."""


class RunFolderError(UserError):
    """A folder that cannot hold this run; the message says why and what to change."""


def differing_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings that are not the same in both, by dotted key: [theirs, ours], None where one has no such setting.

    >>> differing_settings({"train": {"rounds": 5}, "seed": 0}, {"train": {"rounds": 9}, "seed": 0})
    {'train.rounds': [5, 9]}
    """
    flat_theirs, flat_ours = flatten(theirs), flatten(ours)
    keys = sorted(flat_theirs.keys() | flat_ours.keys())
    pairs = {key: [flat_theirs.get(key), flat_ours.get(key)] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def fixed_settings(config_json: str) -> dict[str, Any]:
    """The settings that a run keeps, by dotted key."""
    return {key: value for key, value in flatten(json.loads(config_json)).items() if key != RESUMABLE_CHANGE}


def refuse_other_run(path: Path, checkpoint: Checkpoint, origin: Mapping[str, Any]) -> None:
    """Raise RunFolderError if the checkpoint says of itself that it is another run's."""
    theirs = checkpoint.facts.get(ORIGIN, {})
    settings, ours = theirs.get("settings", origin["settings"]), origin["settings"]
    if differing := differing_settings(settings, ours):
        raise RunFolderError(refusal(path, differing))
    if changed := [name for name in origin if name != "settings" and theirs.get(name, origin[name]) != origin[name]]:
        raise RunFolderError(
            f"{path} holds a run whose {', '.join(changed)} changed since its checkpoint of round {checkpoint.round}; put back "
            "what was there to go on, or choose another --out"
        )


def refusal(path: Path, differing: Mapping[str, list[Any]]) -> str:
    """Why the folder cannot hold a run whose settings differ so."""
    named = [f"{key} (there {there!r}, asked {asked!r})" for key, (there, asked) in differing.items()]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return (
        f"{path} holds a run with other settings: {', '.join(named[:5])}{more}; "
        "choose another --out, or set them as they are there to resume that run"
    )
