"""The K of a budget."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe.costs.shape import budget_top_k

few = settings(max_examples=40, deadline=None)


@given(st.integers(1, 64), st.integers(1, 64))
@few
def test_a_budget_that_means_a_whole_number_of_experts_buys_exactly_it(k_max: int, wanted: int) -> None:
    wanted = min(wanted, k_max)
    assert budget_top_k(k_max, wanted / k_max) == wanted


@given(st.integers(1, 64), st.floats(1e-3, 1.0))
@few
def test_a_budget_buys_between_one_and_k_max_and_never_more_than_it_affords(k_max: int, budget: float) -> None:
    top_k = budget_top_k(k_max, budget)
    assert 1 <= top_k <= k_max
    assert top_k == 1 or top_k <= k_max * budget + 1e-6
    assert top_k + 1 > k_max * budget


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.0001, math.nan])
def test_a_budget_outside_its_range_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\]"):
        budget_top_k(8, budget)
