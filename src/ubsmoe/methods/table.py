"""The table of federated methods: one line each. What a method says of itself is read from its file as text.

Nothing heavy is imported here: listing methods, or refusing a misspelt one, takes no model. Adding a method is a file in this
folder with a builder of the same name, and a line below. The test battery and the documentation pick it up.
"""

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ubsmoe.config.plug_ins import plug_in, source_of
from ubsmoe.errors import UserError

METHODS = (
    "fedavg",
    "fedprox",
    "scaffold",
    "fedit",
    "hetlora",
    "flexlora",
    "flora",
    "florist",
    "ffa_lora",
    "fedex_lora",
    "fed_sb",
    "fedsvd",
    "rolora",
    "fedrot",
    "lora_fair",
    "smoe_llb",
    "smoe_glb",
    "lossfree",
    "a3smoe",
    "flame",
    "hfedmoe",
    "ubsmoe",
)
PARTS = {
    "server": "ubsmoe.methods.server_optimiser.ServerOptimiser",
    "dmr": "ubsmoe.methods.modulation.Modulation",
    "pg": "ubsmoe.maths.pseudo_gradient.PseudoGradient",
    "compensation": "ubsmoe.model.compensation_fit.FormSettings",
    "averaging": "ubsmoe.methods.averaging.Averaging",
}
"""Sections of [method] that put a part around a method, in the order in which they are put, and the class of their settings."""

RENAMED = {
    **{f"pg_{key}": f"pg.{key}" for key in ("mode", "strength", "scope", "fraction", "limit")},
    **{
        key: f"dmr.{key}"
        for key in ("num_candidates", "momentum", "epsilon", "phi", "phi_penalty", "phi_min", "phi_max")
    },
    "activation_power": "averaging.exponent",
}
"""Settings of `ubsmoe` in run files written before 0.2, and what they are called now."""


@dataclass(frozen=True)
class Description:
    """What a method's file says: its first line, its settings with their defaults, and the properties it does not have.

    `parts` are those of `PARTS` that the method has unless they are switched off.
    """

    name: str
    summary: str
    settings: Mapping[str, Any]
    exempt: Mapping[str, str]
    parts: tuple[str, ...]


@cache
def describe(name: str) -> Description:
    """Read a method's description from its file.

    >>> describe("smoe_llb").settings
    {'coefficient': 0.01}
    """
    module, function = place_of(name)
    tree = _parsed(module)
    builder = next((one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function), None)
    if builder is None:
        raise UserError(f"method.name: {module} has no function {function!r}")
    known = dict(zip((arg.arg for arg in builder.args.kwonlyargs), builder.args.kw_defaults, strict=True))
    exempt = _constant(module, "EXEMPT")
    return Description(
        name=name,
        summary=(ast.get_docstring(tree) or name).splitlines()[0],
        settings={key: default and _literal(default) for key, default in known.items() if key not in PARTS},
        exempt=exempt or {},
        parts=tuple(key for key in known if key in PARTS),
    )


def place_of(name: str) -> tuple[str, str]:
    """The module, or the file of a plug-in, that holds a method's builder, and the builder's name."""
    if name in METHODS:
        return f"ubsmoe.methods.{name}", name
    return str(source_of(name, "method.name")), (plug_in(name) or "").rpartition(":")[2]


@cache
def part_settings(part: str) -> Mapping[str, Any]:
    """The settings of a part with their defaults.

    >>> part_settings("averaging")
    {'rule': 'factors', 'exponent': None}
    """
    module, _, name = PARTS[part].rpartition(".")
    fields = next(node for node in _parsed(module).body if isinstance(node, ast.ClassDef) and node.name == name).body
    return {
        field.target.id: field.value and ast.literal_eval(field.value)
        for field in fields
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def check_names(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a method, a setting or a section that does not exist, with the nearest name.

    Raises:
        UserError: with one sentence.
    """
    if name not in METHODS and plug_in(name) is None:
        raise UserError(f"method.name: no method {name!r}; {_hint(name, METHODS)}")
    known = [*describe(name).settings, *PARTS]
    for key, value in settings.items():
        if key not in known:
            new = RENAMED.get(key) if name == "ubsmoe" else None
            hint = f"it is now called 'method.{new}'" if new else _hint(key, known)
            raise UserError(f"unknown setting 'method.{key}' for {name}; {hint}")
        if key in PARTS and not isinstance(value, bool | Mapping):
            raise UserError(f"method.{key}: expected true, false or a section [method.{key}], got {value!r}")
        if key in PARTS and isinstance(value, Mapping):
            for inner in value:
                if inner not in part_settings(key):
                    hint = _hint(inner, part_settings(key))
                    raise UserError(f"unknown setting 'method.{key}.{inner}'; {hint}")


def _hint(name: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


@cache
def _parsed(module: str) -> ast.Module:
    if module.endswith(".py"):
        return ast.parse(Path(module).read_text(encoding="utf-8"))
    spec = find_spec(module)  # finds the file; of packages on the way only __init__ is imported, which brings no torch
    assert spec and spec.origin, module
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _constant(module: str, name: str) -> Any:
    """The value of a constant of texts: a literal, a name of another one, or a dict of such; None if there is none."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and name in (alias.name for alias in node.names):
            return _constant(node.module, name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == name:
                return _value(module, node.value)
    return None


def _literal(node: ast.expr) -> Any:
    """A default as it stands in the file; a plug-in's may be computed, and is then shown as it is written."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _value(module: str, node: Any) -> Any:
    if isinstance(node, ast.Name):
        return _constant(module, node.id)
    if isinstance(node, ast.Dict):
        return {_value(module, key): _value(module, value) for key, value in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)
