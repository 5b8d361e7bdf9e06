"""Entropy and Gini against definitions in loops, their properties, and examples by hand. Losses: test_balancing_loss.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe.maths.balance import entropy, gini, normalised_entropy

few = settings(max_examples=40, deadline=None)
uses = st.lists(st.floats(0, 1e6), min_size=2, max_size=9).filter(lambda u: sum(u) > 1e-3)


@given(uses)
@few
def test_both_equal_their_definitions_written_as_loops(used: list[float]) -> None:
    total, count = sum(used), len(used)
    u = torch.tensor(used, dtype=torch.float64)
    by_hand = -sum(x / total * math.log(x / total) for x in used if x / total > 0)
    assert float(entropy(u)) == pytest.approx(by_hand, abs=1e-9)
    pairs = sum(abs(x - y) for x in used for y in used)
    assert float(gini(u)) == pytest.approx(pairs / (2 * count * total), abs=1e-9)


@given(uses, st.floats(1e-3, 1e3), st.randoms())
@few
def test_neither_depends_on_scale_or_order_and_both_keep_their_range(used: list[float], scale: float, shuffle) -> None:
    u = torch.tensor(used, dtype=torch.float64)
    order = torch.tensor(shuffle.sample(range(len(used)), len(used)))
    for measure in (entropy, normalised_entropy, gini):
        assert float(measure(u[order] * scale)) == pytest.approx(float(measure(u)), abs=1e-9)
    assert -1e-12 <= float(normalised_entropy(u)) <= 1 + 1e-12
    assert -1e-12 <= float(gini(u)) <= 1 - 1 / len(used) + 1e-12


@pytest.mark.parametrize("count", [2, 7, 64])
def test_the_ends_of_the_range(count: int) -> None:
    even, one = torch.full((count,), 3.0), torch.eye(count)[0]
    assert float(entropy(even)) == pytest.approx(math.log(count))
    assert float(normalised_entropy(even)) == pytest.approx(1) and float(gini(even)) == pytest.approx(0)
    assert float(entropy(one)) == 0 and float(gini(one)) == pytest.approx(1 - 1 / count)


@given(uses)
@few
def test_moving_use_from_a_busy_expert_to_an_idle_one_makes_it_more_even(used: list[float]) -> None:
    u = torch.tensor(used, dtype=torch.float64)
    busy, idle = int(u.argmax()), int(u.argmin())
    moved = u.clone()
    moved[busy] -= (u[busy] - u[idle]) / 4
    moved[idle] += (u[busy] - u[idle]) / 4
    assert float(gini(moved)) <= float(gini(u)) + 1e-12
    assert float(entropy(moved)) >= float(entropy(u)) - 1e-12


def test_an_example_worked_by_hand() -> None:
    # shares 1/4, 1/4, 1/2; |differences| sum to 4 over ordered pairs, 2 M sum = 24
    u = torch.tensor([1.0, 1.0, 2.0])
    assert float(entropy(u)) == pytest.approx(1.5 * math.log(2))
    assert float(gini(u)) == pytest.approx(4 / 24)


def test_unused_layers_give_finite_numbers() -> None:
    for measure in (entropy, normalised_entropy, gini):
        assert math.isfinite(float(measure(torch.zeros(5))))
