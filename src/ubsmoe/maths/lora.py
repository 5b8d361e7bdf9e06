"""Low-rank adapters as pairs of factors, one expert or many fused ones.

Legend: A and B are the factors of an update scale · B A of a weight [O, I]; r is the rank, E experts (any leading
dims). Which factor is which is said by name, never guessed from shapes: a layer's width may equal the rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Weights = Sequence[float] | Tensor
"""One weight per pair, or a [K, *E] tensor: one per pair and expert."""


@dataclass(frozen=True)
class LoraPair:
    """The factors of a low-rank update `scale · B A`; leading dims, such as experts, are a batch.

    `scale` is LoRA's alpha / rank. It is part of the value: two pairs with other scales but one product are one update.

    >>> pair = LoraPair(a=torch.ones(1, 3), b=torch.ones(2, 1), scale=2.0)
    >>> pair.rank, pair.product().shape
    (1, torch.Size([2, 3]))
    """

    a: Float[Tensor, "*E r I"]
    b: Float[Tensor, "*E O r"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim < 2 or self.a.ndim != self.b.ndim:
            raise ValueError(f"expected A [..., r, I] and B [..., O, r], got {[*self.a.shape]} and {[*self.b.shape]}")
        if self.a.shape[:-2] != self.b.shape[:-2] or self.a.shape[-2] != self.b.shape[-1]:
            raise ValueError(f"A {[*self.a.shape]} and B {[*self.b.shape]} differ in rank or in leading dims")

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.a.shape[-2]

    def product(self) -> Float[Tensor, "*E O I"]:
        """The dense update scale · B A, in float32 or wider."""
        return self.scale * (widened(self.b) @ widened(self.a))


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when already wider: sums are never taken in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def stack(pairs: Sequence[LoraPair], weights: Weights) -> LoraPair:
    """Put pairs side by side, so that one product is the weighted sum of theirs.

        B = [B_1 ... B_K],    A = [w_1 s_1 A_1; ...; w_K s_K A_K],    B A = Σ_k w_k s_k B_k A_k

    The weight and the scale go on A alone; on both factors they would count twice.

    Args:
        pairs: for one and the same layer; ranks may differ, [E, O, I] may not.
        weights: one per pair, or [K, *E]: one per pair and expert. Taken as they are, not normalised.

    Returns:
        A pair of rank Σ r_k and scale 1, in float32 or wider.

    Raises:
        ValueError: if there is no pair, the shapes disagree, or weights and pairs differ in number.

    Source: FLoRA (Wang et al. 2024, arXiv 2409.05976), stacking.

    >>> pair = LoraPair(a=torch.ones(1, 3), b=torch.ones(2, 1), scale=2.0)
    >>> stack([pair, pair], weights=[0.25, 0.75]).product()
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    table = weight_factors(pairs, weights)
    rows = [(pair.a * w).to(widened(pair.a).dtype) for pair, w in zip(pairs, table, strict=True)]
    return LoraPair(a=torch.cat(rows, dim=-2), b=torch.cat([widened(pair.b) for pair in pairs], dim=-1))


def weight_factors(pairs: Sequence[LoraPair], weights: Weights) -> Float[Tensor, "K *E 1 1"]:
    """w_k s_k in float64, shaped to multiply A; checks that the pairs belong together. Raises as `stack` does."""
    _check_same_layer(pairs)
    table = torch.as_tensor(weights, dtype=torch.float64, device=pairs[0].a.device)
    lead = pairs[0].a.shape[:-2]
    if table.shape not in ((len(pairs),), (len(pairs), *lead)):
        raise ValueError(f"expected weights [{len(pairs)}] or {[len(pairs), *lead]}, got {[*table.shape]}")
    if table.ndim == 1:
        table = table.reshape(-1, *[1] * len(lead)).expand(-1, *lead)
    scales = table.new_tensor([pair.scale for pair in pairs])
    return (table * scales.reshape(-1, *[1] * len(lead)))[..., None, None]


def _check_same_layer(pairs: Sequence[LoraPair]) -> None:
    if not pairs:
        raise ValueError("expected at least one pair, got none")
    shapes = {(*pair.b.shape[:-1], pair.a.shape[-1]) for pair in pairs}
    if len(shapes) > 1:
        raise ValueError(f"pairs of different layers cannot be added: update shapes {sorted(shapes)}")


def pad_rank(pair: LoraPair, rank: int) -> LoraPair:
    """Append zero rows to A and zero columns to B; the product and the scale stay.

    Raises:
        ValueError: if `rank` is below the pair's own.

    Source: HetLoRA (Cho et al. 2024, arXiv 2401.06432), zero-padding.

    >>> pad_rank(LoraPair(a=torch.ones(1, 3), b=torch.ones(2, 1)), rank=4).b
    tensor([[1., 0., 0., 0.],
            [1., 0., 0., 0.]])
    """
    extra = rank - pair.rank
    if extra < 0:
        raise ValueError(f"cannot pad rank {pair.rank} down to {rank}; truncate_rank cuts")
    pad = torch.nn.functional.pad
    return LoraPair(a=pad(pair.a, (0, 0, 0, extra)), b=pad(pair.b, (0, extra)), scale=pair.scale)


