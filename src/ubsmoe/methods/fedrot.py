"""FedRot-LoRA: each client's factors are turned towards those that it was sent, then averaged.

    Q_c = argmin |Q A_c - A|,  Q^T Q = 1,        A_c <- Q_c A_c,    B_c <- B_c Q_c^T        B_c A_c stays
    A <- sum_c p_c A_c,    B <- sum_c p_c B_c,    p_c = n_c / sum n

Not exact: what clients turned by chance no longer cancels, what they learnt apart still mixes. The rank stays r, traffic is that of
plain averaging.

The paper has the turn before averaging, by orthogonal Procrustes. Reconstructed: the reference is the A that the round began with,
in the full turn (the paper can soften it) and for A alone. Ours: the server turns, where a client could do it before it sends; so
here the server needs each client's own factors, and this refuses secure aggregation, [robust] and [privacy]. An expert that nobody
changed stays bit for bit. Weights p_c may be an expert's own ([method.averaging] exponent).

Source: FedRot-LoRA (Zhang et al. 2026, arXiv 2602.23638); alignment with the last round also in FLoRG (Meng et al. 2026, arXiv
2602.17095), for the square root of a Gram matrix.
"""

from collections.abc import Iterable
from dataclasses import replace

from ubsmoe.maths.splits import aligned
from ubsmoe.methods.factors import resplit
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Method, RunShape, State
from ubsmoe.methods.refusals import OWN_FACTORS


def fedrot(shape: RunShape) -> Method:
    """Build the method; it has no settings."""
    return replace(with_alignment(fedavg(shape), shape), name="fedrot")


def with_alignment(method: Method, shape: RunShape) -> Method:
    """A method whose server turns each client's factors towards its own before it averages them.

    Args:
        method: it averages factors.
        shape: sizes of the run.
    """

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        def turned(one: Contribution) -> Contribution:
            return replace(one, adapters=resplit(state.adapters, one.adapters, shape.alpha, aligned))

        return method.aggregate(state, map(turned, contributions))

    return replace(method, aggregate=aggregate, refuses={**method.refuses, **OWN_FACTORS})
