"""A machine and a server that lies, or has other settings: one sentence, and no training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ubsmoe.client.node import Machine, Node
from ubsmoe.client.train import ClientFailure
from ubsmoe.config import parse_run
from ubsmoe.errors import UserError
from ubsmoe.messages import Profile, Task
from ubsmoe.wire.codec import encode_task

Payload = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def machine(random_base: Path) -> Machine:
    table = {
        "model": {"base": str(random_base)},
        "clients": {"count": 2},
        "tiers": {"budgets": [0.5, 1.0]},
        "data": {"synthetic": {"train_examples": 8, "test_examples": 2, "entities": 8}},
        "train": {"local_steps": 1, "batch_size": 2},
        "method": {"name": "ubsmoe"},
    }
    return Machine(parse_run(table))


@pytest.fixture
def node(machine: Machine) -> Node:
    return machine.node({"partition-id": 0, "num-partitions": 2})


def task_of(machine: Machine, change: Callable[[Payload], object] = lambda sent: None, **claims: int) -> Task:
    method = machine.trainer(None).method
    fresh = machine.trainer(None).model.fresh_adapter(8, torch.Generator(), shared_a=True)
    sent = method.dispatch(method.start(fresh), PROFILE)
    sent = {name: value.clone() for name, value in sent.items()}
    change(sent)
    return Task(1, replace(PROFILE, **claims), sent, "run", machine.trainer(None).base_sha256)


PROFILE = Profile("client-0", 1, 1.0, 4, 8, 4)
SPOILT: dict[str, tuple[Callable[[Payload], object], dict[str, int], str]] = {
    "phi out of its range": (lambda sent: sent["phi"].add_(9), {}, "phi reaches from 9 to 9, expected -2 to 2"),
    "NaN in a weight": (lambda sent: sent["layers.1.up.A"][0].fill_(float("nan")), {}, "layers.1.up.A holds NaN"),
    "infinity in phi": (lambda sent: sent["phi"][0].fill_(float("inf")), {}, "phi holds NaN or infinity"),
    "another shape": (lambda sent: sent.update(phi=torch.zeros(9, 9)), {}, r"phi has shape \(9, 9\), this base needs"),
    "a tensor missing": (lambda sent: sent.pop("layers.0.down.B"), {}, "the adapter lacks layers.0.down.B"),
    "a tensor too many": (lambda sent: sent.update({"layers.9.up.A": torch.ones(1)}), {}, "know: layers.9.up.A"),
    "no phi": (lambda sent: sent.pop("phi"), {}, "KeyError 'phi'"),
    "K above all experts": (lambda sent: None, {"top_k": 99}, r"top_k must lie in 1\.\.4 for this base, got 99"),
    "a tier nobody has": (lambda sent: None, {"tier": 7}, "tier 7, there are 2"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_task_that_no_honest_server_sends_is_refused(name: str, machine: Machine, node: Node) -> None:
    change, claims, sentence = SPOILT[name]
    with pytest.raises(ClientFailure, match=f"^the server's task is refused: .*{sentence}"):
        node.answer("train", encode_task(task_of(machine, change, **claims)))
    assert not machine.trainer(None).model.adapter


def test_an_honest_one_is_carried_out(machine: Machine, node: Node) -> None:
    assert node.answer("train", encode_task(task_of(machine))).tensors


def test_a_node_does_no_work_for_which_it_would_have_to_keep_something(machine: Machine) -> None:
    settings = machine.settings.model_copy(
        update={"method": machine.settings.method.model_copy(update={"name": "scaffold"})}
    )
    node = Machine(settings).node({"partition-id": 0, "num-partitions": 2})
    with pytest.raises(
        UserError, match=r"under scaffold each client keeps tensors of its own .* nodes of Flower keep nothing"
    ):
        node.train(Task(1, PROFILE, {}))