def truncate_rank(pair: LoraPair, rank: int | Int[Tensor, "*E"]) -> LoraPair:
    """Keep the first `rank` rows of A and columns of B; the scale stays, so each kept term keeps its size.

    The kept directions are the strongest ones only if the pair comes from `spectra.truncated_svd`. If the receiver
    multiplies by its own alpha / rank, follow with `with_scale`.

    Args:
        pair: the factors to cut.
        rank: one number (the result then shares memory with `pair`), or one per expert: the result has the largest of
            them, and zeros past each expert's own.

    Raises:
        ValueError: if `rank` is negative or above the pair's own.

    Source: HetLoRA (Cho et al. 2024, arXiv 2401.06432), truncation.

    >>> truncate_rank(LoraPair(a=torch.ones(4, 3), b=torch.ones(2, 4)), rank=1).product()
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    ranks = torch.as_tensor(rank)
    low, high = (int(ranks.min()), int(ranks.max())) if ranks.numel() else (0, 0)
    if low < 0 or high > pair.rank:
        raise ValueError(f"cannot truncate rank {pair.rank} to {low if low < 0 else high}; pad_rank widens")
    a, b = pair.a[..., :high, :], pair.b[..., :high]
    if ranks.ndim:
        keep = torch.arange(high, device=a.device) < ranks.to(a.device)[..., None]
        a, b = a * keep[..., :, None], b * keep[..., None, :]
    return LoraPair(a=a, b=b, scale=pair.scale)


def with_scale(pair: LoraPair, scale: float) -> LoraPair:
    """The same product under another scale: both factors take √(old / new).

    Needed wherever ranks change at fixed alpha, since alpha / rank changes with them.

    Raises:
        ValueError: if either scale is not positive.

    >>> pair = with_scale(LoraPair(a=torch.ones(1, 3), b=torch.ones(2, 1), scale=2.0), scale=8.0)
    >>> pair.a, pair.product()[0]
    (tensor([[0.5000, 0.5000, 0.5000]]), tensor([2., 2., 2.]))
    """
    if scale <= 0 or pair.scale <= 0:
        raise ValueError(f"scales must be positive to be exchanged, got {pair.scale} -> {scale}")
    if scale == pair.scale:
        return pair
    root = (pair.scale / scale) ** 0.5
    return LoraPair(a=pair.a * root, b=pair.b * root, scale=scale)


def refill(pair: LoraPair, fresh_a: Float[Tensor, "*E r I"]) -> LoraPair:
    """Give dead directions a new row of A; the product stays bit for bit.

    A direction with a zero row of A and a zero column of B has no gradient in either factor, for ever. Truncated SVD
    leaves such directions where the sum has less rank than asked. Pass the previous A, or a fresh draw.

    >>> dead = LoraPair(a=torch.zeros(1, 3), b=torch.zeros(2, 1))
    >>> refill(dead, torch.ones(1, 3)).a
    tensor([[1., 1., 1.]])
    """
    dead = (pair.a == 0).all(dim=-1) & (pair.b == 0).all(dim=-2)
    return LoraPair(a=torch.where(dead[..., None], fresh_a.to(pair.a.dtype), pair.a), b=pair.b, scale=pair.scale)


def inner(left: LoraPair, right: LoraPair) -> Float[Tensor, "*E"]:
    """Inner product of two updates without forming either: cost (O + I) r² instead of O I r.

        <s_1 B_1 A_1, s_2 B_2 A_2> = s_1 s_2 Σ_ij (B_1ᵀ B_2 ∘ A_1 A_2ᵀ)_ij

    Returns:
        One number per expert, in float64.

    >>> pair = LoraPair(a=torch.ones(1, 3), b=torch.ones(2, 1), scale=2.0)
    >>> inner(pair, pair)
    tensor(24., dtype=torch.float64)
    """
    _check_same_layer([left, right])
    gram_b = left.b.double().mT @ right.b.double()
    gram_a = left.a.double() @ right.a.double().mT
    return left.scale * right.scale * (gram_b * gram_a).sum(dim=(-2, -1))


def frobenius(pair: LoraPair) -> Float[Tensor, "*E"]:
    """Frobenius norm ‖scale · B A‖ of an update, per expert, from two r × r Gram matrices in float64.

    Rounding can push a vanishing square below zero, hence the clamp: norms below 1e-8 of the factors' size are noise.

    >>> frobenius(LoraPair(a=torch.ones(1, 3), b=torch.ones(2, 1), scale=2.0)) ** 2
    tensor(24.0000, dtype=torch.float64)
    """
    return inner(pair, pair).clamp(min=0).sqrt()
