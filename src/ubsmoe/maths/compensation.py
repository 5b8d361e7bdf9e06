r"""Least squares for what a layer leaves out: a map of low rank from the layer's input to the sum over its skipped experts.

    T(x)   experts that the base runs for token x        A(x)   those that are run       w_i   their gate weights at K_max
    z      features of a token: [x ; s], s_i = w_i for i in T(x) \\ A(x), else 0           y     sum of w_i E_i(x) over T(x) \\ A(x)

    min over V, U, c of    sum_t || y_t - V U z_t - c ||^2 + lambda || (V U) ||^2,    V [h, r], U [r, d]

With W = (G + lambda I)^-1 H, G = sum z z^T and H = sum z y^T of centred z and y, the best map of rank r is W projected on the r
leading eigenvectors V of H^T W: reduced-rank ridge regression (Izenman 1975; the penalty as in Mukherjee & Zhu 2011). The
sums add up over clients, so a fit from sums is the fit on the pooled tokens, whoever holds them.

Source: ours, as an answer to skipped experts; the regression is the cited one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIXED_POINT = 2.0**24


@dataclass(frozen=True)
class Sums:
    """What the fit needs to know of any number of tokens, float64. Sums of several clients are added.

    Attributes:
        count: number of tokens.
        features: sum of z.
        outputs: sum of y.
        gram: sum of z z^T.
        cross: sum of z y^T.
        energy: sum of || y ||^2.
    """

    count: Float[Tensor, ""]
    features: Float[Tensor, " d"]
    outputs: Float[Tensor, " h"]
    gram: Float[Tensor, "d d"]
    cross: Float[Tensor, "d h"]
    energy: Float[Tensor, ""]

    @classmethod
    def of(cls, z: Float[Tensor, "T d"], y: Float[Tensor, "T h"]) -> "Sums":
        """The sums over these tokens."""
        z, y = z.double(), y.double()
        count = torch.tensor(float(len(z)), dtype=torch.float64, device=z.device)
        return cls(count, z.sum(0), y.sum(0), z.T @ z, z.T @ y, y.square().sum())

    @classmethod
    def zero(cls, d: int, h: int, device: torch.device | None = None) -> "Sums":
        """The sums over no tokens."""
        return cls.of(torch.zeros(0, d, device=device), torch.zeros(0, h, device=device))

    def fixed(self) -> dict[str, Int[Tensor, "..."]]:
        """By name, as whole numbers of 2^-24: they add up without rounding, in any order."""
        return {name: (value * FIXED_POINT).round().to(torch.int64) for name, value in vars(self).items()}

    @classmethod
    def of_fixed(cls, fixed: Mapping[str, Int[Tensor, "..."]]) -> "Sums":
        """The reverse."""
        return cls(**{name: value.double() / FIXED_POINT for name, value in fixed.items()})

    def fault(self) -> str | None:
        """Why no tokens have such sums, as far as `fixed` tells; None if some have.

        With z' = [1 ; z] there are tokens just when G' is symmetric and positive semidefinite, and tr(H'^T G'^-1 H') <= energy:
        a regression explains no more than there is. What rounding may do is allowed for.

        >>> true = Sums.of(torch.eye(2), torch.ones(2, 1))
        >>> true.fault(), Sums(**{**vars(true), "energy": torch.tensor(1.0)}).fault()
        (None, 'the outputs that its sums explain are more than their energy')
        """
        step = 1 / FIXED_POINT
        first = torch.cat([self.count[None], self.features])[None]
        gram = torch.cat([first, torch.cat([first[:, 1:].T, self.gram], 1)])
        slack = 1e-9 * gram.diagonal().clamp_min(0) + len(gram) * step
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(slack))
        skew = (self.gram - self.gram.T).abs().max()
        if self.count < 1 or failed or skew > slack.max():
            return "its sums of squares are those of no tokens"
        cross = torch.cat([self.outputs[None], self.cross])
        explained = torch.linalg.solve_triangular(factor, cross, upper=False).square().sum()
        most = self.energy.clamp_min(0).sqrt() * (1 + 1e-6) + (cross.shape[1] * step) ** 0.5
        return None if explained.sqrt() <= most else "the outputs that its sums explain are more than their energy"

    def __add__(self, other: "Sums") -> "Sums":
        """The sums over both."""
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class LowRankMap:
    """y = V U z + c, and the share of the outputs' variance about zero that it explains on what it was fitted to."""

    u: Float[Tensor, "r d"]
    v: Float[Tensor, "h r"]
    c: Float[Tensor, " h"]
    explained: float


def fit_low_rank(sums: Sums, rank: int, ridge: float) -> LowRankMap:
    """Reduced-rank ridge regression from its sums.

    Args:
        sums: over at least one token.
        rank: r; the full regression where it is as large as d or h.
        ridge: lambda as a share of the features' mean variance.

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    >>> y = z @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]) + torch.tensor([0.0, 0.0, 5.0])
    >>> found = fit_low_rank(Sums.of(z, y), rank=1, ridge=0.0)
    >>> (found.v @ found.u).abs().round(decimals=6).tolist(), found.c.round(decimals=6).tolist()
    ([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]], [0.0, 0.0, 5.0])
    """
    z_mean, y_mean = sums.features / sums.count, sums.outputs / sums.count
    gram = sums.gram - sums.count * torch.outer(z_mean, z_mean)
    cross = sums.cross - sums.count * torch.outer(z_mean, y_mean)
    spread = gram.diagonal()
    # a feature that never varies, such as an expert that is never skipped, gets a penalty of its own and so no weight
    penalty = ridge * spread.mean() + (spread <= 1e-12 * spread.max()) * spread.max().clamp_min(1.0)
    full = torch.linalg.solve(gram + torch.diag(penalty), cross)
    v = torch.linalg.eigh(cross.T @ full).eigenvectors.flip(-1)[:, : min(rank, *full.shape)]
    u = (full @ v).T
    c = y_mean - v @ (u @ z_mean)
    # || y - V U z - c ||^2 over the tokens, from the sums
    fitted = v @ u
    left = (
        sums.energy - sums.count * y_mean.square().sum() - 2 * (fitted.T * cross).sum() + (fitted @ gram * fitted).sum()
    )
    return LowRankMap(u, v, c, explained=1 - float(left / sums.energy.clamp_min(1e-300)))
