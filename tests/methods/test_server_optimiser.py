"""[method.server] against the formulas, by hand, and the properties that it keeps."""

import pytest
import torch

from ubsmoe.errors import UserError
from ubsmoe.methods import build
from ubsmoe.methods.method import Contribution, RunShape, State
from ubsmoe.methods.server_optimiser import OptimiserState
from ubsmoe.methods.state import pack, unpack, with_stored

SHAPE = RunShape(num_layers=2, num_experts=6, k_max=3, rank=4, alpha=6.0)


def client(name: str, examples: float, *values: float) -> Contribution:
    return Contribution(name, examples, {"w": torch.tensor([values])}, torch.ones(1, 2), tokens=2.0, assignments=2.0)


def rounds(settings: dict, *changes: tuple[float, ...]) -> list[torch.Tensor]:
    """theta after each round in which the clients' mean lies so far from theta."""
    method = build("fedavg", SHAPE, {"server": settings})
    state, seen = method.start({"w": torch.tensor([[1.0, 2.0, 3.0]])}), []
    for change in changes:
        here = state.adapters["w"][0] + torch.tensor(change)
        one, other = (here + 3).tolist(), (here - 1).tolist()
        state = method.aggregate(state, [client("a", 1.0, *one), client("b", 3.0, *other)])
        state = unpack(pack(state), method.keeps)  # as after a resumption
        seen.append(state.adapters["w"][0])
    return seen


def near(values: torch.Tensor, *expected: float) -> bool:
    return torch.allclose(values, torch.tensor(expected), rtol=1e-5)


def test_momentum_by_hand() -> None:
    first, second = rounds({"rule": "momentum", "beta1": 0.5}, (1.0, 0.0, -2.0), (1.0, 0.0, 0.0))
    assert near(first, 2.0, 2.0, 1.0)
    assert near(second, 3.5, 2.0, 0.0)  # m = 0.5 * (1, 0, -2) + (1, 0, 0)


def test_adam_and_yogi_by_hand() -> None:
    own = {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.75, "tau": 2.0}
    # v = 0.75 * 4 + 0.25 * 16 = 7, m = 0.5 * 4 = 2;  then v = 0.75 * 7 + 0.25 * 1 = 5.5, m = 1 + 0.5 = 1.5
    first, second = rounds({"rule": "adam", **own}, (4.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    after = 1 + 0.1 * 2 / (7**0.5 + 2)
    assert near(first, after, 2.0, 3.0) and near(second, after + 0.1 * 1.5 / (5.5**0.5 + 2), 2.0, 3.0)
    # v = 4 + 0.25 * 16 = 8, since 16 > 4;  then v = 8 - 0.25 * 1 = 7.75, since 1 < 8
    first, second = rounds({"rule": "yogi", **own}, (4.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    after = 1 + 0.1 * 2 / (8**0.5 + 2)
    assert near(first, after, 2.0, 3.0) and near(second, after + 0.1 * 1.5 / (7.75**0.5 + 2), 2.0, 3.0)


def test_without_memory_and_at_full_step_it_is_the_method_inside() -> None:
    (moved,) = rounds({"rule": "momentum", "beta1": 0.0}, (0.25, -0.5, 0.75))
    assert near(moved, 1.25, 1.5, 3.75)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_run_that_begins_where_another_ended_has_its_memory(rule: str) -> None:
    """Momentum keeps no squares, and a mapping without an entry leaves no trace in a file."""
    method = build("fedavg", SHAPE, {"server": {"rule": rule}})
    fresh = method.start({"w": torch.ones(1, 3)})
    ended = method.aggregate(fresh, [client("a", 1.0, 1.0, 2.0, 3.0)])
    begun = with_stored(fresh, pack(ended), method.keeps)
    assert pack(begun).keys() == pack(ended).keys() and begun.of(OptimiserState).change_mean
    assert not with_stored(fresh, {"w": torch.ones(1, 3)}, method.keeps).of(OptimiserState).change_mean


@pytest.mark.parametrize("rule", ["momentum", "adam", "yogi"])
def test_a_round_without_replies_changes_nothing(rule: str) -> None:
    method = build("fedavg", SHAPE, {"server": {"rule": rule}})
    state = method.aggregate(method.start({"w": torch.ones(1, 3)}), [client("a", 1.0, 1.0, 2.0, 3.0)])
    assert pack(method.aggregate(state, [])).keys() == pack(state).keys()
    assert all(torch.equal(pack(method.aggregate(state, []))[name], value) for name, value in pack(state).items())


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("flora", {"server": True}, r"\[method\.server\] cannot be combined with method flora: it needs each client's"),
        (
            "fedavg",
            {"server": {"rule": "adamm"}},
            r"method\.server\.rule: Input should be 'momentum', 'adam' or 'yogi'",
        ),
        ("fedavg", {"server": True, "averaging": {"rule": "svd"}}, r"leave \[method\.averaging\] out"),
        ("fedavg", {"server": {"tau": 0.0}}, r"method\.server\.tau: Input should be greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(name, SHAPE, settings)


def test_it_goes_around_other_methods_and_keeps_their_state() -> None:
    method = build("ubsmoe", SHAPE, {"server": {"rule": "yogi"}})
    kept = {kind.__name__ for kind in method.keeps}
    assert kept == {"ModulationState", "OptimiserState"} and method.name == "ubsmoe"
    assert isinstance(method.start({}), State)
