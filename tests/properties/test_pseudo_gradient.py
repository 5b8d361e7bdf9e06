"""What the method's text claims of one layer, shown on a small one in float64 against autograd through a dense mixture.

dense gradient = sparse gradient + missing gradient,   B_i = -(1 - p_i) E[grad_i | i not in A],   sum_i p_i = K
"""

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from ubsmoe.maths.pseudo_gradient import PseudoGradient, client_mean, routing_mass, self_ipw
from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel_choice import run_assignments
from unit.model.small_layer import EXPERTS, HIDDEN, RANK, TOKENS, WIDTH, SmallLayer, normal, random_factors

pytestmark = pytest.mark.usefixtures("each_kernel")
every_layout = pytest.mark.parametrize("layout", oracles.LAYOUTS)
PARTS = ("experts", "router", "hidden")
SCOPES = [scope for size in (1, 2, 3) for scope in combinations(PARTS, size)]
MODES = [
    PseudoGradient(mode, 1.0, scope, fraction=0.5)
    for mode in ("client_mean", "self_ipw", "sampled", "oracle")
    for scope in SCOPES
]
few = settings(max_examples=30, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every_layout
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_without_pseudo_gradient_the_gradient_is_that_of_the_sparse_mixture(layout: str, top_k: int) -> None:
    small = SmallLayer(layout, top_k)
    p, chosen = small.scores()
    assert_same(small.gradients(None), small.oracle_gradients(p * chosen))


@every_layout
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sparse_plus_missing_is_the_dense_gradient_for_parameters_router_and_hidden(layout: str, top_k: int) -> None:
    small = SmallLayer(layout, top_k)
    p, chosen = small.scores()
    dense = small.oracle_gradients(p)
    assert_same(small.gradients(PseudoGradient("oracle", 1.0, PARTS)), dense)
    missing = oracles.missing_gradient(
        small.experts, small.factors, small.seen_by_experts, (p * ~chosen).detach(), small.delta
    )
    sparse = small.gradients(None)
    assert_same([a + b for a, b in zip(sparse, missing, strict=False)], dense[:4])
    assert all(part.norm() > 1e-3 for part in missing)


@pytest.mark.parametrize("layout", ["gated", "transposed"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_gives_the_dense_gradient_to_what_it_names_and_leaves_the_rest_sparse(layout: str, scope: Any) -> None:
    small = SmallLayer(layout, 2)
    p, chosen = small.scores()
    sparse, dense = small.oracle_gradients(p * chosen), small.oracle_gradients(p)
    # the router's own input follows the router's logits
    owner = ["experts"] * 4 + ["router", "router", "hidden"]
    for strength in (1.0, 0.3):
        expected = [
            s + strength * (d - s) if part in scope else s for part, s, d in zip(owner, sparse, dense, strict=True)
        ]
        assert_same(small.gradients(PseudoGradient("oracle", strength, scope)), expected)


def test_a_renormalising_family_weighs_the_missing_in_the_units_of_its_own_weights() -> None:
    small = SmallLayer("gated", 2, renormalise=True)
    p, chosen = small.scores()
    unit = 1 / (p * chosen).sum(-1, keepdim=True)
    sparse = p * chosen * unit
    assert_same(small.gradients(None), small.oracle_gradients(sparse))
    expected = small.oracle_gradients(sparse + p * ~chosen * unit.detach())
    assert_same(small.gradients(PseudoGradient("oracle", 1.0, PARTS)), expected)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_bias_of_an_experts_gradient_is_the_missed_share_times_what_it_missed(top_k: int) -> None:
    small = SmallLayer("gated", top_k)
    p, chosen = small.scores()
    full = small.gradients(PseudoGradient("oracle", 1.0))[:4]
    bias = [(sparse - dense) / TOKENS for sparse, dense in zip(small.gradients(None), full, strict=False)]
    active_share = chosen.double().mean(0)
    torch.testing.assert_close(active_share.sum(), torch.tensor(float(top_k)).double())  # sum_i p_{c,i} = K_c
    for i in range(EXPERTS):
        inactive = [t for t in range(TOKENS) if not chosen[t, i]]
        if not inactive:
            assert not any(b[i].any() for b in bias)
            continue
        total = [torch.zeros_like(b) for b in bias]
        for t in inactive:
            only = torch.zeros_like(p)
            only[t, i] = p[t, i].detach()
            grads = oracles.missing_gradient(small.experts, small.factors, small.seen_by_experts, only, small.delta)
            total = [a + b for a, b in zip(total, grads, strict=True)]
        for b, t in zip(bias, total, strict=True):
            expected = -(1 - active_share[i]) * t[i] / len(inactive)
            torch.testing.assert_close(b[i], expected, rtol=1e-10, atol=1e-12)


@given(st.integers(2, 9), st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**31))
@few
def test_the_bound_on_the_bias_is_smallest_at_uniform_use(experts: int, top_k: int, tokens: int, seed: int) -> None:
    top_k = min(top_k, experts)
    chosen = normal(tokens, experts, seed=seed).topk(top_k).indices
    p = torch.bincount(chosen.reshape(-1), minlength=experts).double() / tokens
    lowest = (experts - top_k) ** 2 / experts
    assert lowest - 1e-9 <= (1 - p).square().sum().item() <= (1 - p).sum().item() + 1e-9
    assert (1 - p).sum().item() == pytest.approx(experts - top_k)
    uniform = torch.full((experts,), top_k / experts).double()
    assert (1 - uniform).square().sum().item() == pytest.approx(lowest)


@every_layout
@pytest.mark.parametrize("renormalise", [False, True])
def test_no_mode_changes_a_bit_of_the_forward_pass(layout: str, renormalise: bool) -> None:
    small = SmallLayer(layout, 2, renormalise=renormalise)
    plain = small.output(None)
    for pseudo in MODES:
        y = small.output(pseudo, generator())
        assert torch.equal(y, plain), pseudo
        with torch.no_grad():
            assert torch.equal(small.output(pseudo, generator()), plain)


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_at_k_equal_m_nothing_is_missing_and_no_mode_adds_anything(settings: PseudoGradient) -> None:
    small = SmallLayer("gated", EXPERTS, k_max=EXPERTS)
    assert_same(small.gradients(settings, generator()), small.gradients(None))


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_each_mode_changes_only_what_its_scope_names(settings: PseudoGradient) -> None:
    small = SmallLayer("gated", 2)
    ours, plain = small.gradients(settings, generator()), small.gradients(None)
    owner = ["experts"] * 4 + ["router", "router", "hidden"]
    for part, one, other in zip(owner, ours, plain, strict=True):
        same = torch.allclose(one, other, rtol=1e-12, atol=1e-13)
        assert same == (part not in settings.scope), part


@pytest.mark.parametrize("mode", ["client_mean", "self_ipw"])
def test_hidden_and_router_scopes_of_cheap_modes_follow_their_formulas(mode: Any) -> None:
    small = SmallLayer("gated", 2)
    p, chosen = small.scores()
    rho = 1 - 2 / EXPERTS
    active = (p * chosen).sum(-1, keepdim=True)
    share = (p * ~chosen).sum(-1, keepdim=True) / active.detach()
    plain = small.gradients(None)
    hidden = small.gradients(PseudoGradient(mode, 0.5, ("hidden",)))[6]
    torch.testing.assert_close(hidden, plain[6] * (1 + 0.5 * rho * share.detach()))
    y = small.output(None).detach()  # an unseen expert answers like the mean of the active ones: y / active
    extra = torch.autograd.grad((0.5 * rho * share * y * small.delta).sum(), small.router.weight)[0]
    router = small.gradients(PseudoGradient(mode, 0.5, ("router",)))[4]
    torch.testing.assert_close(router, plain[4] + extra)


def test_sampled_is_the_oracle_at_fraction_one_and_draws_anew_below() -> None:
    small = SmallLayer("gated", 2)
    oracle = small.gradients(PseudoGradient("oracle", 1.0, PARTS))
    for one, other in zip(small.gradients(PseudoGradient("sampled", 1.0, PARTS, fraction=1.0)), oracle, strict=True):
        assert torch.equal(one, other)
    draws = generator(1)
    first, second = (small.gradients(PseudoGradient("sampled", 1.0, fraction=0.5), draws)[1] for _ in range(2))
    assert not torch.equal(first, second)


def test_sampled_is_unbiased() -> None:
    small, draws, repeats = SmallLayer("gated", 2), generator(1), 120
    settings = PseudoGradient("sampled", 1.0, PARTS, fraction=0.3)
    oracle = torch.cat([g.flatten() for g in small.gradients(PseudoGradient("oracle", 1.0, PARTS))])
    seen = torch.stack([torch.cat([g.flatten() for g in small.gradients(settings, draws)]) for _ in range(repeats)])
    error = (seen.mean(0) - oracle) / (seen.std(0) / repeats**0.5).clamp_min(1e-12)
    assert error.abs().max() < 5  # some 250 numbers, in standard errors
    assert 0.7 < error.square().mean() < 1.4


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_strength_zero_is_off(mode: PseudoGradient) -> None:
    zero = PseudoGradient(mode.mode, 0.0, mode.scope, fraction=0.5)
    small = SmallLayer("gated", 2)
    assert_same(small.gradients(zero, generator()), small.gradients(None))


class OneTokenManyTimes:
    """All tokens have one content and one delta, but go to different experts: J_i^T delta does not vary over them."""

    def __init__(self, layout: str, same_experts: bool) -> None:
        self.module = oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH)
        self.factors = random_factors(self.module)
        if same_experts:
            with torch.no_grad():
                for tensor in [*self.module.parameters(), *self.factors.leaves()]:
                    tensor.copy_(tensor[:1].expand_as(tensor).clone())
        self.hidden = normal(1, HIDDEN, seed=3).expand(TOKENS, -1).contiguous()
        self.delta = normal(1, HIDDEN, seed=4).expand(TOKENS, -1).contiguous()
        self.weights = normal(TOKENS, EXPERTS, seed=5).softmax(-1)
        index = self.weights.topk(2).indices
        self.chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, index, True)

    def gradients_and_mass(self) -> tuple[list[Tensor], Any]:
        token, expert = self.chosen.nonzero(as_tuple=True)
        lora = Lora(*self.factors.leaves(), scale=self.factors.scale)
        weight = self.weights[token, expert]
        y = run_assignments(self.hidden, token, expert, weight, ExpertWeights.of(self.module), lora)
        grads = list(torch.autograd.grad(y, self.factors.leaves(), self.delta))
        return grads, routing_mass(self.weights, self.chosen)

    def missing(self) -> list[Tensor]:
        weights = self.weights * ~self.chosen
        return oracles.missing_gradient(self.module, self.factors, self.hidden, weights, self.delta)


