"""FedIT with ranks of different size: average the LoRA factors, padded with zeros to the largest rank.

    A <- sum_c p_c pad(A_c),    B <- sum_c p_c pad(B_c),    p_c = n_c / sum n

The mean of factors is not the mean of updates: mean(B) mean(A) carries the products B_i A_j of different clients.
Rows above a client's rank are zero in its A and B and yet weigh p_c, so they shrink where small clients take part.

Reconstructed: ranks by padding are how others run FedIT as a baseline, its paper has one rank for all; at a fixed
alpha factors change hands with the root of the scales' ratio on both sides, so that a term stays the same update. An
expert that a client did not activate comes back as it was sent, cut to its rank, and counts with full weight; one
that nobody activated stays.

Source: FedIT (Zhang et al. 2023, arXiv 2305.05644); padding: as in HetLoRA (arXiv 2401.06432).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ubsmoe.maths.means import WeightedMean
from ubsmoe.messages import Profile
from ubsmoe.methods.factors import at_rank, keep_untouched, rank_of
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Method, RunShape, State
from ubsmoe.methods.refusals import OWN_FACTORS, Refusable

REFUSES: Mapping[Refusable, str] = {
    **OWN_FACTORS,
    "secure_aggregation": "what a client is sent depends on its rank, and changes of factors of different rank do not add up",
}


def fedit(shape: RunShape) -> Method:
    """Build the method; it has no settings."""

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return at_rank(state.adapters, shape.alpha, profile.rank)

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        mean, rank = WeightedMean(), rank_of(state.adapters)
        expert_tokens = torch.zeros(shape.num_layers, shape.num_experts, dtype=torch.float64)
        for one in contributions:
            mean.add(at_rank(one.adapters, shape.alpha, rank), one.weight)
            expert_tokens += one.expert_tokens
        return replace(state, adapters=keep_untouched(state.adapters, mean.result(state.adapters), expert_tokens))

    return replace(fedavg(shape), name="fedit", dispatch=dispatch, aggregate=aggregate, varies="rank", refuses=REFUSES)
