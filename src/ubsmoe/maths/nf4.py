"""NF4: four bits per number and one float32 scale per block of 64.

A block is divided by its largest entry, absmax, and each number rounded to the nearest of 16 levels, which are quantiles of a
normal distribution with 0 and both ends among them. Two numbers share a byte, the first in its high half.

Source: QLoRA (arXiv 2305.14314), section 3 and appendix E; bytes and levels are those of bitsandbytes.
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantise_nf4(x: Float[Tensor, "*shape"]) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " blocks"]]:
    """Round to the nearest level, block by block through the flattened tensor; the last block may be short.

        |x - absmax level| <= absmax max_j (level_{j+1} - level_j) / 2 < .152 absmax

    Returns:
        Bytes of two levels, and absmax of each block. A block of zeros has absmax 0 and stays zeros.

    >>> packed, absmax = quantise_nf4(torch.tensor([-2.0, 2.0, 0.05, 0.9]))
    >>> packed.tolist(), absmax.tolist()
    ([15, 124], [2.0])
    >>> dequantise_nf4(packed, absmax, (4,), torch.float32)
    tensor([-2.0000,  2.0000,  0.0000,  0.8814])
    """
    flat = x.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    index = torch.cat([_nearest_level(part) for part in scaled.split(2048)])  # what fits the cache: twice as fast
    index = index.view(-1)[: flat.numel() + flat.numel() % 2].view(-1, 2)
    return index[:, 0] << 4 | index[:, 1], absmax


def _nearest_level(scaled: Float32[Tensor, "n block"]) -> UInt8[Tensor, "n block"]:
    """The number of middles between levels that each number exceeds."""
    levels = torch.tensor(LEVELS, device=scaled.device)
    index = torch.zeros_like(scaled, dtype=torch.uint8)
    for middle in ((levels[1:] + levels[:-1]) / 2).unbind():  # several times faster than torch.bucketize
        index += scaled > middle
    return index


def dequantise_nf4(
    packed: UInt8[Tensor, " bytes"], absmax: Float32[Tensor, " blocks"], shape: tuple[int, ...], dtype: torch.dtype
) -> Float[Tensor, "..."]:
    """absmax times level, rounded once to `dtype`."""
    levels, byte = torch.tensor(LEVELS, device=packed.device), torch.arange(256, device=packed.device)
    # a byte looks its two levels up at once, as one number of eight bytes: half the time of two lookups
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).view(torch.int64).view(-1)
    numbers = pairs.index_select(0, packed.int()).view(torch.float32)
    whole = len(numbers) // BLOCK * BLOCK
    numbers[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK].unsqueeze(1))
    numbers[whole:].mul_(absmax[-1])
    return numbers[: torch.Size(shape).numel()].view(shape).to(dtype)
