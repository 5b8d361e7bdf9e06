"""The names of a run folder's files, and how its JSON is read: `runfolder.py` says what each file holds."""

import re
from pathlib import Path
from typing import Any

from ubsmoe.storage import disk, json_text
from ubsmoe.storage.same_run import RunFolderError
from ubsmoe.version import __version__

CONFIG, VERSIONS, EVENTS, CHECKPOINTS = "config.json", "versions.json", "events.jsonl", "checkpoints"
ADAPTER, SUMMARY, DATA, COSTS = "adapter.safetensors", "summary.json", "data.json", "costs.json"
RELEASES, LOCK, RECORDS, CLIENTS = "releases.jsonl", ".lock", "records", "clients"
MEND = "move it away and start the run again with the same --out: checkpoints are intact, and it is written anew"
OLDEST = (0, 2)
"""The oldest version of ubsmoe whose run folders are read."""
RUN_FILES = {
    *(CONFIG, DATA, COSTS, VERSIONS, EVENTS, CHECKPOINTS, ADAPTER, SUMMARY, RELEASES, LOCK, RECORDS, CLIENTS),
    *(f".{CONFIG}.draft", f".{VERSIONS}.draft"),
}


def read_versions(path: Path) -> dict[str, str]:
    """versions.json of a run folder. Raises RunFolderError if an older ubsmoe wrote it than is read."""
    versions: dict[str, str] = read_json(path / VERSIONS)
    wrote = re.match(r"(\d+)\.(\d+)", str(versions.get("ubsmoe")))
    if wrote and (int(wrote[1]), int(wrote[2])) < OLDEST:
        this = ".".join(__version__.split(".")[:2])
        raise RunFolderError(
            f"{path} was written by ubsmoe {versions['ubsmoe']}; ubsmoe {this} does not read it: "
            f"use {versions['ubsmoe']} or run it again"
        )
    return versions


def refuse_foreign(path: Path) -> None:
    """Never mix a run into a folder of something else; what a start killed half-way left behind is ours."""
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; choose another --out")
    if not path.exists() or (path / CONFIG).exists():
        return
    ours = tuple(RUN_FILES)  # as the beginning of a name too: config.json.damaged is what somebody moved away
    foreign = sorted(part.name for part in path.iterdir() if not part.name.startswith(ours))
    if foreign:
        raise RunFolderError(f"{path} is not a run folder: it holds {', '.join(foreign[:3])}; choose another --out")


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file of a run folder. Raises RunFolderError if it is missing, damaged or no `kind`."""
    try:
        value = json_text.decode_json(disk.read_file(path))
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error}; is {path.parent} a run folder?") from error
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: {error}; {MEND}") from None
    if not isinstance(value, kind):
        raise RunFolderError(f"{path} is damaged: expected a JSON {'object' if kind is dict else 'list'}; {MEND}")
    return value
