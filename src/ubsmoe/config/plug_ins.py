"""Plug-ins: functions of one's own, which a run file names as "module:function" or by the name of an entry point.

A plug-in is code. Only the run file on this machine may name one: a node of a federation runs one of a run file that came over the
network only if its own configuration names it too (client/node_config.py), and one that a run folder names, which may be another
person's, runs only if the environment does (`require_trusted`). `identities` goes into the run folder.
"""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ubsmoe.errors import UserError

GROUP = "ubsmoe"
"""The group of entry points that packages register their plug-ins in."""
KEYS = (
    "method.name",
    "data.train",
    "data.test",
    "data.partition.kind",
    "data.template",
    "clients.sampling",
    "train.schedule",
    "method.server.rule",
)
"""Settings that may name a plug-in, beside the lists of `LISTS`."""
LISTS = ("evaluate.metrics",)
TRUSTED, ANY = "UBSMOE_PLUG_INS", "*"
"""The environment variable that names the plug-ins of run folders, with commas between them, and what stands for all of them."""
NAME = re.compile(r"(?P<module>[A-Za-z_]\w*(\.\w+)*|.+\.py):(?P<function>[A-Za-z_]\w*)")


def plug_in(value: object) -> str | None:
    """The "module:function" that a setting names; None if it names no plug-in.

    >>> plug_in("mine:split"), plug_in("iid"), plug_in("C:/data.jsonl")
    ('mine:split', None, None)
    """
    if not isinstance(value, str):
        return None
    return value if NAME.fullmatch(value) else _entry_points().get(value)


@cache
def _entry_points() -> dict[str, str]:
    return {one.name: one.value for one in entry_points(group=GROUP) if NAME.fullmatch(one.value)}


def load(value: str, key: str) -> Callable[..., Any]:
    """The function that a setting names.

    Args:
        value: "module:function", or an entry point's name.
        key: the setting, for the message.

    Raises:
        UserError: if there is no such module or function, or importing it fails.
    """
    name = plug_in(value)
    found = NAME.fullmatch(name or "")
    if found is None:
        raise UserError(f'{key}: expected a plug-in "module:function" or an entry point of {GROUP!r}, got {value!r}')
    source_of(value, key)
    try:
        module = _module(found["module"])
    except Exception as error:
        raise UserError(f"{key}: {value} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, found["function"], None)
    if not callable(function):
        raise UserError(f"{key}: {source_of(value, key)} has no function {found['function']!r}")
    return function


def source_of(value: str, key: str) -> Path:
    """The file of a plug-in, found without importing it. Raises UserError if there is none."""
    found = NAME.fullmatch(plug_in(value) or "")
    assert found is not None, value
    module = found["module"]
    place = Path(module) if module.endswith(".py") else _file_of(module)
    if place is None or not place.is_file():
        raise UserError(
            f"{key}: {value} names no module that is there; put {module.partition('.')[0]}.py beside the run file, or install it"
        )
    return place


def _file_of(module: str) -> Path | None:
    """The file of a module; `find_spec` would import the packages that a dotted name lies in."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not inner:
        return Path(spec.origin) if spec and spec.origin else None
    stems = [Path(place, *inner) for place in spec.submodule_search_locations or ()]
    files = [file for stem in stems for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def require_trusted(table: dict[str, Any], folder: str | Path) -> None:
    """Raise UserError for plug-ins that the settings of a run folder name and the environment does not; nothing is imported."""
    trusted = {name.strip() for name in os.environ.get(TRUSTED, "").split(",")}
    named = plug_ins(table)
    unknown = {key: name for key, name in named.items() if not {name, ANY} & trusted}
    if unknown:
        spelt = ", ".join(f"{name!r} ({key})" for key, name in unknown.items())
        raise UserError(
            f"{folder} names the plug-in{'s' * (len(unknown) > 1)} {spelt}, which is code, and a run folder may be another "
            f"person's; to run it set the environment variable {TRUSTED}={','.join(dict.fromkeys(named.values()))}"
        )


def identities(named: dict[str, str]) -> dict[str, str]:
    """SHA-256 of the source file of each plug-in of `plug_ins`, under its name. Raises UserError as `source_of`."""
    return {
        f"plug-in {Path(name).name}": hashlib.sha256(source_of(name, key).read_bytes()).hexdigest()
        for key, name in sorted(named.items())
    }


def plug_ins(table: dict[str, Any]) -> dict[str, str]:
    """The plug-ins that a run's settings, as a nested dict, name: by dotted key."""
    named: dict[str, str] = {}
    for key in (*KEYS, *LISTS):
        value = setting(table, key)
        values = enumerate(value) if key in LISTS and isinstance(value, list | tuple) else [(0, value)]
        named |= {f"{key}.{i}" if key in LISTS else key: name for i, one in values if (name := plug_in(one))}
    return named


def setting(table: Any, key: str) -> Any:
    """The value at a dotted key of a nested dict; None if there is none."""
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    return table


def beside(value: Any, folder: Path) -> Any:
    """A plug-in in a file beside the run file, by its whole path; any other value as it is."""
    found = NAME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    file = folder / (found["module"] if found["module"].endswith(".py") else f"{found['module'].replace('.', '/')}.py")
    return f"{file.absolute()}:{found['function']}" if file.is_file() else value


@cache
def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    inner = f"ubsmoe_plug_in_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(inner, name)
    assert spec is not None and spec.loader is not None
    module = sys.modules[inner] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[inner]
        raise
    return module


class OrPlugIn:
    """Marks a choice in whose place a plug-in may stand: `Annotated[Literal["a", "b"], OrPlugIn()]`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Any "module:function", and what the choice allows."""

        def choose(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            try:
                return inner(value)
            except ValueError:
                if plug_in(value):
                    return value
                raise

        plain = core_schema.plain_serializer_function_ser_schema(str)
        return core_schema.no_info_wrap_validator_function(choose, handler(source), serialization=plain)
