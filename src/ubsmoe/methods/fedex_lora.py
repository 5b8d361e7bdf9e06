"""FedEx-LoRA: average the factors, and put what that gets wrong into the frozen base.

    A <- sum_c p_c A_c,    B <- sum_c p_c B_c,    p_c = n_c / sum n
    W <- W + s (sum_c p_c B_c A_c - B A),    and the bracket = sum_{c<K} p_c (B_c - B_K)(A_c - A),    K the last client

so that base and adapter together hold the exact mean of the updates. The second form of the residual holds because
sum_c p_c (A_c - A) = 0. It is a sum of products of deviations: small numbers are added, no large ones subtracted, it is
zero to the bit where clients agree, and its rank is (K - 1) r, below the K r + r of the first form.

Ours: weights p_c where the paper has 1 / K; the residual stays in factors, as the paper's text proposes and its code
does not, summed up in a side factor (side.py) that every payload carries. Ranks are uniform (the mean of factors
needs that), so a tier's budget sets its experts per token; with all budgets at 1 this is the published method. An
expert that a client did not activate comes back as it was sent and counts with full weight; one that nobody activated
stays, weight decay apart. All of a round's factors are held at once and the server needs each client's own, so this
method cannot run under secure aggregation.

Source: FedEx-LoRA (Singhal et al. 2025, arXiv 2410.09432).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ubsmoe.maths.lora import LoraPair, stack
from ubsmoe.maths.means import WeightedMean
from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.factors import pairs, shares
from ubsmoe.methods.method import FACTORS_APART, Base, Hooks, Method, State, adapter_part, install_adapter
from ubsmoe.methods.side import empty_side, fold, full_side
from ubsmoe.model.surgery import SparseModel


def fedex_lora(base: Base) -> Method:
    """Build the method; it has no settings."""

    def start(adapter: dict[str, Tensor]) -> State:
        return State({**adapter, **empty_side(adapter)})

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return dict(state.adapters)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, base.alpha)
        return Hooks()

    def aggregate(state: State, updates: Iterable[Update]) -> State:
        updates, mean = list(updates), WeightedMean()
        if not any(update.num_examples for update in updates):
            return state
        for update in updates:
            mean.add(update.adapters, update.num_examples)
        adapters = mean.result(adapter_part(state.adapters))
        *others, last = (pairs(update.adapters, base.alpha) for update in updates)
        if not others:
            return State(state.adapters | adapters)
        weights = shares(updates)[:-1]
        residuals = {
            name: stack([deviation(client[name], middle, last[name]) for client in others], weights)
            for name, middle in pairs(adapters, base.alpha).items()
        }
        return State(adapters | fold(state.adapters, residuals))

    return Method(
        "fedex_lora",
        start,
        dispatch,
        install,
        aggregate,
        refuses=FACTORS_APART,
        extra_down=lambda shape, rank: full_side(shape, base.attention),
        exempt={"predicted_bytes": "the side factor grows from rank 0; what is predicted is its largest size"},
    )


def deviation(pair: LoraPair, middle: LoraPair, last: LoraPair) -> LoraPair:
    """(B_c - B_K)(A_c - A) at the same scale."""
    return LoraPair(pair.a - middle.a, pair.b - last.b, pair.scale)
