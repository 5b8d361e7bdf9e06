"""Eight bits per number and one float32 scale per row."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor


def quantise(x: Float[Tensor, "*shape"], dim: int) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*ones"]]:
    """Round each row to the nearest of 255 even steps between minus and plus its largest entry.

        scale = max |x| / 127,    q = round(x / scale),    |x - scale q| <= scale / 2

    Args:
        x: any tensor; its rows lie along `dim`.
        dim: the axis that is summed up in one scale.

    Returns:
        q, and the scales with `dim` kept at size 1. A row of zeros has scale 0; a row with NaN or an infinity has one that
        is not finite and comes back as NaN throughout, so that nobody takes it for numbers.

    >>> q, scale = quantise(torch.tensor([[254.0, -127.0, 3.0]]), dim=1)
    >>> q.tolist(), scale.tolist()
    ([[127, -64, 2]], [[2.0]])
    >>> dequantise(q, scale)
    tensor([[ 254., -128.,    4.]])
    """
    scale = x.abs().amax(dim, keepdim=True).float() / 127
    steps = torch.where(scale > 0, x / scale, 0).nan_to_num(0.0).round().clamp(-127, 127)
    return steps.to(torch.int8), scale


def dequantise(q: Int8[Tensor, "*shape"], scale: Float[Tensor, "*ones"]) -> Float[Tensor, "*shape"]:
    """scale q, float32."""
    return q.float() * scale


def dequantise_blocks(
    q: Float[Tensor, "rows columns"], scale: Float[Tensor, "row_blocks column_blocks"], block: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """scale q, float32, where each block of so many rows and columns has a scale; those at the end may be smaller.

    >>> dequantise_blocks(torch.ones(2, 3), torch.tensor([[2.0, 5.0]]), (2, 2)).tolist()
    [[2.0, 2.0, 5.0], [2.0, 2.0, 5.0]]
    """
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return q.float() * wide[: q.shape[0], : q.shape[1]]
