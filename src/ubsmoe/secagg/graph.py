"""Who shares masks with whom: everybody with everybody, or in large rounds each with `neighbours` others on a ring.

The order of the ring follows from a hash over all keys of the round, so that the server cannot choose a client's neighbours.

Source: SecAgg+ (Bell et al. 2020, ePrint 2020/704), whose graphs are k-regular; the order by hash is ours.
"""

import hashlib
import math
from collections.abc import Mapping


def holders(public_keys: Mapping[str, str], neighbours: int | None) -> dict[str, list[str]]:
    """Who holds shares of each client's secrets, sorted: its neighbours and itself. The relation is symmetric.

    Args:
        public_keys: of every client of the round, as text.
        neighbours: of each client, rounded up to an even number; all when None.

    >>> holders({"a": "1", "b": "2", "c": "3"}, None)["a"]
    ['a', 'b', 'c']
    """
    names = sorted(public_keys)
    if neighbours is None or neighbours >= len(names) - 1:
        return dict.fromkeys(names, names)
    digest = hashlib.sha256("\x1f".join(f"{name}\x1e{public_keys[name]}" for name in names).encode()).hexdigest()
    ring = sorted(names, key=lambda name: hashlib.sha256(f"{digest}\x1f{name}".encode()).digest())
    reach, size = math.ceil(neighbours / 2), len(ring)
    return {
        name: sorted({ring[(place + step) % size] for step in range(-reach, reach + 1)})
        for place, name in enumerate(ring)
    }


def needed(threshold: float, count: int) -> int:
    """How many of `count` holders it takes to restore a secret: more than half, so that no two answers can restore both kinds.

    >>> needed(2 / 3, 5), needed(0.6, 5), needed(0.51, 4)
    (4, 3, 3)
    """
    return max(math.ceil(threshold * count - 1e-9), count // 2 + 1)
