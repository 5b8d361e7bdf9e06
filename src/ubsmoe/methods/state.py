"""What a server keeps between rounds, and how it is stored: the global adapter, and one typed value per part of the method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor

Part = TypeVar("Part")
PREFIX = "server."


@dataclass(frozen=True)
class State:
    """The global adapter, and what the parts of a method need to go on. Both are checkpointed.

    `adapters` is what clients get, by its names on the wire: trained tensors and, in some methods, a frozen side factor.
    A part is a frozen dataclass of tensors, or of tensors by name. A part is found by its class:

    >>> import torch
    >>> @dataclass(frozen=True)
    ... class Momentum:
    ...     velocity: Mapping[str, Tensor]
    >>> state = State({}).having(Momentum({"layers.0.up.A": torch.zeros(2)}))
    >>> state.of(Momentum).velocity["layers.0.up.A"]
    tensor([0., 0.])
    """

    adapters: dict[str, Tensor]
    parts: tuple[Any, ...] = ()

    def of(self, kind: type[Part]) -> Part:
        """The part of this class."""
        return next(part for part in self.parts if isinstance(part, kind))

    def having(self, part: object) -> "State":
        """The same state with this part, in the place of an earlier one of its class."""
        others = tuple(other for other in self.parts if type(other) is not type(part))
        return replace(self, parts=(*others, part))


def pack(state: State) -> dict[str, Tensor]:
    """A state as one flat dict: the adapter by its own names, the parts as `server.{field}` or `server.{field}.{key}`.

    >>> import torch
    >>> @dataclass(frozen=True)
    ... class Ranks:
    ...     rank: Mapping[str, Tensor]
    >>> pack(State({}).having(Ranks({"client-0": torch.tensor(4)})))
    {'server.rank.client-0': tensor(4)}
    """
    tensors = dict(state.adapters)
    for part in state.parts:
        for field in fields(part):
            value = getattr(part, field.name)
            named = value if isinstance(value, Mapping) else {"": value}
            tensors |= {f"{PREFIX}{field.name}{key and '.'}{key}": tensor for key, tensor in named.items()}
    return tensors


def unpack(tensors: Mapping[str, Tensor], kinds: Sequence[type]) -> State:
    """The state that `pack` was given, its parts of these classes.

    Raises:
        ValueError: if a part lacks a tensor: it was stored by another method.
    """
    adapters = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
    return State(adapters, tuple(_part(kind, tensors) for kind in kinds))


def with_stored(state: State, tensors: Mapping[str, Tensor], kinds: Sequence[type]) -> State:
    """The state with a stored adapter in the place of its own, and with those of its parts that were stored beside it."""
    adapters = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
    fields_there = {name.removeprefix(PREFIX).partition(".")[0] for name in tensors if name.startswith(PREFIX)}
    state = replace(state, adapters={**adapters, **{n: v for n, v in state.adapters.items() if n not in adapters}})
    for kind in kinds:
        if _is_stored(kind, fields_there):
            state = state.having(_part(kind, tensors))
    return state


def _is_stored(kind: type, fields_there: set[str]) -> bool:
    """Whether something of a part was stored, and every tensor; of a mapping that was empty nothing is."""
    needed = {field.name for field in fields(kind) if field.type is Tensor}
    return needed <= fields_there and not fields_there.isdisjoint(field.name for field in fields(kind))


def _part(kind: type, tensors: Mapping[str, Tensor]) -> Any:
    found: dict[str, Any] = {}
    for field in fields(kind):
        name = f"{PREFIX}{field.name}"
        if name in tensors:
            found[field.name] = tensors[name]
        elif field.type is Tensor:
            raise ValueError(f"the stored state has no tensor {name!r}, which this method keeps")
        else:
            found[field.name] = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
    return kind(**found)
