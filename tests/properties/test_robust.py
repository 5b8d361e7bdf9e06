"""What f liars among n clients can do to each rule, whatever they send: hypothesis draws clients and lies."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ubsmoe.maths.means import WeightedMean
from ubsmoe.maths.robust import (
    TrimmedMean,
    capped_shares,
    clip_factor,
    krum_scores,
    multi_krum,
    squared_distances,
    trimmed_mean,
)

EXPERTS, WIDTH = 3, 2
anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
decent = st.floats(-10, 10, width=32)
weights = st.floats(1e-3, 1e6)


def tensor_of(elements):
    return arrays.arrays("float32", (EXPERTS, WIDTH), elements=elements).map(torch.from_numpy)


def averaged(rule, clients, fallback=None):
    for tensor, weight in clients:
        rule.add({"x": tensor}, weight)
    return rule.result({"x": torch.zeros(EXPERTS, WIDTH) if fallback is None else fallback})["x"]


@st.composite
def honest_and_liars(draw):
    """f liars with any values and weights among at least f + 1 honest clients, shuffled; and f."""
    attackers = draw(st.integers(1, 3))
    honest = draw(st.lists(st.tuples(tensor_of(decent), weights), min_size=attackers + 1, max_size=6))
    liars = draw(st.lists(st.tuples(tensor_of(anything), weights), min_size=attackers, max_size=attackers))
    return honest, draw(st.permutations(honest + liars)), attackers


@given(honest_and_liars())
def test_no_lie_moves_a_trimmed_mean_or_median_out_of_the_honest_range(drawn):
    honest, clients, attackers = drawn
    stacked = torch.stack([tensor for tensor, _ in honest])
    low, high = stacked.amin(0), stacked.amax(0)
    for rule in (TrimmedMean(attackers), TrimmedMean(0, median=True)):
        result = averaged(rule, clients)
        assert (result >= low).all() and (result <= high).all()


def test_one_liar_more_than_f_breaks_it():
    """The breakdown point is where it is said to be: f + 1 liars of 2 f + 1 own the trimmed mean."""
    honest, liars = [(torch.zeros(EXPERTS, WIDTH), 1.0)] * 2, [(torch.full((EXPERTS, WIDTH), 1e9), 1.0)] * 3
    assert averaged(TrimmedMean(2), honest + liars).eq(1e9).all()
    assert averaged(TrimmedMean(0, median=True), honest + liars).eq(1e9).all()


@given(st.lists(st.tuples(tensor_of(decent), weights), min_size=5, max_size=8), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_nothing_trimmed_is_the_plain_mean(clients, random):
    shuffled = random.sample(clients, len(clients))
    for rule in (lambda: TrimmedMean(2), lambda: TrimmedMean(0, median=True), lambda: TrimmedMean(0)):
        torch.testing.assert_close(averaged(rule(), shuffled), averaged(rule(), clients), rtol=1e-6, atol=1e-9)
    plain = averaged(WeightedMean(), clients)
    torch.testing.assert_close(averaged(TrimmedMean(0), clients), plain, rtol=1e-6, atol=1e-9)


@given(tensor_of(anything), st.lists(weights, min_size=5, max_size=9))
def test_clients_that_agree_get_back_exactly_what_they_agree_on(tensor, drawn):
    for rule in (TrimmedMean(2), TrimmedMean(0, median=True)):
        assert torch.equal(averaged(rule, [(tensor, weight) for weight in drawn]), tensor)


@given(st.lists(tensor_of(decent), min_size=5, max_size=9))
def test_at_equal_weights_it_is_scipys_trimmed_mean_and_numpys_median(tensors):
    stacked = np.stack([tensor.double().numpy() for tensor in tensors])
    clients = [(tensor, 3.0) for tensor in tensors]
    median = averaged(TrimmedMean(0, median=True), clients)
    np.testing.assert_allclose(median, np.median(stacked, axis=0), rtol=1e-6, atol=1e-9)
    trimmed = scipy.stats.trim_mean(stacked, 2.001 / len(tensors), axis=0)
    np.testing.assert_allclose(averaged(TrimmedMean(2), clients), trimmed, rtol=1e-6, atol=1e-9)


def test_an_expert_that_too_few_have_weight_on_stays():
    """By hand, f = 1. Expert 0: values 1, 2, 3, 90 of weights 1, 1, 3, 1 leave (2 + 9) / 4. Expert 1: two clients, stays."""
    rule, before = TrimmedMean(1), torch.tensor([[7.0], [7.0]])
    rows = [([1.0], 1.0, 1.0), ([2.0], 1.0, 0.0), ([3.0], 3.0, 0.0), ([90.0], 1.0, 1.0)]
    for value, first, second in rows:
        rule.add({"x": torch.tensor([value, [1e9]])}, torch.tensor([first, second]))
    assert rule.result({"x": before})["x"].tolist() == [[2.75], [7.0]]
    assert torch.equal(before, torch.tensor([[7.0], [7.0]]))


def test_scalars_and_missing_names_are_treated_as_in_the_plain_mean():
    rule = TrimmedMean(1)
    for value in (1.0, 2.0, 50.0):
        rule.add({"scalar": torch.tensor(value)}, weight=1.0)
    result = rule.result({"scalar": torch.tensor(0.0), "other": torch.ones(2)})
    assert result["scalar"].item() == 2.0 and result["other"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("tensor", "weight", "words"),
    [
        (torch.ones(2, 5), 1.0, r"got \[2, 5\].*\[3, 5\]"),
        (torch.ones(3, 5), -1.0, "negative"),
        (torch.ones(3, 5), torch.ones(5), "one per expert"),
        (torch.ones(3, 5), {"B": 1.0}, "no weight"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_counted(tensor, weight, words):
    rule = TrimmedMean(0)
    rule.add({"A": torch.full((3, 5), 2.0)}, weight=1.0)
    with pytest.raises(ValueError, match=words):
        rule.add({"new": torch.ones(3), "A": tensor}, weight if isinstance(weight, dict) else {"new": 1.0, "A": weight})
    assert rule.result({"A": torch.zeros(3, 5)})["A"].eq(2.0).all()
    with pytest.raises(ValueError, match="'A'"):
        rule.result({"B": torch.ones(3, 5)})
    with pytest.raises(ValueError, match=r"averaged \[3, 5\], expected \[3, 1\]"):
        rule.result({"A": torch.ones(3, 1)})
    with pytest.raises(ValueError, match="cannot trim 2 at each end of 4"):
        trimmed_mean(torch.ones(4, 1), torch.ones(4), 2)


@st.composite
def crowd_and_outsiders(draw):
    """n >= 2 f + 3 clients of which f lie far off, together or apart; the liars' places; f."""
    attackers = draw(st.integers(1, 3))
    near = draw(st.lists(tensor_of(st.floats(-1, 1, width=32)), min_size=attackers + 3, max_size=8))
    far = draw(st.lists(tensor_of(st.floats(99, 1e6, width=32)), min_size=attackers, max_size=attackers))
    order = draw(st.permutations(range(len(near) + attackers)))
    clients = [{"x": (near + far)[i]} for i in order]
    return clients, {place for place, i in enumerate(order) if i >= len(near)}, attackers


