"""Whether a folder or a checkpoint is of the run that is asked for: the same settings, made of the same things."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubsmoe.errors import UserError
from ubsmoe.storage.checkpoints import Checkpoint

ORIGIN = "origin"  # the fact of a checkpoint that says of which run it is
MAY_CHANGE = {
    *("train.rounds", "train.patience", "clients.count", "label", "keep_checkpoints"),
    *("rounds.quorum", "rounds.deadline_seconds", "rounds.give_up_seconds"),
    *("model.base", "data.train", "data.test"),
}
"""Settings beside [evaluate] that may be others when a run goes on. Where base and data lie is one: hashes say what they are."""
CLIENT_DATA, QUESTIONS = "client data", "test questions"
FOLLOWS_FROM = {CLIENT_DATA: "clients.count", QUESTIONS: "evaluate."}
"""What a run is made of that follows from settings which may change, and is not compared where they have."""


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


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of this setting."""
    return key in MAY_CHANGE or key.startswith("evaluate.")


def settings_of_origin(config_json: str) -> dict[str, Any]:
    """What a checkpoint says of its run's settings, by dotted key: those that stay, and those that may change."""
    flat = flatten(json.loads(config_json))
    return {
        "settings": {key: value for key, value in flat.items() if not may_change(key)},
        "changeable": {key: value for key, value in flat.items() if may_change(key)},
    }


def refuse_change(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise RunFolderError if a run with `theirs` cannot go on with `ours`, both nested or by dotted key."""
    differing = differing_settings(theirs, ours)
    if other := {key: pair for key, pair in differing.items() if not may_change(key)}:
        raise RunFolderError(refusal(path, other))
    before, after = differing.get("clients.count", [0, 0])
    private = any(key.startswith("privacy.") and value is not None for key, value in flatten(ours).items())
    if before and (after < before or private):
        reason = "epsilon was reckoned with these" if private else "it can only grow"
        raise RunFolderError(f"{path} holds a run with clients.count = {before}, asked {after}: {reason}")
    schedule, spans = (flatten(ours).get(f"train.{key}") for key in ("schedule", "schedule_rounds"))
    if "train.rounds" in differing and schedule not in (None, "constant") and spans is None:
        raise RunFolderError(
            f"{path} holds a run whose train.schedule spans its {differing['train.rounds'][0]} rounds; to have more of them, "
            "begin with train.schedule_rounds set"
        )
    for key in ("data.train", "data.test"):
        if None in differing.get(key, []):
            raise RunFolderError(refusal(path, {key: differing[key]}))  # a part was held out of train, or now would be


def changed_settings(checkpoint: Checkpoint, origin: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings that are no longer those of the checkpoint: [then, now]."""
    then = checkpoint.facts.get(ORIGIN, {}).get("changeable", origin["changeable"])
    return differing_settings(then, origin["changeable"])


def refuse_other_run(path: Path, checkpoint: Checkpoint, origin: Mapping[str, Any]) -> None:
    """Raise RunFolderError if the checkpoint says of itself that it is another run's."""
    theirs = checkpoint.facts.get(ORIGIN, {})
    stays = {key: value for key, value in theirs.get("settings", origin["settings"]).items() if not may_change(key)}
    refuse_change(path, {**theirs.get("changeable", {}), **stays}, {**origin["settings"], **_known(origin, theirs)})
    moved = changed_settings(checkpoint, origin)
    skipped = {"settings", "changeable"}
    skipped |= {name for name, cause in FOLLOWS_FROM.items() if any(key.startswith(cause) for key in moved)}
    if changed := [name for name in origin if name not in skipped and theirs.get(name, origin[name]) != origin[name]]:
        raise RunFolderError(
            f"{path} holds a run whose {', '.join(changed)} changed since its checkpoint of round {checkpoint.round}; put back "
            "what was there to go on, or choose another --out"
        )


def _known(origin: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may change and of which the checkpoint says what they were."""
    return {key: value for key, value in origin["changeable"].items() if key in theirs.get("changeable", {})}


def refusal(path: Path, differing: Mapping[str, list[Any]]) -> str:
    """Why the folder cannot hold a run whose settings differ so."""
    named = [f"{key} (there {there!r}, asked {asked!r})" for key, (there, asked) in differing.items()]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return (
        f"{path} holds a run with other settings: {', '.join(named[:5])}{more}; "
        "choose another --out, or set them as they are there to resume that run"
    )
