"""An adapter as pairs of factors, one per expert matrix, and how it changes hands between clients of different rank.

With a fixed alpha the factor alpha / rank depends on the holder. Here a pair carries its own scale, products carry it
inside, and whoever hands factors over changes the numbers, so that each rank-one term stays the same update.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ubsmoe.errors import UserError
from ubsmoe.maths.lora import LoraPair, pad_rank, truncate_rank, with_scale
from ubsmoe.maths.means import WeightedMean
from ubsmoe.maths.spectra import Split
from ubsmoe.messages import Tensors
from ubsmoe.methods.method import Contribution, Weigh
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel


def pairs(tensors: Tensors, alpha: float) -> dict[str, LoraPair]:
    """`layers.0.up.A` and `.B` as one pair named `layers.0.up`, at the scale of a client that holds them."""
    names = [name[:-2] for name in sorted(tensors) if name.endswith(".A")]  # by name: norms are summed over pairs
    return {n: LoraPair(a := tensors[f"{n}.A"], tensors[f"{n}.B"], alpha / a.shape[1]) for n in names}


def tensors(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """The reverse of `pairs`: the factors by their names on the wire."""
    return {f"{name}.{key}": value for name, pair in pairs.items() for key, value in (("A", pair.a), ("B", pair.b))}


def routers(adapters: Tensors) -> dict[str, Tensor]:
    """The routers' differences, if they are trained; they have no rank and every method averages them."""
    return {name: value for name, value in adapters.items() if name.endswith(".router")}


def rank_of(adapters: Tensors) -> int:
    """The rank of an adapter."""
    return next(value.shape[1] for name, value in adapters.items() if name.endswith(".A"))


def at_rank(adapters: Tensors, alpha: float, rank: int, split: Split = "balanced") -> dict[str, Tensor]:
    """An adapter cut or zero-padded to a rank, each kept term s_i b_i a_i the same update as before.

    Args:
        adapters: factors and maybe routers, which stay.
        alpha: LoRA's numerator, the same everywhere.
        rank: of the receiver.
        split: who takes the change of scale: "balanced" both factors, by its root; "b" B alone.
    """
    if rank == rank_of(adapters):
        return dict(adapters)
    return {
        **routers(adapters),
        **tensors({n: _resized(p, alpha, rank, split) for n, p in pairs(adapters, alpha).items()}),
    }


def _resized(pair: LoraPair, alpha: float, rank: int, split: Split) -> LoraPair:
    pair = truncate_rank(pair, rank) if rank < pair.rank else pad_rank(pair, rank)
    if split == "balanced":
        return with_scale(pair, alpha / rank)
    return LoraPair(pair.a, pair.b * (pair.scale * rank / alpha), alpha / rank)


def shares(contributions: Sequence[Contribution]) -> list[float]:
    """p_c = n_c / sum n."""
    total = sum(one.weight for one in contributions)
    return [one.weight / total for one in contributions]


def mean_routers(before: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """sum_c p_c router_c, for methods that treat the factors in another way."""
    mean = WeightedMean()
    for one in contributions:
        mean.add(routers(one.adapters), one.weight)
    return mean.result(routers(before))


def keep_untouched(before: Tensors, after: Tensors, expert_tokens: Shaped[Tensor, "L M"]) -> dict[str, Tensor]:
    """`after`, but bit for bit `before` for each expert that none of these tokens went to.

    Cutting, padding and refactoring change the tensors of an expert that nobody trained. Counts decide who did, not a
    comparison of tensors: weight decay moves those of every expert.
    """

    def kept(name: str, value: Tensor) -> Tensor:
        layer = layer_of_experts(name)
        if layer is None:
            return value
        touched = expert_tokens[layer] > 0
        return torch.where(touched[:, None, None], value, before[name])

    return {name: kept(name, value) for name, value in after.items()}


def matrix_shares(contributions: Sequence[Contribution], weigh: Weigh, matrix: str) -> Float[Tensor, "C *M"]:
    """p_c of one matrix, which may be one per expert: the weights of `weigh`, over their sum; zeros where that is zero."""
    weights = []
    for one in contributions:
        given = weigh(one)
        weights.append(torch.as_tensor(given[f"{matrix}.A"] if isinstance(given, dict) else given, dtype=torch.float64))
    table = torch.stack(weights)
    return table / table.sum(0).clamp(min=torch.finfo(torch.float64).tiny)


Resplit = Callable[[LoraPair, LoraPair], LoraPair]
"""From a pair and the one that stood in its place before: other factors of the same update."""


def resplit(before: Tensors, after: Tensors, alpha: float, split: Resplit) -> dict[str, Tensor]:
    """`after` with each pair split anew, but bit for bit `before` for each expert whose factors did not change.

    Tensors decide here, not counts: a mean leaves what nobody changed bit-identical, and elsewhere a split keeps the product.
    """
    found, old = {}, pairs(before, alpha)
    for name, pair in pairs(after, alpha).items():
        new, was = split(pair, old[name]), old[name]
        moved = ((pair.a != was.a).flatten(1).any(1) | (pair.b != was.b).flatten(1).any(1))[:, None, None]
        found[name] = replace(new, a=torch.where(moved, new.a, was.a), b=torch.where(moved, new.b, was.b))
    return {**after, **tensors(found)}


def freeze(model: SparseModel, factor: str) -> None:
    """Stop training one factor, "A" or "B", of the adapter that is in place; it is used as it is, and not sent back."""
    for name in [one for one in model.adapter if one.endswith(f".{factor}")]:
        model.adapter.pop(name).requires_grad_(False)


def check_independent(adapter: Tensors, method: str) -> None:
    """Raise UserError if an adapter has more rank than one of its matrices has directions."""
    for name, pair in pairs(adapter, alpha=1.0).items():
        if pair.rank > min(pair.a.shape[-1], pair.b.shape[-2]):
            raise UserError(f"adapter.rank is {pair.rank}, more than {name} has; {method} needs independent directions")
