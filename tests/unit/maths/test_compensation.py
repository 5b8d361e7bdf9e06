"""Laws of the fit for skipped experts: sums add up, linear targets are met exactly, no map of the rank is better."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.maths.compensation import Sums, fit_low_rank

TOKENS, D, H = 40, 7, 5


def data(seed: int = 0, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(TOKENS, D, generator=draw, dtype=torch.float64) * torch.arange(1, D + 1) + 3
    w = torch.randn(D, H, generator=draw, dtype=torch.float64)
    return z, z @ w + 2 + noise * torch.randn(TOKENS, H, generator=draw, dtype=torch.float64)


@given(st.permutations(range(4)), st.integers(0, 50))
def test_a_fit_from_the_sums_of_clients_is_the_fit_on_their_pooled_tokens(order: list[int], seed: int) -> None:
    z, y = data(seed, noise=1.0)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 25), slice(25, TOKENS)]
    parts = [Sums.of(z[cuts[i]], y[cuts[i]]) for i in order]
    pooled = fit_low_rank(Sums.of(z, y), 2, 1e-3)
    summed = fit_low_rank(parts[0] + parts[1] + parts[2] + parts[3], 2, 1e-3)
    torch.testing.assert_close(summed.v @ summed.u, pooled.v @ pooled.u)
    torch.testing.assert_close(summed.c, pooled.c)


def test_a_linear_target_is_met_exactly_at_full_rank() -> None:
    z, y = data()
    found = fit_low_rank(Sums.of(z, y), H, 1e-14)
    torch.testing.assert_close(z @ found.u.T @ found.v.T + found.c, y, rtol=1e-6, atol=1e-6)
    assert abs(found.explained - 1) < 1e-9


def test_no_map_of_this_rank_is_better() -> None:
    """Against the textbook: the fitted values' leading directions of the unreduced regression (Izenman 1975)."""
    z, y = data(noise=5.0)
    centred, target = z - z.mean(0), y - y.mean(0)
    full = torch.linalg.lstsq(centred, target).solution
    _, _, right = torch.linalg.svd(centred @ full, full_matrices=False)
    for rank in (1, 2, 4):
        best = full @ right[:rank].T @ right[:rank]
        found = fit_low_rank(Sums.of(z, y), rank, 1e-12)
        torch.testing.assert_close((found.v @ found.u).T, best, rtol=1e-5, atol=1e-5)
        left = (y - z @ found.u.T @ found.v.T - found.c).square().sum()
        assert abs(found.explained - (1 - float(left / y.square().sum()))) < 1e-9


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    z, y = data(noise=1.0)
    z[:, 2] = 0
    found = fit_low_rank(Sums.of(z, y), H, 1e-3)
    assert (found.v @ found.u)[:, 2].abs().max() < 1e-6 * (found.v @ found.u).abs().max()


@given(st.integers(1, TOKENS), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([0.0, 1.0]), st.integers(0, 50))
def test_sums_of_tokens_are_known_as_such(tokens: int, size: float, noise: float, seed: int) -> None:
    """Few tokens leave the sums without full rank, a linear target with nothing unexplained; both are at the edge."""
    z, y = data(seed, noise)
    z = torch.cat([z[:, :-1], z[:, :1]], 1)  # two equal features
    assert Sums.of_fixed(Sums.of(size * z[:tokens], size * y[:tokens]).fixed()).fault() is None


LIES: dict[str, Callable[[Sums], dict[str, Any]]] = {
    "no tokens": lambda true: {"count": 0 * true.count},
    "tokens less than none": lambda true: {"count": -true.count},
    "fewer tokens than sums need": lambda true: {"count": true.count / 9},
    "squares below zero": lambda true: {"gram": -true.gram},
    "one square below zero": lambda true: {"gram": true.gram - torch.diag(torch.eye(D)[2] * 1e4)},
    "two features more than equal": lambda true: {"gram": true.gram + 1e5 * torch.eye(D).roll(1, 0).triu(1)},
    "a lower half alone": lambda true: {"gram": true.gram.tril()},
    "a mean without squares": lambda true: {"features": 50 * true.features},
    "outputs without energy": lambda true: {"energy": 0 * true.energy},
    "energy below zero": lambda true: {"energy": -true.energy},
    "a mean without energy": lambda true: {"outputs": 50 * true.outputs},
    "more explained than there is": lambda true: {"cross": 2 * true.cross},
    "one output explained by nothing": lambda true: {"cross": true.cross + torch.eye(D, H) * 1e5},
}


@pytest.mark.parametrize("lie", LIES)
def test_sums_that_no_tokens_have_are_told(lie: str) -> None:
    true = Sums.of(*data(noise=1.0))
    assert replace(true, **LIES[lie](true)).fault()
