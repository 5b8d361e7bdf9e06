"""What an adapter adds to its base, matrix by matrix and expert by expert.

An adapter that was lost on its way adds nothing, and nothing else tells: files load, shapes fit, text comes out. So an export names
the experts that training left alone, and whoever reads it compares.
"""

from collections.abc import Iterator, Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from ubsmoe.errors import UserError

Untouched = dict[str, list[int]]
"""By matrix (`layers.3.up`): the experts, from 0, to which the adapter adds nothing. An attention projection has expert 0 alone."""


class NoEffect(UserError):
    """An adapter that adds nothing where it should; the message says where."""


def matrices(adapter: Mapping[str, Tensor]) -> Iterator[tuple[str, Float[Tensor, "M r in"], Float[Tensor, "M out r"]]]:
    """Every pair of factors: the matrix that it is added to, A, B."""
    for name in adapter:
        if name.endswith(".A"):
            yield name.removesuffix(".A"), adapter[name], adapter[f"{name.removesuffix('A')}B"]


def adds(a: Float[Tensor, "M r in"], b: Float[Tensor, "M out r"]) -> Bool[Tensor, " M"]:
    """Of every expert whether B A is more than zero: some direction has both a row of A and a column of B."""
    return ((a != 0).any(dim=2) & (b != 0).any(dim=1)).any(dim=1)


def untouched(adapter: Mapping[str, Tensor]) -> Untouched:
    """The experts that an adapter leaves as they are; matrices of which it changes every expert are left out.

    >>> import torch
    >>> a, b = torch.ones(3, 1, 2), torch.ones(3, 4, 1)
    >>> b[1] = 0
    >>> untouched({"layers.0.up.A": a, "layers.0.up.B": b})
    {'layers.0.up': [1]}
    """
    still = {name: (~adds(a, b)).nonzero().flatten().tolist() for name, a, b in matrices(adapter)}
    return {name: experts for name, experts in sorted(still.items()) if experts}


def joined(one: Untouched, other: Untouched) -> Untouched:
    """The experts of both."""
    return {name: sorted({*one.get(name, []), *other.get(name, [])}) for name in sorted({*one, *other})}


def nonzero_rows(adapter: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of rows with a number other than zero, per factor (`up.A`), over all layers and experts."""
    counts: dict[str, list[int]] = {}
    for name, tensor in adapter.items():
        kind = name.split(".", 2)[2]
        used, total = counts.setdefault(kind, [0, 0])
        rows = (tensor != 0).any(dim=-1)
        counts[kind] = [used + int(rows.sum()), total + rows.numel()]
    return {kind: used / total for kind, (used, total) in counts.items()}


def faults(adapter: Mapping[str, Tensor], said: Untouched | None) -> list[str]:
    """What is wrong with the tensors of an adapter, one sentence each.

    Args:
        adapter: by our names.
        said: the experts that the export names as untouched; None where nobody named any, as in an adapter of PEFT's own.
    """
    found = [
        f"{name} holds {int((~tensor.isfinite()).sum())} values that are NaN or infinite; expected numbers, train again"
        for name, tensor in adapter.items()
        if not tensor.isfinite().all()
    ]
    still, routers = untouched(adapter), [tensor for name, tensor in adapter.items() if name.endswith(".router")]
    if not any(adds(a, b).any() for _, a, b in matrices(adapter)) and not any((one != 0).any() for one in routers):
        return [*found, "the adapter adds nothing to any expert: B A is zero everywhere; train it, or save it again"]
    for name, a, _ in matrices(adapter):
        experts = still.get(name, [])
        if said is None and len(experts) == len(a):
            found.append(f"{name} adds nothing to any expert: B A is zero; train it, or save it again")
        elif said is not None and (lost := sorted(set(experts) - set(said.get(name, [])))):
            found.append(
                f"{name} adds nothing to {listed(lost)}, and the export does not name them as untouched: they were lost "
                "when it was saved; export it again"
            )
    return found


def require_effect(adapter: Mapping[str, Tensor], said: Untouched | None, where: str) -> None:
    """Raise NoEffect for an adapter with `faults`."""
    if found := faults(adapter, said):
        more = f" (and {len(found) - 1} more; `ubsmoe check` lists all)" if found[1:] else ""
        raise NoEffect(f"{where}: {found[0]}{more}")


def in_words(adapter: Mapping[str, Tensor]) -> list[str]:
    """What an adapter changes, for whoever exports it: experts trained, and which were not."""
    pairs, still = list(matrices(adapter)), untouched(adapter)
    total = sum(len(a) for _, a, _ in pairs)
    left = sum(map(len, still.values()))
    lines = [f"trained: {total - left} of {total} matrices (experts x projections x layers)"]
    return lines + [f"untouched: {name}, {listed(experts)}" for name, experts in still.items()]


def listed(experts: list[int], most: int = 12) -> str:
    """Experts by number, the first of many.

    >>> listed([1, 4])
    'experts 1, 4'
    """
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return f"expert{'s' if experts[1:] else ''} {', '.join(map(str, experts[:most]))}{more}"
