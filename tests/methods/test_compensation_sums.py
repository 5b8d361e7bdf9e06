"""The fit by clients' sums: pooled least squares, in any order of clients, asked for when due, refused where it cannot be."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch

from methods.laboratory import EXPERTS, HIDDEN, K_MAX, LAYERS, Lab, aggregated, generator
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.data.tokens import Tokens, collate
from ubsmoe.errors import UserError
from ubsmoe.messages import Task, Update
from ubsmoe.methods import build
from ubsmoe.methods.compensation import CompensationState
from ubsmoe.methods.compensation_sums import FitState
from ubsmoe.methods.method import Method, State
from ubsmoe.model.compensation import PREFIX
from ubsmoe.model.compensation_fit import FormSettings, fit_compensation
from ubsmoe.model.compensation_sums import no_sums, passed_sums
from ubsmoe.model.routing import Passing
from ubsmoe.model.surgery import SparseModel
from ubsmoe.server.peers import without_outliers
from ubsmoe.wire.codec import decode_update, encode_update

EXAMPLES = [Tokens(tuple(2 + (7 * i + i * j * j) % 30 for j in range(4 + i % 5)), prompt_length=2) for i in range(24)]
OWN = {"compensation": {"rank": 5, "fit": "clients"}}
CLIENTS = (EXAMPLES[:3], EXAMPLES[3:14], EXAMPLES[14:])


@pytest.fixture
def method(lab: Lab) -> Method:
    return build("fedavg", lab.shape, OWN)


def updates(lab: Lab, method: Method, state: State, shares=CLIENTS, tier: int = 3) -> list:
    settings = TrainSettings(local_steps=1, batch_size=4, learning_rate=1e-2)
    trainer = Trainer(lab.model, method, settings, TierSettings(), seed=0, pad_id=0)
    found = []
    for number, examples in enumerate(shares):
        profile = lab.profile(method, tier, f"client-{number}")
        task = Task(1, profile, method.dispatch(state, profile))
        found.append(train(trainer, task, examples))
    return found


def maps(state: State) -> dict[str, torch.Tensor]:
    return dict(state.of(CompensationState).compensation)


def test_any_order_of_clients_gives_the_same_bits_and_the_pooled_examples_the_same_map(
    lab: Lab, method: Method
) -> None:
    state = lab.start(method)
    parts = updates(lab, method, state)
    first, *others = (maps(aggregated(method, state, order)) for order in permutations(parts))
    assert len(first) == 2 * 2 * 3  # layers, K = 1 and 2, U V c
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    pooled = maps(aggregated(method, state, updates(lab, method, state, [EXAMPLES])))
    for layer, top_k in ((0, 1), (0, 2), (1, 1), (1, 2)):
        one, other = (found[f"{layer}.{top_k}.v"] @ found[f"{layer}.{top_k}.u"] for found in (first, pooled))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_lowest_layers_map_is_the_servers_own_on_the_same_text(lab: Lab, method: Method) -> None:
    """Nothing lies below it that a small budget could change, so one pass at K_max and the sequential fit meet the same inputs."""
    state = lab.start(method)
    found = maps(aggregated(method, state, updates(lab, method, state)))
    profile = lab.profile(method, 3)
    method.install(lab.model, method.dispatch(state, profile), profile, torch.Generator())
    text = {n: v for n, v in collate(EXAMPLES, 0).items() if n != "labels"}
    server = fit_compensation(lab.model, text, [1, 2], FormSettings(rank=5)).tensors
    lab.model.clear()
    for top_k in (1, 2):
        prefix = f"{PREFIX}0.{top_k}"
        product = server[f"{prefix}.v"] @ server[f"{prefix}.u"]
        torch.testing.assert_close(found[f"0.{top_k}.v"] @ found[f"0.{top_k}.u"], product, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_what_sums_leave_out_is_what_a_client_at_that_k_leaves_out(model: SparseModel, biased: bool) -> None:
    """The lowest layer again: its gate weights of skipped experts, one pass at K_max against a pass at each K."""
    adapter, text = model.fresh_adapter(3, generator(1), shared_a=True), collate(EXAMPLES[:9], 0)

    def put(top_k: int) -> None:
        model.load_adapter(adapter, 6.0)
        if biased:
            model.set_selection_bias(torch.linspace(0, 0.02, LAYERS * EXPERTS).reshape(LAYERS, EXPERTS))
        if top_k < K_MAX:
            model.set_compensation({})
        model.set_top_k(top_k)

    put(K_MAX)
    found = passed_sums(model, [text], [1, 2], tokens=64)
    for top_k in (1, 2):
        put(top_k)
        seen: list[Passing] = []
        model.layers[0].routing = replace(model.layers[0].routing, probe=seen.append)
        model.model(input_ids=text["input_ids"], attention_mask=text["attention_mask"])
        skipped = found[0, top_k].features[HIDDEN:]
        torch.testing.assert_close(skipped, seen[0].skipped.double().sum(0))
        assert skipped.count_nonzero() > 1
        model.clear()


def test_sums_lie_where_the_base_does(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator's sums are not added to those of no token on a CPU."""
    monkeypatch.setattr(lab.skeleton, "device", torch.device("meta"))
    for sums in no_sums(lab.skeleton, [1, 2]).values():
        assert {value.device.type for value in [*vars(sums).values(), *sums.fixed().values()]} == {"meta"}


