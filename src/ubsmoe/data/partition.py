"""Which client holds which example, and how unlike the clients are.

Source: the Dirichlet splits over labels and over sizes are those of Hsu et al. 2019 (arXiv 1909.06335) and of Li et al.
2022 (arXiv 2102.02079).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ubsmoe.config import ConfigError, PartitionSettings, RunSettings
from ubsmoe.config.plug_ins import load, plug_in
from ubsmoe.data.tasks import Example
from ubsmoe.seeds import seed_for


@dataclass(frozen=True)
class ClientShare:
    """One client's part: how many examples, and how many of each value of the field."""

    client: int
    size: int
    counts: dict[str, int]


@dataclass(frozen=True)
class PartitionReport:
    """How a partition looks through one field.

    `mean_total_variation` is the mean over non-empty clients of 1/2 sum_v |p_client(v) - p_all(v)|: 0 when every client
    has the global mix, near 1 when every client holds a single rare value.
    """

    field: str
    clients: tuple[ClientShare, ...]
    mean_total_variation: float

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self) | {"clients": [asdict(client) for client in self.clients]}


def partition(examples: Sequence[Example], settings: PartitionSettings, num_clients: int, seed: int) -> list[list[int]]:
    """Give every example to exactly one client.

    - iid: shuffled, sizes equal give or take one.
    - natural: the examples with one value of `field` stay together; a client gets several values if there are many.
    - dirichlet: each value of `field` is spread over the clients in proportions drawn from Dirichlet(alpha).
    - quantity: client sizes are drawn from Dirichlet(alpha), the content is iid.
    - a plug-in: `split(examples, num_clients, seed)`, which gives the positions of each client's examples.

    Args:
        examples: what to distribute.
        settings: the run's [data.partition].
        num_clients: the run's clients.count.
        seed: the run's, or data.seed.

    Returns:
        Per client, the positions of its examples in ascending order.

    Raises:
        ConfigError: for an unknown field, fewer examples or values than clients, or a client below `min_examples`.
    """
    if num_clients > len(examples):
        raise ConfigError(
            f"clients.count is {num_clients}, but there are {len(examples)} examples to train on; "
            f"expected at most {len(examples)}"
        )
    rng = np.random.default_rng(seed_for(seed, "partition"))
    if settings.kind == "iid":
        parts = _cut(rng.permutation(len(examples)), np.full(num_clients, 1 / num_clients))
    elif settings.kind == "quantity":
        parts = _cut(rng.permutation(len(examples)), rng.dirichlet(np.full(num_clients, settings.alpha)))
    elif settings.kind == "natural":
        parts = _natural(_groups(examples, settings.field), num_clients, rng, settings.field)
    elif plug_in(settings.kind):
        parts = _own(settings.kind, examples, num_clients, seed)
    else:
        parts = _dirichlet(_groups(examples, settings.field), num_clients, rng, settings.alpha)
    _check_sizes(parts, settings)
    return [sorted(part) for part in parts]


def client_names(settings: RunSettings) -> list[str]:
    """The run file's own clients."""
    return [f"client-{i}" for i in range(settings.clients.count)]


def tier_of_client(settings: RunSettings) -> dict[str, int]:
    """The tier of each of the run file's own clients, by name: client i is in tier i mod the number of tiers."""
    return {name: i % len(settings.tiers.budgets) for i, name in enumerate(client_names(settings))}


def partition_clients(settings: RunSettings, examples: Sequence[Example]) -> dict[str, list[int]]:
    """Which of the run's training examples each of its own clients holds."""
    seed = settings.data.drawn_with(settings.seed)
    parts = partition(examples, settings.data.partition, settings.clients.count, seed)
    return dict(zip(client_names(settings), parts, strict=True))


