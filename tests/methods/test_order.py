"""The order in which tensors come, and how they lie in memory, is no fact of a run: a message and a file keep neither."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from methods.laboratory import Lab, aggregated
from methods.test_battery import COMPOSITIONS, spelt
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import RobustSettings, TierSettings, TrainSettings
from ubsmoe.data.tokens import Tokens
from ubsmoe.maths import robust
from ubsmoe.messages import Task, Tensors, Update
from ubsmoe.methods import METHODS, build
from ubsmoe.methods.method import Method, State
from ubsmoe.methods.state import pack, unpack
from ubsmoe.server.robust import robustify

CLIP = 1e-3  # far below the norm of a first gradient
EXAMPLES = [Tokens(tuple(2 + (i + j) % 29 for j in range(7)), 4) for i in range(6)]


def turned(tensors: Tensors) -> dict[str, Tensor]:
    """The same values in the reverse order, each lying in memory the other way round."""
    return {name: transposed(tensors[name]) for name in reversed(sorted(tensors))}


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(params=[*((name, {}) for name in METHODS), *COMPOSITIONS], ids=spelt)
def method(request: pytest.FixtureRequest, lab: Lab) -> Method:
    name, settings = request.param
    return build(name, lab.shape, settings)


def trained(lab: Lab, method: Method, payload: Tensors, clip_norm: float | None, optimizer: str = "sgd") -> Update:
    settings = TrainSettings(
        local_steps=3, batch_size=2, gradient_accumulation=2, clip_norm=clip_norm, weight_decay=0.1, optimizer=optimizer
    )  # type: ignore[arg-type]
    trainer = Trainer(lab.model, method, settings, TierSettings(), seed=4, pad_id=0)
    return train(trainer, Task(1, lab.profile(method, 1), payload), EXAMPLES)


def test_a_client_trains_to_the_same_bits_whatever_the_order_of_its_payload(lab: Lab, method: Method) -> None:
    payload = method.dispatch(lab.warm(method), lab.profile(method, 1))
    one, other = (trained(lab, method, tensors, CLIP) for tensors in (payload, turned(payload)))
    assert same(one.adapters, other.adapters) and same(one.extras, other.extras) and one.loss == other.loss
    assert list(one.adapters) == sorted(one.adapters)
    free = trained(lab, method, payload, None)
    assert not same(one.adapters, free.adapters), "clipping does not act, so this test would see nothing"


def test_the_server_averages_to_the_same_bits_whatever_the_order_of_updates_tensors(lab: Lab, method: Method) -> None:
    state = lab.warm(method)
    updates = lab.round(method, state)
    others = [replace(one, adapters=turned(one.adapters), extras=turned(one.extras)) for one in updates]
    before = unpack(turned(pack(state)), method.keeps)
    assert same(pack(aggregated(method, state, updates)), pack(aggregated(method, before, others)))


@pytest.mark.parametrize(
    "rule", [{"clip_norm": 0.5}, {"rule": "multi_krum", "attackers": 1, "clip_norm": 0.5}], ids=str
)
def test_what_protects_an_average_is_the_same_whatever_the_order(lab: Lab, rule: dict[str, object]) -> None:
    method, settings = build("fedavg", lab.shape, {}), RobustSettings(**rule)  # type: ignore[arg-type]
    state = lab.warm(method)
    updates = [lab.update(method, state, tier, seed=seed)[0] for seed in (0, 1) for tier in range(4)]

    def kept(order: Callable[[Tensors], Tensors], state: State) -> list[Tensors]:
        task = Task(1, lab.profile(method, 3), order(state.adapters))
        answers = [(task, replace(one, adapters=order(one.adapters))) for one in updates]
        return [one.adapters for one in robustify(answers, settings, lambda _: None)]

    plain, reverse = kept(dict, state), kept(turned, state)
    assert len(plain) == len(reverse) and all(map(same, plain, reverse))
    assert not same(plain[0], updates[0].adapters), "nothing was clipped, so this test would see nothing"


def test_norms_and_distances_are_sums_in_the_order_of_names() -> None:
    draw = torch.Generator().manual_seed(1)
    clients = [
        {f"layers.{i}.up.A": torch.randn(3, 5 + i, 7, generator=draw) * 10.0**i for i in range(6)} for _ in range(4)
    ]
    turned_clients = [turned(one) for one in clients]
    assert [*map(robust.squared_norm, clients)] == [*map(robust.squared_norm, turned_clients)]
    assert torch.equal(robust.squared_distances(clients), robust.squared_distances(turned_clients))