@every_layout
def test_self_ipw_equals_the_oracle_when_tokens_do_not_differ(layout: str) -> None:
    problem = OneTokenManyTimes(layout, same_experts=False)
    grads, mass = problem.gradients_and_mass()
    assert (mass.active > 0).all()
    assert_same([self_ipw(grad, mass, 1e9) for grad in grads], problem.missing())


@every_layout
def test_client_mean_equals_the_oracle_when_experts_do_not_differ_either(layout: str) -> None:
    problem = OneTokenManyTimes(layout, same_experts=True)
    grads, mass = problem.gradients_and_mass()
    assert_same([client_mean(grad, mass) for grad in grads], problem.missing())


def test_client_mean_of_b_points_along_the_truth_only_with_a_shared_a() -> None:
    """With independent A, gradients of B live in unrelated bases; with a shared A they are comparable."""
    cosines = {}
    for shared in (True, False):
        problem = OneTokenManyTimes("gated", same_experts=True)
        with torch.no_grad():
            a = normal(EXPERTS, RANK, WIDTH, seed=6)
            problem.factors.down_a.copy_(a[:1].expand_as(a) if shared else a)
            problem.factors.down_b.zero_()
        grads, mass = problem.gradients_and_mass()
        signal, truth = client_mean(grads[3], mass), problem.missing()[3]
        cosines[shared] = torch.cosine_similarity(signal.flatten(1), truth.flatten(1), dim=1)
    assert cosines[True].min() > 1 - 1e-9
    assert cosines[False].min() < 0.5
