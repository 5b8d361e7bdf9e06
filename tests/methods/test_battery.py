"""One battery for every federated method: adding a line to METHODS adds it here.

A method that does not keep a law says so in `exempt`, with the reason, and is skipped with it.
"""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.costs.shape import Trained
from ubsmoe.costs.traffic import count_bytes, payload_bytes, update_bytes
from ubsmoe.data.tokens import Tokens
from ubsmoe.maths.robust import TrimmedMean
from ubsmoe.messages import Task, Tensors
from ubsmoe.methods import METHODS, build, summary_line
from ubsmoe.methods.method import LAWS, Method, State
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.load import weights_sha256
from ubsmoe.server.checks import check_update
from ubsmoe.server.validator import update_spec
from ubsmoe.storage.checkpoints import read_tensors, tensor_bytes
from ubsmoe.wire.codec import Packed, decode_task, decode_update, encode_task, encode_update

TIERS, TOP, EXPERTS = range(4), 3, 6
MATRIX = r"layers\.\d+\.(up|down|attention\.[qkvo]_proj)"
ADAPTER_NAME = re.compile(rf"(side\.)?{MATRIX}\.[AB]|{MATRIX}\.R|layers\.\d+\.router")
ALL = Trained(router=True, attention=True)


@pytest.fixture(params=METHODS)
def method(request, lab) -> Method:
    return build(request.param, lab.base)


@pytest.fixture
def warm(lab, method) -> State:
    return lab.warm(method)


def promised(method: Method, law: str) -> None:
    if law in method.exempt:
        pytest.skip(f"{method.name} does not promise {law}: {method.exempt[law]}")


