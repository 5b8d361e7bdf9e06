"""Rules of averaging that are exact or nearer at rank r, against dense sums in float64 and against their laws."""

from dataclasses import replace

import pytest
import torch

from methods.laboratory import BUDGETS, EXPERTS, aggregated, generator
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.costs.shape import Trained
from ubsmoe.data.tokens import Tokens
from ubsmoe.errors import UserError
from ubsmoe.maths.lora import LoraPair
from ubsmoe.maths.means import WeightedMean
from ubsmoe.maths.splits import aligned, principal
from ubsmoe.messages import Task
from ubsmoe.methods import build
from ubsmoe.methods.factors import pairs, tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.lora_fair import with_correction
from ubsmoe.methods.method import by_use, contribution
from ubsmoe.model.adapter import layer_of_experts

TIERS, ALPHA, RANK = range(len(BUDGETS)), 6.0, 4
EXACT, NEARER = ("svd", "alternating"), ("aligned", "corrected")


def ruled(lab, rule, base="fedavg", **settings):
    return build(base, lab.shape, {"averaging": {"rule": rule, **settings}})


def after_rounds(lab, method, rounds):
    state = lab.start(method)
    for number in range(rounds):
        state = aggregated(method, state, lab.round(method, state, seed=number))
    return state


def wholes(state, update):
    """An update's pairs, what the client was sent in the place of what it kept back."""
    return pairs({**state.adapters, **update.adapters}, ALPHA)


def mean_of_products(state, updates, weights):
    """sum_c p_c s B_c A_c per matrix; weights [C] or, for experts, [C, M]."""
    clients, dense = [wholes(state, update) for update in updates], {}
    for name in clients[0]:
        table = weights if layer_of_experts(f"{name}.A") is None or weights.ndim == 1 else weights[:, :, None, None]
        table = table[:, 0] if table.ndim == 2 else table
        shares = table / table.sum(0)
        dense[name] = sum(
            p * (ALPHA / RANK) * (c[name].b.double() @ c[name].a.double()) for p, c in zip(shares, clients, strict=True)
        )
    return dense


def with_uneven_use(updates):
    more = torch.arange(EXPERTS)
    return [replace(one, expert_tokens=one.expert_tokens + i * more) for i, one in enumerate(updates)]


def product(pair):
    return pair.scale * (pair.b.double() @ pair.a.double())


def close(left, right, atol=2e-6):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=atol)


def examples_of(updates):
    return torch.tensor([float(update.num_examples) for update in updates], dtype=torch.float64)


@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("rule", EXACT)
def test_the_exact_rules_hold_the_mean_of_the_products_at_rank_r(lab, rule, rounds):
    method = ruled(lab, rule)
    state = after_rounds(lab, method, rounds)
    updates = lab.round(method, state, seed=9)
    after = aggregated(method, state, updates)
    close(lab.effective(method, after), mean_of_products(state, updates, examples_of(updates)))
    assert {name: value.shape for name, value in after.adapters.items()} == {
        name: value.shape for name, value in lab.start(method).adapters.items()
    }


@pytest.mark.parametrize("rule", EXACT)
def test_they_are_exact_with_an_experts_own_weights_too(lab, rule):
    method = build("fedavg", lab.shape, {"averaging": {"rule": rule, "exponent": 0.5}})
    state = lab.warm(method)
    updates = with_uneven_use(lab.round(method, state))
    use = torch.stack([(one.expert_tokens[0] / one.tokens).double() ** 0.5 * one.num_examples for one in updates])
    expected = mean_of_products(state, updates, use)
    found = {name: product(pair) for name, pair in pairs(aggregated(method, state, updates).adapters, ALPHA).items()}
    experts = [name for name in found if layer_of_experts(f"{name}.A") is not None]
    close({name: found[name] for name in experts}, {name: expected[name] for name in experts})


@pytest.mark.parametrize(
    ("rule", "enough"),
    [
        ("factors", True),
        ("svd", True),
        ("alternating", True),
        ("exact", False),
        ("aligned", False),
        ("corrected", False),
    ],
)
def test_a_rule_that_does_not_refuse_privacy_needs_the_clients_sum_alone(lab, rule, enough):
    method = ruled(lab, rule)
    state = lab.warm(method)
    clients = [contribution(update) for update in lab.round(method, state, noise=0.5)]
    mean = WeightedMean()
    for one in clients:
        mean.add(one.adapters, one.weight)
    summed = replace(clients[0], adapters=mean.result(clients[0].adapters), weight=sum(one.weight for one in clients))
    apart, together = (method.aggregate(state, ones) for ones in (clients, [summed]))
    left, right = (lab.effective(method, one) for one in (apart, together))
    assert all(torch.allclose(left[name], right[name], atol=2e-6) for name in left) == enough
    assert all((section in method.refuses) != enough for section in ("privacy", "robust"))


