"""What runs and clients say, made fit for where it is shown: a mean of any numbers, JSON of any, cells of Markdown and CSV."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ubsmoe.errors import printable

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes a cell for that begins so


def average(values: Iterable[float]) -> float:
    """The mean; NaN or infinite where the values or their sum are, and NaN of nothing.

    >>> average([1e308, 1e308]), average([1.0, 2.0])
    (inf, 1.5)
    """
    known = [float(value) for value in values]
    return sum(known) / len(known) if known else math.nan


def finite_json(value: Any) -> Any:
    """The same with null for every number that JSON, and so a chart, does not have."""
    if isinstance(value, Mapping):
        return {key: finite_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_cell(text: str) -> str:
    r"""A text in a cell of a Markdown table, as it is.

    >>> print(markdown_cell("a|b <img>"))
    a\|b &lt;img>
    """
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file whose texts no spreadsheet takes for formulas: these get an apostrophe in front."""
    return {key: f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v for key, v in row.items()}


def formats_said(tiers: Iterable[Mapping[str, Any]]) -> str:
    """What the tiers' frozen experts are quantised to, for a caption; nothing if none is.

    >>> formats_said([{"tier": 0, "experts": "nf4"}, {"tier": 1, "experts": None}, {"tier": 2, "experts": "nf4"}])
    '; experts: nf4 in tiers 1, 3, plain in tier 2'
    """
    found: dict[str, list[str]] = {}
    for tier in tiers:
        found.setdefault(tier.get("experts") or "plain", []).append(str(tier["tier"] + 1))
    words = (f"{name} in tier{'s' * (len(own) > 1)} {', '.join(own)}" for name, own in found.items())
    return "" if found.keys() <= {"plain"} else f"; experts: {', '.join(words)}"
