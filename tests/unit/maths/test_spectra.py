"""Truncated SVD of sums of low-rank updates. The oracle is a dense float64 SVD of the formed sum."""

import pytest
import torch
from torch import Tensor

from ubsmoe.maths.lora import LoraPair, frobenius, refill, stack, truncate_rank
from ubsmoe.maths.spectra import energy_rank, tail_energy, truncated_svd

EXPERTS, OUT, IN = 3, 23, 17


def draw(rank: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, lead=(EXPERTS,)) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*lead, rank, IN, generator=generator, dtype=torch.float64)
    b = torch.randn(*lead, OUT, rank, generator=generator, dtype=torch.float64)
    return LoraPair(a=a.to(dtype), b=b.to(dtype), scale=scale)


def dense_sum(pairs: list[LoraPair], weights: list[float]) -> Tensor:
    terms = (w * pair.scale * pair.b.double() @ pair.a.double() for w, pair in zip(weights, pairs, strict=True))
    return torch.stack(list(terms)).sum(dim=0)


def dense_best(total: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def shared_a(deviation: float) -> list[LoraPair]:
    """Clients that started from one A and moved a little: nearly repeated rows."""
    start = draw(4, 0).a
    return [LoraPair(a=start + deviation * draw(4, seed).a, b=draw(4, seed).b) for seed in (1, 2, 3)]


def graded(pair: LoraPair, power: float) -> LoraPair:
    """The same product with its factors' columns on very different scales."""
    steps = torch.logspace(-power, power, pair.rank, dtype=torch.float64)
    return LoraPair(a=pair.a * steps[:, None], b=pair.b / steps, scale=pair.scale)


STACKS = {
    "one client": ([draw(5, 0, 2.0)], [1.0]),
    "several ranks and scales": ([draw(1, 0, 16.0), draw(4, 1, 4.0), draw(8, 2, 2.0)], [0.5, 0.3, 0.2]),
    "a client of no weight": ([draw(3, 0), draw(4, 1)], [1.0, 0.0]),
    "a client of almost no weight": ([draw(3, 0), draw(4, 1)], [1.0, 1e-12]),
    "a client that sent zeros": (
        [draw(3, 0), LoraPair(draw(4, 1).a, torch.zeros(EXPERTS, OUT, 4).double())],
        [0.5, 0.5],
    ),
    "the same client twice": ([draw(3, 0), draw(3, 0), draw(2, 1)], [0.2, 0.3, 0.5]),
    "one shared A": (shared_a(0.0), [0.2, 0.3, 0.5]),
    "an A that is nearly shared": (shared_a(1e-5), [0.2, 0.3, 0.5]),
    "factors graded over twelve decades": ([graded(draw(6, 0), 6.0), draw(2, 1)], [0.5, 0.5]),
    "a term graded the other way": ([graded(draw(6, 0), 6.0), graded(draw(6, 1), -6.0)], [0.5, 0.5]),
    "R just fits": ([draw(9, 0), draw(8, 1)], [0.5, 0.5]),
    "R above both widths": ([draw(9, 0), draw(16, 1), draw(3, 2)], [0.2, 0.3, 0.5]),
    "one rank above both widths": ([draw(30, 0)], [1.0]),
    "opposing clients": ([draw(4, 0), draw(4, 0), draw(2, 1)], [1.0, -0.9, 0.1]),
}


def transposed(pairs: list[LoraPair]) -> list[LoraPair]:
    return [LoraPair(a=pair.b.mT, b=pair.a.mT, scale=pair.scale) for pair in pairs]


@pytest.mark.parametrize("turn", [list, transposed], ids=["tall", "wide"])
@pytest.mark.parametrize("split", ["b", "balanced"])
@pytest.mark.parametrize("name", STACKS)
def test_it_equals_the_dense_svd(name, split, turn):
    pairs, weights = turn(STACKS[name][0]), STACKS[name][1]
    total = dense_sum(pairs, weights)
    exact = torch.linalg.svdvals(total)
    size = exact[..., :1]
    best = truncated_svd(pairs, weights, split=split)
    padded = torch.nn.functional.pad(best.singular_values, (0, exact.shape[-1] - best.singular_values.shape[-1]))
    assert ((padded - exact).abs() <= 1e-6 * size).all()
    assert ((best.pair.product() - total).abs() <= 1e-6 * size[..., None]).all()
    for rank in (1, 2, 5):
        error = torch.linalg.matrix_norm(total - truncated_svd(pairs, weights, rank, split).pair.product())
        torch.testing.assert_close(
            error, tail_energy(exact)[..., rank].sqrt(), rtol=1e-6, atol=1e-6 * float(size.max())
        )


@pytest.mark.parametrize("name", STACKS)
def test_the_split_puts_sigma_where_it_says(name):
    pairs, weights = STACKS[name]
    best = truncated_svd(pairs, weights, rank=4)
    one = (best.singular_values[..., :4] > 0).to(torch.float64)
    s = best.singular_values[..., :4]
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(best.pair.a @ best.pair.a.mT, torch.diag_embed(one), **close)
    torch.testing.assert_close(torch.linalg.vector_norm(best.pair.b, dim=-2), s, **close)
    even = truncated_svd(pairs, weights, rank=4, split="balanced").pair
    torch.testing.assert_close(even.a.square().sum(-1), even.b.square().sum(-2), **close)


def test_float32_clients_of_an_experts_size_reach_float32_accuracy():
    generator = torch.Generator().manual_seed(0)
    pairs = [
        LoraPair(torch.randn(r, 384, generator=generator), torch.randn(512, r, generator=generator), 16.0 / r)
        for r in (4, 8, 16)
    ]
    total = dense_sum(pairs, [0.2, 0.3, 0.5])
    best = truncated_svd(pairs, [0.2, 0.3, 0.5], rank=16)
    exact = dense_best(total, 16)
    assert best.pair.a.dtype == torch.float32
    assert torch.linalg.matrix_norm(best.pair.product() - exact) <= 1e-6 * torch.linalg.matrix_norm(exact)
    torch.testing.assert_close(best.pair.a @ best.pair.a.mT, torch.eye(16), rtol=0, atol=1e-6)


def test_a_weight_per_expert_acts_on_that_expert():
    pairs, weights = [draw(3, 0), draw(4, 1)], torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.0, 0.7]], dtype=torch.float64)
    best = truncated_svd(pairs, weights)
    torch.testing.assert_close(best.pair.product(), stack(pairs, weights).product())
    assert best.rank.tolist() == [3, 0, 7]


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_leading_dims_are_a_batch(lead):
    pairs = [draw(3, 0, lead=lead), draw(2, 1, lead=lead)]
    best = truncated_svd(pairs, [0.5, 0.5], rank=4)
    assert best.pair.a.shape == (*lead, 4, IN) and best.pair.b.shape == (*lead, OUT, 4)
    torch.testing.assert_close(best.pair.product(), dense_best(dense_sum(pairs, [0.5, 0.5]), 4))