def test_singular_factors_are_orthonormal_and_ordered_and_the_rows_of_a_stay_in_their_first_space(lab):
    method = ruled(lab, "svd")
    first = pairs(lab.start(method).adapters, ALPHA)
    for name, pair in pairs(after_rounds(lab, method, 3).adapters, ALPHA).items():
        a, b, a0 = pair.a.double(), pair.b.double(), first[name].a.double()
        torch.testing.assert_close(a @ a.mT, torch.eye(RANK, dtype=a.dtype).expand(len(a), -1, -1), atol=2e-6, rtol=0)
        gram = b.mT @ b
        sizes = gram.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(gram, torch.diag_embed(sizes), atol=1e-5, rtol=0)
        assert (sizes.diff() <= 1e-9).all()
        onto = a0.mT @ torch.linalg.solve(a0 @ a0.mT, a0)
        torch.testing.assert_close(a @ onto, a, atol=5e-6, rtol=0)


def test_alternating_turns_change_one_factor_each_and_leave_the_first_row_space(lab):
    method = ruled(lab, "alternating")
    states = [after_rounds(lab, method, rounds) for rounds in range(4)]
    for before, after, trained in zip(states, states[1:], "BAB", strict=False):
        for name, value in after.adapters.items():
            if name[-2:] in (".A", ".B"):
                assert torch.equal(value, before.adapters[name]) != name.endswith(trained), name
    a0, a = (states[i].adapters["layers.1.down.A"].double() for i in (0, 2))
    assert (a @ a0.mT @ torch.linalg.solve(a0 @ a0.mT, a0) - a).norm() > 0.1 * a.norm()


def test_a_round_without_replies_is_not_a_turn(lab):
    method = ruled(lab, "alternating")
    state = aggregated(method, lab.warm(method), [])
    silent = [replace(update, num_examples=0) for update in lab.round(method, state)]
    for unchanged in (state, aggregated(method, state, silent)):
        assert "frozen.B" in method.dispatch(unchanged, lab.profile(method, 0))


