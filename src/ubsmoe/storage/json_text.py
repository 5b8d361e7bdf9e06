"""JSON that holds NaN and infinity as texts, and gives them back as numbers."""

import json
import math
from typing import Any

_TEXTS = {
    *("event", "time", "client", "stage", "reason", "field", "label", "method", "name"),
    *("task", "prompt", "truth", "said"),
}
"""Keys whose values are never numbers."""

_NUMBERS = {json.dumps(value): value for value in (math.nan, math.inf, -math.inf)}


def encode_json(value: Any, indent: int | None = None, sort_keys: bool = True) -> bytes:
    """One JSON text; the numbers JSON lacks become the texts "NaN", "Infinity" and "-Infinity".

    >>> encode_json({"loss": float("nan"), "bytes": 3})
    b'{"bytes": 3, "loss": "NaN"}'
    """
    return json.dumps(_finite(value), sort_keys=sort_keys, allow_nan=False, indent=indent).encode()


def decode_json(data: bytes) -> Any:
    """What `encode_json` was given: its texts for the numbers that JSON lacks are numbers again, except where texts stand.

    A whole number that no float holds exactly, which nothing here writes, becomes a float.

    >>> decode_json(b'{"loss": "NaN", "client": "NaN", "bytes": 3}')
    {'loss': nan, 'client': 'NaN', 'bytes': 3}
    """
    return _numbers(json.loads(data))


def _numbers(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _numbers(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part, key) for part in value]
    if isinstance(value, str):
        return value if key in _TEXTS else _NUMBERS.get(value, value)
    if type(value) is int and abs(value) >= 2**63:
        return math.copysign(math.inf, value) if abs(value) >= 2**1023 else float(value)
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
