"""FedEx-LoRA: average the factors, and put what that gets wrong into the frozen base.

    A <- sum_c p_c A_c,    B <- sum_c p_c B_c,    p_c = n_c / sum n
    W <- W + s (sum_c p_c B_c A_c - B A),    and the bracket = sum_{c<K} p_c (B_c - B_K)(A_c - A),    K the last client

so that base and adapter together hold the exact mean of the updates. The second form of the residual holds because
sum_c p_c (A_c - A) = 0. It is a sum of products of deviations: small numbers are added, no large ones subtracted, it is
exactly zero where clients agree, and its rank is (K - 1) r, below the K r + r of the first form.

Ours: weights p_c where the paper has 1 / K; the residual stays in factors, as the paper's text proposes and its code
does not, summed up in a side factor (side.py) that every payload carries. Ranks are uniform (the mean of factors
needs that), so a tier's budget sets its experts per token; with all budgets at 1 this is the published method. An
expert that a client did not activate comes back as it was sent and counts with full weight; one that nobody activated
stays, weight decay apart. All of a round's factors are held at once and the server needs each client's own, so this
method cannot run under secure aggregation.

Source: FedEx-LoRA (Singhal et al. 2025, arXiv 2410.09432).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from ubsmoe.maths.lora import LoraPair, stack
from ubsmoe.methods.factors import pairs, shares
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Method, RunShape, State, adapter_part
from ubsmoe.methods.refusals import OWN_FACTORS
from ubsmoe.methods.side import SIDE_GROWS, empty_side, fold, largest_side, side_traffic

EXEMPT: Mapping[str, str] = {"predicted_bytes": SIDE_GROWS}


def fedex_lora(shape: RunShape) -> Method:
    """Build the method; it has no settings."""
    return replace(with_exact_averaging(fedavg(shape), shape), name="fedex_lora")


def with_exact_averaging(method: Method, shape: RunShape) -> Method:
    """A method that averages factors by p_c, made exact by the residual.

    Args:
        method: its `aggregate` leaves the mean of factors in the state.
        shape: sizes of the run.
    """

    def start(adapter: dict[str, Tensor]) -> State:
        state = method.start(adapter)
        return replace(state, adapters={**state.adapters, **empty_side(adapter)})

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        clients = list(contributions)
        after = method.aggregate(state, clients)
        if len(clients) < 2 or not any(one.weight for one in clients):
            return after
        *others, last = (pairs(one.adapters, shape.alpha) for one in clients)
        weights = shares(clients)[:-1]
        residuals = {
            name: stack([deviation(client[name], middle, last[name]) for client in others], weights)
            for name, middle in pairs(adapter_part(after.adapters), shape.alpha).items()
        }
        return replace(after, adapters={**after.adapters, **fold(state.adapters, residuals)})

    return replace(
        method,
        start=start,
        aggregate=aggregate,
        refuses={**method.refuses, **OWN_FACTORS},
        side_elements=partial(largest_side, shape),
        traffic=side_traffic(method.traffic, shape),
        exempt={**method.exempt, **EXEMPT},
    )


def deviation(pair: LoraPair, middle: LoraPair, last: LoraPair) -> LoraPair:
    """(B_c - B_K)(A_c - A) at the same scale."""
    return LoraPair(pair.a - middle.a, pair.b - last.b, pair.scale)