def steps(lab, state, optimizer):
    """The dense update that a client of the largest budget makes of a state, its A frozen."""
    method = ruled(lab, "svd")
    settings = TrainSettings(local_steps=3, batch_size=2, learning_rate=1e-2, optimizer=optimizer, momentum=0.0)
    task = Task(1, lab.profile(method, 3, "client-3"), method.dispatch(state, lab.profile(method, 3)))
    examples = [Tokens(tuple(2 + (7 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(6)]
    update = train(Trainer(lab.model, method, settings, TierSettings(), seed=0, pad_id=0), task, examples)
    return {name: product(pair) for name, pair in wholes(state, update).items()}


@pytest.mark.parametrize(("optimizer", "same"), [("sgd", True), ("adamw", False)])
def test_plain_sgd_does_not_notice_a_turned_basis_and_adam_does(lab, optimizer, same):
    """Why FedSVD differs from FFA-LoRA with an orthonormal A at all."""
    state = lab.warm(ruled(lab, "svd"))
    draw = generator(11)
    turned = {
        name: LoraPair(turn @ pair.a, pair.b @ turn.mT, pair.scale)
        for name, pair in pairs(state.adapters, ALPHA).items()
        for turn in [torch.linalg.qr(torch.randn(len(pair.a), RANK, RANK, generator=draw)).Q]
    }
    other = replace(state, adapters={**state.adapters, **tensors(turned)})
    one, two = steps(lab, state, optimizer), steps(lab, other, optimizer)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one) == same


def test_clients_that_turned_their_factors_by_chance_change_nothing_where_they_are_aligned(lab):
    for rule, indifferent in (("aligned", True), ("factors", False)):
        method = ruled(lab, rule)
        state = lab.warm(method)
        updates = lab.round(method, state)
        again = [turned_by_chance(update, seed) for seed, update in enumerate(updates)]
        before, after = (lab.effective(method, aggregated(method, state, ones)) for ones in (updates, again))
        assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before) == indifferent


def turned_by_chance(update, seed):
    draw, found = generator(13, seed), {}
    for name, pair in pairs(update.adapters, ALPHA).items():
        turn = torch.linalg.qr(torch.randn(len(pair.a), RANK, RANK, generator=draw)).Q
        found[name] = LoraPair(turn @ pair.a, pair.b @ turn.mT, pair.scale)
    return replace(update, adapters={**update.adapters, **tensors(found)})


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_the_corrected_b_is_the_least_squares_fit_of_the_mean_product_to_the_mean_a(lab, exponent):
    """penalty 0 of lora_fair, and with weights per expert: lstsq of the dense mean in float64."""
    shape = replace(lab.shape, weigh=by_use(exponent))
    method = with_correction(fedavg(shape), shape, penalty=0.0)
    state = lab.warm(method)
    updates = with_uneven_use(lab.round(method, state, noise=0.5))
    use = torch.stack([(one.expert_tokens[0] / one.tokens).double() ** exponent * one.num_examples for one in updates])
    whole = mean_of_products(state, updates, use)
    after, plain = (aggregated(one, state, updates) for one in (method, fedavg(shape)))
    for name, pair in pairs(after.adapters, ALPHA).items():
        if layer_of_experts(f"{name}.A") is None:
            continue
        a = plain.adapters[f"{name}.A"]
        assert torch.equal(pair.a, a)
        best = torch.linalg.lstsq(a.double().mT, whole[name].mT / pair.scale).solution.mT
        torch.testing.assert_close(pair.b.double(), best, rtol=1e-4, atol=1e-5)
        naive = whole[name] - product(pairs(plain.adapters, ALPHA)[name])
        assert ((whole[name] - product(pair)).norm(dim=(1, 2)) < naive.norm(dim=(1, 2))).all()


def test_a_large_penalty_leaves_the_mean_of_factors(lab):
    fair, plain = build("lora_fair", lab.shape, {"penalty": 1e12}), build("fedavg", lab.shape)
    state = lab.warm(plain)
    updates = lab.round(plain, state)
    close(aggregated(fair, state, updates).adapters, aggregated(plain, state, updates).adapters)


def test_what_is_kept_back_is_not_charged(lab):
    """By hand, per expert: A has r (h + f) = 4 (12 + 10) numbers, B r (2 f + h) = 4 (20 + 12); attention's are r 4 h each."""
    plain = build("fedavg", lab.shape).traffic(lab.sizes, RANK, Trained(router=True, attention=True), "float32")
    for rule in EXACT:
        found = ruled(lab, rule).traffic(lab.sizes, RANK, Trained(router=True, attention=True), "float32")
        assert plain.upload_bytes - found.upload_bytes == 4 * 2 * (EXPERTS * 4 * 22 + 4 * 4 * 12)
        assert plain.download_bytes == found.download_bytes


def test_more_rank_than_a_matrix_has_is_refused_before_anything_runs(lab):
    method = build("fedsvd", replace(lab.shape, rank=11))
    with pytest.raises(UserError, match=r"adapter\.rank is 11, more than layers\.0\.\w+ has"):
        method.start(lab.model.fresh_adapter(11, generator(1), shared_a=True))


@pytest.mark.parametrize("b", ["full", "deficient", "zero"])
def test_principal_keeps_the_product_and_gives_r_orthonormal_rows_whatever_b_is(b):
    draw = generator(17)
    pair = LoraPair(torch.randn(2, 3, 7, generator=draw), torch.randn(2, 5, 3, generator=draw), scale=2.0)
    pair.b.mul_({"full": 1, "deficient": torch.tensor([1.0, 0.0, 0.0]), "zero": 0}[b])
    split = principal(pair)
    torch.testing.assert_close(split.product(), pair.product(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split.a @ split.a.mT, torch.eye(3).expand(2, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.linalg.svdvals(pair.product())[:, :3], 2 * split.b.norm(dim=1), atol=1e-5, rtol=1e-5
    )


def test_no_other_turn_comes_nearer_to_the_reference():
    draw = generator(19)
    a, b, other = (torch.randn(2, *size, generator=draw) for size in ((3, 7), (5, 3), (3, 7)))
    pair, reference = LoraPair(a, b), LoraPair(other, b)
    best = aligned(pair, reference)
    torch.testing.assert_close(best.product(), pair.product(), atol=1e-5, rtol=1e-5)
    for _ in range(50):
        turn = torch.linalg.qr(torch.randn(2, 3, 3, generator=draw)).Q
        assert ((turn @ pair.a - reference.a).norm(dim=(1, 2)) >= (best.a - reference.a).norm(dim=(1, 2))).all()
