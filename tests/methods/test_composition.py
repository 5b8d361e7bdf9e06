"""Parts around methods: what a composition is, what is refused, and that a method's file says what building it gives."""

import inspect
from importlib import import_module

import pytest
import torch

from methods.laboratory import aggregated
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.costs.shape import Trained
from ubsmoe.data.tokens import Tokens
from ubsmoe.errors import UserError
from ubsmoe.maths.pseudo_gradient import PseudoGradient
from ubsmoe.messages import Task
from ubsmoe.methods import METHODS, build
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Method, RunShape
from ubsmoe.methods.modulation import Modulation, with_modulation
from ubsmoe.methods.pseudo_gradient import with_pseudo_gradient
from ubsmoe.methods.refusals import PROPERTIES
from ubsmoe.methods.state import pack
from ubsmoe.methods.table import PARTS, RENAMED, describe, part_settings

SHAPE = RunShape(num_layers=2, num_experts=6, k_max=3, rank=4, alpha=6.0)
EXAMPLES = [Tokens(tuple(2 + (7 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(6)]


def two_rounds(lab, method: Method) -> list[dict[str, torch.Tensor]]:
    """All that the server holds after each of two rounds of training, by name."""
    settings = TrainSettings(local_steps=2, batch_size=2, learning_rate=1e-2)
    trainer, state = Trainer(lab.model, method, settings, TierSettings(), seed=0, pad_id=0), lab.start(method)
    seen = []
    for number in (1, 2):
        profiles = [lab.profile(method, tier, f"client-{tier}") for tier in (0, 3)]
        tasks = [Task(number, profile, method.dispatch(state, profile)) for profile in profiles]
        state = aggregated(method, state, [train(trainer, task, EXAMPLES) for task in tasks])
        seen.append(pack(state))
    return seen


def assert_same(left, right) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def test_ubsmoe_is_its_two_parts_around_plain_averaging_to_the_bit(lab):
    by_hand = with_modulation(fedavg(lab.shape), lab.shape, Modulation())
    by_hand = with_pseudo_gradient(by_hand, lab.shape, PseudoGradient())
    whole = two_rounds(lab, build("ubsmoe", lab.shape))
    assert_same(two_rounds(lab, by_hand), whole)
    assert_same(two_rounds(lab, build("fedavg", lab.shape, {"dmr": True, "pg": True})), whole)
    assert any(name.startswith("server.phi") for name in whole[0])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("ubsmoe", {"dmr": False}), ("fedavg", {"pg": True})),
        (("ubsmoe", {"pg": False}), ("fedavg", {"dmr": True})),
        (("ubsmoe", {"pg": {"mode": "off"}}), ("ubsmoe", {"pg": False})),
        (("fedavg", {"averaging": {"rule": "exact"}}), ("fedex_lora", {})),
        (("fedavg", {"averaging": {"rule": "svd"}}), ("fedsvd", {})),
        (("fedavg", {"averaging": {"rule": "alternating"}}), ("rolora", {})),
        (("fedavg", {"averaging": {"rule": "aligned"}}), ("fedrot", {})),
        (("fedavg", {"averaging": {"rule": "corrected"}}), ("lora_fair", {})),
        (("fedavg", {"averaging": {"exponent": 1.0}}), ("a3smoe", {})),
        (("fedavg", {"averaging": {"rule": "activation"}}), ("a3smoe", {})),
        (("fedavg", {"averaging": {"rule": "activation", "exponent": 2.0}}), ("flame", {"exponent": 2.0, "learn_scale": False})),
        (("fedavg", {"averaging": {"rule": "activation", "exponent": 0.0}}), ("fedavg", {})),
        (("fedavg", {"averaging": {"rule": "factors"}}), ("fedavg", {})),
        (("ubsmoe", {"averaging": True}), ("ubsmoe", {})),
        (("ubsmoe", {"averaging": False, "dmr": {}, "pg": True}), ("ubsmoe", {})),
    ],
    ids=str,
)  # fmt: skip
def test_two_ways_to_say_a_method_are_the_same_to_the_bit(lab, left, right):
    methods = [build(name, lab.shape, settings) for name, settings in (left, right)]
    assert_same(*(two_rounds(lab, method) for method in methods))


