"""The method that docs/add-a-method.md writes passes the battery, as any method in the table, and does what its page says."""

import pytest
import torch

from documents import ROOT, blocks, method_of
from methods.test_battery import *  # noqa: F403  every law, with the fixture below in place of the table's
from ubsmoe.methods import METHODS, build
from ubsmoe.methods.method import Method
from ubsmoe.model.surgery import SparseModel

(BLOCK,) = (block for block in blocks(ROOT / "docs/add-a-method.md") if block.is_method)


@pytest.fixture
def method(lab, monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setitem(METHODS, "fedprox", method_of(BLOCK))
    return build("fedprox", lab.base)


def test_the_penalty_is_half_mu_times_the_squared_distance_from_what_was_sent(lab, method: Method) -> None:
    held, model = build("fedprox", lab.base, {"mu": 0.5}), lab.model
    state, profile = lab.start(held), lab.profile(held, 1)
    hooks = held.install(model, held.dispatch(state, profile), profile, torch.Generator())
    assert isinstance(model, SparseModel) and hooks.penalty is not None and hooks.penalty() == 0
    moved = model.adapter["layers.1.up.A"]
    with torch.no_grad():
        moved[2, 1, :3] += torch.tensor([1.0, -2.0, 3.0])
    assert hooks.penalty().item() == pytest.approx(0.5 / 2 * (1 + 4 + 9))
    hooks.penalty().backward()
    torch.testing.assert_close(moved.grad[2, 1, :4], torch.tensor([0.5, -1.0, 1.5, 0.0]))
    model.clear()
