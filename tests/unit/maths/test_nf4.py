"""NF4: bytes worked by hand, the error of every block, and bitsandbytes' own numbers where it is installed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.maths.nf4 import BLOCK, LEVELS, dequantise_nf4, quantise_nf4

shapes = st.tuples(st.integers(1, 7), st.integers(1, 45))


def test_bytes_by_hand():
    """absmax 4: level 15 (1), level 0 (-1), then .25 lies between .2461 (10) and .3379 (11), and 0 is level 7; odd: a 7 beside."""
    packed, absmax = quantise_nf4(torch.tensor([[4.0, -4.0, 1.0], [0.0, 2.0, -4.0], [4.0, 4.0, 0.1]]))
    assert packed.tolist() == [15 << 4 | 0, 10 << 4 | 7, 12 << 4 | 0, 15 << 4 | 15, 7 << 4 | 7] and absmax.tolist() == [
        4.0
    ]
    back = dequantise_nf4(packed, absmax, (3, 3), torch.float64)
    assert back.tolist()[0] == [4.0, -4.0, 4 * LEVELS[10]] and back[2, 2] == 0.0


@given(shapes, st.integers(0, 99), st.floats(-20, 20))
def test_every_number_comes_back_within_half_a_gap_between_levels_of_its_own_block(shape, seed, exponent):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    packed, absmax = quantise_nf4(x)
    assert len(packed) == -(-x.numel() // 2) and len(absmax) == -(-x.numel() // BLOCK)
    back = dequantise_nf4(packed, absmax, shape, torch.float32)
    gap = max(high - low for low, high in pairwise(LEVELS))
    for n, (one, other) in enumerate(zip(x.reshape(-1).split(BLOCK), back.reshape(-1).split(BLOCK), strict=True)):
        assert absmax[n] == one.abs().max()
        assert (one - other).abs().max() <= absmax[n] * (gap / 2 + 1e-6)


@given(shapes, st.integers(0, 99))
def test_what_was_rounded_once_is_not_rounded_again(shape, seed):
    packed, absmax = quantise_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    # the largest entry of a block may be negative, where the level is -1 all the same
    again, absmax_again = quantise_nf4(dequantise_nf4(packed, absmax, shape, torch.float32))
    assert torch.equal(again, packed) and torch.equal(absmax_again, absmax)


def test_zeros_stay_zeros():
    packed, absmax = quantise_nf4(torch.zeros(3, 50))
    assert not dequantise_nf4(packed, absmax, (3, 50), torch.bfloat16).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 24), (7, 13), (64, 65), (128, 256)])
def test_bytes_and_numbers_are_those_of_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, absmax = quantise_nf4(x)
    theirs, state = functional.quantize_4bit(x, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(packed, theirs.flatten()) and torch.equal(absmax, state.absmax)
    numbers = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, "nf4", shape, dtype)
    assert torch.equal(dequantise_nf4(packed, absmax, shape, dtype), numbers)
