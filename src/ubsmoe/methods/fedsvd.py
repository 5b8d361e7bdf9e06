"""FedSVD: clients train and send B alone; the server averages it and takes the singular vectors of the update as new factors.

    B <- sum_c p_c B_c,    p_c = n_c / sum n        exact: sum_c p_c s B_c A = s B A, since A is one for all
    B A = U Sigma V^T,     A <- V^T,    B <- U Sigma        the update stays, A has orthonormal rows

The rank stays r, and half of an adapter travels up. Aggregation is linear in what is sent: the server needs sum_c n_c B_c and
no client's own, so this fits secure aggregation, [robust] and [privacy].

The paper has: B alone trained and sent, the product with the last A, the SVD, orthonormal rows of A, which keep noise on B
from being amplified. Reconstructed: A starts as any LoRA's does and is orthonormal from round 2 on; the SVD comes every round.
Ours: weights p_c, which may be an expert's own ([method.averaging] exponent), and an expert whose B nobody changed keeps both
factors bit for bit, so that a client that did not run an expert sends zero change for it.

What follows from the formulas and a reader should know: V^T lies in the rows of A, so the row space of A is that of its first
draw for ever. The reach is FFA-LoRA's; what is new in a round is the basis, which Adam notices and plain SGD does not. The
singular vectors are each expert's own, so [method.pg] mode "client_mean" averages gradients of unlike directions from round 2 on.

Source: FedSVD (Lee et al. 2025, arXiv 2505.12805).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ubsmoe.maths.lora import LoraPair
from ubsmoe.maths.splits import principal
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.factors import check_independent, freeze, resplit
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, keeping_back
from ubsmoe.methods.refusals import OWN_WEIGHTS
from ubsmoe.model.surgery import SparseModel


def fedsvd(shape: RunShape) -> Method:
    """Build the method; it has no settings."""
    method = with_singular_factors(fedavg(shape), shape)
    return replace(method, name="fedsvd", refuses={**method.refuses, **OWN_WEIGHTS})


def with_singular_factors(method: Method, shape: RunShape) -> Method:
    """A method whose clients train B alone, and whose server splits the mean update by its singular vectors.

    Args:
        method: its `aggregate` leaves the mean of what clients send in the state.
        shape: sizes of the run.
    """

    def start(adapter: dict[str, Tensor]) -> State:
        check_independent(adapter, "averaging by singular vectors")
        return method.start(adapter)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        freeze(model, "A")
        return hooks

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        after = method.aggregate(state, contributions)
        return replace(after, adapters=resplit(state.adapters, after.adapters, shape.alpha, split))

    def split(pair: LoraPair, before: LoraPair) -> LoraPair:
        return principal(pair)

    return replace(method, start=start, install=install, aggregate=aggregate, traffic=keeping_back(method.traffic, "A"))
