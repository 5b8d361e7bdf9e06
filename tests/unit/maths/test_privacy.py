"""Epsilon against an accountant written here, and what one client can do to a noisy sum."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.signal import fftconvolve
from scipy.stats import norm

from ubsmoe.maths.privacy import deviation, epsilon, noisy, shares_from

DELTA = 1e-5
FULL = [(0.7, 1), (1.0, 1), (1.0, 10), (2.0, 6), (0.5, 3), (4.0, 50), (8.0, 300), (3.0, 7)]
DRAWN = [
    (1.0, 0.1, 20), (0.8, 0.01, 300), (2.0, 0.5, 6), (0.6, 0.2, 4), (1.5, 0.05, 100), (1.0, 0.3, 10),
    (3.0, 0.5, 50), (0.9, 0.02, 50), (1.2, 0.25, 8), (4.0, 0.1, 200), (0.7, 0.1, 1), (2.5, 0.8, 12),
]  # fmt: skip


def of_gaussian(sigma: float, rounds: int) -> float:
    """Closed form: rounds of sigma are one of sigma / sqrt(rounds). Balle and Wang 2018 (arXiv 1805.06530), theorem 8."""
    mu = math.sqrt(rounds) / sigma

    def excess(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)) - DELTA

    return float(brentq(excess, 0, 200))


def of_drawn_gaussian(sigma: float, drawn: float, rounds: int) -> float:
    """The larger of both directions, by sums of the privacy loss on a grid of cell midpoints."""
    x = np.linspace(-14 * sigma, 1 + 14 * sigma, 400_001)
    without, mixed = norm.pdf(x, 0, sigma), (1 - drawn) * norm.pdf(x, 0, sigma) + drawn * norm.pdf(x, 1, sigma)
    loss = np.log1p(drawn * np.expm1((2 * x - 1) / (2 * sigma**2)))
    found = []
    for density, sign in ((mixed, 1.0), (without, -1.0)):
        step, mass = 2e-4, density * (x[1] - x[0])
        low = math.floor((sign * loss).min() / step)
        one = np.bincount(np.rint(sign * loss / step).astype(int) - low, weights=mass)
        total, start = one, low
        for _ in range(rounds - 1):
            total, start = fftconvolve(total, one), start + low
            keep = np.flatnonzero(total > 1e-15)
            total, start = total[keep[0] : keep[-1] + 1], start + keep[0]
        losses = (start + np.arange(len(total))) * step

        def excess(e: float, losses=losses, total=total) -> float:
            above = losses > e
            return float((total[above] * -np.expm1(e - losses[above])).sum()) - DELTA

        found.append(float(brentq(excess, 0, 200)) if excess(0) > 0 else 0.0)
    return max(found)


@pytest.mark.parametrize(("sigma", "rounds"), FULL)
def test_with_everybody_in_every_round_epsilon_is_the_closed_form(sigma, rounds):
    assert epsilon(sigma, 1.0, rounds, DELTA) == pytest.approx(of_gaussian(sigma, rounds), rel=0.01)


@pytest.mark.parametrize(("sigma", "drawn", "rounds"), DRAWN)
def test_with_drawn_clients_epsilon_is_the_numerical_one(sigma, drawn, rounds):
    assert epsilon(sigma, drawn, rounds, DELTA) == pytest.approx(of_drawn_gaussian(sigma, drawn, rounds), rel=0.01)


def test_the_accountant_written_here_has_the_closed_form_as_its_limit():
    assert of_drawn_gaussian(2.0, 1.0, 6) == pytest.approx(of_gaussian(2.0, 6), rel=1e-3)
    assert len(FULL) + len(DRAWN) == 20


def test_more_noise_fewer_rounds_and_rarer_draws_cost_less():
    costs = [epsilon(*setting, DELTA) for setting in ((1.0, 1.0, 4), (1.0, 0.5, 4), (1.0, 0.5, 2), (2.0, 0.5, 2))]
    assert costs == sorted(costs, reverse=True)


@given(st.integers(0, 2**31))
def test_deviations_are_zero_for_even_use_and_lead_back_to_the_shares(seed):
    counts = torch.from_numpy(np.random.default_rng(seed).multinomial(600, [1 / 5] * 5, size=3))
    shares = counts.double() / 600
    torch.testing.assert_close(shares_from(deviation(counts, 600)), shares, rtol=1e-9, atol=1e-9)
    assert deviation(torch.full((3, 5), 120), 600).abs().max() < 1e-15
    relative = shares * 5 - 1
    assert float(deviation(counts, 600).norm()) == pytest.approx(float(relative.square().mean().sqrt()), rel=1e-6)


def test_noise_has_the_deviation_asked_for_and_its_own_seed():
    total = torch.full((200, 100), 3.0, dtype=torch.float64)
    once, again = (noisy(total, 2.5, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(once, again)
    assert float(once.mean()) == pytest.approx(3.0, abs=0.1) and float(once.std()) == pytest.approx(2.5, rel=0.02)
