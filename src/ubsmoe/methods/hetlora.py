"""HetLoRA: every client its own rank, cut from one adapter; tails are pressed towards zero and pruned.

A round, r the rank of the server, r_c the client's, Delta_c = s_c B_c A_c:

    (1) the client gets the first r_c rows of A and columns of B
    (2) it trains on   loss + lambda sum_matrices ||B[:, g r_c:]|| ||A[g r_c:, :]||,    g r_c rounded down
    (3) if that is smaller afterwards than before, the tail is cut and the client's rank stays floor(g r_c)
    (4) A <- sum_c w_c pad(A_c),  B <- sum_c w_c pad(B_c),    w_c = ||Delta_c||_F / sum_j ||Delta_j||_F

The amount of data does not enter the weights. Where all norms are zero (the first round, before B moves) they fall
back to n_c / sum n. Rank 1, or `min_rank`, is never pruned and has no penalty.

Reconstructed: the norm's scope is each expert's own matrix, or all of a client's with `scope = "client"`; clients are
stateless here, so the server remembers their ranks (`RankState`) and cuts the pruned tail on arrival; at a fixed
alpha factors change hands with the root of the scales' ratio on both sides. lambda and g are others' defaults, as the
paper's grid is for another model. An expert that a client did not activate still weighs by its old norm; one that
nobody activated stays.

Source: HetLoRA (Cho et al. 2024, arXiv 2401.06432).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ubsmoe.costs.traffic import adapter_traffic
from ubsmoe.maths.lora import frobenius
from ubsmoe.maths.means import Weight, WeightedMean
from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.factors import at_rank, keep_untouched, pairs, rank_of
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, install_adapter, sending
from ubsmoe.methods.refusals import OWN_FACTORS
from ubsmoe.model.surgery import SparseModel

EXEMPT: Mapping[str, str] = {
    "client_halves": "clients weigh by the norm of their update, whatever their number of examples"
}


@dataclass(frozen=True)
class RankState:
    """The rank that each client has pruned itself to, int64 by the client's name."""

    rank: Mapping[str, Tensor]


def hetlora(
    shape: RunShape,
    *,
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99,
    penalty: Annotated[float, Field(ge=0)] = 0.01,
    min_rank: Annotated[int, Field(ge=1)] = 1,
    scope: Literal["matrix", "client"] = "matrix",
) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        decay: g, the share of its rank that a client keeps when it prunes.
        penalty: lambda, how strongly tails are pressed towards zero.
        min_rank: no client is pruned below it.
        scope: whose norm weighs a client: each expert matrix's own, or one over all of the client's.
    """

    def start(adapter: dict[str, Tensor]) -> State:
        return State(adapter).having(RankState({}))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        pruned = state.of(RankState).rank.get(profile.client)
        rank = profile.rank if pruned is None else min(int(pruned), profile.rank)
        return at_rank(state.adapters, shape.alpha, rank)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, shape.alpha)
        rank = rank_of(payload)
        kept = max(min_rank, pruned_rank(rank, decay))
        if kept >= rank:
            return Hooks(extras=lambda: {"rank": torch.tensor(rank)})
        before = tail_norms(model.adapter, kept).detach()

        def extras() -> dict[str, Tensor]:
            shrunk = tail_norms(model.adapter, kept).detach() < before
            return {"rank": torch.where(shrunk, kept, rank)}

        return Hooks(penalties=[lambda: penalty * tail_norms(model.adapter, kept)], extras=extras)

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        by_norm, by_examples, rank = WeightedMean(), WeightedMean(), rank_of(state.adapters)
        expert_tokens = torch.zeros(shape.num_layers, shape.num_experts, dtype=torch.float64)
        ranks = dict(state.of(RankState).rank)
        for one in contributions:
            ranks[one.client] = one.extras["rank"]
            own = at_rank(one.adapters, shape.alpha, int(one.extras["rank"]))
            padded = at_rank(own, shape.alpha, rank)
            by_norm.add(padded, norm_weights(padded, shape.alpha, scope, one.weight))
            by_examples.add(padded, one.weight)
            expert_tokens += one.expert_tokens
        after = by_norm.result(by_examples.result(state.adapters))
        adapters = keep_untouched(state.adapters, after, expert_tokens)
        return replace(state, adapters=adapters).having(RankState(ranks))

    def validate_update(update: Update) -> str | None:
        rank, most = int(update.extras["rank"]), rank_of(update.adapters)
        return None if 1 <= rank <= most else f"its new rank is {rank}, expected 1 to {most}"

    return replace(
        fedavg(shape),
        name="hetlora",
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        varies="rank",
        keeps=(RankState,),
        refuses=OWN_FACTORS,
        traffic=sending(adapter_traffic, up=2),  # the new rank is one int64
        validate_update=validate_update,
        exempt=EXEMPT,
    )


def pruned_rank(rank: int, decay: float) -> int:
    """floor(decay * rank), at least 1, whatever the product's rounding."""
    return max(1, int(decay * rank + 1e-9))


def tail_norms(adapter: Mapping[str, Tensor], kept: int) -> Float[Tensor, ""]:
    """The sum of ||B tail|| ||A tail|| over experts and matrices, differentiable; tails are what lies past `kept`."""
    norm = torch.linalg.vector_norm
    return torch.stack(
        [
            (
                norm(adapter[f"{name}.B"][:, :, kept:], dim=(1, 2)) * norm(adapter[f"{name}.A"][:, kept:], dim=(1, 2))
            ).sum()
            for name in sorted(key[:-2] for key in adapter if key.endswith(".A"))
        ]
    ).sum()


def norm_weights(
    adapters: Tensors, alpha: float, scope: Literal["matrix", "client"], weight: float
) -> dict[str, Weight]:
    """Weight of each tensor: the norm of its update, per expert or of the whole client; a router's is the examples'."""
    norms = {name: frobenius(pair) for name, pair in pairs(adapters, alpha).items()}
    if scope == "client":
        whole = torch.stack([norm.square().sum() for norm in norms.values()]).sum().sqrt()
        norms = {name: whole.expand_as(norm) for name, norm in norms.items()}
    return {name: weight if name.endswith(".router") else norms[name[:-2]] for name in adapters}
