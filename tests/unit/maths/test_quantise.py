"""Eight bits: the error of every row is within half a step of its own, whatever its size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.maths.quantise import dequantise, quantise

sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))


@given(sizes, st.integers(0, 2), st.integers(0, 99), st.floats(-30, 30))
def test_every_number_comes_back_within_half_a_step_of_its_row(size, dim, seed, exponent):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x *= 10.0 ** torch.arange(size[(dim + 1) % 3]).reshape([-1 if i == (dim + 1) % 3 else 1 for i in range(3)])
    q, scale = quantise(x, dim)
    assert q.dtype == torch.int8 and scale.shape == tuple(1 if i == dim else n for i, n in enumerate(size))
    largest = x.abs().amax(dim, keepdim=True)
    assert ((dequantise(q, scale) - x).abs() <= largest / 254 * (1 + 1e-5)).all()
    assert (q.abs().amax(dim) == 127).all()  # the largest entry of a row is met but for rounding
    torch.testing.assert_close(dequantise(q, scale).abs().amax(dim, keepdim=True), largest)


@given(sizes, st.integers(0, 99))
def test_what_was_rounded_once_is_not_rounded_again(size, seed):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    q, scale = quantise(x, 2)
    again, scale_again = quantise(dequantise(q, scale), 2)
    assert torch.equal(again, q)
    torch.testing.assert_close(scale_again, scale)


def test_zeros_stay_zeros_and_the_smallest_floats_do_not_overflow():
    tiny = torch.tensor([[0.0, -0.0, 0.0], [1e-45, -1e-43, 0.0]])
    q, scale = quantise(tiny, 1)
    assert q[0].tolist() == [0, 0, 0] and scale[0].item() == 0.0
    assert ((dequantise(q, scale) - tiny).abs() <= 2e-43).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_nan_throughout_and_leaves_the_others_alone(bad):
    x = torch.tensor([[1.0, bad, 2.0], [127.0, 1.0, -3.0]])
    back = dequantise(*quantise(x, 1))
    assert back[0].isnan().all() and torch.equal(back[1], x[1])
