"""The side factor: what rounds have merged into the frozen base, kept as factors beside it.

Merging W <- W + S would need a private copy of every expert per run, loses small updates in 16 bits and cannot be
done on a quantised base. So S stays B A with scale 1, `side.layers.{l}.{up|down}.A` [M, R, in] and `.B` [M, out, R],
and `side.layers.{l}.attention.{q_proj|...}.A` and `.B` with M = 1 where attention is trained.
Its rank R grows by what is added and ends at min(out, in) of the matrix, from where on the sum is recompressed, which
cuts nothing.

Clients keep nothing between rounds: every payload carries the whole side factor, so a client that missed rounds is up
to date. The papers send what one round added and count on nobody missing a round. Bytes and memory are counted with R
as large as the run's rounds can make it; FLOPs are the papers', of a base that S was merged into: here its products come
on top, as the seconds of a run show.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ubsmoe.costs.shape import FLOAT32, ModelShape, Trained
from ubsmoe.costs.traffic import Traffic
from ubsmoe.costs.workload import WireDtype
from ubsmoe.maths.lora import LoraPair, pad_rank, stack
from ubsmoe.maths.spectra import truncated_svd
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods import factors
from ubsmoe.methods.method import RunShape, TrafficOf, adapter_part, side_part
from ubsmoe.model.surgery import SparseModel

SIDE_GROWS = "the side factor grows from rank 0; what is predicted is its largest size"
"""Why a method with a side factor sends at most the predicted bytes."""


def empty_side(adapter: Tensors) -> dict[str, Tensor]:
    """A side factor of rank 0 for the matrices that this adapter sits on."""
    matrices = factors.tensors(factors.pairs(adapter, alpha=1.0))
    return {f"side.{n}": value[:, :0] if n.endswith(".A") else value[:, :, :0] for n, value in matrices.items()}


def fold(state: Tensors, new: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """The side factor of a state's tensors with one more update per matrix, named as in `factors.pairs`."""
    side = {name: LoraPair(state[f"side.{name}.A"], state[f"side.{name}.B"]) for name in new}
    return factors.tensors({f"side.{name}": grown(side[name], pair) for name, pair in new.items()})


def grown(side: LoraPair, new: LoraPair) -> LoraPair:
    """Their sum at a rank of at most min(out, in). The factors of an expert that `new` is zero for stay bit for bit."""
    limit = min(side.b.shape[-2], side.a.shape[-1])
    if side.rank + new.rank <= limit:
        return stack([side, new], [1.0, 1.0])
    whole, kept = truncated_svd([side, new], [1.0, 1.0], rank=limit).pair, pad_rank(side, limit)
    changed = ((new.b != 0).any(dim=-2) & (new.a != 0).any(dim=-1)).any(dim=-1)[:, None, None]
    return LoraPair(torch.where(changed, whole.a, kept.a), torch.where(changed, whole.b, kept.b))


def install_fresh(
    model: SparseModel, payload: Tensors, profile: Profile, shape: RunShape, generator: torch.Generator
) -> None:
    """The side factor in place, and beside it a new adapter of the client's own rank and draw, with B zero."""
    fresh = model.fresh_adapter(profile.rank, generator, shared_a=shape.shared_a, attention=shape.attention)
    model.load_adapter(fresh | adapter_part(payload), shape.alpha, side_part(payload))
    model.set_top_k(profile.top_k)


def side_traffic(traffic: TrafficOf, shape: RunShape) -> TrafficOf:
    """The traffic of a method that sends the side factor too, at its largest."""

    def both(base: ModelShape, rank: int, trained: Trained, wire_dtype: WireDtype) -> Traffic:
        side = FLOAT32 * largest_side(shape, base, trained)
        return traffic(base, rank, trained, wire_dtype) + Traffic(side, 0)

    return both


def largest_side(shape: RunShape, base: ModelShape, trained: Trained) -> int:
    """Elements of the side factor at its largest: of the rank that the run's rounds can add up to, at most min(out, in)."""
    wide, width, hidden = base.up_matrices * base.expert_width, base.expert_width, base.hidden

    def full(*matrices: tuple[int, int]) -> int:
        most = math.inf if shape.side_rank is None else shape.side_rank
        return sum(int(min(out, into, most)) * (out + into) for out, into in matrices)

    experts = base.num_experts * full((wide, hidden), (hidden, width))
    return base.num_moe_layers * (experts + trained.attention * full(*base.attention_first, *base.attention_later))
