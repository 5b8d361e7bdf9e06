"""HFedMoE-style: each batch trains only the experts that matter most to it, and the server averages by usage.

Within a batch of B tokens, G_e(x) the router's score, C the number of experts a client can train per layer and batch:

    s(e) = lambda mean_x G_e(x) + (1 - lambda) max_x G_e(x)                        importance
    I(e) = s(e) - beta mean_x G_e(x) ln(G_e(x) / mean_x' G_e(x'))                  information bottleneck
    forward as routed; backward through the C experts of largest I among those the batch activated

Over a round, u_c(e) = mean_x G_e(x) on the client's tokens, S_c = {e: u_c(e) >= tau}:

    theta_e <- sum_c n_c 1[e in S_c] theta_{c,e} / sum_c n_c 1[e in S_c]
    router  <- sum_c alpha_c router_c / sum_c alpha_c,    alpha_c = sum_{e in S_c} u_c(e) s_c(e)  (trained routers)

No code was published. Reconstructed or changed by us: the budget sets C = max(1, floor(M beta_c)) here, and K_c as in
every method of this project, so that tiers stay comparable (the paper keeps the model's own K); tau is given in units
of 1/M; s_c(e) is the mean importance over the round's batches; alpha is normalised (as printed it shrinks the
router); usage is not training, so an expert counts for a client only if it was in a backward pass; an expert that no
client counts for stays bit for bit. Left out: the choice of C from device profiles. The values of lambda, beta and
tau are ours. Padding never counts.

Source: HFedMoE (Fang et al. 2026, arXiv 2601.00583).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from ubsmoe.costs.traffic import adapter_traffic
from ubsmoe.maths.means import Weight
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, install_adapter, sending
from ubsmoe.methods.refusals import OWN_WEIGHTS, USE_WEIGHS, WHOLE_BATCH, Refusable
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel

EXEMPT: Mapping[str, str] = {
    "lone_client": "a client's experts below the usage threshold are not taken over",
    "identical_clients": "the same: what all agree on is taken over only where they use the expert enough",
}
REFUSES: Mapping[Refusable, str] = {
    **USE_WEIGHS,
    **OWN_WEIGHTS,
    **WHOLE_BATCH,
    "pg": "it chooses which experts learn from a batch, and a pseudo-gradient would teach the others",
}


def hfedmoe(
    shape: RunShape,
    *,
    mean_share: Annotated[float, Field(ge=0, le=1)] = 0.5,
    bottleneck: Annotated[float, Field(ge=0)] = 0.1,
    threshold: Annotated[float, Field(ge=0)] = 0.5,
) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        mean_share: lambda, weight of the mean score against the largest one.
        bottleneck: beta, how much telling tokens apart costs an expert.
        threshold: tau times M: an expert counts from this share of an even use on.
    """
    tau = threshold / shape.num_experts
    weigh = partial(usage_weights, tau=tau)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, shape.alpha)
        most = max(1, math.floor(shape.num_experts * profile.budget + 1e-9))
        layers = [Selection(shape.num_experts, most, mean_share, bottleneck) for _ in model.layers]
        model.set_trainable_experts(layers)
        return Hooks(extras=lambda: {name: torch.stack([layer.report()[name] for layer in layers]) for name in REPORT})

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        mean = shape.mean()
        for one in contributions:
            mean.add(one.adapters, one.weights or weigh(one))
        return replace(state, adapters=mean.result(state.adapters))

    return replace(
        fedavg(shape),
        name="hfedmoe",
        install=install,
        aggregate=aggregate,
        weigh=weigh,
        refuses=REFUSES,
        traffic=sending(adapter_traffic, up=len(REPORT) * shape.num_layers * shape.num_experts),
        ranges=dict.fromkeys(REPORT, (0.0, 1.0)),  # both are means of router scores
        exempt=EXEMPT,
    )


REPORT = ("usage", "importance")
"""What a client reports of its round, [L, M] each, both zero for experts it never trained."""


def importance(scores: Float[Tensor, "B M"], mean_share: float) -> Float[Tensor, " M"]:
    """s(e): the mean and the largest score of each expert in a batch, mixed.

    >>> importance(torch.tensor([[0.9, 0.1], [0.5, 0.5]]), mean_share=0.5)
    tensor([0.8000, 0.4000])
    """
    return mean_share * scores.mean(0) + (1 - mean_share) * scores.max(0).values


def bottleneck_score(scores: Float[Tensor, "B M"], mean_share: float, bottleneck: float) -> Float[Tensor, " M"]:
    """I(e): importance less what an expert's scores tell about the token they belong to."""
    information = torch.xlogy(scores, scores / scores.mean(0).clamp_min(torch.finfo(scores.dtype).tiny)).mean(0)
    return importance(scores, mean_share) - bottleneck * information


class Selection:
    """One layer of one client: picks the experts that learn from a batch, and remembers usage and importance."""

    def __init__(self, num_experts: int, most: int, mean_share: float, bottleneck: float) -> None:
        self.most, self.mean_share, self.bottleneck = most, mean_share, bottleneck
        self.score_sum = torch.zeros(num_experts, dtype=torch.float64)
        self.importance_sum = torch.zeros(num_experts, dtype=torch.float64)
        self.tokens = self.batches = 0
        self.trained = torch.zeros(num_experts, dtype=torch.bool)

    @torch.no_grad()
    def __call__(
        self, scores: Float[Tensor, "T M"], chosen: Int[Tensor, "T K"], real: Bool[Tensor, " T"] | None
    ) -> Bool[Tensor, " M"]:
        """Which experts learn: the `most` of largest I among those that a real token of the batch uses."""
        if real is not None:
            scores, chosen = scores[real], chosen[real]
        active = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        active[chosen.reshape(-1)] = True
        ranked = bottleneck_score(scores, self.mean_share, self.bottleneck).masked_fill(~active, -torch.inf)
        learns = torch.zeros_like(active)
        learns[ranked.topk(min(self.most, int(active.sum()))).indices] = True
        self.score_sum += scores.double().sum(0).cpu()
        self.importance_sum += importance(scores, self.mean_share).double().cpu()
        self.tokens, self.batches = self.tokens + len(scores), self.batches + 1
        self.trained |= learns.cpu()
        return learns

    def report(self) -> dict[str, Tensor]:
        """Usage u_c and mean importance s_c, [M] each, zero for experts that never learnt."""
        usage = self.score_sum / max(self.tokens, 1) * self.trained
        return {
            "usage": usage.float(),
            "importance": (self.importance_sum / max(self.batches, 1) * self.trained).float(),
        }


def usage_weights(one: Contribution, tau: float) -> dict[str, Weight]:
    """Each tensor's weight: examples where usage reaches tau, per expert, and for attention; alpha_c of the layer for a router."""
    usage, weight = one.extras["usage"].double(), one.extras["importance"].double()
    counts = (usage >= tau) & (usage > 0)
    alpha = (usage * weight * counts).sum(-1)
    weights: dict[str, Weight] = {}
    for name in one.adapters:
        layer = int(name.split(".")[1])
        if name.endswith(".router"):
            weights[name] = alpha[layer]
        elif layer_of_experts(name) is None:
            weights[name] = one.weight
        else:
            weights[name] = one.weight * counts[layer].double()
    return weights
