"""Truncated SVD of a sum of low-rank updates, never larger than the factors themselves.

Legend: S = Σ_k w_k s_k B_k A_k = 𝓑 𝓐 is the sum [O, I] of K clients' updates, 𝓑 [O, R] and 𝓐 [R, I] their stacked
factors, R = Σ r_k; F⁺ is a pseudo-inverse; σ_i singular values of S, largest first; E experts, a batch throughout.

Method, on the R × R core, all in float64 (bench/aggregation.py compares it with the dense route):

    𝓐 𝓐ᵀ = F Fᵀ,          M = Fᵀ (𝓑ᵀ 𝓑) F = W Θ Wᵀ,                  σ = √Θ
    B = 𝓑 F W = U Σ,      A = Wᵀ F⁺ 𝓐 with orthonormal rows,      B A = S

There is no division by singular values of S. A Gram matrix squares the condition number, so what lies below
RESOLUTION of the summands' size is rounding, and is returned as exactly zero.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ubsmoe.maths.lora import LoraPair, Weights, weight_factors

RESOLUTION = 1e-7
CHOLESKY_LIMIT = 1e-4  # below this ratio of pivots F comes from eigenvectors, which can leave directions out
CHUNK_BYTES = 32 * 2**20

Split = Literal["b", "balanced"]


@dataclass(frozen=True)
class TruncatedSVD:
    """What `truncated_svd` gives.

    `pair` has scale 1 and the rank asked for. `singular_values` are those of the whole sum, cut or not, in float64.
    """

    pair: LoraPair
    singular_values: Float[Tensor, "*E S"]

    @property
    def rank(self) -> Int[Tensor, "*E"]:
        """Numerical rank of the sum, per expert.

        Directions of `pair` past it are zero in both factors, so training on from them gets no gradient: `lora.refill`
        gives them rows.
        """
        return (self.singular_values > 0).sum(dim=-1)


def truncated_svd(
    pairs: Sequence[LoraPair],
    weights: Weights,
    rank: int | None = None,
    split: Split = "b",
    chunk_bytes: int = CHUNK_BYTES,
) -> TruncatedSVD:
    """The best rank-`rank` factors of a weighted sum of updates, for every expert at once.

        B A = argmin_{rank(X) ≤ rank} ‖Σ_k w_k s_k B_k A_k − X‖_F,    error = √(Σ_{i > rank} σ_i²)

    Directions come strongest first, so a client of lower rank takes a slice (`lora.truncate_rank`). Each column's
    entry of largest magnitude is positive in B; where singular values are equal, any rotation is as good. The result
    can be an input again, `truncated_svd([previous.pair, one_more], [1.0, w])`, exact while nothing is cut.

    Args:
        pairs: one per client, for one layer; ranks may differ.
        weights: one per pair, or [K, *E]: one per pair and expert. Taken as they are, not normalised.
        rank: columns of the result, zero-padded past min(O, I); min(R, O, I), which cuts nothing, when left out.
        split: "b" leaves Σ on B and A with orthonormal rows, as FlexLoRA and FLoRIST publish it; "balanced" puts √Σ
            on each, which keeps their gradients on one scale.
        chunk_bytes: experts are worked on in chunks whose stacked factors, in float64, fit in here.

    Returns:
        Factors in float32, or wider if the pairs are, and all singular values.

    Raises:
        ValueError: if there is no pair, shapes or numbers disagree, `rank` is negative, `split` is unknown, or a pair
            holds NaN or infinity.

    Source: the optimum is Eckart & Young 1936; used by FlexLoRA (Bai et al. 2024, arXiv 2402.11505) and FLoRIST
    (Ramesh & Dass 2025, arXiv 2506.09199). The route through Gram matrices is ours; its formulas open this file.

    >>> pair = LoraPair(a=torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]]), b=torch.eye(2))
    >>> best = truncated_svd([pair, pair], weights=[0.5, 0.5], rank=1)
    >>> best.singular_values
    tensor([3., 1.], dtype=torch.float64)
    >>> best.pair.b, best.pair.a
    (tensor([[3.],
            [0.]]), tensor([[0., 1., 0.]]))
    """
    table = weight_factors(pairs, weights)
    if split not in ("b", "balanced"):
        raise ValueError(f"split must be 'b' or 'balanced', got {split!r}")
    lead, rows, columns = pairs[0].a.shape[:-2], pairs[0].b.shape[-2], pairs[0].a.shape[-1]
    experts, stacked = lead.numel(), sum(pair.rank for pair in pairs)
    full = min(stacked, rows, columns)
    rank = full if rank is None else rank
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    kept, dtype = min(rank, full), _common_dtype(pairs)
    a, b = table.new_zeros(experts, rank, columns, dtype=dtype), table.new_zeros(experts, rows, rank, dtype=dtype)
    sigma = table.new_zeros(experts, full)
    step = max(1, chunk_bytes // (8 * max(1, stacked) * (rows + columns)))
    for some in (slice(start, start + step) for start in range(0, experts if full else 0, step)):
        part = _svd_of_product(*_stacked(pairs, table, some), kept, split)
        a[some, :kept], b[some, :, :kept], sigma[some] = part
    pair = LoraPair(a=a.reshape(*lead, rank, columns), b=b.reshape(*lead, rows, rank))
    return TruncatedSVD(pair, sigma.reshape(*lead, full))


def tail_energy(singular_values: Float[Tensor, "*E S"]) -> Float[Tensor, "*E S1"]:
    """Squared error of every cut: entry c is Σ_{i > c} σ_i², for c = 0 ... S; the last is exactly 0.

    >>> tail_energy(torch.tensor([2.0, 1.0, 0.5]))
    tensor([5.2500, 1.2500, 0.2500, 0.0000])
    """
    squares = singular_values.square().flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(squares, (0, 1))


def energy_rank(singular_values: Float[Tensor, "*E S"], energy: float) -> Int[Tensor, "*E"]:
    """The smallest rank that keeps a share `energy` of Σ σ_i², per expert; 0 where the sum is zero.

        p = min { c : Σ_{i > c} σ_i² ≤ (1 − τ) Σ_i σ_i² }

    Counting the tail rather than the head makes τ = 1 the numerical rank, whatever the rounding. The cut is free of
    scale: a barely trained expert with a flat spectrum keeps a high rank. `lora.truncate_rank` applies the result.

    Raises:
        ValueError: if `energy` is outside (0, 1].

    Source: FLoRIST (Ramesh & Dass 2025, arXiv 2506.09199), energy threshold τ.

    >>> energy_rank(torch.tensor([2.0, 1.0, 0.5]), energy=0.9)
    tensor(2)
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    tail = tail_energy(singular_values)
    return (tail > (1 - energy) * tail[..., :1]).sum(dim=-1)


