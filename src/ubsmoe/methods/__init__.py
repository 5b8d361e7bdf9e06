"""Federated methods: `build` makes one by name. The table and the descriptions are in table.py, what a method is in method.py."""

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError, validate_call

from ubsmoe.config.plug_ins import load
from ubsmoe.errors import UserError
from ubsmoe.methods import table
from ubsmoe.methods.table import METHODS as METHODS
from ubsmoe.methods.table import PARTS, check_names

if TYPE_CHECKING:
    from ubsmoe.methods.method import Method, RunShape


def build(name: str, shape: "RunShape", settings: Mapping[str, Any] | None = None) -> "Method":
    """Build a method by name from the other keys of [method], its parts around it.

    Args:
        name: a name of the table.
        shape: sizes of the run.
        settings: the method's own settings; a part as true (its defaults), false (off) or a dict of its settings.

    Raises:
        UserError: for an unknown method or setting (with the nearest name), a value that is refused, or a part that makes no
            sense with the method.
    """
    settings = settings or {}
    check_names(name, settings)
    parts = {key: _part(key, settings[key]) for key in PARTS if key in settings}
    averaging = parts.pop("averaging", None)
    if averaging and parts.get("server"):
        raise UserError("[method.server] takes steps along the plain mean; leave [method.averaging] out")
    own = {key: value for key, value in settings.items() if key not in PARTS}
    try:
        if not averaging:
            return _composed(name, shape, own, parts)
        from ubsmoe.methods.averaging import with_averaging

        return with_averaging(lambda on: _composed(name, on, own, parts), shape, averaging)
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(_sentence("method", error)) from None
    except ValueError as error:
        raise UserError(f"method.{error}") from error


def _composed(name: str, shape: "RunShape", own: dict[str, Any], parts: dict[str, Any]) -> "Method":
    """The method with its parts: those that its builder takes by the builder, the others around what it built."""
    from ubsmoe.methods.compensation import with_compensation
    from ubsmoe.methods.modulation import with_modulation
    from ubsmoe.methods.pseudo_gradient import with_pseudo_gradient
    from ubsmoe.methods.server_optimiser import with_server_optimiser

    wrappers: dict[str, Callable[..., Method]] = {
        "server": with_server_optimiser,
        "dmr": with_modulation,
        "pg": with_pseudo_gradient,
        "compensation": with_compensation,
    }
    known = name in table.METHODS
    builder = getattr(import_module(f"ubsmoe.methods.{name}"), name) if known else load(name, "method.name")
    taken = {key: part for key, part in parts.items() if key in signature(builder).parameters}
    checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))(builder)
    method: Method = checked(shape, **own, **taken)
    for key, wrap in wrappers.items():
        if key not in taken and (part := parts.get(key)):
            method = wrap(method, shape, part)
    return method


def _part(key: str, value: bool | Mapping[str, Any]) -> Any:
    """The settings of a part; None if it is switched off."""
    if value is False:
        return None
    module, _, name = PARTS[key].rpartition(".")
    try:
        return getattr(import_module(module), name)(**({} if value is True else value))
    except ValidationError as error:
        raise UserError(_sentence(f"method.{key}", error)) from None


def _sentence(section: str, error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join([section, *(str(part) for part in fault["loc"][:1])])
    return f"{where}: {fault['msg'].removeprefix('Value error, ')} (got {fault['input']!r})"
