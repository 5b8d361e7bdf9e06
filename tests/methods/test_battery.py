"""One battery for every federated method: adding a line to METHODS adds it here, and so does a composition below.

A method that does not have a property says so in `exempt`, with the reason, and is skipped with it. A property that fails names
itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, get_args

import pytest
import torch

from methods.laboratory import aggregated
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.costs.shape import Trained
from ubsmoe.costs.traffic import count_bytes, update_bytes
from ubsmoe.data.tokens import Tokens
from ubsmoe.maths.robust import TrimmedMean
from ubsmoe.messages import Task, Tensors
from ubsmoe.methods import METHODS, build
from ubsmoe.methods.method import Method, State
from ubsmoe.methods.refusals import PROPERTIES, Refusable
from ubsmoe.methods.state import pack, unpack
from ubsmoe.methods.table import describe
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.identity import weights_sha256
from ubsmoe.server.update_checks import check_update, spec_of
from ubsmoe.server.validator import UpdateSpecs
from ubsmoe.storage.tensors import read_tensors, tensor_bytes
from ubsmoe.wire.codec import Packed, decode_task, decode_update, encode_task, encode_update

TIERS, TOP, EXPERTS = range(4), 3, 6
MATRIX = r"layers\.\d+\.(up|down|attention\.[qkvo]_proj)"
ADAPTER_NAME = re.compile(rf"(side\.)?{MATRIX}\.[AB]|{MATRIX}\.R|layers\.\d+\.router")
ALL = Trained(router=True, attention=True)

Recipe = tuple[str, dict[str, Any]]
"""A method's name and the other keys of [method]."""

COMPOSITIONS: list[Recipe] = [
    ("hetlora", {"pg": True}),
    ("flame", {"dmr": True}),
    ("ubsmoe", {"averaging": {"rule": "exact"}}),
    ("ubsmoe", {"averaging": {"rule": "activation"}, "dmr": {"phi": "trained"}, "pg": {"mode": "sampled"}}),
    ("florist", {"dmr": True, "pg": True}),
    ("lossfree", {"averaging": {"rule": "exact"}, "pg": False}),
    ("ubsmoe", {"averaging": {"rule": "svd"}}),
    ("fedavg", {"compensation": {"rank": 5}}),
    ("ubsmoe", {"compensation": {"rank": 3, "fit": "clients", "every": 1}}),
    ("ffa_lora", {"compensation": {"rank": 3}, "dmr": True}),
    ("fed_sb", {"compensation": {"form": "constant"}, "dmr": True}),
    ("fedsvd", {"compensation": {"rank": 4, "slices": 2}}),
    ("ubsmoe", {"compensation": {"form": "stand_ins", "rank": 3}}),
    ("smoe_glb", {"averaging": {"rule": "svd", "exponent": 1.0}}),
    ("ubsmoe", {"averaging": {"rule": "alternating"}, "dmr": {"phi": "trained"}}),
    ("ubsmoe", {"averaging": {"rule": "aligned", "exponent": 0.5}}),
    ("lossfree", {"averaging": {"rule": "corrected", "exponent": 0.5}}),
    ("fedavg", {"server": {"rule": "momentum"}}),
    ("fedavg", {"server": {"rule": "adam"}}),
    ("ubsmoe", {"server": {"rule": "yogi"}}),
    ("scaffold", {"dmr": True, "pg": True}),
]


def spelt(recipe: Recipe) -> str:
    """A recipe as the name of a test."""
    name, settings = recipe
    return "+".join([name, *(f"{key}:{value}" for key, value in settings.items())]).replace("{", "").replace("}", "")


@pytest.fixture(params=[*((name, {}) for name in METHODS), *COMPOSITIONS], ids=spelt)
def recipe(request) -> Recipe:
    return request.param


@pytest.fixture
def method(recipe, lab) -> Method:
    name, settings = recipe
    return build(name, lab.shape, settings)


@pytest.fixture
def warm(lab, method) -> State:
    return lab.warm(method)


