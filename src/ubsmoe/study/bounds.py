"""What top-K costs in convergence: the bias of its gradient and the floor at which SGD stalls, as numbers.

    M        experts                       p_i    P(i in A(x)), the chance that a token uses expert i; sum_i p_i = K
    K        experts active per token      G      bound on ||E[grad_i | i not in A]||
    B_i      bias of expert i's gradient   mu'    strong monotonicity of the biased gradient field

The floor and its growth with M - K are the paper's (Corollary 1); the form of B_i, the sharper bound and what mu' is exactly are
reconstructions, since the paper's appendix is not public.

Source: UB-SMoE (arXiv 2605.16690), convergence analysis.
"""

from jaxtyping import Float
from torch import Tensor


def sparse_bias(
    active_probability: Float[Tensor, " M"], inactive_gradient: Float[Tensor, "M *S"]
) -> Float[Tensor, "M *S"]:
    """What top-K adds to the expected gradient of each expert by leaving out the tokens that do not use it.

        B_i = -(1 - p_i) E[grad_i | i not in A]

    Args:
        active_probability: p, in [0, 1].
        inactive_gradient: the mean gradient of expert i over the tokens that do not use it.

    >>> import torch
    >>> sparse_bias(torch.tensor([0.75, 1.0]), torch.tensor([[4.0, -8.0], [5.0, 5.0]]))
    tensor([[-1.,  2.],
            [-0., -0.]])
    """
    missed = 1 - active_probability
    return -missed.view(-1, *(1,) * (inactive_gradient.dim() - 1)) * inactive_gradient


def budget_bias_bound(num_experts: int, top_k: int, gradient_bound: float) -> float:
    """Largest ||B||^2 at a budget, however the tokens are routed: G^2 (M - K), since (1 - p)^2 <= 1 - p.

    Raises:
        ValueError: if K is not in 1..M.

    >>> budget_bias_bound(num_experts=8, top_k=2, gradient_bound=1.0)
    6.0
    """
    _check(num_experts, top_k)
    return gradient_bound**2 * (num_experts - top_k)


def sgd_floor(squared_bias: float, monotonicity: float) -> float:
    """The loss above the optimum at which SGD with a biased gradient is said to stall: 2 ||B(theta*)||^2 / mu'.

    Raises:
        ValueError: if mu' is not positive: then nothing keeps the iterates together and no floor is promised.

    >>> sgd_floor(squared_bias=3.0, monotonicity=0.5)
    12.0
    """
    if monotonicity <= 0:
        raise ValueError(f"monotonicity must be > 0, got {monotonicity}")
    return 2 * squared_bias / monotonicity


def _check(num_experts: int, top_k: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts}, got {top_k}")
