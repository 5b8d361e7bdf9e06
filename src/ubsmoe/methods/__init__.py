"""The table of federated methods: one line each. Adding one is a file here, a line below, and the battery picks it up."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from ubsmoe.errors import UserError
from ubsmoe.methods.a3smoe import a3smoe
from ubsmoe.methods.fed_sb import fed_sb
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.fedex_lora import fedex_lora
from ubsmoe.methods.fedit import fedit
from ubsmoe.methods.ffa_lora import ffa_lora
from ubsmoe.methods.flame import flame
from ubsmoe.methods.flexlora import flexlora
from ubsmoe.methods.flora import flora
from ubsmoe.methods.florist import florist
from ubsmoe.methods.hetlora import hetlora
from ubsmoe.methods.hfedmoe import hfedmoe
from ubsmoe.methods.lossfree import lossfree
from ubsmoe.methods.method import Base, Method
from ubsmoe.methods.smoe_glb import smoe_glb
from ubsmoe.methods.smoe_llb import smoe_llb
from ubsmoe.methods.ubsmoe import ubsmoe

METHODS: dict[str, Callable[..., Method]] = {
    "fedavg": fedavg,
    "fedit": fedit,
    "hetlora": hetlora,
    "flexlora": flexlora,
    "flora": flora,
    "florist": florist,
    "ffa_lora": ffa_lora,
    "fedex_lora": fedex_lora,
    "fed_sb": fed_sb,
    "smoe_llb": smoe_llb,
    "smoe_glb": smoe_glb,
    "lossfree": lossfree,
    "a3smoe": a3smoe,
    "flame": flame,
    "hfedmoe": hfedmoe,
    "ubsmoe": ubsmoe,
}


def build(name: str, base: Base, settings: dict[str, Any] | None = None) -> Method:
    """Build a method by name from the other keys of [method].

    Raises:
        UserError: for an unknown method or setting (with the nearest name), or a value the method refuses.
    """
    if name not in METHODS:
        raise UserError(f"method.name: no method {name!r}; {_hint(name, list(METHODS))}")
    known = [key for key in inspect.signature(METHODS[name]).parameters if key != "base"]
    for key in settings or {}:
        if key not in known:
            raise UserError(f"unknown setting 'method.{key}' for {name}; {_hint(key, known)}")
    checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))(METHODS[name])
    try:
        return checked(base, **(settings or {}))
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"method.{fault['loc'][0]}: {fault['msg']} (got {fault['input']!r})") from None
    except ValueError as error:
        raise UserError(f"method.{error}") from error


def summary_line(name: str) -> str:
    """The first line of the method's own file."""
    module = inspect.getmodule(METHODS[name])
    return (inspect.getdoc(module) or "").splitlines()[0]


def exempt_properties(name: str) -> dict[str, str]:
    """The laws of the battery that the method, at its defaults, does not keep, each with its reason."""
    smallest = Base(num_layers=1, num_experts=2, k_max=1, rank=1, alpha=1.0)  # laws do not depend on sizes
    return dict(METHODS[name](smallest).exempt)


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
