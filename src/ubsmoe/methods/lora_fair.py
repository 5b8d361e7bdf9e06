"""LoRA-FAIR: average the factors, and move B so that their product comes nearer to the mean of the products.

    A <- sum_c p_c A_c,    B <- sum_c p_c B_c + D,    p_c = n_c / sum n
    D = argmin |R - D A|^2 + lambda a |D|^2 = R A^T (A A^T + lambda a 1)^-1,    R = sum_c p_c B_c A_c - B A,    a = mean_i |A_i|^2

At lambda = 0 the part of R that lies in the rows of A is put right, and the rest is lost: of all B this one is the best for that A.
The rank stays r, traffic is that of plain averaging. The server needs each client's own factors, since R is not a sum of
them; so this refuses secure aggregation, [robust] and [privacy].

The paper has the correction of B on the server and the corrected mean as the next start, with a similarity of products that is
maximised in steps. Reconstructed: the Frobenius norm in its place, which has the closed form above, and lambda in units of a
row's squared length a. Ours: R as a sum of products of deviations (fedex_lora.py), which is exactly zero where clients agree,
so an expert that nobody changed stays bit for bit; weights p_c, which may be an expert's own ([method.averaging] exponent).

Source: LoRA-FAIR (Bian et al. 2024, arXiv 2411.14961).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ubsmoe.maths.lora import LoraPair, stack
from ubsmoe.methods.factors import matrix_shares, pairs, tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.fedex_lora import deviation
from ubsmoe.methods.method import Contribution, Method, RunShape, State, adapter_part
from ubsmoe.methods.refusals import OWN_FACTORS


def lora_fair(shape: RunShape, *, penalty: Annotated[float, Field(ge=0)] = 0.01) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        penalty: lambda, how small the correction is kept.
    """
    return replace(with_correction(fedavg(shape), shape, penalty), name="lora_fair")


def with_correction(method: Method, shape: RunShape, penalty: float = 0.01) -> Method:
    """A method that averages factors, its B corrected.

    Args:
        method: its `aggregate` leaves the mean of factors by `shape.weigh` in the state.
        shape: sizes of the run.
        penalty: lambda.
    """

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        clients = list(contributions)
        after = method.aggregate(state, clients)
        if not any(one.weight for one in clients):
            return after
        sent = [pairs(one.adapters, shape.alpha) for one in clients]
        corrected = {
            name: correct([one[name] for one in sent], matrix_shares(clients, shape.weigh, name), middle, penalty)
            for name, middle in pairs(adapter_part(after.adapters), shape.alpha).items()
        }
        return replace(after, adapters={**after.adapters, **tensors(corrected)})

    return replace(method, aggregate=aggregate, refuses={**method.refuses, **OWN_FACTORS})


def correct(sent: Sequence[LoraPair], weights: Tensor, middle: LoraPair, penalty: float) -> LoraPair:
    """The mean pair `middle` with B + D, from the pairs that were averaged and their weights [C] or [C, M]."""
    a = middle.a.double()
    missed = stack([deviation(one, middle, sent[-1]) for one in sent], weights)
    gram = a @ a.mT
    gram = gram + penalty * torch.diag_embed(
        gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(a.shape[:-1])
    )
    toward = missed.b.double() @ (missed.a.double() @ a.mT) / middle.scale
    step = torch.linalg.solve(gram, toward, left=False)
    return replace(middle, b=(middle.b.double() + step).to(middle.b.dtype))
