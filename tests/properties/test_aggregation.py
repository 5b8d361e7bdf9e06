"""Properties of aggregation that hold for any clients: hypothesis draws them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ubsmoe.maths.lora import LoraPair, frobenius, inner, stack
from ubsmoe.maths.means import WeightedMean
from ubsmoe.maths.spectra import energy_rank, tail_energy, truncated_svd

OUT, IN = 9, 6
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
drawn = settings(deadline=None, max_examples=40)

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = arrays.arrays("float32", (3, 2), elements=floats32).map(torch.from_numpy)
weights = st.floats(1e-6, 1e6)
per_client_and_expert = arrays.arrays("float64", (4, 3), elements=st.one_of(weights, st.just(0.0))).map(
    torch.from_numpy
)
narrow = st.sampled_from(list(BITS))


@st.composite
def clients(draw, max_rank: int = 5):
    """One to five clients with ranks of their own and weights that sum to one."""
    ranks = draw(st.lists(st.integers(1, max_rank), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pairs = [
        LoraPair(
            a=torch.randn(2, rank, IN, generator=generator, dtype=torch.float64),
            b=torch.randn(2, OUT, rank, generator=generator, dtype=torch.float64),
            scale=draw(st.sampled_from([0.5, 1.0, 4.0])),
        )
        for rank in ranks
    ]
    raw = [draw(st.floats(0.01, 1.0)) for _ in ranks]
    return pairs, [value / sum(raw) for value in raw]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.view(BITS[left.dtype]).equal(right.view(BITS[right.dtype]))


@drawn
@given(tensors, st.lists(st.one_of(weights, st.just(0.0)), min_size=1, max_size=40), narrow, tensors)
def test_clients_that_agree_get_back_exactly_what_they_agree_on(tensor, client_weights, dtype, fallback):
    tensor, fallback = tensor.to(dtype), fallback.to(dtype)
    mean = WeightedMean()
    for weight in client_weights:
        mean.add({"x": tensor}, weight)
    expected = tensor if any(client_weights) else fallback
    assert same_bits(mean.result({"x": fallback})["x"], expected)


@drawn
@given(tensors, per_client_and_expert, tensors)
def test_experts_nobody_weighs_in_on_keep_the_fallback_bit_for_bit(tensor, per_expert, fallback):
    mean = WeightedMean()
    for weight in per_expert:
        mean.add({"x": tensor}, weight)
    touched = per_expert.sum(dim=0) > 0
    result = mean.result({"x": fallback})["x"]
    assert same_bits(result[touched], tensor[touched]) and same_bits(result[~touched], fallback[~touched])


@drawn
@given(st.lists(st.tuples(tensors, weights), min_size=1, max_size=6), weights, st.randoms(use_true_random=False))
def test_the_mean_ignores_the_order_and_the_unit_of_the_weights(drawn, unit, random):
    def mean(items, factor: float = 1.0) -> torch.Tensor:
        running = WeightedMean()
        for tensor, weight in items:
            running.add({"x": tensor}, weight * factor)
        return running.result({"x": torch.zeros(3, 2)})["x"]

    shuffled = random.sample(drawn, len(drawn))
    size = max(float(tensor.abs().max()) for tensor, _ in drawn)
    close = {"rtol": 1e-6, "atol": 1e-13 * size + 1e-44}
    torch.testing.assert_close(mean(shuffled), mean(drawn), **close)
    torch.testing.assert_close(mean(drawn, unit), mean(drawn), **close)
    stacked = torch.stack([tensor for tensor, _ in drawn])
    slack = 1e-6 * size
    assert (mean(drawn) <= stacked.amax(0) + slack).all() and (mean(drawn) >= stacked.amin(0) - slack).all()


@drawn
@given(clients())
def test_the_error_of_every_cut_is_the_tail_of_the_spectrum(drawn):
    pairs, client_weights = drawn
    total = stack(pairs, client_weights).product()
    full = truncated_svd(pairs, client_weights)
    torch.testing.assert_close(full.pair.product(), total)
    for rank in (0, 1, 3, min(OUT, IN), min(OUT, IN) + 2):
        cut = truncated_svd(pairs, client_weights, rank).pair
        kept = min(rank, full.singular_values.shape[-1])
        error = torch.linalg.matrix_norm(total - cut.product()).square()
        torch.testing.assert_close(error, tail_energy(full.singular_values)[..., kept], rtol=1e-7, atol=1e-9)


@drawn
@given(clients(), st.randoms(use_true_random=False), st.integers(1, 6))
def test_the_order_of_clients_does_not_matter(drawn, random, rank):
    pairs, client_weights = drawn
    order = random.sample(range(len(pairs)), len(pairs))
    one = truncated_svd(pairs, client_weights, rank)
    other = truncated_svd([pairs[i] for i in order], [client_weights[i] for i in order], rank)
    torch.testing.assert_close(other.singular_values, one.singular_values, rtol=1e-7, atol=1e-7)
    assert_same_cut(one, other, rank)


@drawn
@given(clients(), st.integers(0, 2**31), st.floats(-6, 6), st.integers(1, 6))
def test_only_the_clients_products_matter_not_their_factors(drawn, seed, decades, rank):
    pairs, client_weights = drawn
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for pair in pairs:
        q = torch.linalg.qr(torch.randn(pair.rank, pair.rank, generator=generator, dtype=torch.float64)).Q
        t = q * torch.logspace(0, decades, pair.rank, dtype=torch.float64)
        turned.append(LoraPair(a=torch.linalg.solve(t, pair.a), b=pair.b @ t, scale=pair.scale))
    one, other = truncated_svd(pairs, client_weights, rank), truncated_svd(turned, client_weights, rank)
    assert_same_cut(one, other, rank)


def assert_same_cut(one, other, rank: int) -> None:
    """Equal products, except where σ_rank = σ_rank+1 leaves a choice: there equal energies."""
    sigma = torch.nn.functional.pad(one.singular_values, (0, rank + 1))
    apart = (sigma[..., rank - 1] - sigma[..., rank]) > 1e-2 * sigma[..., 0]
    torch.testing.assert_close(other.pair.product()[apart], one.pair.product()[apart], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frobenius(other.pair), frobenius(one.pair), rtol=1e-6, atol=1e-6)


@drawn
@given(clients(), st.floats(0.01, 1.0))
def test_an_energy_cut_is_minimal_and_monotone(drawn, energy):
    values = truncated_svd(*drawn).singular_values
    rank, more = energy_rank(values, energy), energy_rank(values, (energy + 1) / 2)
    tail = tail_energy(values)
    kept = 1 - tail / tail[:, :1]
    assert (kept.gather(-1, rank[:, None]) >= energy - 1e-12).all()
    assert (kept.gather(-1, rank[:, None] - 1) < energy + 1e-12).all()
    assert (more >= rank).all() and (energy_rank(values, 1.0) == (values > 0).sum(-1)).all()


@drawn
@given(clients())
def test_inner_products_obey_cauchy_schwarz_and_add_up(drawn):
    pairs, client_weights = drawn
    first, last = pairs[0], pairs[-1]
    assert (inner(first, last).abs() <= frobenius(first) * frobenius(last) * (1 + 1e-9)).all()
    added = sum(w * inner(pair, first) for w, pair in zip(client_weights, pairs, strict=True))
    torch.testing.assert_close(inner(stack(pairs, client_weights), first), added)
