"""UB-SMoE's parts: what a round does to phi, what a client does with it, where the pseudo-gradient enters."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from methods.laboratory import aggregated
from ubsmoe.client.train import language_loss
from ubsmoe.messages import Update
from ubsmoe.methods import build
from ubsmoe.methods.method import State
from ubsmoe.methods.modulation import ModulationState

LOW, TOP = 0, 3  # tiers: K = 1 and K = 3 of 6 experts
BATCH = {
    "input_ids": torch.tensor([[3, 9, 4, 7, 8], [5, 6, 11, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, 9, 4, 7, 8], [-100, 6, 11, -100, -100]]),
}


@pytest.fixture
def install(lab, install):
    """UB-SMoE of these settings on the base, as a client of a tier would get it; gives the hooks."""
    return lambda settings, state=None, tier=LOW: install(build("ubsmoe", lab.shape, settings), tier, state)


@pytest.fixture
def one_layer(lab):
    """A method for one layer of four experts, K_max 2."""
    return lambda **settings: build("ubsmoe", replace(lab.shape, num_layers=1, num_experts=4, k_max=2), settings)


def update(counts: list[int], top_k: int, examples: int, value: float = 0.0, **extras: Tensor) -> Update:
    adapters = {"layers.0.up.A": torch.full((4, 1, 1), value)}
    assignments = sum(counts)
    return Update(
        "c", 1, examples, adapters, torch.tensor([counts]), assignments // top_k, assignments, 1.0, 1.0, extras
    )


def modulation(phi: Tensor) -> ModulationState:
    return ModulationState(phi, torch.zeros_like(phi))


def state(*phi: float) -> State:
    return State({"layers.0.up.A": torch.full((4, 1, 1), 9.0)}).having(modulation(torch.tensor([phi])))


# u = 3/4 (1, 0, 0, 0) + 1/4 (0, 1, 1, 0), and u* = 1.25 / 4
TARGET = torch.tensor([[math.tanh(0.3125 / 0.75 - 1), math.tanh(0.25), math.tanh(0.25), 1.0]])


def test_a_round_moves_phi_by_the_clients_shares_whatever_their_budgets(one_layer):
    method = one_layer(dmr={"momentum": 0.25}, pg=False)
    clients = [update([4, 0, 0, 0], 1, examples=3), update([0, 10, 10, 0], 2, examples=1)]
    after = aggregated(method, state(0.8, 0.0, 0.0, -0.4), clients)
    torch.testing.assert_close(after.of(ModulationState).utilization, torch.tensor([[0.75, 0.25, 0.25, 0.0]]))
    expected = 0.25 * torch.tensor([[0.8, 0.0, 0.0, -0.4]]) + 0.75 * TARGET
    torch.testing.assert_close(after.of(ModulationState).phi, expected, atol=1e-5, rtol=0)


def test_where_clients_train_phi_their_mean_takes_the_place_of_the_old_one(one_layer):
    method = one_layer(dmr={"momentum": 0.25, "phi": "trained"}, pg=False)
    own = torch.tensor([[0.4, 0.0, 0.8, 0.0]]), torch.tensor([[0.0, 0.8, 0.0, -0.8]])
    clients = [update([4, 0, 0, 0], 1, 3, phi=own[0]), update([0, 10, 10, 0], 2, 1, phi=own[1])]
    after = aggregated(method, state(7.0, 7.0, 7.0, 7.0), clients)
    expected = 0.25 * (0.75 * own[0] + 0.25 * own[1]) + 0.75 * TARGET
    torch.testing.assert_close(after.of(ModulationState).phi, expected, atol=1e-5, rtol=0)


def test_activation_weighs_an_expert_by_the_share_of_a_clients_tokens_that_used_it(one_layer):
    method = one_layer(dmr=False, pg=False, averaging={"rule": "activation"})
    clients = [update([2, 2, 0, 0], 1, examples=1, value=0.0), update([4, 2, 2, 0], 2, examples=2, value=3.0)]
    after = aggregated(method, State(state(0.0).adapters), clients).adapters["layers.0.up.A"].flatten()
    # shares of the tokens 1/2, 1/2, 0, 0 and 1, 1/2, 1/2, 0, times 1 and 2 examples
    torch.testing.assert_close(after, torch.tensor([3 * 2 / 2.5, 3 * 1 / 1.5, 3.0, 9.0]))


def test_what_the_server_saw_is_not_sent(lab):
    method = build("ubsmoe", lab.shape)
    warm = lab.warm(method)
    assert warm.of(ModulationState).utilization.any()
    assert method.dispatch(warm, lab.profile(method, LOW)).keys() == warm.adapters.keys() | {"phi"}


@pytest.mark.parametrize(("asked", "num_candidates"), [(None, 6), (4, 4)])
def test_phi_reaches_every_layer_with_its_number_of_candidates(lab, model, install, asked, num_candidates):
    phi = torch.linspace(-1, 1, 12).reshape(2, 6)
    start = lab.warm(build("fedavg", lab.shape)).having(modulation(phi))
    install({"pg": False, "dmr": {"num_candidates": asked}}, start)
    for layer in model.layers:
        assert torch.equal(layer.routing.phi, phi[layer.index]) and layer.routing.num_candidates == num_candidates


def test_a_trained_phi_has_a_gradient_a_penalty_outside_its_range_and_comes_back(lab, model, install):
    phi = torch.zeros(2, 6)
    phi[0, 1], phi[1, 4] = 1.5, -3.0
    start = lab.warm(build("fedavg", lab.shape)).having(modulation(phi))
    hooks = install({"pg": False, "dmr": {"phi": "trained", "phi_penalty": 0.1, "phi_min": -2.0}}, start, TOP)
    (trained,) = hooks.parameters
    (penalty,) = hooks.penalties
    assert penalty().item() == pytest.approx(0.1 * (0.5**2 + 1.0**2))
    language_loss(model, BATCH).backward()
    assert trained.grad.abs().sum() > 0
    trained.data.add_(1.0)
    assert torch.equal(hooks.extras()["phi"], phi + 1)


def test_the_pseudo_gradient_is_added_once_a_step_before_the_optimiser(lab, model, install):
    """client_mean by hand: g_i + strength rho missing_i mean_j (g_j / active_j), rho = 1 - K / M."""
    hooks = install({"dmr": False, "pg": {"strength": 0.5}}, lab.warm(build("fedavg", lab.shape)))
    (add_signal,), seen = hooks.before_step, []
    for _ in range(2):  # masses start anew in every step
        for parameter in model.adapter.values():
            parameter.grad = None
        language_loss(model, BATCH).backward()
        before = {name: parameter.grad.clone() for name, parameter in model.adapter.items()}
        mass = model.layers[1].observed.mass
        add_signal()
        assert all(layer.observed.mass is None for layer in model.layers)
        seen.append(model.adapter["layers.1.down.B"].grad.clone())
    assert torch.equal(seen[0], seen[1])
    grad, used = before["layers.1.down.B"], mass.active > 0
    mean = (grad[used] / mass.active[used, None, None]).mean(0)
    expected = grad + 0.5 * (1 - 1 / 6) * mass.missing[:, None, None] * mean
    torch.testing.assert_close(seen[0], expected)
    assert (seen[0][~used] != 0).any()
    assert torch.equal(model.adapter["layers.1.router"].grad, before["layers.1.router"])
