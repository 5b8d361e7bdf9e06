"""Dynamic Modulated Routing: how phi shifts a router, how utilization moves phi.

    s      router logits            phi   modulation, one number per expert
    T(x)   candidates of a token    u_i   share of tokens that used expert i, weighted by clients
    K, M   experts used, experts    K_bar mean number of experts per token = sum_i u_i

Source: UB-SMoE (arXiv 2605.16690), section on DMR, steps 1-8. The paper gives the candidate set, the shift, the tanh target and
the momentum; which side the momentum weighs, epsilon and the defaults are our reconstruction.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def candidates(logits: Float[Tensor, "T M"], num_candidates: int) -> Bool[Tensor, "T M"]:
    """T(x): the `num_candidates` experts with the largest unmodulated logits of each token."""
    if num_candidates >= logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    top = logits.detach().topk(num_candidates, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, top, True)


def modulate(logits: Float[Tensor, "T M"], phi: Float[Tensor, " M"], num_candidates: int) -> Float[Tensor, "T M"]:
    """m_i = s_i + phi_i on a token's candidates, m_i = s_i elsewhere. Differentiable in both arguments.

    Source: UB-SMoE, DMR steps 1-2.

    >>> modulate(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0.0, 2.0, 9.0, 9.0]), num_candidates=2)
    tensor([[3., 4., 1., 0.]])
    """
    return logits + phi.to(logits.dtype) * candidates(logits, num_candidates)


def utilization(expert_tokens: Shaped[Tensor, "*L M"], tokens: int | float) -> Float[Tensor, "*L M"]:
    """One client's share of tokens that used each expert: a_i / n. Its sum over experts is the client's mean K."""
    return expert_tokens.double() / max(tokens, 1)


def phi_target(used: Float[Tensor, "*L M"], epsilon: float = 1e-6) -> Float[Tensor, "*L M"]:
    """tanh(u* / (u_i + epsilon) - 1) with u* = mean_i u_i: at most +1 for a starved expert, above -0.7616 for a busy one.

    Source: UB-SMoE, DMR steps 5-6.
    """
    return torch.tanh(used.mean(dim=-1, keepdim=True) / (used + epsilon) - 1)


def phi_update(phi: Float[Tensor, "*L M"], target: Float[Tensor, "*L M"], momentum: float) -> Float[Tensor, "*L M"]:
    """phi <- momentum * phi + (1 - momentum) * target (DMR step 7; that momentum weighs the old phi is our reading)."""
    return momentum * phi + (1 - momentum) * target


def phi_range_penalty(phi: Float[Tensor, "..."], low: float, high: float) -> Float[Tensor, ""]:
    """||ReLU(low - phi)||^2 + ||ReLU(phi - high)||^2, the regulariser of a trained phi (DMR step 8)."""
    return torch.relu(low - phi).square().sum() + torch.relu(phi - high).square().sum()


def mass_ratio(scores: Float[Tensor, "T M"], k_max: int, chosen: Int[Tensor, "T K"]) -> Float[Tensor, "T 1"]:
    """Routing mass a token would send through its K_max best experts over the mass of the K it was given.

    Multiplying the gate weights by it gives a layer at K < K_max the output scale that it has at K_max. Ours.
    """
    full = scores.topk(k_max, dim=-1).values.sum(dim=-1, keepdim=True)
    return full / scores.gather(-1, chosen).sum(dim=-1, keepdim=True)
