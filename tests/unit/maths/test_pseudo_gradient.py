"""Each mode where its assumption holds, its size, its knobs; the layer-level laws are in laws/test_method_laws.py."""

from types import SimpleNamespace
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
    missing_pairs,
    parameter_signal,
    routing_mass,
    scale_gradient,
    self_ipw,
    server,
    straight_through,
    unit_rows,
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


@given(seeds, st.floats(1e-6, 1e6))
@few
def test_server_has_the_active_experts_norm_times_rho_and_the_share_missed(seed: int, length: float) -> None:
    mass, grads, update = random_mass(seed, starved=1), normal(M, *SHAPE, seed=seed), normal(M, *SHAPE, seed=seed + 1)
    signal = server(grads, mass, unit_rows(update))
    scale = sum(grads[i].norm() for i in range(1, M)) / (M - 1)
    for i in range(M):
        expected = 0.6 * mass.missing[i] / (mass.missing[i] + mass.active[i]) * scale
        torch.testing.assert_close(signal[i].norm(), expected)
        torch.testing.assert_close(signal[i] / signal[i].norm(), -update[i] / update[i].norm())
    torch.testing.assert_close(
        server(grads, mass, unit_rows(length * update)), signal
    )  # the update's length is dropped


def test_server_is_silent_for_experts_the_others_did_not_move() -> None:
    mass, grads, update = random_mass(0), normal(M, *SHAPE, seed=1), normal(M, *SHAPE, seed=2)
    update[3] = 0
    signal = server(grads, mass, unit_rows(update))
    assert not signal[3].any() and signal.isfinite().all() and signal[2].any()


@pytest.mark.parametrize("mode", ["client_mean", "self_ipw", "server"])
def test_a_step_in_which_no_expert_was_active_gets_no_signal(mode: Any) -> None:
    mass = Mass(torch.zeros(M), torch.ones(M), torch.ones(M))
    signal = parameter_signal(PseudoGradient(mode), torch.zeros(M, *SHAPE), mass, torch.ones(M, *SHAPE))
    assert torch.equal(signal, torch.zeros(M, *SHAPE))


@pytest.mark.parametrize("mode", ["client_mean", "self_ipw", "server"])
@given(seeds, st.floats(0, 3))
@few
def test_signals_are_proportional_to_strength_and_to_rho(mode: Any, seed: int, strength: float) -> None:
    grads, update = normal(M, *SHAPE, seed=seed), normal(M, *SHAPE, seed=seed + 3)
    one = parameter_signal(PseudoGradient(mode), grads, random_mass(seed, rho=0.6), update)
    many = parameter_signal(PseudoGradient(mode, strength), grads, random_mass(seed, rho=0.6), update)
    half = parameter_signal(PseudoGradient(mode), grads, random_mass(seed, rho=0.3), update)
    torch.testing.assert_close(many, strength * one)
    torch.testing.assert_close(half, one / 2)


@pytest.mark.parametrize("mode", ["client_mean", "self_ipw", "server"])
def test_signals_of_experts_do_not_depend_on_their_order(mode: Any) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    mass, grads, update = random_mass(0, starved=1), normal(M, *SHAPE, seed=1), normal(M, *SHAPE, seed=2)
    other = Mass(mass.active[order], mass.missing[order], mass.scaled_missing[order])
    signal = parameter_signal(PseudoGradient(mode), grads, mass, update)
    torch.testing.assert_close(
        parameter_signal(PseudoGradient(mode), grads[order], other, update[order]), signal[order]
    )


def test_rho_is_larger_for_smaller_budgets_and_zero_where_nothing_is_missing() -> None:
    for sparsity in ("experts", "k_max", "inverse"):
        rhos = [PseudoGradient("client_mean", sparsity=sparsity).rho(k, 16, 8) for k in (1, 2, 4, 6, 8)]
        assert rhos == sorted(rhos, reverse=True) and len(set(rhos[1:])) == 4
    assert PseudoGradient("client_mean").rho(16, 16, 16) == 0
    assert PseudoGradient("client_mean").rho(4, 16, 8) == 0.75
    assert PseudoGradient("client_mean", sparsity="k_max").rho(8, 16, 8) == 0
    assert PseudoGradient("client_mean", sparsity="inverse", limit=3.0).rho(1, 16, 8) == 3
    assert PseudoGradient("oracle").rho(1, 16, 8) == 1


def test_all_missing_pairs_are_listed_and_a_fraction_of_them_is_drawn() -> None:
    chosen = torch.zeros(40, 9, dtype=torch.bool)
    chosen[:, :3] = True
    token, expert = missing_pairs(~chosen, 1.0, None)
    assert len(token) == 40 * 6 and (expert >= 3).all()
    drawn = [len(missing_pairs(~chosen, 0.3, torch.Generator().manual_seed(seed))[0]) for seed in range(50)]
    assert abs(sum(drawn) / 50 - 0.3 * 240) < 5 * (240 * 0.3 * 0.7 / 50) ** 0.5
    twice = [missing_pairs(~chosen, 0.3, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(twice[0][0], twice[1][0]) and torch.equal(twice[0][1], twice[1][1])
    assert not chosen[twice[0]].any()


def test_drawing_never_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    missing_pairs(torch.ones(3, 4, dtype=torch.bool), 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(AssertionError, match="generator of their own"):
        missing_pairs(torch.ones(3, 4, dtype=torch.bool), 0.5, None)


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
        (dict(mode="clientmean"), "pg_mode must be one of off, client_mean"),
        (dict(sparsity="k"), "pg_sparsity must be one of experts, k_max, inverse"),
        (dict(scope=("experts", "gate")), "pg_scope must be one of experts, router, hidden; got 'gate'"),
        (dict(scope=()), "pg_scope must name at least one"),
        (dict(fraction=0.0), r"pg_fraction must lie in \(0, 1\]"),
        (dict(fraction=1.5), r"pg_fraction must lie in \(0, 1\]"),
        (dict(strength=-0.1), "pg_strength must be >= 0"),
        (dict(limit=0.0), "pg_limit > 0"),
        (dict(mode="server", scope=("experts", "router")), "pg_scope must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    # in tests jaxtyping refuses a wrong word before our own check can speak, so that check is called by itself
    fields = SimpleNamespace(**(vars(PseudoGradient()) | settings))
    with pytest.raises(ValueError, match=message):
        PseudoGradient.__post_init__(fields)  # type: ignore[arg-type]


def test_only_modes_that_run_missing_experts_are_charged_for_them() -> None:
    assert PseudoGradient("sampled", fraction=0.2).pair_fraction == 0.2
    assert PseudoGradient("oracle").pair_fraction == 1.0
    assert PseudoGradient("oracle", strength=0.0).pair_fraction == 0.0
    for mode in ("off", "client_mean", "self_ipw", "server"):
        assert PseudoGradient(mode).pair_fraction == 0.0