@pytest.mark.parametrize(
    "settings", [{"dmr": False}, {"pg": False}, {"pg": {"strength": 1.0}}, {"dmr": {"momentum": 0.0}}]
)
def test_each_part_and_each_of_its_settings_does_something(lab, settings):
    plain, changed = (two_rounds(lab, build("ubsmoe", lab.shape, own))[-1] for own in ({}, settings))
    assert any(name not in changed or not torch.equal(value, changed[name]) for name, value in plain.items())


def test_parts_add_what_they_cost_and_what_they_tell(lab):
    """By hand: phi is L M = 12 numbers down, and 12 up where clients train it; a scale is L = 2 both ways."""

    plain = build("fedavg", lab.shape)

    def extra(name, **settings):
        adapter, own = (
            m.traffic(lab.sizes, 4, Trained(), "float32") for m in (plain, build(name, lab.shape, settings))
        )
        return (own.download_bytes - adapter.download_bytes) // 4, (own.upload_bytes - adapter.upload_bytes) // 4

    assert (extra("fedavg"), extra("ubsmoe"), extra("ubsmoe", dmr=False)) == ((0, 0), (12, 0), (0, 0))
    assert (extra("flame", dmr=True), extra("flame", dmr={"phi": "trained"})) == ((14, 2), (14, 14))
    down, up = extra("fedex_lora")
    assert extra("ubsmoe", averaging={"rule": "exact"}) == (down + 12, up)
    assert build("hetlora", lab.shape, {"pg": {"mode": "sampled", "fraction": 0.2}}).pair_fraction == 0.2
    told = {name: build(name, lab.shape, {"dmr": True}) for name in ("flame", "hetlora")}
    assert all([*method.event(lab.warm(method))] == ["phi"] for method in told.values())
    assert build("fedavg", lab.shape).event(lab.warm(build("fedavg", lab.shape))) == {}


def test_a_part_says_what_is_refused_with_the_method_around_it():
    assert "robust" in build("ubsmoe", SHAPE, {"averaging": {"rule": "exact"}}).refuses
    assert "privacy" in build("ubsmoe", SHAPE, {"averaging": {"rule": "activation"}}).refuses
    assert not build("ubsmoe", SHAPE).refuses
    exact = build("fedavg", SHAPE, {"averaging": {"rule": "exact"}})
    assert exact.exempt == describe("fedex_lora").exempt and exact.refuses == build("fedex_lora", SHAPE).refuses


