"""SMoE-LLB: naive sparse mixture of experts plus a load-balancing loss that each client computes from its own batches.

    loss + lambda sum_l M sum_i f_{l,i} P_{l,i}

    f_{l,i}  share of the batch's routed assignments that went to expert i in layer l
    P_{l,i}  mean score of expert i over the batch's tokens; it alone has a gradient

A client can only even out what it sees: with unlike data, every expert is asked to serve every client. Aggregation is
FedAvg. With frozen routers (adapter.router = "frozen") the loss acts through the hidden states that the adapters of
lower layers write, so the first layer cannot be balanced; with trained ones it acts on the routers directly.

The paper names SMoE-LLB as a baseline and does not spell it out: the loss is Switch's, layer by layer, with Switch's
and OLMoE's coefficient; f is over all K_c assignments, so that perfect balance costs lambda L at any budget.

Source: the baseline SMoE-LLB of UB-SMoE (arXiv 2605.16690), reconstructed; the loss: Switch Transformer (arXiv
2101.03961), eq. 4.
"""

from dataclasses import replace
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ubsmoe.maths.balance import load_balancing_loss
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Hooks, Method, RunShape
from ubsmoe.methods.refusals import WHOLE_BATCH
from ubsmoe.model.surgery import SparseModel


def smoe_llb(shape: RunShape, *, coefficient: Annotated[float, Field(ge=0)] = 0.01) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        coefficient: lambda, the weight of the balancing loss.
    """
    method = fedavg(shape)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        method.install(model, payload, profile, generator)
        model.record()
        return Hooks(penalties=[lambda: coefficient * balance_penalty(model)])

    return replace(method, name="smoe_llb", install=install, refuses=WHOLE_BATCH)


def balance_penalty(model: SparseModel, shares: Float[Tensor, "L M"] | None = None) -> Float[Tensor, ""]:
    """sum_l M sum_i f_{l,i} P_{l,i} of the last forward pass; f from that pass too unless `shares` are given."""
    losses = []
    for layer in model.layers:
        scores = layer.scores()
        share = None if shares is None else shares[layer.index].to(scores)
        # sigmoid scores become probabilities too, as in DeepSeek-V3's own balancing loss
        probabilities = scores / scores.sum(-1, keepdim=True)
        losses.append(load_balancing_loss(probabilities, layer.chosen(), layer.real_tokens(), share))
    return torch.stack(losses).sum()
