"""Numbers as integers and back: exact where they should be, within a step elsewhere, and never beyond a word."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.costs.secure import word_bits
from ubsmoe.errors import UserError
from ubsmoe.secagg.vector import WORDS, Summand, decode, encode, size_of, step_of
from unit.secagg.test_protocol import terms

LAYOUT, COUNTS = {"w": [3, 2, 4], "s": [], "u": [5]}, {"n": [2, 3], "t": []}
LIMITS = {"w": 0.5, "s": 8.0, "u": 1.0}


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def client(
    seed: int, weight: float, rows: torch.Tensor | None = None
) -> tuple[dict[str, Summand], dict[str, torch.Tensor]]:
    g = draw(seed)
    summands = {
        "w": Summand(torch.rand(3, 2, 4, generator=g) - 0.5, weight if rows is None else rows, 0.5),
        "s": Summand(torch.rand((), generator=g), weight, 8.0),
    }
    return summands, {"n": torch.randint(0, 9, (2, 3), generator=g), "t": torch.tensor(seed)}


@pytest.mark.parametrize(("word", "fraction"), [(32, 0), (64, 0), (64, 16)])
def test_weighted_means_are_within_a_step_and_counts_exact(word: int, fraction: int) -> None:
    """Three clients, one of whom weighs the rows differently, and nobody has `u`; an oracle in float64 beside."""
    agreed = terms("abc", word=word, fraction=fraction)
    rows = torch.tensor([0.0, 1.0, 4.0] if not fraction else [0.0, 0.25, 3.875])
    clients = [client(1, 5), client(2, 9), client(3, 2, rows)]
    vectors = [encode(own, counts, LAYOUT, agreed, draw(i)) for i, (own, counts) in enumerate(clients)]
    assert {one.dtype for one in vectors} == {WORDS[agreed.word]} and {len(one) for one in vectors} == {
        size_of(LAYOUT, COUNTS)
    }
    sums = decode(sum(vectors), LAYOUT, COUNTS, LIMITS, agreed)  # type: ignore[arg-type]
    weights = [torch.as_tensor(own["w"].weight, dtype=torch.float64).expand(3)[:, None, None] for own, _ in clients]
    exact = sum(w * own["w"].value for w, (own, _) in zip(weights, clients, strict=True)) / sum(weights)
    assert float((sums.mean("w") - exact).abs().max()) <= step_of(0.5, agreed.bits)
    assert torch.equal(sums.weights["w"], sum(weights).flatten())  # type: ignore[union-attr]
    assert (sums.mean("u") == 0).all() and (sums.weights["u"] == 0).all()
    for name in COUNTS:
        assert torch.equal(sums.counts[name], sum(counts[name] for _, counts in clients))  # type: ignore[arg-type]


def test_rounding_is_unbiased_follows_the_generator_and_keeps_zero() -> None:
    agreed, value = terms("abc", bits=8), torch.full([10_000], 0.1234)
    before = torch.random.get_rng_state()

    def mean(seed: int, x: torch.Tensor) -> torch.Tensor:
        vector = encode({"w": Summand(x, 1, 0.5)}, {}, {"w": [10_000]}, agreed, draw(seed))
        return decode(vector, {"w": [10_000]}, {}, {"w": 0.5}, agreed).mean("w")

    rounded = mean(1, value)
    assert len(rounded.unique()) == 2 and abs(float(rounded.mean()) - 0.1234) < 0.1 * step_of(0.5, 8)
    assert torch.equal(rounded, mean(1, value)) and not torch.equal(rounded, mean(2, value))
    assert (mean(3, torch.zeros(10_000)) == 0).all()
    assert (mean(4, torch.full([10_000], 7.0)) == 0.5).all()
    assert torch.equal(before, torch.random.get_rng_state())


@given(st.integers(3, 5000), st.integers(1, 10**6), st.integers(8, 30), st.sampled_from([0, 16]))
def test_the_largest_sum_fits_the_word(clients: int, most: int, bits: int, fraction: int) -> None:
    largest = clients * (most << fraction) * ((1 << (bits - 1)) - 1)
    word = word_bits(clients, most, bits, fraction)
    assert largest < 1 << (word - 1) if word else largest > 1 << 60


def test_the_extreme_sum_does_not_wrap_around() -> None:
    agreed = terms("abc", clients=15, max_weight=4096, word=word_bits(15, 4096, 16, 0))
    one = encode({"w": Summand(torch.full([2], 0.5), 4096, 0.5)}, {}, {"w": [2]}, agreed, draw(0))
    assert agreed.word == 32 and one.dtype == torch.int32
    total = sum([one] * 14, one)
    assert decode(total, {"w": [2]}, {}, {"w": 0.5}, agreed).mean("w").tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"w": Summand(torch.full([3, 2, 4], float("nan")), 1, 0.5)}, "w holds NaN or infinity"),
        ({"w": Summand(torch.zeros(3, 2, 4), 11, 0.5)}, "w: a weight of 11, at most 10 can be summed; raise"),
        ({"w": Summand(torch.zeros(3, 2, 4), -1, 0.5)}, "w: a weight of -1"),
        ({"x": Summand(torch.zeros(3), 1, 0.5)}, "layout has no 'x' of this client's shape"),
        ({"w": Summand(torch.zeros(2, 3, 4), 1, 0.5)}, "layout has no 'w' of this client's shape"),
    ],
)
def test_what_a_sum_cannot_bear_is_refused(change: dict[str, Summand], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        encode(change, {}, LAYOUT, terms("abc"), draw(0))


def test_a_count_that_could_wrap_around_is_refused() -> None:
    with pytest.raises(UserError, match="t reaches 2147483648, at most 715827882 can be summed"):
        encode({}, {"t": torch.tensor(2**31)}, {}, terms("abc"), draw(0))