OWN_WAY = (
    "hetlora",
    "fedit",
    "flexlora",
    "flora",
    "florist",
    "fedex_lora",
    "flame",
    "a3smoe",
    "ffa_lora",
    "fed_sb",
    "fedsvd",
    "rolora",
    "fedrot",
    "lora_fair",
    "hfedmoe",
    "scaffold",
)
NONSENSE = [
    ("hfedmoe", {"pg": True}, "[method.pg] cannot be combined with method hfedmoe: it chooses which experts learn"),
    *((name, {"averaging": {"rule": rule}}, f"[method.averaging] cannot be combined with method {name}: it ")
      for name in OWN_WAY
      for rule in ("activation", "exact", "factors")),
]  # fmt: skip
WRONG = [
    ("fedavgg", {}, "method.name: no method 'fedavgg'; did you mean 'fedavg'?"),
    ("fedavg", {"mu": 1.0}, "unknown setting 'method.mu' for fedavg; known: server, dmr, pg, compensation, averaging"),
    ("ubsmoe", {"pgg": True}, "unknown setting 'method.pgg' for ubsmoe; did you mean 'pg'?"),
    ("ubsmoe", {"pg": {"mod": "off"}}, "unknown setting 'method.pg.mod'; did you mean 'mode'?"),
    ("ubsmoe", {"pg": "off"}, "method.pg: expected true, false or a section [method.pg], got 'off'"),
    ("ubsmoe", {"pg": {"mode": "server"}}, "method.pg.mode: Input should be 'off', 'client_mean'"),
    ("ubsmoe", {"pg": {"strength": float("nan")}}, "method.pg.strength: Input should be a finite number (got nan)"),
    ("ubsmoe", {"dmr": {"momentum": float("nan")}}, "method.dmr.momentum: Input should be"),
    ("ubsmoe", {"dmr": {"epsilon": float("inf")}}, "method.dmr.epsilon: Input should be a finite number (got inf)"),
    ("ubsmoe", {"dmr": {"phi_max": float("nan")}}, "method.dmr.phi_max: Input should be a finite number (got nan)"),
    ("ubsmoe", {"dmr": {"epsilon": 0.0}}, "method.dmr.epsilon: Input should be greater than 0 (got 0.0)"),
    ("ubsmoe", {"dmr": {"phi_penalty": -1}}, "method.dmr.phi_penalty: Input should be greater than or equal to 0"),
    ("ubsmoe", {"dmr": {"num_candidates": 2}}, "method.dmr.num_candidates must lie in K_max..M = 3..6, got 2"),
    ("ubsmoe", {"dmr": {"phi_min": 2.0}}, "method.dmr.phi_min must be below dmr.phi_max, got 2.0 and 1.0"),
    ("ubsmoe", {"averaging": {"exponent": -1}}, "method.averaging.exponent: Input should be greater than or equal to 0"),
    ("ubsmoe", {"averaging": {"rule": "mean"}}, "method.averaging.rule: Input should be 'factors', 'activation', 'exact', 'svd', "),
    ("ubsmoe", {"averaging": {"rule": "exact", "exponent": 0.5}},
     "method.averaging.exponent is 0.5, but rule 'exact' weighs by examples; leave exponent out"),
    ("florist", {"energy": 0.0}, "method.energy: Input should be greater than 0 (got 0.0)"),
    ("smoe_llb", {"coefficient": float("inf")}, "method.coefficient: Input should be a finite number (got inf)"),
    ("hetlora", {"scope": "layer"}, "method.scope: Input should be 'matrix' or 'client' (got 'layer')"),
    ("hetlora", {"min_rank": 1.5}, "method.min_rank: Input should be a valid integer"),
    *(("ubsmoe", {old: 1}, f"unknown setting 'method.{old}' for ubsmoe; it is now called 'method.{new}'")
      for old, new in RENAMED.items()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "sentence"), [*NONSENSE, *WRONG], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(name, settings, sentence):
    with pytest.raises(UserError) as refusal:
        build(name, SHAPE, settings)
    assert str(refusal.value).startswith(sentence)
    assert (
        "\n" not in str(refusal.value)
        and ". " not in str(refusal.value)
        and "For further information" not in str(refusal.value)
    )


def test_unrelated_gradients_are_not_averaged():
    apart = RunShape(2, 6, 3, rank=4, alpha=6.0, shared_a=False)
    with pytest.raises(
        UserError, match=r"method\.pg\.mode 'client_mean' .* set adapter\.shared_a = true or another pg\.mode"
    ):
        build("ubsmoe", apart)
    for harmless in ({"mode": "sampled"}, {"scope": ["router"]}, {"strength": 0.0}):
        build("ubsmoe", apart, {"pg": harmless})


def test_every_renamed_setting_has_a_place():
    for new in RENAMED.values():
        part, _, key = new.partition(".")
        assert key in part_settings(part)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_read_off_a_methods_file_is_what_building_it_gives(name):
    """The description is read without importing anything; so it must not drift from the code."""
    said, module = describe(name), import_module(f"ubsmoe.methods.{name}")
    method, builder = build(name, SHAPE), getattr(module, name)
    parameters = list(inspect.signature(builder).parameters.values())
    assert parameters[0].name == "shape" and all(one.kind is one.KEYWORD_ONLY for one in parameters[1:])
    defaults = {one.name: one.default for one in parameters[1:]}
    assert dict(said.settings) == {key: value for key, value in defaults.items() if key not in PARTS}
    assert said.parts == tuple(key for key in defaults if key in PARTS)
    assert said.exempt == method.exempt and set(said.exempt) <= set(PROPERTIES)
    assert said.summary == inspect.getdoc(module).splitlines()[0] and said.name == method.name == name


@pytest.mark.parametrize("part", PARTS)
def test_what_is_read_off_a_parts_file_is_its_class(part):
    module, _, name = PARTS[part].rpartition(".")
    made = getattr(import_module(module), name)()
    assert dict(part_settings(part)) == {key: getattr(made, key) for key in made.__dataclass_fields__}
