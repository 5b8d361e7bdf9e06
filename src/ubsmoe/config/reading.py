"""A run file (TOML) becomes settings; what is wrong with it becomes sentences."""

import copy
import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ubsmoe.config.data import DataSettings
from ubsmoe.config.model import ModelSettings
from ubsmoe.config.plug_ins import LISTS, beside, plug_ins, setting
from ubsmoe.config.settings import RunSettings
from ubsmoe.errors import UserError

AnySettings = TypeVar("AnySettings", bound=BaseModel)

BUILT_IN = {DataSettings.model_fields["train"].default, ModelSettings.model_fields["base"].default}
"""Names of things that come with the package, whatever files are called so."""


RENAMED = {
    "data.world": "data.synthetic",
    "evaluate.likelihood": "evaluate.mc_accuracy",
}
"""Keys of run files written before 0.2, and what they are called now."""


LONGEST_LINE = 10_000  # characters; a key of many thousand dots takes tomllib minutes
MAIN_KEY = {"model": "base", "method": "name", "data": "train"}
"""What a section is when it is given as a single value: method = "fedavg" is method = {name = "fedavg"}."""


class ConfigError(UserError):
    """A run file that cannot be used; the message says what to change."""


def load_run(path: str | Path, overrides: dict[str, Any] | None = None) -> RunSettings:
    """Read and validate a run file.

    Args:
        path: a TOML file. Paths inside it are taken relative to its folder if they exist there, or else to the current one.
        overrides: dotted keys that replace the file's, such as {"train.rounds": 2}.

    Raises:
        ConfigError: with one sentence per fault: the setting, what came, what is expected.
    """
    return parse_table(read_toml(Path(path)), overrides or {}, Path(path).parent)


def parse_table(table: dict[str, Any], overrides: dict[str, Any], folder: Path) -> RunSettings:
    """The same for the tables of a run file whose paths are relative to `folder`."""
    whole = {name: {MAIN_KEY[name]: given} if _is_single(name, given) else given for name, given in table.items()}
    return parse_run(_resolve_paths(with_overrides(whole, overrides), folder))


def _is_single(section: str, given: Any) -> bool:
    return section in MAIN_KEY and isinstance(given, str)


def parse_run(table: dict[str, Any]) -> RunSettings:
    """Validate a run given as a nested dict. Raises ConfigError as `load_run` does."""
    data = table.get("data")
    if isinstance(data, dict) and data.get("train") == "world":
        raise ConfigError('data.train: "world" is now called "synthetic"; rename it in the run file')
    return validated(RunSettings, table)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a run file. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors of Windows put a mark in front
        if (longest := max(map(len, text.splitlines()), default=0)) > LONGEST_LINE:
            raise ConfigError(f"{path} has a line of {longest} characters; expected at most {LONGEST_LINE}")
        return _toml(text)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError for all that is none, sections too deep to be any included."""
    try:
        return copy.deepcopy(tomllib.loads(text))  # tables too deep to be copied are too deep for all that follows
    except RecursionError:
        raise ValueError("its tables or lists lie too deep in one another") from None


def validated(root: type[AnySettings], table: dict[str, Any]) -> AnySettings:
    """Settings of any kind from a nested dict. Raises ConfigError with one sentence per fault."""
    try:
        return root.model_validate(table)
    except ValidationError as error:
        faults = error.errors()
        # a list with a bad entry is also said to be too short: only the innermost fault helps
        inner = [one for one in faults if not any(_is_inside(other, one) for other in faults)]
        raise ConfigError("\n".join(_explain(fault, root) for fault in inner)) from None


def with_overrides(table: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with dotted keys set, such as {"train.rounds": 2}. Raises ConfigError if a section is none."""
    table = copy.deepcopy(table)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"cannot set {key}: {section} is not a section of the run file")
        place[last] = value
    return table


def parse_value(text: str) -> Any:
    """A setting's value as written on a command line: TOML, and a bare word is a string.

    >>> parse_value("3"), parse_value("[0.25, 1]"), parse_value("off")
    (3, [0.25, 1], 'off')
    """
    try:
        return _toml(f"value = {text}")["value"]
    except ValueError:
        return text


def to_json(settings: RunSettings) -> str:
    """The resolved settings, stable text: equal settings give equal text."""
    return json.dumps(settings.model_dump(mode="json"), indent=2, sort_keys=True)


def _resolve_paths(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Files beside the run file, or else where the command is started, by their whole path: a run folder is read anywhere."""
    for section, key in (("data", "train"), ("data", "test"), ("model", "base"), ("adapter", "start")):
        part = table.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str) and part[key] not in BUILT_IN:
            found = (place for place in (folder / part[key], Path(part[key])) if place.exists())
            part[key] = next((str(place.absolute()) for place in found), part[key])
    return _resolve_plug_ins(table, folder)


def _resolve_plug_ins(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Plug-ins in files beside the run file, or where the command is started, by the whole paths of these."""
    changes: dict[str, Any] = {}
    for key, name in plug_ins(table).items():
        place = next((found for at in (folder, Path()) if (found := beside(name, at)) != name), name)
        if place != name:
            changes[key] = place
    for key in LISTS:
        if isinstance(given := setting(table, key), list | tuple):
            changes[key] = [changes.pop(f"{key}.{i}", one) for i, one in enumerate(given)]
        changes.pop(f"{key}.0", None)  # a text in the place of a list is refused as it is
    return with_overrides(table, changes)


def _is_inside(fault: Any, other: Any) -> bool:
    """Whether a fault lies deeper within the setting that another one is about."""
    depth = len(other["loc"])
    return len(fault["loc"]) > depth and fault["loc"][:depth] == other["loc"]


def _explain(fault: Any, root: type[BaseModel]) -> str:
    """One pydantic fault as a sentence that names the setting, what came and what is expected."""
    where = ".".join(str(part) for part in fault["loc"]) or "run file"
    if fault["type"] != "extra_forbidden":
        came = "" if fault["type"] == "missing" or not fault["loc"] else f" (got {fault['input']!r})"
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}{came}"
    if where in RENAMED:
        return f"{where!r} is now called {RENAMED[where]!r}; rename it in the run file"
    known = list(_section(root, fault["loc"][:-1]).model_fields)
    near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown setting {where!r}; {hint}"


def _section(model: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    for name in path:
        if isinstance(name, int):  # an entry of a list of sections, whose kind is known by then
            continue
        annotation = model.model_fields[name].annotation
        # a section that may be left out is annotated "Settings | None"
        sections = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
        model = next(part for part in sections if issubclass(part, BaseModel))
    return model
