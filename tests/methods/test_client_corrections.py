"""FedProx and SCAFFOLD: the laws that follow from their algorithms, on clients that really train."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.laboratory import TOP, Lab, aggregated
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.data.tokens import Tokens
from ubsmoe.messages import Task, Update
from ubsmoe.methods import build
from ubsmoe.methods.hooks import Hooks
from ubsmoe.methods.method import Method, State
from ubsmoe.methods.scaffold import ControlState
from ubsmoe.storage.client_memory import ClientMemory

SGD = TrainSettings(
    local_steps=3, batch_size=2, optimizer="sgd", momentum=0.0, learning_rate=0.2, clip_norm=None, schedule="linear"
)
ADAMW = TrainSettings(local_steps=3, batch_size=2, learning_rate=1e-2)
SIZES = (5, 2, 9, 4)


def examples(client: int) -> list[Tokens]:
    """Data of its own for each client, so that clients pull apart."""
    step = 3 + 2 * client
    return [Tokens(tuple(2 + (step * i + j * step) % 30 for j in range(4 + i % 3)), 2) for i in range(SIZES[client])]


def work(lab: Lab, method: Method, state: State, number: int, client: int, how: TrainSettings, memory: Any) -> Update:
    profile = replace(lab.profile(method, TOP, f"client-{client}"), num_examples=SIZES[client])
    trainer = Trainer(lab.model, method, how, TierSettings(), seed=0, pad_id=0, memory=memory)
    return train(trainer, Task(number, profile, method.dispatch(state, profile)), examples(client))


def rounds(lab: Lab, method: Method, how: TrainSettings, count: int = 2, clients: int = 4, memory: Any = None) -> State:
    state = lab.start(method)
    for number in range(1, count + 1):
        state = aggregated(method, state, [work(lab, method, state, number, i, how, memory) for i in range(clients)])
    return state


def equal(left: Any, right: Any) -> None:
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("how", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_fedprox_with_mu_0_is_fedavg_bit_for_bit(lab: Lab, how: TrainSettings) -> None:
    plain, prox = (
        rounds(lab, build(name, lab.shape, own), how) for name, own in (("fedavg", {}), ("fedprox", {"mu": 0}))
    )
    equal(plain.adapters, prox.adapters)


def test_the_larger_mu_the_nearer_a_client_stays(lab: Lab) -> None:
    """At mu eta = 1 each step of plain SGD goes back to the start and on by one gradient, however many steps there are."""

    def distance(mu: float, steps: int) -> float:
        how = SGD.model_copy(update={"local_steps": steps, "schedule": "constant"})
        method = build("fedprox", lab.shape, {"mu": mu})
        state = lab.warm(method)
        after = work(lab, method, state, 1, 2, how, None).adapters
        return sum(float((after[name] - value).square().sum()) for name, value in state.adapters.items()) ** 0.5

    free, held, pinned = (distance(mu, 6) for mu in (0.0, 2.5, 5.0))
    assert free > held > pinned and pinned < 2 * distance(5.0, 1) < free


@pytest.mark.parametrize("how", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_scaffold_with_one_client_is_local_training(lab: Lab, tmp_path: Path, how: TrainSettings) -> None:
    """c and its only c_c are equal in every round: nothing to correct."""
    plain = rounds(lab, build("fedavg", lab.shape), how, count=3, clients=1)
    corrected = rounds(lab, build("scaffold", lab.shape), how, 3, 1, ClientMemory(tmp_path, 3))
    for name, value in plain.adapters.items():
        torch.testing.assert_close(corrected.adapters[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_servers_variate_is_the_mean_of_the_clients(lab: Lab, tmp_path: Path, how: TrainSettings) -> None:
    memory = ClientMemory(tmp_path, 3)
    shape = replace(lab.shape, num_clients=4)
    state = rounds(lab, build("scaffold", shape), how, 3, 4, memory)
    kept = [memory.recall(f"client-{i}") for i in range(4)]
    for name, common in state.of(ControlState).control.items():
        mean = sum(size / sum(SIZES) * own[name] for size, own in zip(SIZES, kept, strict=True))
        torch.testing.assert_close(common, mean, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(kept[0][name], kept[2][name], atol=1e-4) for name in kept[0])


def test_of_eight_clients_four_move_the_servers_variate_half_as_far(lab: Lab, tmp_path: Path) -> None:
    all_, half = (
        rounds(
            lab, build("scaffold", replace(lab.shape, num_clients=n)), SGD, 1, memory=ClientMemory(tmp_path / str(n), 3)
        )
        for n in (4, 8)
    )
    for name, value in all_.of(ControlState).control.items():
        torch.testing.assert_close(half.of(ControlState).control[name], value / 2)


def test_a_client_steps_along_its_gradient_corrected_and_keeps_the_gradients_mean(lab: Lab, tmp_path: Path) -> None:
    """Algorithm 1 by hand: the gradients that the optimiser saw, the steps that follow from them, option II."""
    method, memory = build("scaffold", replace(lab.shape, num_clients=4)), ClientMemory(tmp_path, 3)
    state = rounds(lab, method, SGD, 1, 4, memory)
    own, common = memory.recall("client-2"), state.of(ControlState).control
    seen: list[dict[str, Tensor]] = []

    def install(model: Any, *given: Any) -> Hooks:
        def look() -> None:
            seen.append({name: value.grad.clone() for name, value in model.adapter.items()})

        return method.install(model, *given).and_then(Hooks(before_step=[look]))

    update = work(lab, replace(method, install=install), state, 2, 2, SGD, memory)
    rates = [0.2 * (1 - (1 + step / 3) / SGD.rounds) for step in range(3)]
    for name, x in state.adapters.items():
        gradient = sum(rate * grads[name] for rate, grads in zip(rates, seen, strict=True)) / sum(rates)
        torch.testing.assert_close(
            update.adapters[name], x - sum(rates) * (gradient - own[name] + common[name]), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(memory.recall("client-2")[name], gradient, rtol=1e-3, atol=1e-5)
    assert float(update.extras["rate"]) == pytest.approx(sum(rates))


def test_no_server_can_send_what_is_a_clients_own(lab: Lab, tmp_path: Path) -> None:
    method = build("scaffold", lab.shape)
    state = lab.warm(method)
    profile = replace(lab.profile(method, TOP, "client-0"), num_examples=5)
    payload = method.dispatch(state, profile)
    planted = payload | {f"own.{name}": torch.ones_like(value) for name, value in state.adapters.items()}
    honest, misled = (
        train(Trainer(lab.model, method, SGD, TierSettings(), 0, 0, memory=memory), Task(1, profile, sent), examples(0))
        for sent, memory in ((payload, ClientMemory(tmp_path / "a", 3)), (planted, ClientMemory(tmp_path / "b", 3)))
    )
    equal(honest.adapters, misled.adapters)