def test_the_largest_tier_is_asked_until_it_has_answered_and_again_when_it_is_due(lab: Lab) -> None:
    method = build("fedavg", lab.shape, {"compensation": {**OWN["compensation"], "every": 2}})
    state, asked, sent = lab.start(method), [], []
    for number in range(4):
        tiers = [0] if number == 0 else [0, 3]  # nobody of the largest tier takes part in the first round
        asked.append("fit.top_ks" in method.dispatch(state, lab.profile(method, 3)))
        sent.append(any(name.startswith(PREFIX) for name in method.dispatch(state, lab.profile(method, 0))))
        assert "fit.top_ks" not in method.dispatch(state, lab.profile(method, 0))
        found = [one for tier in tiers for one in updates(lab, method, state, [EXAMPLES], tier)]
        state = aggregated(method, state, found)
    assert asked == [True, True, True, False] and sent == [False, False, True, True]
    assert int(state.of(FitState).rounds) == 4


def test_micro_batches_change_no_sum(lab: Lab) -> None:
    method = build("fedavg", lab.shape, {"compensation": {**OWN["compensation"], "tokens": 70}})
    profile = lab.profile(method, 3)
    task, found = Task(1, profile, method.dispatch(lab.start(method), profile)), []
    for size in (None, 2):
        settings = TrainSettings(local_steps=1, batch_size=4, micro_batch=size)
        found.append(train(Trainer(lab.model, method, settings, TierSettings(), seed=0, pad_id=0), task, EXAMPLES))
    whole, cut = (one.extras for one in found)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert 70 <= whole["sums.0.1.count"] / 2**24 < 70 + 4 * 8


def test_sums_cross_the_wire_to_the_bit(lab: Lab, method: Method) -> None:
    state = lab.start(method)
    (update,) = updates(lab, method, state, [EXAMPLES])
    before = method.dispatch(state, lab.profile(method, 3))
    back = decode_update(encode_update(update, before, "int8"), 2**30, before)
    assert all(torch.equal(value, back.extras[name]) for name, value in update.extras.items())
    assert update.extras["sums.1.2.gram"].any()


def lying(update: Update, **changed: Callable[[torch.Tensor], torch.Tensor]) -> Update:
    """The update, sums of these names changed in every place."""
    lies = {name: changed[end](v) for name, v in update.extras.items() if (end := name.split(".")[-1]) in changed}
    return replace(update, extras={**update.extras, **lies})


@pytest.mark.parametrize(
    ("said", "lie"),
    [
        ("are those of no tokens", dict.fromkeys(("count", "features", "outputs", "gram", "cross", "energy"), torch.zeros_like)),
        ("are those of no tokens", {"gram": torch.neg}),
        ("more than their energy", {"cross": lambda cross: cross + 2**40}),
        ("a client looks at 4160", {"count": lambda count: count + 2**50}),
    ],
)  # fmt: skip
def test_sums_that_no_tokens_have_are_their_clients_drop(
    lab: Lab, said: str, lie: dict[str, Callable[[torch.Tensor], torch.Tensor]]
) -> None:
    method = build("fedavg", replace(lab.shape, batch_tokens=64), OWN)
    for update in updates(lab, method, lab.start(method)):
        assert method.fault(update) is None
        assert said in str(method.fault(lying(update, **lie)))


def test_sums_of_far_larger_states_than_the_others_are_found_beside_them(lab: Lab, method: Method) -> None:
    """True sums of tokens that nobody has: only the others' tell."""
    state = lab.start(method)
    honest = updates(lab, method, state, [EXAMPLES[i::4] for i in range(4)])
    squared = {name: 400 for name in ("gram", "cross", "energy")} | {name: 20 for name in ("features", "outputs")}
    liar = lying(honest[3], **{name: partial(torch.mul, other=times) for name, times in squared.items()})
    assert method.fault(liar) is None
    task = Task(1, lab.profile(method, 3), method.dispatch(state, lab.profile(method, 3)))
    for last, dropped in ((honest[3], []), (liar, ["client-3"])):
        lost: list[str] = []
        answers = [(task, update) for update in (*honest[:3], last)]
        list(without_outliers(answers, 8.0, lambda one, answer: lost.append(one.client), method.judged))  # noqa: B023
        assert lost == dropped


def test_a_client_whose_sums_overflow_is_dropped(lab: Lab, method: Method) -> None:
    (update,) = updates(lab, method, lab.start(method), [EXAMPLES])
    assert method.fault(update) is None
    update.extras["sums.0.1.gram"] = torch.full_like(update.extras["sums.0.1.gram"], 2**62)  # type: ignore[index]
    assert str(method.fault(update)).startswith("sums.0.1.gram reaches from")


def test_what_sums_cannot_do_is_refused_with_the_reason(lab: Lab, method: Method) -> None:
    assert {"robust", "privacy", "secure_aggregation"} <= set(method.refuses)
    for more in ({"slices": 2}, {"form": "stand_ins"}):
        with pytest.raises(UserError, match=r"compensation\.fit 'clients' .* or fit = 'server'"):
            build("fedavg", lab.shape, {"compensation": {**OWN["compensation"], **more}})
    assert method.calibration is None  # the server needs no text, nor weights
    with pytest.raises(UserError, match=r"clients that run K_max = 3 experts, and no tier does; add budget 1"):
        build("fedavg", replace(lab.shape, top_ks=(1, 2)), OWN)
