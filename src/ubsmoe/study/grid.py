"""The points of a grid: every combination of its axes' values. At each of them all methods do the same work."""

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

from ubsmoe.config import ConfigError, parse_value

NO_AXES = {"method": "--methods or --variants", "seed": "--seeds and --first-seed", "label": "--variants"}
"""Settings that a comparison varies by an option of their own."""


def grid(axes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each point changes in the run file, by dotted key, under the point's name; without axes one point without a name.

    Args:
        axes: a setting and its values each, as in "model.base=ubsmoe-tiny,my-base".

    Raises:
        ConfigError: for what is no axis, or is listed twice.

    >>> list(grid(["model.base=a,b", "tiers.budgets=[0.5, 1], [1]"]))[1]
    'model.base=a;tiers.budgets=[1]'
    """
    values = dict(map(_axis, axes))
    if len(values) < len(axes):
        raise ConfigError(f"--grid: one setting is named twice in {', '.join(axes)}; list all its values in one")
    points = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    return {";".join(f"{key}={_plain(value)}" for key, value in point.items()): point for point in points}


def _axis(text: str) -> tuple[str, list[Any]]:
    key, _, given = text.partition("=")
    listed = parse_value(f"[{given}]")  # numbers and lists, or else bare words
    values = listed if isinstance(listed, list) else [parse_value(word.strip()) for word in given.split(",")]
    if option := NO_AXES.get(key.partition(".")[0]):
        raise ConfigError(f"--grid {text!r}: {key} is no axis of a grid; a comparison varies it by {option}")
    if not key or not values or "" in values or len(set(map(_plain, values))) < len(values):
        raise ConfigError(
            f"--grid {text!r}: expected a setting and different values, as in model.base=ubsmoe-tiny,my-base"
        )
    return key, values


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