def has_property(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test of a property: skipped for a method that is exempt from it; where it fails, the property is named."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def run(method: Method, **given: Any) -> None:
            if name in method.exempt:
                pytest.skip(f"{method.name} is exempt from {name}: {method.exempt[name]}")
            try:
                test(method=method, **given)
            except AssertionError as error:
                lacks = f"{method.name} does not have the property {name!r}: {PROPERTIES[name]}"
                raise AssertionError(f"{lacks}.\nMend it, or give the reason in Method.exempt.\n{error}") from error

        return run

    return decorate


def close(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def equal(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


def num_bytes(tensors: Tensors) -> int:
    return sum(value.nbytes for value in tensors.values())


def test_exemptions_and_refusals_exist_and_have_a_reason(method):
    assert set(method.exempt) <= set(PROPERTIES)
    assert set(method.refuses) <= set(get_args(Refusable))
    assert all(reason.strip() for reason in (*method.exempt.values(), *method.refuses.values()))
    assert describe(method.name).summary


def test_payload_and_update_fit_the_clients_budget(lab, method, warm):
    for tier in TIERS:
        profile = lab.profile(method, tier)
        assert profile.rank == (lab.shape.rank if method.varies == "top_k" else (2, 3, 5, 7)[tier])
        least = method.skipped.least_top_k if method.skipped else 1
        assert profile.top_k == ((least, 1, 2, 3)[tier] if method.varies == "top_k" else lab.shape.k_max)
        payload = method.dispatch(warm, profile)
        update, _ = lab.update(method, warm, tier)
        for tensors in (payload, update.adapters):
            ranks = {value.shape[1] for name, value in tensors.items() if re.fullmatch(r"layers.*\.[AR]", name)}
            ranks |= {value.shape[2] for name, value in tensors.items() if re.fullmatch(r"layers.*\.[BR]", name)}
            assert all(rank <= profile.rank for rank in ranks)
        method.install(lab.model, payload, profile, torch.Generator().manual_seed(0))
        assert {layer.routing.top_k for layer in lab.model.layers} == {profile.top_k}
        lab.model.clear()


@pytest.mark.parametrize("begin", ["start", "warm"])
@has_property("lone_client")
def test_a_lone_full_client_comes_back_unchanged(lab, method, begin):
    state = getattr(lab, begin)(method)
    update, dense = lab.update(method, state, TOP)
    after = aggregated(method, state, [update])
    close(lab.effective(method, after), dense)
    router = {name: value for name, value in after.adapters.items() if name.endswith(".router")}
    equal(router, {name: update.adapters[name] for name in router})


@pytest.mark.parametrize("begin", ["start", "warm"])
@has_property("identical_clients")
def test_identical_clients_are_a_fixed_point(lab, method, begin):
    state = getattr(lab, begin)(method)
    update, dense = lab.update(method, state, TOP)
    clients = [replace(update, client=f"client-{i}", num_examples=n) for i, n in enumerate((3, 8, 1))]
    close(lab.effective(method, aggregated(method, state, clients)), dense)


@has_property("client_order")
def test_order_of_replies_does_not_matter(lab, method, warm):
    updates = lab.round(method, warm)
    there, back = (aggregated(method, warm, order) for order in (updates, updates[::-1]))
    close(lab.effective(method, there), lab.effective(method, back))


@has_property("client_names")
def test_names_of_clients_do_not_matter(lab, method, warm):
    updates = lab.round(method, warm)
    others = [replace(update, client=f"other-{9 - i}") for i, update in enumerate(updates)]
    equal(aggregated(method, warm, updates).adapters, aggregated(method, warm, others).adapters)


@has_property("example_scale")
def test_scale_of_example_counts_does_not_matter(lab, method, warm):
    updates = lab.round(method, warm)
    more = [replace(update, num_examples=7 * update.num_examples) for update in updates]
    close(
        lab.effective(method, aggregated(method, warm, updates)), lab.effective(method, aggregated(method, warm, more))
    )


@has_property("client_halves")
def test_a_client_weighs_what_its_two_halves_weigh(lab, method, warm):
    """Catches what every other property lets pass: a mean that does not look at the number of examples."""
    first, *others = lab.round(method, warm)
    others = [replace(update, num_examples=2 * update.num_examples) for update in others]
    halves = [replace(first, client=f"half-{i}") for i in range(2)]
    whole = replace(first, num_examples=2 * first.num_examples)
    one, two = (aggregated(method, warm, [*clients, *others]) for clients in ([whole], halves))
    close(lab.effective(method, one), lab.effective(method, two))


@has_property("untouched_expert")
def test_an_expert_nobody_touched_is_bit_identical(lab, method, warm):
    nobody, somebody = 2, 4
    after = aggregated(method, warm, lab.round(method, warm, untouched=[nobody]))
    equal(directions(warm.adapters, nobody), directions(after.adapters, nobody))
    before, now = directions(warm.adapters, somebody), directions(after.adapters, somebody)
    if method.name != "hfedmoe":  # it takes nothing over without the usage of real batches
        assert any(not torch.equal(before[name], now[name]) for name in before)


def directions(adapters: Tensors, expert: int) -> Tensors:
    """One expert's factors; those of a side factor without the directions that do nothing, which may be padding."""
    found = {}
    for name, value in adapters.items():
        if name.startswith("side.") and "attention" not in name:
            a, b = adapters[f"{name[:-2]}.A"][expert], adapters[f"{name[:-2]}.B"][expert]
            live = (a != 0).any(dim=1) & (b != 0).any(dim=0)
            found[name] = a[live] if name.endswith(".A") else b[:, live]
        elif layer_of_experts(name) is not None:
            found[name] = value[expert]
    return found


@dataclass
class Watched:
    """A running mean that shows what it came to."""

    inner: TrimmedMean
    seen: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, tensors: Tensors, weight: Any) -> None:
        self.inner.add(tensors, weight)

    def result(self, fallback: Tensors) -> dict[str, torch.Tensor]:
        self.seen.update(found := self.inner.result(fallback))
        return found


def wild(update, size: float):
    """The update as a liar sends it."""
    lie = {name: size * (1.0 + value.abs()) for name, value in update.adapters.items()}
    return replace(update, client="liar", adapters=lie)


@pytest.mark.parametrize("median", [True, False], ids=["median", "trimmed mean"])
def test_a_liar_does_not_move_the_aggregate_or_the_method_refuses_with_a_reason(lab, recipe, method, median):
    """One of five sends anything. Every tensor's mean stays within what the other four sent; what the server makes of the mean
    may leave that range (momentum), yet what other clients are sent next does not depend on how large the lie was."""
    if "robust" in method.refuses:
        pytest.skip(f"{method.name} refuses [robust]: {method.refuses['robust']}")
    means: dict[str, torch.Tensor] = {}
    rule = partial(TrimmedMean, 0 if median else 1, median=median)
    name, settings = recipe
    method = build(name, replace(lab.shape, mean=lambda: Watched(rule(), means)), settings)
    state = lab.warm(method)
    honest = [replace(lab.update(method, state, TOP, seed=i)[0], client=f"client-{i}") for i in range(4)]
    sent_on: list[dict[str, torch.Tensor]] = []
    for size in (1e6, 1e9):
        means.clear()
        after = aggregated(method, state, [*honest[:2], wild(honest[0], size), *honest[2:]])
        for key in honest[0].adapters:
            assert key in means, (
                f"{method.name} averages {key} in a way of its own: use RunShape.mean, or refuse [robust]"
            )
            sent = torch.stack([state.adapters[key], *(update.adapters[key] for update in honest)])
            assert (means[key] >= sent.amin(0)).all() and (means[key] <= sent.amax(0)).all(), key
        later = aggregated(method, after, honest)  # a lie may not come out a round later either
        others = [(round, lab.profile(method, tier)) for round in (after, later) for tier in TIERS]
        sent_on.append(
            {f"{i} {key}": v for i, (s, to) in enumerate(others) for key, v in method.dispatch(s, to).items()}
        )
    equal(*sent_on)


@has_property("no_clients")
def test_no_clients_leave_the_state_as_it_was(method, warm):
    after = aggregated(method, warm, iter([]))
    equal(pack(after), pack(warm))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_nothing_is_ever_nan(lab, method, noise):
    state = lab.start(method)
    for number in range(2):
        updates = lab.round(method, state, noise=noise, seed=number)
        updates[1] = replace(updates[1], num_examples=0)
        state = aggregated(method, state, updates)
        for tensors in (pack(state), lab.effective(method, state)):
            assert all(value.isfinite().all() for value in tensors.values())
    silent = [replace(update, num_examples=0) for update in lab.round(method, state, noise=noise)]
    assert all(value.isfinite().all() for value in aggregated(method, state, silent).adapters.values())


@pytest.mark.parametrize("begin", ["start", "warm"])
def test_bytes_are_what_costs_predict(lab, method, begin):
    state = getattr(lab, begin)(method)
    for tier in TIERS:
        profile = lab.profile(method, tier)
        predicted = method.traffic(lab.sizes, profile.rank, ALL, "float32")
        update, _ = lab.update(method, state, tier)
        up = num_bytes(update.adapters) + num_bytes(update.extras)
        down = num_bytes(method.dispatch(state, profile))
        assert down <= predicted.download_bytes and up <= predicted.upload_bytes
        exact = "predicted_bytes" in method.exempt or (down, up) == (predicted.download_bytes, predicted.upload_bytes)
        assert exact, f"{method.name} does not have the property 'predicted_bytes': {PROPERTIES['predicted_bytes']}"


@pytest.mark.parametrize("untouched", [[], [2, 5]], ids=["all experts", "some experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_change_on_the_wire_is_as_long_as_costs_predict_and_as_exact_as_its_dtype(
    lab, method, warm, dtype, untouched
):
    for tier in TIERS:
        payload = method.dispatch(warm, lab.profile(method, tier))
        update, _ = lab.update(method, warm, tier, untouched=untouched)
        packed = encode_update(update, payload, dtype)
        back = decode_update(packed, 1 << 20, payload)
        equal(back.extras, update.extras)
        assert back.adapters.keys() == update.adapters.keys()
        for name, value in update.adapters.items():
            before = payload.get(name, torch.zeros_like(value))
            same = (value == before).flatten(1).all(1)
            assert torch.equal(back.adapters[name][same], before[same])
            change, axis = value - before, 1 if name.endswith(".B") else -1
            step = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 254}[dtype] * change.abs()
            bound = step.amax(axis, keepdim=True) if dtype == "int8" else step
            assert ((back.adapters[name] - value).abs() <= bound * (1 + 1e-4) + (1e-6 if bound.any() else 0)).all()
        if dtype == "float32":
            equal(back.adapters, update.adapters)
        rank = lab.profile(method, tier).rank
        factors = "".join(key for key in "ABR" if any(name.endswith(f".{key}") for name in update.adapters))
        # routers, attention and a client's own A change whoever was chosen, so only factors that were sent down can stay behind
        if not untouched:
            predicted = update_bytes(lab.sizes, rank, dtype, factors=factors, trained=ALL)
            assert blob_bytes(packed) == predicted + num_bytes(update.extras) + count_bytes(lab.sizes) - 16
        elif any(name in payload for name in update.adapters if name.endswith((".A", ".B", ".R"))):
            touched = [EXPERTS - len(untouched)] * lab.sizes.num_moe_layers
            predicted = update_bytes(lab.sizes, rank, dtype, factors=factors, touched=touched)
            whole = update_bytes(lab.sizes, rank, dtype, factors=factors, trained=ALL)
            beside = whole - update_bytes(lab.sizes, rank, dtype, factors=factors)
            assert blob_bytes(packed) == predicted + beside + num_bytes(update.extras) + count_bytes(lab.sizes) - 16


def blob_bytes(packed: Packed) -> int:
    """Bytes of the tensors of a message, without the blob's own header; tokens and assignments are in the message's."""
    return len(packed.tensors) - 8 - int.from_bytes(packed.tensors[:8], "little")


def test_state_and_payload_survive_the_disk_bit_for_bit(lab, method, warm):
    assert all(ADAPTER_NAME.fullmatch(name) for name in warm.adapters)
    for tensors in (pack(warm), method.dispatch(warm, lab.profile(method, 0))):
        assert {value.dtype for value in tensors.values()} <= {torch.float32, torch.int64}
        equal(read_tensors(tensor_bytes(tensors)), dict(tensors))
    back = unpack(read_tensors(tensor_bytes(pack(warm))), method.keeps)
    assert [type(part) for part in back.parts] == [*method.keeps]
    equal(pack(back), pack(warm))
    for tier in TIERS:
        equal(method.dispatch(back, lab.profile(method, tier)), method.dispatch(warm, lab.profile(method, tier)))
    updates = lab.round(method, warm)
    equal(pack(aggregated(method, back, updates)), pack(aggregated(method, warm, updates)))


def test_two_rounds_of_training_leave_no_trace_on_the_base(lab, method):
    before, state = weights_sha256(lab.model.model), lab.start(method)
    settings = TrainSettings(local_steps=2, batch_size=2, learning_rate=1e-2)
    trainer = Trainer(lab.model, method, settings, TierSettings(), seed=0, pad_id=0)
    examples = [Tokens(tuple(2 + (7 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(6)]
    first = lab.effective(method, state)
    for number in (1, 2):
        profiles = [lab.profile(method, tier, f"client-{tier}") for tier in TIERS]
        tasks = (Task(number, profile, method.dispatch(state, profile)) for profile in profiles)
        updates = [train(trainer, task, examples) for task in tasks]
        assert all(int(update.expert_tokens.sum()) == 2 * update.assignments for update in updates)
        state = aggregated(method, state, iter(updates))
    last = lab.effective(method, state)
    assert all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert weights_sha256(lab.model.model) == before
    assert not lab.model.adapter and all(layer.routing.adapter is None for layer in lab.model.layers)


def test_what_a_client_trains_passes_the_validator_and_the_wire_bit_for_bit(lab, method):
    state = lab.warm(method)
    trainer = Trainer(
        lab.model, method, TrainSettings(local_steps=1, batch_size=2), TierSettings(), 0, 0, base_sha256="base"
    )
    examples = [Tokens(tuple(2 + (5 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(3)]
    for tier in TIERS:
        profile = replace(lab.profile(method, tier, f"client-{tier}"), num_examples=len(examples))
        sent = Task(1, profile, method.dispatch(state, profile), "run", "base")
        task = decode_task(encode_task(sent), 1 << 20)
        equal(task.payload, sent.payload)
        assert (task.round, task.profile, task.run, task.base) == (1, profile, "run", "base")
        update = train(trainer, task, examples)
        back = decode_update(encode_update(update, sent.payload), 1 << 20, sent.payload)
        for part in ("adapters", "extras"):
            equal(getattr(back, part), getattr(update, part))
        run = [method.skipped.runs(profile.top_k) if method.skipped else profile.top_k]
        check_update(back, sent, UpdateSpecs(lab.model, method)(sent), max_change=1.0, run=run)
        assert not lab.model.adapter


@pytest.mark.parametrize("begin", ["start", "warm"])
def test_installing_on_a_base_without_weights_gives_the_same_names_shapes_and_dtypes(lab, method, begin):
    """So a server knows what an update looks like before it has seen one, and needs no weights for it."""
    state = getattr(lab, begin)(method)
    for tier in TIERS:
        profile = lab.profile(method, tier)
        task = Task(1, profile, method.dispatch(state, profile))
        update, _ = lab.update(method, state, tier)
        spec = UpdateSpecs(lab.skeleton, method)(task)
        assert spec == UpdateSpecs(lab.model, method)(task)
        assert (spec.adapters, spec.extras) == (spec_of(update.adapters), spec_of(update.extras))
        assert not lab.skeleton.adapter and not lab.model.adapter
