"""The folder of a Flower app: a run file, what Flower wants to know about it, and two lines of code."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError, RunSettings, load_run, parse_value
from ubsmoe.config.plug_ins import KEYS, LISTS, plug_ins, setting
from ubsmoe.config.reading import BUILT_IN
from ubsmoe.storage.exportfolder import put_text, write_folder
from ubsmoe.storage.runfolder import is_run
from ubsmoe.storage.same_run import flatten
from ubsmoe.version import __version__

# What Flower and Ray do unless they are told not to: report usage, ask for newer versions, install packages before a run.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
RUN_FILE = "run.toml"
FOR_SERVER = ("out", "join-seconds", "track")  # what an app's configuration says beside the run file's own keys

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = {name}
version = "0.1.0"
description = "A run of ubsmoe on Flower"
license = {{ file = "LICENSE" }}
dependencies = ["ubsmoe[flower]=={version}", "flwr>=1.41,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "ubsmoe"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"

# For the server: its run folder, how long it waits for the run file's number of clients, and the trackers that it logs metrics to
# (tensorboard, wandb, mlflow; several with commas).
# Every other key is one of the run file's and replaces what it says. `flwr run -c` can change what stands here.
[tool.flwr.app.config]
{config}
"""
CODE = '''\
"""What Flower runs on {where}."""

from pathlib import Path

from ubsmoe.engines.flower.{side} import {side}_app

app = {side}_app(Path(__file__).with_name("{run_file}"))
'''
README = """\
# {name}

A Flower app that carries out `{run_file}` with ubsmoe, on as many nodes as there are.

    set -a; . ./flower.env; set +a   # no telemetry, no update checks, no installing of packages at run time
    flwr run . --stream              # simulated nodes on this machine, needs flwr[simulation]
    ubsmoe flower up .               # or a SuperLink and SuperNodes on this machine, with TLS; it says how to go on

The result is in `{out}`, a run folder like any other.
"""


def write_app(
    run_file: Path,
    app: Path,
    changes: Mapping[str, Any],
    out: Path | None = None,
    join_seconds: int = 120,
    track: Sequence[str] = (),
) -> RunSettings:
    """Write a Flower app that carries out a run file. The folder appears whole or not at all.

    Args:
        run_file: copied as it is.
        app: a folder that does not exist yet; letters, digits and hyphens, because Flower asks for that.
        changes: dotted settings that replace the file's.
        out: the run folder on the server; `out` inside the app's folder when left out.
        join_seconds: how long a start waits for all clients, before a quorum of them does.
        track: the trackers that the server logs metrics to.

    Returns:
        The settings of the run.

    Raises:
        ConfigError: if the run file or the folder's name cannot be used.
        ExportError: if there is something at `app`, or the disk refuses.
    """
    app = app.absolute()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,31}", app.name):
        raise ConfigError(
            f"{app.name!r} cannot be a Flower app's name: a letter, then up to 31 letters, digits, hyphens"
        )
    settings = load_run(run_file, dict(changes))
    check_fits_flower(settings)
    out = (out or app / "out").absolute()
    config = {
        "out": str(out),
        "join-seconds": join_seconds,
        "track": ",".join(track),
        **changes,
        **_found_paths(settings),
    }
    words = {"name": app.name, "run_file": RUN_FILE, "out": out}
    pyproject = PYPROJECT.format(
        name=json.dumps(app.name),
        version=__version__,
        config="\n".join(f"{key} = {_toml(value)}" for key, value in config.items()),
    )

    def fill(folder: Path) -> None:
        put_text(folder / RUN_FILE, run_file.read_text(encoding="utf-8"))
        put_text(folder / "pyproject.toml", pyproject)
        put_text(folder / "server.py", CODE.format(side="server", where="the server", **words))
        put_text(folder / "client.py", CODE.format(side="client", where="every node", **words))
        put_text(folder / "README.md", README.format(**words))
        put_text(folder / "LICENSE", metadata.distribution("ubsmoe").read_text("licenses/LICENSE") or "Apache-2.0\n")
        put_text(folder / "flower.env", "".join(f"{key}={value}\n" for key, value in QUIET.items()))
        put_text(folder / ".gitignore", "/out/\n/.flwr/\n")  # Flower ships what git would track

    write_folder(app, fill)
    return settings


def read_app(run_file: Path, config: Mapping[str, Any]) -> RunSettings:
    """The run file of a Flower app under the app's own configuration, whose dotted keys replace the file's.

    Raises:
        ConfigError: as `load_run`, and for a run that only one process can carry out.
    """
    changes = {key: value for key, value in config.items() if key not in FOR_SERVER}
    texts = {key: parse_value(value) for key, value in changes.items() if isinstance(value, str)}
    settings = load_run(run_file, {**changes, **texts})
    check_fits_flower(settings)
    return settings


def plug_ins_of(app: Path) -> str:
    """The plug-ins that an app's run file names, as a node's configuration says them. Raises ConfigError as `read_app`."""
    if not (app / RUN_FILE).is_file():  # another app, which some measurement runs
        return ""
    settings = read_app(app / RUN_FILE, _config_of(app))
    return ",".join(plug_ins(settings.model_dump(mode="json")).values())


def run_folder_of(place: Path) -> Path:
    """The run folder that an app writes, by its own configuration, whether there is a run yet; a run folder is its own.

    Raises:
        ConfigError: if `place` is neither.
    """
    if is_run(place):
        return place
    if not (place / "pyproject.toml").is_file():
        raise ConfigError(
            f"{place} is neither a Flower app's folder nor a run folder; expected what `ubsmoe flower init` made"
        )
    return Path(str(_config_of(place)["out"]))


def _config_of(app: Path) -> dict[str, Any]:
    """[tool.flwr.app.config], with dotted keys. Raises ConfigError if there is none that names a run folder."""
    project = app / "pyproject.toml"
    try:
        config = flatten(tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"])
        config["out"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f'{project} names no run folder: [tool.flwr.app.config] needs out = "..."') from None
    return config


def check_fits_flower(settings: RunSettings) -> None:
    """Raise ConfigError for a run that only one process can carry out."""
    if settings.simulation is not None:
        raise ConfigError("[simulation] is a virtual clock for clients in one process; with Flower leave it out")


def _found_paths(settings: RunSettings) -> dict[str, Any]:
    """Files that the run file names beside itself are not beside its copy."""
    named = {
        "model.base": settings.model.base,
        "adapter.start": settings.adapter.start,
        "data.train": settings.data.train,
        "data.test": settings.data.test,
    }
    found = {key: Path(place) for key, place in named.items() if place and place not in BUILT_IN}
    table = settings.model_dump(mode="json")
    paths: dict[str, Any] = {key: str(place.absolute()) for key, place in found.items() if place.exists()}
    return paths | {key: setting(table, key) for key in KEYS + LISTS if ".py:" in str(setting(table, key))}


def _toml(value: Any) -> str:
    """A value of the app's configuration; Flower takes no lists there, so they travel as text that is read again."""
    return json.dumps(value if isinstance(value, str | int | float) else json.dumps(value))