def test_an_expert_does_not_depend_on_its_neighbours_or_on_the_chunks():
    pairs = shared_a(0.0)
    pairs = [LoraPair(torch.cat([p.a[:1], draw(4, 9 + i).a[1:]]), p.b) for i, p in enumerate(pairs)]
    together = truncated_svd(pairs, [0.2, 0.3, 0.5], rank=6)
    in_chunks = truncated_svd(pairs, [0.2, 0.3, 0.5], rank=6, chunk_bytes=1)
    torch.testing.assert_close(in_chunks.pair.a, together.pair.a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(in_chunks.pair.b, together.pair.b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [(3, 3), (20, 20)], ids=["narrow", "wide"])
@pytest.mark.parametrize("how", ["all B zero", "no weight", "cancelling"])
def test_a_zero_sum_gives_zeros_and_says_so(how, ranks):
    first, second = draw(ranks[0], 0), draw(ranks[1], 1)
    if how == "all B zero":
        pairs, weights = [LoraPair(p.a, torch.zeros_like(p.b)) for p in (first, second)], [0.5, 0.5]
    elif how == "no weight":
        pairs, weights = [first, second], [0.0, 0.0]
    else:
        pairs, weights = [first, first, second, second], [1 / 3, -1 / 3, 0.1, -0.1]
    best = truncated_svd(pairs, weights, rank=4)
    assert best.rank.eq(0).all() and best.singular_values.count_nonzero() == 0
    assert best.pair.a.count_nonzero() == best.pair.b.count_nonzero() == 0
    previous = draw(4, 5)
    assert refill(best.pair, previous.a).a.equal(previous.a)
    assert energy_rank(best.singular_values, 1.0).eq(0).all()


def test_a_rank_above_the_widths_is_padded_with_zeros():
    pairs = [draw(20, 0)]
    best = truncated_svd(pairs, [1.0], rank=29)
    assert best.pair.rank == 29 and best.singular_values.shape[-1] == IN
    assert best.pair.a[:, IN:].count_nonzero() == best.pair.b[..., IN:].count_nonzero() == 0
    torch.testing.assert_close(best.pair.product(), pairs[0].product())


def test_rank_one_and_rank_zero():
    pairs = [draw(1, 0), draw(1, 1)]
    best = truncated_svd(pairs, [0.5, 0.5], 1).pair
    torch.testing.assert_close(best.product(), dense_best(dense_sum(pairs, [0.5, 0.5]), 1))
    assert truncated_svd(pairs, [0.5, 0.5], 0).pair.product().count_nonzero() == 0
    empty = LoraPair(a=torch.zeros(EXPERTS, 0, IN), b=torch.zeros(EXPERTS, OUT, 0))
    assert truncated_svd([empty], [1.0], 2).rank.eq(0).all()


def test_signs_do_not_depend_on_the_clients_signs():
    pair = draw(4, 0)
    best = truncated_svd([pair], [1.0]).pair
    flipped = truncated_svd([LoraPair(-pair.a, -pair.b)], [1.0]).pair
    torch.testing.assert_close(flipped.b, best.b)
    largest = best.b.gather(-2, best.b.abs().argmax(dim=-2, keepdim=True))
    assert (largest > 0).all()


def test_slices_for_weaker_clients_are_their_own_best():
    pairs, weights = STACKS["several ranks and scales"]
    best = truncated_svd(pairs, weights, rank=8).pair
    for rank in (1, 3, 8):
        alone = truncated_svd(pairs, weights, rank).pair
        torch.testing.assert_close(truncate_rank(best, rank).product(), alone.product())


def test_adding_one_client_at_a_time_gives_the_same_sum():
    pairs, weights = STACKS["several ranks and scales"]
    running = truncated_svd(pairs[:1], weights[:1])
    for pair, weight in zip(pairs[1:], weights[1:], strict=True):
        running = truncated_svd([running.pair, pair], [1.0, weight])
    torch.testing.assert_close(running.pair.product(), dense_sum(pairs, weights))
    torch.testing.assert_close(running.singular_values, truncated_svd(pairs, weights).singular_values)


def test_an_energy_cut_is_the_smallest_that_keeps_it():
    # by hand: squares 16, 4, 1, 0 of 21: one direction keeps 76 %, two 95 %, three all
    values = torch.tensor([4.0, 2.0, 1.0, 0.0])
    assert [int(energy_rank(values, t)) for t in (0.5, 0.76, 0.77, 0.95, 0.96, 1.0)] == [1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(tail_energy(values), torch.tensor([21.0, 5.0, 1.0, 0.0, 0.0]))


def test_an_energy_cut_per_expert_loses_no_more_than_allowed():
    pairs, weights = STACKS["several ranks and scales"]
    full = truncated_svd(pairs, weights)
    ranks = energy_rank(full.singular_values, 0.9)
    cut, whole = truncate_rank(full.pair, ranks), frobenius(full.pair) ** 2
    assert (frobenius(cut) ** 2 >= 0.9 * whole - 1e-9 * whole).all()
    assert (frobenius(truncate_rank(full.pair, ranks - 1)) ** 2 < 0.9 * whole).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: truncated_svd([], []), "at least one"),
        (lambda: truncated_svd([draw(2, 0)], [1.0, 2.0]), "expected weights"),
        (lambda: truncated_svd([draw(2, 0)], [1.0], rank=-1), "negative"),
        (lambda: truncated_svd([LoraPair(draw(2, 0).a * torch.nan, draw(2, 0).b)], [1.0]), "NaN"),
        (lambda: truncated_svd([LoraPair(draw(30, 0).a * torch.inf, draw(30, 0).b)], [1.0]), "NaN"),
        (lambda: energy_rank(torch.ones(3), 1.1), "energy"),
    ],
)
def test_mistakes_are_refused_with_a_reason(call, words):
    with pytest.raises(ValueError, match=words):
        call()
