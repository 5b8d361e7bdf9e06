"""The bound against drawn biases, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe.study import bounds

few = settings(max_examples=40, deadline=None)
budgets = st.integers(2, 12).flatmap(lambda m: st.tuples(st.just(m), st.integers(1, m), st.integers(0, 99)))


def probabilities(num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    """How often each expert is among the K best of random scores: sums to K by construction."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(50, num_experts, generator=draw) + torch.randn(num_experts, generator=draw)
    return torch.zeros(50, num_experts).scatter_(1, scores.topk(top_k).indices, 1.0).mean(0)


@given(budgets)
@few
def test_no_bias_of_bounded_gradients_exceeds_its_bound(case) -> None:
    num_experts, top_k, seed = case
    p = probabilities(num_experts, top_k, seed)
    gradient = torch.randn(num_experts, 3, 2, generator=torch.Generator().manual_seed(seed))
    largest = float(gradient.flatten(1).norm(dim=1).max())
    assert float(bounds.sparse_bias(p, gradient).square().sum()) <= bounds.budget_bias_bound(
        num_experts, top_k, largest
    ) * (1 + 1e-5)


def test_all_experts_active_means_no_bias_and_no_floor() -> None:
    assert bounds.sparse_bias(torch.ones(5), torch.ones(5, 2)).count_nonzero() == 0
    assert bounds.budget_bias_bound(5, 5, 7.0) == bounds.sgd_floor(0.0, 0.1) == 0


def test_impossible_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"top_k must lie in 1\.\.4, got 5"):
        bounds.budget_bias_bound(4, 5, 1.0)
    with pytest.raises(ValueError, match="monotonicity must be > 0"):
        bounds.sgd_floor(1.0, 0.0)
