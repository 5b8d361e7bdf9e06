"""The methods that docs/add-a-method.md writes pass the battery, as any method in the table, and do what their pages say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from documents import ROOT, add_method, blocks
from methods.laboratory import aggregated
from methods.test_battery import *  # noqa: F403  every test, with the fixture below in place of the table's
from ubsmoe.errors import UserError
from ubsmoe.methods import build
from ubsmoe.methods.table import describe

BLOCKS = [block for block in blocks(ROOT / "docs/add-a-method.md") if block.is_method]
NAMES = [Path(block.title).stem for block in BLOCKS]


@pytest.fixture(autouse=True)
def added(tmp_path, monkeypatch):
    for block in BLOCKS:
        add_method(block, tmp_path / "methods", monkeypatch)


@pytest.fixture(params=[*((name, {}) for name in NAMES), ("fedavgm", {"pg": True, "dmr": True})], ids=str)
def recipe(request, added):
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_off_its_file_is_what_building_it_gives(lab, name):
    assert describe(name).exempt == build(name, lab.shape).exempt and describe(name).summary


def test_there_is_one_of_each_kind(lab):
    assert NAMES == ["fedprox", "fedavgm", "fedper"]
    with pytest.raises(UserError, match=r"method\.momentum: Input should be less than 1 \(got 1\.0\)"):
        build("fedavgm", lab.shape, {"momentum": 1.0})


def test_fedproxs_penalty_is_half_mu_times_the_squared_distance_from_what_was_sent(lab, model, install):
    hooks = install(build("fedprox", lab.shape, {"mu": 0.5}), 1)
    (penalty,) = hooks.penalties
    assert penalty() == 0
    moved = model.adapter["layers.1.up.A"]
    with torch.no_grad():
        moved[2, 1, :3] += torch.tensor([1.0, -2.0, 3.0])
    assert penalty().item() == pytest.approx(0.5 / 2 * (1 + 4 + 9))
    penalty().backward()
    torch.testing.assert_close(moved.grad[2, 1, :4], torch.tensor([0.5, -1.0, 1.5, 0.0]))


def test_fedavgm_moves_by_the_change_and_half_of_the_last_move(lab):
    """By hand: clients ask for 1 in two rounds; v = 1, then 0.5 + 1. With momentum 0 it is FedAvg, and exempt from nothing."""
    method = build("fedavgm", lab.shape, {"momentum": 0.5})
    state, template = lab.start(method), lab.update(method, lab.start(method), 3)[0]
    first = dict(state.adapters)
    for distance in (1.0, 2.5):
        one_more = {name: value + 1 for name, value in state.adapters.items()}
        state = aggregated(method, state, [replace(template, adapters=one_more)])
        for name, value in state.adapters.items():
            torch.testing.assert_close(value, first[name] + distance)
    assert not build("fedavgm", lab.shape, {"momentum": 0.0}).exempt


def test_fedper_gives_each_client_its_own_router_back_and_newcomers_the_mean(lab):
    method, name = build("fedper", lab.shape), "layers.0.router"
    updates = lab.round(method, lab.start(method))
    state = aggregated(method, lab.start(method), updates)
    for tier, update in enumerate(updates):
        payload = method.dispatch(state, lab.profile(method, tier, update.client))
        assert torch.equal(payload[name], update.adapters[name])
        assert torch.equal(payload["layers.0.up.A"], state.adapters["layers.0.up.A"])
    assert torch.equal(method.dispatch(state, lab.profile(method, 0, "new"))[name], state.adapters[name])


def test_a_property_that_fails_names_itself_with_its_sentence(lab):
    broken = replace(
        build("fedavg", lab.shape), aggregate=lambda state, contributions: lab.start(build("fedavg", lab.shape))
    )
    with pytest.raises(
        AssertionError, match="fedavg does not have the property 'lone_client': one client of the largest budget"
    ):
        test_a_lone_full_client_comes_back_unchanged(lab=lab, method=broken, begin="start")  # noqa: F405
