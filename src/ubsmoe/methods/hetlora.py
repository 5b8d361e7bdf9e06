"""HetLoRA: every client its own rank, cut from one adapter; tails are pressed towards zero and pruned.

A round, r the rank of the server, r_c the client's, Delta_c = s_c B_c A_c:

    (1) the client gets the first r_c rows of A and columns of B
    (2) it trains on   loss + lambda sum_matrices ||B[:, g r_c:]|| ||A[g r_c:, :]||,    g r_c rounded down
    (3) if that is smaller afterwards than before, the tail is cut and the client's rank stays floor(g r_c)
    (4) A <- sum_c w_c pad(A_c),  B <- sum_c w_c pad(B_c),    w_c = ||Delta_c||_F / sum_j ||Delta_j||_F

The amount of data does not enter the weights. Where all norms are zero (the first round, before B moves) they fall
back to n_c / sum n. Rank 1, or `min_rank`, is never pruned and has no penalty.

Reconstructed: the norm's scope is each expert's own matrix, or all of a client's with `scope = "client"`; clients are
stateless here, so the server remembers their ranks (`rank.<client>`) and cuts the pruned tail on arrival; at a fixed
alpha factors change hands with the root of the scales' ratio on both sides. lambda and g are others' defaults, as the
paper's grid is for another model. An expert that a client did not activate still weighs by its old norm; one that
nobody activated stays.

Source: HetLoRA (Cho et al. 2024, arXiv 2401.06432).
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ubsmoe.maths.lora import frobenius
from ubsmoe.maths.means import Weight, WeightedMean
from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.factors import at_rank, keep_untouched, pairs, rank_of
from ubsmoe.methods.method import FACTORS_APART, Base, Hooks, Method, State, install_adapter
from ubsmoe.model.surgery import SparseModel


def hetlora(
    base: Base,
    *,
    decay: float = 0.99,
    penalty: float = 0.01,
    min_rank: int = 1,
    scope: Literal["matrix", "client"] = "matrix",
) -> Method:
    """Build the method.

    Args:
        base: sizes of the run.
        decay: g, the share of its rank that a client keeps when it prunes.
        penalty: lambda, how strongly tails are pressed towards zero.
        min_rank: no client is pruned below it.
        scope: whose norm weighs a client: each expert matrix's own, or one over all of the client's.

    Raises:
        ValueError: for a setting out of range.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must lie in (0, 1), got {decay}")
    if penalty < 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    if min_rank < 1:
        raise ValueError(f"min_rank must be at least 1, got {min_rank}")

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        known = state.extras.get(f"rank.{profile.client}")
        rank = profile.rank if known is None else min(int(known), profile.rank)
        return at_rank(state.adapters, base.alpha, rank)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, base.alpha)
        rank = rank_of(payload)
        kept = max(min_rank, pruned_rank(rank, decay))
        if kept >= rank:
            return Hooks(extras=lambda: {"rank": torch.tensor(rank)})
        before = tail_norms(model.adapter, kept).item()

        def extras() -> dict[str, Tensor]:
            return {"rank": torch.tensor(kept if tail_norms(model.adapter, kept).item() < before else rank)}

        return Hooks(penalty=lambda: penalty * tail_norms(model.adapter, kept), extras=extras)

    def aggregate(state: State, updates: Iterable[Update]) -> State:
        by_norm, by_examples, rank = WeightedMean(), WeightedMean(), rank_of(state.adapters)
        expert_tokens = torch.zeros(base.num_layers, base.num_experts, dtype=torch.int64)
        ranks = {}
        for update in updates:
            ranks[f"rank.{update.client}"] = update.extras["rank"]
            own = at_rank(update.adapters, base.alpha, int(update.extras["rank"]))
            padded = at_rank(own, base.alpha, rank)
            by_norm.add(padded, norm_weights(padded, base.alpha, scope, update.num_examples))
            by_examples.add(padded, update.num_examples)
            expert_tokens += update.expert_tokens
        after = by_norm.result(by_examples.result(state.adapters))
        return State(keep_untouched(state.adapters, after, expert_tokens), state.extras | ranks)

    def fault(update: Update) -> str | None:
        rank, most = int(update.extras["rank"]), rank_of(update.adapters)
        return None if 1 <= rank <= most else f"its new rank is {rank}, expected 1 to {most}"

    return Method(
        "hetlora",
        State,
        dispatch,
        install,
        aggregate,
        varies="rank",
        refuses=FACTORS_APART,
        extra_up=2,  # the new rank is one int64
        fault=fault,
        exempt={"client_halves": "clients weigh by the norm of their update, whatever their number of examples"},
    )


def pruned_rank(rank: int, decay: float) -> int:
    """floor(decay * rank), at least 1, whatever the product's rounding."""
    return max(1, int(decay * rank + 1e-9))


def tail_norms(adapter: Mapping[str, Tensor], kept: int) -> Float[Tensor, ""]:
    """The sum of ||B tail|| ||A tail|| over experts and matrices, differentiable; tails are what lies past `kept`."""
    norm = torch.linalg.vector_norm
    return torch.stack(
        [
            (norm(adapter[f"{name[:-2]}.B"][:, :, kept:], dim=(1, 2)) * norm(a[:, kept:], dim=(1, 2))).sum()
            for name, a in adapter.items()
            if name.endswith(".A")
        ]
    ).sum()


def norm_weights(
    adapters: Tensors, alpha: float, scope: Literal["matrix", "client"], num_examples: int
) -> dict[str, Weight]:
    """Weight of each tensor: the norm of its update, per expert or of the whole client; a router's is the examples."""
    norms = {name: frobenius(pair) for name, pair in pairs(adapters, alpha).items()}
    if scope == "client":
        whole = torch.stack([norm.square().sum() for norm in norms.values()]).sum().sqrt()
        norms = {name: whole.expand_as(norm) for name, norm in norms.items()}
    return {name: num_examples if name.endswith(".router") else norms[name[:-2]] for name in adapters}