@given(crowd_and_outsiders())
def test_multi_krum_leaves_out_f_liars_that_lie_far_off_even_together(drawn):
    clients, liars, attackers = drawn
    distances = squared_distances(clients)
    kept = multi_krum(distances, attackers)
    assert len(kept) == len(clients) - attackers and not liars & set(kept)
    turned = multi_krum(squared_distances(clients[::-1]), attackers)
    assert not liars & {len(clients) - 1 - place for place in turned}


@given(st.lists(tensor_of(decent), min_size=5, max_size=7))
def test_distances_and_scores_are_those_written_out(tensors):
    clients = [{"x": tensor, "y": tensor[:1] * 2} for tensor in tensors]
    flat = [torch.cat([part.double().flatten() for part in client.values()]) for client in clients]
    by_hand = torch.stack([torch.stack([(a - b).square().sum() for b in flat]) for a in flat])
    torch.testing.assert_close(squared_distances(clients), by_hand)
    near = [sorted(row[:c] + row[c + 1 :])[: len(flat) - 3] for c, row in enumerate(by_hand.tolist())]
    expected = torch.tensor([sum(row) for row in near], dtype=torch.float64)
    torch.testing.assert_close(krum_scores(by_hand, 1), expected)


def test_equal_clients_tie_and_the_first_are_kept_and_too_few_are_refused():
    assert multi_krum(torch.zeros(7, 7), attackers=2) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least 2 f \\+ 3 = 7 clients, got 6"):
        multi_krum(torch.zeros(6, 6), attackers=2)


@given(st.floats(0, 1e30), st.floats(1e-6, 1e6))
def test_a_clipped_change_is_never_longer_and_a_short_one_is_left_alone(norm, longest):
    factor = clip_factor(norm, longest)
    assert norm * factor <= longest * (1 + 1e-12) and (factor == 1 if norm <= longest else factor < 1)


@given(st.integers(2, 4), st.integers(0, 2**31), st.floats(1, 4), st.integers(0, 5))
def test_a_liars_shares_stay_within_the_cap_of_the_honest_range(liars, seed, cap, expert):
    """2 to 4 liars among more honest clients put all on one expert: it stays within the cap of an honest share."""
    draw, assignments = np.random.default_rng(seed), 4000
    counts = draw.multinomial(assignments, draw.dirichlet(np.full(6, 3.0), (liars + 1, 2)))
    honest = torch.from_numpy(counts).double() / assignments
    lie = torch.zeros(liars, 2, 6, dtype=torch.float64)
    lie[..., expert] = 1
    capped = capped_shares(torch.cat([honest, lie]), cap)
    assert (capped <= honest.amax(0) * cap + 1e-12).all() and (capped >= honest.amin(0) / cap - 1e-12).all()
    assert torch.equal(capped_shares(honest[:1].expand(5, -1, -1), cap)[3], honest[0])