def close(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def equal(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


def num_bytes(tensors: Tensors) -> int:
    return sum(value.nbytes for value in tensors.values())


def test_unpromised_laws_exist_and_have_a_reason(method):
    assert set(method.exempt) <= set(LAWS)
    assert all(reason.strip() for reason in method.exempt.values())
    assert summary_line(method.name)


def test_payload_and_update_fit_the_clients_budget(lab, method, warm):
    for tier in TIERS:
        profile = lab.profile(method, tier)
        assert profile.rank == (lab.base.rank if method.varies == "top_k" else (2, 3, 5, 7)[tier])
        assert profile.top_k == ((1, 1, 2, 3)[tier] if method.varies == "top_k" else lab.base.k_max)
        payload = method.dispatch(warm, profile)
        update, _ = lab.update(method, warm, tier)
        for tensors in (payload, update.adapters):
            ranks = {value.shape[1] for name, value in tensors.items() if re.fullmatch(r"layers.*\.[AR]", name)}
            ranks |= {value.shape[2] for name, value in tensors.items() if re.fullmatch(r"layers.*\.[BR]", name)}
            assert all(rank <= profile.rank for rank in ranks)
        method.install(lab.model, payload, profile, torch.Generator().manual_seed(0))
        assert {layer.top_k for layer in lab.model.layers} == {profile.top_k}
        lab.model.clear()


@pytest.mark.parametrize("begin", ["start", "warm"])
def test_a_lone_full_client_comes_back_unchanged(lab, method, begin):
    promised(method, "lone_client")
    state = getattr(lab, begin)(method)
    update, dense = lab.update(method, state, TOP)
    after = method.aggregate(state, [update])
    close(lab.effective(method, after), dense)
    router = {name: value for name, value in after.adapters.items() if name.endswith(".router")}
    equal(router, {name: update.adapters[name] for name in router})


@pytest.mark.parametrize("begin", ["start", "warm"])
def test_identical_clients_are_a_fixed_point(lab, method, begin):
    promised(method, "identical_clients")
    state = getattr(lab, begin)(method)
    update, dense = lab.update(method, state, TOP)
    clients = [replace(update, client=f"client-{i}", num_examples=n) for i, n in enumerate((3, 8, 1))]
    close(lab.effective(method, method.aggregate(state, clients)), dense)


def test_order_of_replies_does_not_matter(lab, method, warm):
    promised(method, "client_order")
    updates = lab.round(method, warm)
    there, back = (method.aggregate(warm, order) for order in (updates, updates[::-1]))
    close(lab.effective(method, there), lab.effective(method, back))


def test_names_of_clients_do_not_matter(lab, method, warm):
    promised(method, "client_names")
    updates = lab.round(method, warm)
    others = [replace(update, client=f"other-{9 - i}") for i, update in enumerate(updates)]
    equal(method.aggregate(warm, updates).adapters, method.aggregate(warm, others).adapters)


def test_scale_of_example_counts_does_not_matter(lab, method, warm):
    promised(method, "example_scale")
    updates = lab.round(method, warm)
    more = [replace(update, num_examples=7 * update.num_examples) for update in updates]
    close(lab.effective(method, method.aggregate(warm, updates)), lab.effective(method, method.aggregate(warm, more)))


def test_a_client_weighs_what_its_two_halves_weigh(lab, method, warm):
    """Catches what every other law lets pass: a mean that does not look at the number of examples."""
    promised(method, "client_halves")
    first, *others = lab.round(method, warm)
    others = [replace(update, num_examples=2 * update.num_examples) for update in others]
    halves = [replace(first, client=f"half-{i}") for i in range(2)]
    whole = replace(first, num_examples=2 * first.num_examples)
    one, two = (method.aggregate(warm, [*clients, *others]) for clients in ([whole], halves))
    close(lab.effective(method, one), lab.effective(method, two))


def test_an_expert_nobody_touched_is_bit_identical(lab, method, warm):
    promised(method, "untouched_expert")
    nobody, somebody = 2, 4
    after = method.aggregate(warm, lab.round(method, warm, untouched=[nobody]))
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


@pytest.mark.parametrize("median", [True, False])
def test_a_method_stands_liars_or_refuses_with_a_reason(lab, method, median):
    """One of five sends anything: every tensor stays within what the other four sent."""
    assert set(method.refuses) <= {"robust", "privacy"} and all(method.refuses.values())
    if "robust" in method.refuses:
        pytest.skip(f"{method.name} refuses [robust]: {method.refuses['robust']}")
    method = build(method.name, replace(lab.base, mean=partial(TrimmedMean, 0 if median else 1, median=median)))
    state = lab.warm(method)
    honest = [replace(lab.update(method, state, TOP, seed=i)[0], client=f"client-{i}") for i in range(4)]
    wild = {name: 1e6 * value - 7 for name, value in honest[0].adapters.items()}
    after = method.aggregate(state, [*honest[:2], replace(honest[0], client="liar", adapters=wild), *honest[2:]])
    for name in honest[0].adapters:
        sent = torch.stack([state.adapters[name], *(update.adapters[name] for update in honest)])
        assert (after.adapters[name] >= sent.amin(0)).all() and (after.adapters[name] <= sent.amax(0)).all()


def test_no_clients_leave_the_state_as_it_was(method, warm):
    promised(method, "no_clients")
    after = method.aggregate(warm, iter([]))
    equal(after.adapters, warm.adapters)
    equal(after.extras, warm.extras)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_nothing_is_ever_nan(lab, method, noise):
    state = lab.start(method)
    for number in range(2):
        updates = lab.round(method, state, noise=noise, seed=number)
        updates[1] = replace(updates[1], num_examples=0)
        state = method.aggregate(state, updates)
        for tensors in (state.adapters, state.extras, lab.effective(method, state)):
            assert all(value.isfinite().all() for value in tensors.values())
    silent = [replace(update, num_examples=0) for update in lab.round(method, state, noise=noise)]
    assert all(value.isfinite().all() for value in method.aggregate(state, silent).adapters.values())


@pytest.mark.parametrize("begin", ["start", "warm"])
def test_bytes_are_what_costs_predict(lab, method, begin):
    state = getattr(lab, begin)(method)
    for tier in TIERS:
        profile = lab.profile(method, tier)
        down, up = method.extra_elements(lab.shape, profile.rank)
        wire = payload_bytes(lab.shape, profile.rank, ALL, factors_up=method.factors_up)
        update, _ = lab.update(method, state, tier)
        assert num_bytes(update.adapters) + num_bytes(update.extras) == wire.upload_bytes + 4 * up
        sent = num_bytes(method.dispatch(state, profile))
        if "predicted_bytes" in method.exempt:
            assert sent <= wire.download_bytes + 4 * down
        else:
            assert sent == wire.download_bytes + 4 * down


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
        # routers, attention and a client's own A change whoever was chosen, so only factors that were sent down can stay behind
        if not untouched:
            predicted = update_bytes(lab.shape, rank, dtype, factors=method.factors_up, trained=ALL)
            assert blob_bytes(packed) == predicted + num_bytes(update.extras) + count_bytes(lab.shape) - 16
        elif any(name in payload for name in update.adapters if name.endswith((".A", ".B", ".R"))):
            touched = [EXPERTS - len(untouched)] * lab.shape.num_moe_layers
            predicted = update_bytes(lab.shape, rank, dtype, factors=method.factors_up, touched=touched)
            whole = update_bytes(lab.shape, rank, dtype, factors=method.factors_up, trained=ALL)
            beside = whole - update_bytes(lab.shape, rank, dtype, factors=method.factors_up)
            assert blob_bytes(packed) == predicted + beside + num_bytes(update.extras) + count_bytes(lab.shape) - 16


def blob_bytes(packed: Packed) -> int:
    """Bytes of the tensors of a message, without the blob's own header; tokens and assignments are in the message's."""
    return len(packed.tensors) - 8 - int.from_bytes(packed.tensors[:8], "little")


def test_state_and_payload_survive_the_disk_bit_for_bit(lab, method, warm):
    assert all(ADAPTER_NAME.fullmatch(name) for name in warm.adapters)
    for tensors in (warm.adapters, warm.extras, method.dispatch(warm, lab.profile(method, 0))):
        assert {value.dtype for value in tensors.values()} <= {torch.float32, torch.int64}
        equal(read_tensors(tensor_bytes(tensors)), dict(tensors))


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
        state = method.aggregate(state, iter(updates))
    last = lab.effective(method, state)
    assert all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert weights_sha256(lab.model.model) == before
    assert not lab.model.adapter and all(layer.routing.adapter is None for layer in lab.model.layers)


def test_what_a_client_trains_passes_the_gate_and_the_wire_bit_for_bit(lab, method):
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
        check_update(back, sent, update_spec(lab.model, method, sent), max_change=1.0, elastic=False)
        assert not lab.model.adapter
