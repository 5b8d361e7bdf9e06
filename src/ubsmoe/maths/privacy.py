"""Client-level differential privacy of a round: one clip, one noise, counts included, and what it adds up to.

    v_c = (Delta_c, S d_c),   d_c = sqrt(M / L) (q_c - 1 / M)      Delta_c all that client c changed, q_c [L, M] its use of experts
    v   = (sum_c min(1, S / ||v_c||) v_c + N(0, sigma^2 S^2 I)) / m

L layers of M experts, q_c per layer the share of c's choices that went to each expert, S the clip norm, sigma the noise
multiplier, m how many clients a round is for, whoever answers. Clients have equal weights: what a client says of itself must not
scale anything. All that a method makes of v, phi too, is as private as v.

epsilon: any one client may be added or taken away (its v_c becomes zero). Clients drawn with probability q each (Poisson) are
accounted for as drawn; with q = 1, or a draw of fixed size, every round is charged in full, because the known bounds for
fixed-size draws cost more here than the draw gains (docs/robustness.md). Rounds compose by their privacy loss distributions.

Source: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963), flat clipping with a fixed denominator; accounting: Koskela et al. 2020
(arXiv 1906.03049) as in the library dp-accounting. Counts in the same clip, and d_c, are ours.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

GRID = 1e-3  # of the privacy loss; rounded towards more loss, so that epsilon is an upper bound (by less than 0.1 %)


def deviation(counts: Int[Tensor, "L M"], assignments: int) -> Float[Tensor, "L M"]:
    """d = sqrt(M / L) (a / assignments - 1 / M): its norm is the root mean square by which use differs from even use, relatively.

    >>> float(deviation(torch.tensor([[15, 5], [5, 15]]), assignments=20).norm())
    0.5
    """
    layers, experts = counts.shape
    return (counts.double() / max(assignments, 1) - 1 / experts) * (experts / layers) ** 0.5


def shares_from(deviations: Float[Tensor, "L M"]) -> Float[Tensor, "L M"]:
    """The shares that noisy deviations stand for: none below zero, one per layer in sum.

    >>> shares_from(deviation(torch.tensor([[15, 5], [5, 15]]), assignments=20))
    tensor([[0.7500, 0.2500],
            [0.2500, 0.7500]], dtype=torch.float64)
    """
    layers, experts = deviations.shape
    shares = (deviations / (experts / layers) ** 0.5 + 1 / experts).clamp_min(1e-12)
    return shares / shares.sum(-1, keepdim=True)


def noisy(total: Float[Tensor, "*x"], deviation: float, generator: torch.Generator) -> Float[Tensor, "*x"]:
    """A sum with Gaussian noise on every element, drawn in float64."""
    return total + deviation * torch.randn(total.shape, generator=generator, dtype=torch.float64)


@lru_cache(maxsize=64)
def epsilon(noise_multiplier: float, drawn: float, rounds: int, delta: float) -> float:
    """What `rounds` rounds cost at `delta`, clients being drawn with probability `drawn` each.

    Raises:
        ModuleNotFoundError: without the library dp-accounting.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    noise: Any = GaussianDpEvent(noise_multiplier)
    accountant = PLDAccountant(value_discretization_interval=GRID)
    accountant.compose(noise if drawn == 1 else PoissonSampledDpEvent(drawn, noise), rounds)
    return float(accountant.get_epsilon(delta))
