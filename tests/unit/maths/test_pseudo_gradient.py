"""Each mode where its assumption holds, its size, its knobs. Of a whole layer: tests/properties/test_pseudo_gradient.py."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ubsmoe.maths.pseudo_gradient import (
    Mass,
    PseudoGradient,
    client_mean,
    missing_assignments,
    parameter_signal,
    routing_mass,
    scale_gradient,
    self_ipw,
    straight_through,
)

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
M, SHAPE = 5, (3, 4)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mass(seed: int, rho: float = 0.6, starved: int = 0) -> Mass:
    active, missing = normal(M, seed=seed).abs() + 0.1, normal(M, seed=seed + 1).abs() + 0.1
    active[:starved] = 0
    return Mass(active, missing, rho * missing)


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


@given(seeds)
@few
def test_masses_equal_sums_by_hand_and_leave_padding_out(seed: int) -> None:
    weights = normal(6, M, seed=seed).softmax(-1)
    chosen = torch.zeros(6, M, dtype=torch.bool).scatter_(1, weights.topk(2).indices, True)
    real = torch.tensor([True, True, False, True, False, True])
    mass = routing_mass(weights, chosen, real, rho=0.25)
    for i in range(M):
        rows = [t for t in range(6) if real[t]]
        torch.testing.assert_close(mass.active[i], sum(weights[t, i] * chosen[t, i] for t in rows))
        torch.testing.assert_close(mass.missing[i], sum(weights[t, i] * ~chosen[t, i] for t in rows))
    torch.testing.assert_close(mass.scaled_missing, 0.25 * mass.missing)
    torch.testing.assert_close((mass.active + mass.missing).sum(), torch.tensor(4.0).double())  # softmax: 1 per token
    unpadded = routing_mass(weights[real], chosen[real], rho=0.25)
    torch.testing.assert_close(mass.active, unpadded.active)


def test_masses_of_micro_batches_add_up() -> None:
    weights = normal(6, M, seed=0).softmax(-1).requires_grad_()
    chosen = torch.zeros(6, M, dtype=torch.bool).scatter_(1, weights.topk(2).indices, True)
    whole = routing_mass(weights, chosen, rho=0.5)
    parts = routing_mass(weights[:2], chosen[:2], rho=0.5) + routing_mass(weights[2:], chosen[2:], rho=0.5)
    for name in ("active", "missing", "scaled_missing"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
        assert not getattr(whole, name).requires_grad


@given(seeds)
@few
def test_client_mean_is_exact_when_all_experts_agree_per_mass(seed: int) -> None:
    mass, common = random_mass(seed, rho=1.0), normal(*SHAPE, seed=seed + 2)
    torch.testing.assert_close(client_mean(column(mass.active) * common, mass), column(mass.missing) * common)


@given(seeds)
@few
def test_self_ipw_is_exact_when_an_experts_gradient_is_proportional_to_its_mass(seed: int) -> None:
    mass, own = random_mass(seed, rho=1.0), normal(M, *SHAPE, seed=seed + 2)
    torch.testing.assert_close(self_ipw(column(mass.active) * own, mass, limit=1e9), column(mass.missing) * own)


def test_self_ipw_bounds_the_ratio_and_puts_rho_in_front_of_it() -> None:
    mass = Mass(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 50.0, 3.0]), 0.5 * torch.tensor([2.0, 50.0, 3.0]))
    grads = torch.tensor([[1.0], [2.0], [0.0]])
    # 0.5 min(2, 10) 1; 0.5 min(50, 10) 2; never active: 0.5 * 3 * mean(1/1, 2/1)
    assert self_ipw(grads, mass, limit=10.0).tolist() == [[1.0], [10.0], [2.25]]


@given(seeds, st.integers(1, M - 1))
@few
def test_self_ipw_falls_back_to_client_mean_where_an_expert_was_never_active(seed: int, starved: int) -> None:
    mass, grads = random_mass(seed, starved=starved), normal(M, *SHAPE, seed=seed)
    grads[:starved] = 0
    assert torch.equal(self_ipw(grads, mass, 10.0)[:starved], client_mean(grads, mass)[:starved])
    mean = sum(grads[i] / mass.active[i] for i in range(starved, M)) / (M - starved)
    torch.testing.assert_close(client_mean(grads, mass), column(mass.scaled_missing) * mean)


@pytest.mark.parametrize("mode", ["client_mean", "self_ipw"])
def test_a_step_in_which_no_expert_was_active_gets_no_signal(mode: Any) -> None:
    mass = Mass(torch.zeros(M), torch.ones(M), torch.ones(M))
    signal = parameter_signal(PseudoGradient(mode), torch.zeros(M, *SHAPE), mass)
    assert torch.equal(signal, torch.zeros(M, *SHAPE))


@pytest.mark.parametrize("mode", ["client_mean", "self_ipw"])
@given(seeds, st.floats(0, 3))
@few
def test_signals_are_proportional_to_strength_and_to_rho(mode: Any, seed: int, strength: float) -> None:
    grads = normal(M, *SHAPE, seed=seed)
    one = parameter_signal(PseudoGradient(mode, 1.0), grads, random_mass(seed, rho=0.6))
    many = parameter_signal(PseudoGradient(mode, strength), grads, random_mass(seed, rho=0.6))
    half = parameter_signal(PseudoGradient(mode, 1.0), grads, random_mass(seed, rho=0.3))
    torch.testing.assert_close(many, strength * one)
    torch.testing.assert_close(half, one / 2)


@pytest.mark.parametrize("mode", ["client_mean", "self_ipw"])
def test_signals_of_experts_do_not_depend_on_their_order(mode: Any) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    mass, grads = random_mass(0, starved=1), normal(M, *SHAPE, seed=1)
    other = Mass(mass.active[order], mass.missing[order], mass.scaled_missing[order])
    signal = parameter_signal(PseudoGradient(mode), grads, mass)
    torch.testing.assert_close(parameter_signal(PseudoGradient(mode), grads[order], other), signal[order])


def test_rho_is_larger_for_smaller_budgets_and_zero_where_nothing_is_missing() -> None:
    rhos = [PseudoGradient("client_mean").rho(k, 16) for k in (1, 2, 4, 6, 8)]
    assert rhos == sorted(rhos, reverse=True) and len(set(rhos)) == 5
    assert PseudoGradient("client_mean").rho(16, 16) == 0
    assert PseudoGradient("client_mean").rho(4, 16) == 0.75
    assert PseudoGradient("oracle").rho(1, 16) == 1


def test_all_missing_assignments_are_listed_and_a_fraction_of_them_is_drawn() -> None:
    chosen = torch.zeros(40, 9, dtype=torch.bool)
    chosen[:, :3] = True
    token, expert = missing_assignments(~chosen, 1.0, None)
    assert len(token) == 40 * 6 and (expert >= 3).all()
    drawn = [len(missing_assignments(~chosen, 0.3, torch.Generator().manual_seed(seed))[0]) for seed in range(50)]
    assert abs(sum(drawn) / 50 - 0.3 * 240) < 5 * (240 * 0.3 * 0.7 / 50) ** 0.5
    twice = [missing_assignments(~chosen, 0.3, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(twice[0][0], twice[1][0]) and torch.equal(twice[0][1], twice[1][1])
    assert not chosen[twice[0]].any()


def test_drawing_never_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    missing_assignments(torch.ones(3, 4, dtype=torch.bool), 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(AssertionError, match="generator of their own"):
        missing_assignments(torch.ones(3, 4, dtype=torch.bool), 0.5, None)


def test_straight_through_keeps_every_bit_and_adds_the_gradient() -> None:
    value, signal = normal(4, 3, seed=0).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    out = straight_through(value, 1e9 * signal.square())
    assert torch.equal(out, value)
    out.sum().backward()
    assert value.grad is not None and signal.grad is not None
    assert torch.equal(value.grad, torch.ones(4, 3).double())
    torch.testing.assert_close(signal.grad, 2e9 * signal.detach())


def test_scale_gradient_keeps_every_bit_and_scales_row_by_row() -> None:
    value, factor = normal(4, 3, seed=0).requires_grad_(), torch.tensor([[1.0], [0.0], [2.5], [-1.0]])
    out = scale_gradient(value, factor)
    assert torch.equal(out, value)
    out.backward(torch.ones(4, 3).double())
    assert value.grad is not None and torch.equal(value.grad, factor.double().expand(4, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mode="clientmean"), "mode\n.*should be 'off', 'client_mean'"),
        (dict(mode="server"), "mode\n.*should be 'off', 'client_mean'"),  # removed
        (dict(scope=("experts", "gate")), "scope.1\n.*should be 'experts', 'router' or 'hidden'"),
        (dict(scope=()), "scope\n.*at least 1 item"),
        (dict(fraction=0.0), "fraction\n.*greater than 0"),
        (dict(fraction=1.5), "fraction\n.*less than or equal to 1"),
        (dict(strength=-0.1), "strength\n.*greater than or equal to 0"),
        (dict(limit=0.0), "limit\n.*greater than 0"),
        (dict(limit=float("inf")), "limit\n.*finite"),
        (dict(sparsity="k_max"), "sparsity\n.*[Uu]nexpected"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PseudoGradient(**settings)


def test_an_empty_section_means_the_methods_defaults() -> None:
    assert PseudoGradient() == PseudoGradient("client_mean", 0.3, ("experts",), fraction=0.1, limit=10.0)


def test_only_modes_that_run_missing_experts_are_charged_for_them() -> None:
    assert PseudoGradient("sampled", fraction=0.2).pair_fraction == 0.2
    assert PseudoGradient("oracle").pair_fraction == 1.0
    assert PseudoGradient("oracle", strength=0.0).pair_fraction == 0.0
    for mode in ("off", "client_mean", "self_ipw"):
        assert PseudoGradient(mode).pair_fraction == 0.0