def partition_report(examples: Sequence[Example], parts: Sequence[Sequence[int]], field: str) -> PartitionReport:
    """Count a field's values per client and measure how far the clients are from the global mix.

    Raises:
        ConfigError: for a field that not all examples have.
    """
    groups = _groups(examples, field)
    value_of = {index: value for value, members in groups.items() for index in members}
    mix = {value: len(members) / len(examples) for value, members in groups.items()}
    shares, distances = [], []
    for client, part in enumerate(parts):
        counts = Counter(value_of[index] for index in part)
        shares.append(ClientShare(client, len(part), {value: counts[value] for value in groups}))
        if part:
            distances.append(sum(abs(counts[value] / len(part) - mix[value]) for value in groups) / 2)
    return PartitionReport(field, tuple(shares), float(np.mean(distances)) if distances else 0.0)


def _groups(examples: Sequence[Example], field: str) -> dict[str, list[int]]:
    """Positions by the value of a field, values in alphabetical order."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        fields = _fields(example)
        if field not in fields:
            common = set.intersection(*(set(_fields(other)) for other in examples))
            raise ConfigError(
                f"data.partition.field: {example.where or f'example {index + 1}'} has no field {field!r}; "
                f"fields of all examples: {', '.join(sorted(common)) or 'none'}"
            )
        groups.setdefault(fields[field], []).append(index)
    return dict(sorted(groups.items()))


def _fields(example: Example) -> dict[str, str]:
    own = {"task": example.task, "answer": example.answer}
    return {key: value for key, value in own.items() if value} | example.fields


def _cut(indices: NDArray[np.int64], shares: NDArray[np.float64]) -> list[list[int]]:
    """Cut a shuffled list into consecutive pieces of the given shares, which sum to one."""
    # Rounding the running sum rather than each share keeps every index in exactly one piece.
    bounds = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
    return [[int(index) for index in piece] for piece in np.split(indices, bounds)]


def _dirichlet(
    groups: dict[str, list[int]], num_clients: int, rng: np.random.Generator, alpha: float
) -> list[list[int]]:
    """Spread each value over the clients in proportions of its own."""
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for members in groups.values():
        pieces = _cut(rng.permutation(members), rng.dirichlet(np.full(num_clients, alpha)))
        for part, piece in zip(parts, pieces, strict=True):
            part.extend(piece)
    return parts


def _natural(groups: dict[str, list[int]], num_clients: int, rng: np.random.Generator, field: str) -> list[list[int]]:
    """Whole groups, the largest first, each go to the client that has the fewest examples so far."""
    if len(groups) < num_clients:
        raise ConfigError(
            f"data.partition: field {field!r} has {len(groups)} values, too few for {num_clients} clients; "
            f"lower clients.count to {len(groups)} or choose another field or kind"
        )
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for members in sorted(groups.values(), key=len, reverse=True):
        min(parts, key=len).extend(members)
    # A client's number decides its tier; without this the weakest tier would always hold the largest group.
    return [parts[i] for i in rng.permutation(num_clients)]


def _own(name: str, examples: Sequence[Example], num_clients: int, seed: int) -> list[list[int]]:
    """What a plug-in deals, once it is seen to be a partition."""
    parts = [list(part) for part in load(name, "data.partition.kind")(examples, num_clients, seed)]
    if len(parts) != num_clients or sorted(i for part in parts for i in part) != list(range(len(examples))):
        raise ConfigError(
            f"data.partition.kind: {name} gave {len(parts)} lists with {sum(map(len, parts))} positions; expected a list for "
            f"each of {num_clients} clients, and each of the positions 0..{len(examples) - 1} in one of them"
        )
    return parts


def _check_sizes(parts: Sequence[Sequence[int]], settings: PartitionSettings) -> None:
    for client, part in enumerate(parts):
        if len(part) < settings.min_examples:
            skewed = settings.kind in ("dirichlet", "quantity")
            remedy = "a larger data.partition.alpha, fewer clients, or another seed" if skewed else "fewer clients"
            raise ConfigError(
                f"data.partition: client {client} would get {len(part)} examples, fewer than min_examples = "
                f"{settings.min_examples}; try {remedy}"
            )
