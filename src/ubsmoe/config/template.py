"""A run file with every key, its default and what it does: what `ubsmoe new` writes."""

import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ubsmoe.config.settings import RunSettings

WIDTH = 100


def run_file_template() -> str:
    """The text of the run file. A key without a default is commented out, and so is a section that is left out."""
    head = "Every key of a run file, at its default. Delete what you do not change; `ubsmoe methods` lists [method]'s settings."
    return "\n".join([*_comment(head), "", *_keys(RunSettings), *_sections(RunSettings, "")]) + "\n"


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The settings that a field is a section of, annotated `Settings` or `Settings | None`; None for a plain key."""
    kinds = (kind for kind in (field.annotation, *get_args(field.annotation)) if inspect.isclass(kind))
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def toml_value(value: Any) -> str:
    """A default as TOML writes it.

    >>> toml_value((0.25, 1.0)), toml_value("off"), toml_value(True)
    ('[0.25, 1.0]', '"off"', 'true')
    """
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if section := section_of(field):
            off = "# " if field.default is None else ""
            yield ""
            yield from _comment((inspect.getdoc(section) or "").partition(": ")[2])
            yield f"{off}[{prefix}{name}]"
            yield from _keys(section, off)
            yield from _sections(section, f"{prefix}{name}.")


def _keys(model: type[BaseModel], off: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if section_of(field) is None:
            if field.description:
                yield from _comment(field.description)
            if field.is_required() or field.default is None:
                yield f"# {name} ="
            else:
                yield f"{off}{name} = {toml_value(field.default)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]