def _common_dtype(pairs: Sequence[LoraPair]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (pair.a.dtype for pair in pairs), torch.float32)


def _stacked(pairs: Sequence[LoraPair], table: Tensor, some: slice) -> tuple[Tensor, Tensor, Tensor]:
    """𝓐 [e, R, I], 𝓑 [e, O, R] and the weight of each of the R terms [e, R, 1], for some of the experts."""
    dtype, experts = _common_dtype(pairs), table[0].numel()

    def joined(tensors: Iterator[Tensor], dim: int) -> Tensor:
        return torch.cat([tensor.reshape(experts, *tensor.shape[-2:])[some].to(dtype) for tensor in tensors], dim=dim)

    weights = [w.expand(*w.shape[:-2], pair.rank, 1) for pair, w in zip(pairs, table, strict=True)]
    weight = torch.cat(weights, dim=-2).reshape(experts, -1, 1)[some]
    return joined((pair.a for pair in pairs), -2), joined((pair.b for pair in pairs), -1), weight


def _svd_of_product(a: Tensor, b: Tensor, weight: Tensor, rank: int, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` factors of 𝓑 diag(w) 𝓐, in the dtype of `a`, and all its singular values."""
    if a.shape[-2] > min(b.shape[-2], a.shape[-1]):
        a, b, weight = _multiplied_out(a, b, weight)
    gram_a, gram_b = weight * _gram(a.double()) * weight.mT, _gram(b.double().mT)
    if not (gram_a.sum() + gram_b.sum()).isfinite():
        raise ValueError("a pair to be added holds NaN or infinity; leave that client's update out")
    on_a, on_b = _balance(gram_a, gram_b)
    to_a, to_b, sigma = _core(on_a * gram_a * on_a.mT, on_b * gram_b * on_b.mT, rank)
    to_a, to_b = weight * on_a * to_a, on_b * to_b
    if split == "balanced":
        root = sigma[:, None, :rank].sqrt()
        to_a, to_b = to_a * root, to_b * _inverse(root)
    new_b = b @ to_b.to(b.dtype)
    low, high = new_b.amin(dim=-2, keepdim=True), new_b.amax(dim=-2, keepdim=True)
    sign = torch.where(high >= -low, 1.0, -1.0).to(b.dtype)
    return (to_a.to(a.dtype) * sign).mT @ a, new_b.mul_(sign), sigma


def _multiplied_out(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product with R = min(O, I): a stack wider than the matrix is cheaper as a dense matrix times identity.

    Summands that cancel leave rounding behind, which would pass for an update; the core cannot see that any more.
    """
    a, b = weight * a, b.double()
    size = torch.linalg.matrix_norm(a, keepdim=True) * torch.linalg.matrix_norm(b, keepdim=True)
    dense = b @ a
    dense = dense * (torch.linalg.matrix_norm(dense, keepdim=True) > RESOLUTION * size)
    rows, columns = dense.shape[-2:]
    one = torch.eye(min(rows, columns), dtype=torch.float64, device=a.device).expand(len(a), -1, -1)
    unit = torch.ones_like(one[..., :1])
    return (one, dense, unit) if columns <= rows else (dense, one, unit)


def _gram(x: Tensor) -> Tensor:
    """x xᵀ. Above and below its diagonal stand the same numbers, so a quarter of the products is left out."""
    top, bottom = x.tensor_split(2, dim=-2)
    cross = bottom @ top.mT
    upper, lower = torch.cat([top @ top.mT, cross.mT], -1), torch.cat([cross, bottom @ bottom.mT], -1)
    return torch.cat([upper, lower], -2)


def _balance(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor]:
    """What row i of 𝓐 and column i of 𝓑 [e, R, 1] are multiplied by to have one norm; 0 where either vanishes.

    The product does not depend on how a term's size is split between its factors, and with this nor does the rounding.
    A client whose B is zero leaves the stack here.
    """
    norm_a, norm_b = (gram.diagonal(dim1=-2, dim2=-1)[..., None] for gram in (gram_a, gram_b))
    on_a = torch.where(norm_a > 0, norm_b / norm_a, 0).pow(0.25)
    return on_a, _inverse(on_a)


def _core(gram_a: Tensor, gram_b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """What 𝓐ᵀ and 𝓑 are to be multiplied by [e, R, rank], and σ [e, R], from the Gram matrices; all largest first.

    Directions below the resolution are zero in all three, so nothing is ragged and rounding noise is never divided by.
    """
    size = torch.linalg.matrix_norm(gram_a) * torch.linalg.matrix_norm(gram_b)
    root, inverse_root = _root(gram_a)
    theta, w = torch.linalg.eigh(root.mT @ gram_b @ root)
    theta, w = theta.flip(-1), w.flip(-1)
    sigma = torch.where(theta > RESOLUTION**2 * size[:, None], theta, 0).sqrt()
    w = (w * (sigma > 0)[:, None, :])[..., :rank]
    return inverse_root @ w, root @ w, sigma


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """F and (pseudo-inverse of F)ᵀ with F Fᵀ = G.

    Cholesky where the terms are well apart, since it costs a tenth; the eigenvectors V √Λ where they nearly repeat.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1)
    # a term that left the stack gets a pivot like the others', so that it alone does not cost the eigenvectors
    root, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed((norms == 0) * norms.amax(-1, keepdim=True)))
    diagonal = root.diagonal(dim1=-2, dim2=-1)
    weak = (failed != 0) | (diagonal.amin(-1) < CHOLESKY_LIMIT * diagonal.amax(-1))
    inverse = torch.linalg.solve_triangular(root, torch.eye(root.shape[-1]).to(root), upper=False).mT
    if weak.any():
        lam, v = torch.linalg.eigh(gram[weak])
        scale = torch.where(lam > RESOLUTION**2 * lam[:, -1:], lam, 0).sqrt()[:, None, :]
        root[weak], inverse[weak] = v * scale, v * _inverse(scale)
    return root, inverse


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0)
