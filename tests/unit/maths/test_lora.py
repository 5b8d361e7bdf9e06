"""Low-rank pairs: products, stacks, ranks and scales. The oracle is the dense product."""

from types import SimpleNamespace

import pytest
import torch

from ubsmoe.maths.lora import (
    LoraPair,
    frobenius,
    inner,
    pad_rank,
    refill,
    stack,
    truncate_rank,
    weight_factors,
    with_scale,
)

EXPERTS, OUT, IN = 3, 7, 5


def draw(rank: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(EXPERTS, rank, IN, generator=generator, dtype=dtype)
    return LoraPair(a=a, b=torch.randn(EXPERTS, OUT, rank, generator=generator, dtype=dtype), scale=scale)


def test_stacking_weights_each_update_once():
    pairs, weights = [draw(1, 0, 2.0), draw(4, 1, 0.5), draw(6, 2)], [0.2, 0.3, 0.5]
    dense = sum(w * pair.scale * (pair.b @ pair.a) for w, pair in zip(weights, pairs, strict=True))
    stacked = stack(pairs, weights)
    assert (stacked.rank, stacked.scale) == (11, 1.0)
    torch.testing.assert_close(stacked.product(), dense)
    torch.testing.assert_close(stacked.b, torch.cat([pair.b for pair in pairs], dim=-1), rtol=0, atol=0)


def test_stacking_takes_a_weight_per_expert():
    pairs, weights = [draw(2, 0), draw(3, 1)], torch.tensor([[0.0, 1.0, 0.25], [0.0, 0.0, 0.75]], dtype=torch.float64)
    dense = sum(w[:, None, None] * pair.product() for w, pair in zip(weights, pairs, strict=True))
    torch.testing.assert_close(stack(pairs, weights).product(), dense)


def test_sums_of_sixteen_bit_pairs_are_taken_in_float32():
    pair = draw(3, 0, dtype=torch.bfloat16)
    assert stack([pair, pair], [0.5, 0.5]).a.dtype == pair.product().dtype == torch.float32


def test_roles_do_not_depend_on_shapes_when_the_rank_equals_a_width():
    a, b = torch.randn(IN, IN, dtype=torch.float64), torch.randn(IN, IN, dtype=torch.float64)
    torch.testing.assert_close(stack([LoraPair(a, b)], [3.0]).product(), 3 * b @ a)


@pytest.mark.parametrize("rank", [4, 9])
def test_padding_keeps_the_product_and_cutting_back_returns_the_pair(rank):
    pair = draw(4, 0, scale=4.0)
    padded = pad_rank(pair, rank)
    torch.testing.assert_close(padded.product(), pair.product(), rtol=0, atol=1e-14)
    back = truncate_rank(padded, 4)
    assert back.a.equal(pair.a) and back.b.equal(pair.b) and back.scale == pair.scale


def test_truncation_keeps_the_first_terms_at_their_size():
    pair = draw(4, 0, scale=4.0)
    torch.testing.assert_close(truncate_rank(pair, 2).product(), 4.0 * pair.b[..., :2] @ pair.a[..., :2, :])
    assert truncate_rank(pair, 0).product().count_nonzero() == 0


def test_truncation_to_a_rank_per_expert_is_zero_past_each():
    pair, ranks = draw(4, 0), torch.tensor([3, 0, 1])
    cut = truncate_rank(pair, ranks)
    assert cut.rank == 3
    for expert, rank in enumerate(ranks.tolist()):
        alone = LoraPair(a=pair.a[expert], b=pair.b[expert])
        torch.testing.assert_close(cut.product()[expert], truncate_rank(alone, rank).product())


def test_a_client_of_another_rank_gets_the_same_product_under_its_own_scale():
    alpha, server = 16.0, draw(8, 0, scale=16.0 / 8)
    sent = with_scale(truncate_rank(server, 2), alpha / 2)
    assert sent.scale == 8.0
    torch.testing.assert_close(sent.product(), truncate_rank(server, 2).product())
    torch.testing.assert_close(sent.a, 0.5 * server.a[..., :2, :])  # sqrt(2 / 8) on each factor


def test_refill_revives_dead_directions_only():
    pair = pad_rank(draw(2, 0), 4)
    fresh = draw(4, 1).a
    alive = refill(pair, fresh)
    assert alive.product().equal(pair.product())
    assert alive.a[..., :2, :].equal(pair.a[..., :2, :]) and alive.a[..., 2:, :].equal(fresh[..., 2:, :])


def test_norm_and_inner_product_equal_the_dense_ones():
    left, right = draw(2, 0, 2.0), draw(4, 1, 0.5)
    torch.testing.assert_close(inner(left, right), (left.product() * right.product()).sum(dim=(-2, -1)))
    torch.testing.assert_close(frobenius(left), torch.linalg.matrix_norm(left.product()))


def test_the_norm_of_an_update_that_cancels_is_zero_and_not_nan():
    pair = draw(2, 0)
    nothing = stack([pair, pair], [1.0, -1.0])
    assert frobenius(nothing).isfinite().all()
    assert (frobenius(nothing) <= 1e-7 * frobenius(pair)).all()


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [((2, 5), (7, 3), "rank"), ((1, 2, 5), (3, 7, 2), "leading"), ((5,), (7,), "expected A"), ((2, 5), (1, 7, 2), "B")],
)
def test_factors_that_do_not_fit_are_refused(a, b, words):
    # called by itself, since the test run's own shape checks come before it
    with pytest.raises(ValueError, match=words):
        LoraPair.__post_init__(SimpleNamespace(a=torch.ones(a), b=torch.ones(b)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stack([], []), "at least one"),
        (lambda: stack([draw(2, 0)], [0.5, 0.5]), r"expected weights \[1\]"),
        (lambda: stack([draw(2, 0), LoraPair(a=draw(2, 0).b.mT, b=draw(2, 0).a.mT)], [1.0, 1.0]), "different layers"),
        (lambda: weight_factors([draw(2, 0)] * 3, torch.ones(3, 2)), r"\[3, 3\], got \[3, 2\]"),
        (lambda: pad_rank(draw(2, 0), 1), "truncate_rank"),
        (lambda: truncate_rank(draw(2, 0), 3), "pad_rank"),
        (lambda: truncate_rank(draw(2, 0), -1), "-1"),
        (lambda: with_scale(draw(2, 0, scale=0.0), 1.0), "positive"),
    ],
)
def test_mistakes_are_refused_with_a_reason(call, words):
    with pytest.raises(ValueError, match=words):
        call()
