"""Candidates, phi and utilization: the identities of docs/equations.md as properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ubsmoe.maths.routing import (
    candidates,
    mass_ratio,
    modulate,
    phi_range_penalty,
    phi_target,
    phi_update,
    utilization,
)

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, st.integers(1, 9))
@few
def test_candidates_are_the_best_n_of_each_token(seed: int, n_p: int) -> None:
    logits = normal(5, 7, seed=seed)
    chosen = candidates(logits, n_p)
    assert (chosen.sum(-1) == min(n_p, 7)).all()
    for row, mask in zip(logits, chosen, strict=True):
        assert mask.all() or row[mask].min() > row[~mask].max()


@given(seeds, st.integers(1, 7))
@few
def test_phi_moves_candidates_by_itself_and_nothing_else(seed: int, n_p: int) -> None:
    logits, phi = normal(5, 7, seed=seed), normal(7, seed=seed + 1)
    moved = modulate(logits, phi, n_p)
    for t in range(5):
        best = sorted(range(7), key=lambda i: logits[t, i].item())[-n_p:]
        for i in range(7):
            assert moved[t, i] == (logits[t, i] + phi[i] if i in best else logits[t, i])


def test_a_phi_of_zero_changes_no_bit() -> None:
    logits = normal(5, 7, seed=0)
    for n_p in (1, 4, 7):
        assert torch.equal(modulate(logits, torch.zeros(7), n_p), logits)


def test_modulation_is_differentiable_in_logits_and_phi() -> None:
    logits, phi = normal(3, 5, seed=0).requires_grad_(), normal(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, f: modulate(s, f, 2), (logits, phi))
    modulate(logits, phi, 2).sum().backward()
    assert phi.grad is not None and torch.equal(phi.grad, candidates(logits, 2).sum(0).double())


def test_modulation_keeps_the_dtype_of_the_logits() -> None:
    assert modulate(torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(3), 2).dtype == torch.bfloat16


@st.composite
def federations(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts [C, M] from real choices, tokens [C], K [C], data shares [C]."""
    num_experts, clients = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    counts, tokens, top_ks = [], [], []
    for _ in range(clients):
        n, k = draw(st.integers(1, 20)), draw(st.integers(1, num_experts))
        index = normal(n, num_experts, seed=draw(seeds)).topk(k).indices
        counts.append(torch.bincount(index.reshape(-1), minlength=num_experts))
        tokens.append(n)
        top_ks.append(k)
    shares = torch.tensor(draw(st.lists(st.integers(1, 50), min_size=clients, max_size=clients))).double()
    return torch.stack(counts), torch.tensor(tokens), torch.tensor(top_ks), shares / shares.sum()


@given(federations())
@few
def test_utilization_sums_to_the_mean_budget_and_its_mean_is_u_star(federation: tuple[Tensor, ...]) -> None:
    counts, tokens, top_ks, shares = federation
    used = sum(p * utilization(a, int(n)) for p, a, n in zip(shares, counts, tokens, strict=True))
    assert isinstance(used, Tensor)
    mean_k = (shares * top_ks).sum()
    torch.testing.assert_close(used.sum(), mean_k)  # sum_i u_i = K_bar
    torch.testing.assert_close(used.mean(), mean_k / counts.shape[1])  # u* = K_bar / M
    for a, n, k in zip(counts, tokens, top_ks, strict=True):
        share = utilization(a, int(n))
        torch.testing.assert_close(share.sum(), k.double())  # sum_i p_{c,i} = K_c
        assert (share <= 1).all()


def test_utilization_of_no_tokens_is_zero() -> None:
    assert torch.equal(utilization(torch.zeros(2, 3, dtype=torch.int64), 0), torch.zeros(2, 3).double())


@given(federations())
@few
def test_targets_lie_in_their_range_and_fall_with_use(federation: tuple[Tensor, ...]) -> None:
    counts, tokens, _, shares = federation
    used = (shares[:, None] * counts / tokens[:, None]).sum(0)
    target = phi_target(used)
    assert (target > -0.7616).all() and (target <= 1).all()
    for i in range(len(used)):
        for j in range(len(used)):
            if used[i] < used[j] - 1e-9:
                assert target[i] >= target[j]
                assert target[i] > target[j] or target[i] > 1 - 1e-9  # tanh saturates
    above = used > used.mean() * (1 + 1e-3)
    assert (target[above] < 0).all()
    assert (target[used < used.mean() * (1 - 1e-3)] > 0).all()


def test_targets_of_an_example_worked_by_hand() -> None:
    # u* = 1; an expert used twice as much gets tanh(1/2 - 1), a fair one 0, a starved one 1
    target = phi_target(torch.tensor([[2.0, 1.0, 0.0]]).double(), epsilon=1e-6)
    torch.testing.assert_close(target, torch.tensor([[math.tanh(-0.5), 0.0, 1.0]]).double(), atol=1e-5, rtol=0)


def test_layers_do_not_mix() -> None:
    used = torch.tensor([[1.0, 3.0], [50.0, 50.0]])
    both = phi_target(used)
    assert torch.equal(both[0], phi_target(used[0])) and torch.equal(both[1], phi_target(used[1]))
    assert both[1].abs().max() < 1e-5


@given(st.floats(0, 1, exclude_max=True), seeds)
@few
def test_the_update_weighs_the_old_phi_by_momentum_and_stays_in_range(momentum: float, seed: int) -> None:
    phi, target = normal(2, 5, seed=seed).tanh(), normal(2, 5, seed=seed + 1).tanh()
    new = phi_update(phi, target, momentum)
    torch.testing.assert_close(new, phi * momentum + target * (1 - momentum))
    assert (new <= torch.maximum(phi, target) + 1e-12).all() and (new >= torch.minimum(phi, target) - 1e-12).all()


def test_repeated_updates_converge_to_a_steady_target() -> None:
    target = torch.tensor([[0.5, -0.7]])
    phi = torch.zeros_like(target)
    for _ in range(10):
        phi = phi_update(phi, target, 0.9)
    torch.testing.assert_close(phi, target * (1 - 0.9**10))


def test_the_range_penalty_is_zero_inside_and_quadratic_outside() -> None:
    phi = torch.tensor([[-1.5, -1.0, 0.0], [1.0, 3.0, 0.5]], requires_grad=True)
    penalty = phi_range_penalty(phi, -1.0, 1.0)
    assert penalty.item() == pytest.approx(0.5**2 + 2.0**2)
    (grad,) = torch.autograd.grad(penalty, phi)
    assert grad.tolist() == [[-1.0, 0.0, 0.0], [0.0, 4.0, 0.0]]


@given(seeds, st.integers(1, 4))
@few
def test_mass_ratio_restores_the_mass_of_the_full_budget(seed: int, top_k: int) -> None:
    scores = normal(5, 7, seed=seed).softmax(-1)
    chosen = scores.topk(top_k).indices
    ratio = mass_ratio(scores, 4, chosen)
    restored = (scores.gather(1, chosen) * ratio).sum(-1)
    torch.testing.assert_close(restored, scores.topk(4).values.sum(-1))
    assert (ratio >= 1 - 1e-12).all()
