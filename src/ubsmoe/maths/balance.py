"""How evenly a mixture of experts is used: the two losses that keep a router healthy and the numbers that describe its balance.

Legend: T tokens, M experts, K active experts per token; u or q the share of work of each expert.
"""

import math

import torch
from torch import Tensor


def load_balancing_loss(
    probs_TM: Tensor, index_TK: Tensor, mask_T: Tensor | None = None, share_M: Tensor | None = None
) -> Tensor:
    """Penalty that is smallest when the experts of ONE layer share the tokens evenly.

        loss = M sum_i f_i P_i

    with f_i the share of routed assignments that expert i received (they sum to 1 whatever K, so perfect balance gives 1) and
    P_i the mean probability the router gave it. Only P carries a gradient.

    Args:
        probs_TM: the router's softmax over all experts.
        index_TK: the chosen experts of each token.
        mask_T: true for tokens that count; padding must not. None counts all.
        share_M: f, if it is known from more than these tokens (global balancing); then `index_TK` is not looked at.

    Source: Switch Transformers (Fedus et al. 2022, arXiv 2101.03961), eq. 4-6, with f normalised over assignments; taken per layer
    as OLMoE does (arXiv 2409.02060), not pooled over layers.

    >>> even = torch.full((4, 4), 0.25)
    >>> load_balancing_loss(even, torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]))
    tensor(1.)
    """
    num_tokens, num_experts = probs_TM.shape
    mask = torch.ones(num_tokens, device=probs_TM.device) if mask_T is None else mask_T.float()
    if share_M is None:
        assignments = mask[:, None].expand(index_TK.shape)
        routed = torch.zeros(num_experts, device=probs_TM.device)
        routed = routed.index_add(0, index_TK.reshape(-1), assignments.reshape(-1))
        share_M = routed / routed.sum().clamp_min(1e-9)
    mean_probability = (probs_TM.float() * mask[:, None]).sum(0) / mask.sum().clamp_min(1e-9)
    return num_experts * (share_M * mean_probability).sum()


def z_loss(logits_TM: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Penalty on large router logits: the mean squared log of the softmax's denominator.

    Source: ST-MoE (Zoph et al. 2022, arXiv 2202.08906), eq. 5.

    >>> z_loss(torch.zeros(3, 1))
    tensor(0.)
    """
    squared = torch.logsumexp(logits_TM.float(), dim=-1).square()
    if mask_T is None:
        return squared.mean()
    return (squared * mask_T).sum() / mask_T.sum().clamp_min(1e-9)


def entropy(utilization: Tensor) -> Tensor:
    """Entropy in nats of the experts' shares of the work, H = -sum q ln q with q = u / sum(u), over the last dimension.

    >>> round(float(entropy(torch.tensor([5.0, 5.0]))), 4)
    0.6931
    """
    q = utilization.double() / utilization.double().sum(-1, keepdim=True).clamp_min(1e-300)
    return -torch.special.xlogy(q, q).sum(-1)


def normalised_entropy(utilization: Tensor) -> Tensor:
    """Entropy over ln M: 1 when all experts work alike, 0 when one does all the work.

    Raises:
        ValueError: with fewer than two experts, where balance means nothing.

    >>> float(normalised_entropy(torch.ones(32)))
    1.0
    """
    num_experts = utilization.shape[-1]
    if num_experts < 2:
        raise ValueError(f"utilization must cover at least two experts, got {num_experts}")
    return entropy(utilization) / math.log(num_experts)


def gini(utilization: Tensor) -> Tensor:
    """Inequality of the experts' use: 0 when all work alike, (M-1)/M when one does all the work.

        G = sum_i sum_j |u_i - u_j| / (2 M sum_i u_i)

    Source: UB-SMoE (arXiv 2605.16690), eq. 62.

    >>> float(gini(torch.tensor([0.0, 0.0, 0.0, 8.0])))
    0.75
    """
    u = utilization.double()
    differences = (u[..., :, None] - u[..., None, :]).abs().sum((-1, -2))
    return differences / (2 * u.shape[-1] * u.sum(-1)).clamp_min(1e-300)


def dead_experts(utilization: Tensor) -> Tensor:
    """How many experts no token used, over the last dimension.

    >>> int(dead_experts(torch.tensor([0.0, 2.0, 0.0])))
    2
    """
    return (utilization == 0).sum(-1)
