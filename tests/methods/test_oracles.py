"""Methods checked against dense sums in float64, and against one another."""

from dataclasses import replace

import pytest
import torch
from transformers import OlmoeForCausalLM

from methods.laboratory import aggregated
from ubsmoe.maths.lora import LoraPair
from ubsmoe.maths.means import WeightedMean
from ubsmoe.messages import Update
from ubsmoe.methods import build, side
from ubsmoe.methods.factors import at_rank, keep_untouched, pairs
from ubsmoe.methods.fed_sb import basis
from ubsmoe.methods.hetlora import RankState, pruned_rank
from ubsmoe.methods.method import install_adapter
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for

RANKS, TOP, EXPERTS = (2, 3, 5, 7), 3, 6
HETEROGENEOUS = ("fedit", "hetlora", "flexlora", "flora", "florist")


def made(lab, name, **settings):
    return build(name, lab.shape, settings)


def mean_of_products(updates, alpha):
    """sum_c p_c (alpha / r_c) B_c A_c, from the tensors alone."""
    total = sum(update.num_examples for update in updates)
    dense = {}
    for update in updates:
        for name, a in update.adapters.items():
            if name.endswith(".A"):
                b = update.adapters[name[:-1] + "B"]
                product = update.num_examples / total * alpha / a.shape[1] * (b.double() @ a.double())
                dense[name[:-2]] = dense.get(name[:-2], 0) + product
    return dense


def close(left, right, atol=2e-6):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=atol)


def side_product(state):
    names = {name[5:-2] for name in state.adapters if name.startswith("side.")}
    return {n: state.adapters[f"side.{n}.B"].double() @ state.adapters[f"side.{n}.A"].double() for n in sorted(names)}


def fresh_round(lab, method):
    """First-round updates: ranks 2, 3, 5, 7 whose sum exceeds every matrix, so that nothing is only stacked."""
    return lab.round(method, lab.start(method))


def test_floras_side_factor_is_the_dense_mean_of_products(lab):
    method = made(lab, "flora")
    updates = fresh_round(lab, method)
    for clients in (updates[:2], updates):  # stacked, and recompressed
        after = aggregated(method, lab.start(method), clients)
        close(side_product(after), mean_of_products(clients, lab.shape.alpha))
    assert after.adapters["side.layers.0.down.A"].shape == (EXPERTS, 10, 10)


def test_floras_rounds_add_up_in_the_base(lab):
    method = made(lab, "flora")
    state, total = lab.start(method), None
    for number in range(4):
        updates = lab.round(method, state, seed=number)
        state = aggregated(method, state, updates)
        step = mean_of_products(updates, lab.shape.alpha)
        total = step if total is None else {name: total[name] + value for name, value in step.items()}
    close(side_product(state), total, atol=1e-5)


def test_florist_at_full_energy_is_flora(lab):
    flora, florist = made(lab, "flora"), made(lab, "florist", energy=1.0)
    updates = fresh_round(lab, flora)
    close(
        side_product(aggregated(florist, lab.start(florist), updates)),
        side_product(aggregated(flora, lab.start(flora), updates)),
    )


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_florist_keeps_the_fewest_directions_that_hold_the_energy(lab, energy):
    method = made(lab, "florist", energy=energy)
    updates = fresh_round(lab, method)
    kept = side_product(aggregated(method, lab.start(method), updates))
    for name, whole in mean_of_products(updates, lab.shape.alpha).items():
        for expert in range(len(whole)):
            squares = torch.linalg.svdvals(whole[expert]).square()
            rank = int(torch.linalg.matrix_rank(kept[name][expert], rtol=1e-5))
            assert squares[: rank - 1].sum() < energy * squares.sum() <= squares[:rank].sum() * (1 + 1e-9)
            error = (whole[expert] - kept[name][expert]).norm()
            assert error == pytest.approx(squares[rank:].sum().sqrt().item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("split", ["b", "balanced"])
def test_flexloras_error_is_the_tail_of_singular_values_at_every_rank(lab, split):
    method = made(lab, "flexlora", split=split)
    updates = fresh_round(lab, method)
    whole = mean_of_products(updates, lab.shape.alpha)
    state = aggregated(method, lab.start(method), updates)
    for tier, rank in enumerate(RANKS):
        for name, given in lab.effective(method, state, tier).items():
            tail = torch.linalg.svdvals(whole[name])[:, rank:].square().sum(-1).sqrt()
            torch.testing.assert_close((whole[name] - given).flatten(1).norm(dim=1), tail, rtol=1e-4, atol=1e-6)


def test_flexlora_is_flora_where_no_rank_is_cut(lab):
    flexlora, flora = made(lab, "flexlora"), made(lab, "flora")
    updates = fresh_round(lab, flora)[:2]  # ranks 2 + 3 fit into 7
    close(
        lab.effective(flexlora, aggregated(flexlora, lab.start(flexlora), updates)),
        side_product(aggregated(flora, lab.start(flora), updates)),
    )


def test_flexlora_keeps_a_row_of_a_where_the_sum_has_no_direction(lab):
    method = made(lab, "flexlora")
    before = lab.start(method)
    after = aggregated(method, before, [lab.update(method, before, 0)[0]])  # rank 2 into 7
    for name, value in after.adapters.items():
        if name.endswith(".A"):
            assert torch.equal(value[:, 2:], before.adapters[name][:, 2:])
            assert not after.adapters[name[:-1] + "B"][:, :, 2:].any()


@pytest.mark.parametrize("name", [*HETEROGENEOUS, "fedex_lora", "ffa_lora", "fed_sb"])
def test_one_client_gives_its_own_update_whatever_the_method(lab, name):
    method = made(lab, name, **({"energy": 1.0} if name == "florist" else {}))
    state = lab.start(method)
    update, dense = lab.update(method, state, TOP)
    after = aggregated(method, state, [update])
    close(lab.effective(method, after), dense)
    if name not in ("flexlora", "flora", "florist"):  # the others average tensors: one client's come back to the bit
        assert all(torch.equal(after.adapters[key], value) for key, value in update.adapters.items())


def turned(update: Update) -> Update:
    """The same update in other factors: (B T, T^-1 A) with a well-conditioned T per expert."""
    adapters = dict(update.adapters)
    for name, pair in pairs(update.adapters, alpha=1.0).items():
        draw = torch.randn(len(pair.a), pair.rank, pair.rank, generator=torch.Generator().manual_seed(pair.rank))
        turn = torch.linalg.qr(draw.double()).Q * torch.linspace(0.5, 2.0, pair.rank, dtype=torch.float64)
        adapters[f"{name}.A"] = torch.linalg.solve(turn, pair.a.double()).float()
        adapters[f"{name}.B"] = (pair.b.double() @ turn).float()
    return replace(update, adapters=adapters)


@pytest.mark.parametrize(
    ("name", "invariant"),
    [("flora", 1), ("florist", 1), ("flexlora", 1), ("fedex_lora", 1), ("fedit", 0), ("hetlora", 0), ("fedavg", 0)],
)
def test_other_factors_of_the_same_updates_change_nothing_where_products_are_averaged(lab, name, invariant):
    method = made(lab, name)
    state = lab.start(method)
    updates = lab.round(method, state)
    before = lab.effective(method, aggregated(method, state, updates))
    after = lab.effective(method, aggregated(method, state, [updates[0], *map(turned, updates[1:])]))
    moved = max((before[key] - after[key]).abs().max().item() for key in before)
    assert (moved < 1e-5) == bool(invariant)


@pytest.mark.parametrize("name", ["fedex_lora", "ffa_lora", "fed_sb", "fedsvd", "rolora"])
def test_the_exact_methods_hold_the_mean_of_the_clients_updates(lab, name):
    method = made(lab, name)
    state = lab.warm(method)
    clients = [lab.update(method, state, tier) for tier in range(4)]
    total = sum(update.num_examples for update, _ in clients)
    mean = {key: sum(u.num_examples / total * dense[key] for u, dense in clients) for key in clients[0][1]}
    close(lab.effective(method, aggregated(method, state, [update for update, _ in clients])), mean)


def test_fedexs_residual_is_what_the_mean_of_factors_gets_wrong(lab):
    method = made(lab, "fedex_lora")
    updates = lab.round(method, lab.start(method))[:3]
    after = aggregated(method, lab.start(method), updates)
    for name, residual in side_product(after).items():
        a, b = after.adapters[f"{name}.A"].double(), after.adapters[f"{name}.B"].double()
        expected = mean_of_products(updates, 6.0)[name] - 6.0 / 4 * (b @ a)
        torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-6)
        assert after.adapters[f"side.{name}.A"].shape[1] == (len(updates) - 1) * lab.shape.rank


def test_fedexs_residual_is_zero_to_the_bit_where_clients_agree(lab):
    method = made(lab, "fedex_lora")
    update, _ = lab.update(method, lab.start(method), TOP)
    clients = [replace(update, client=f"client-{i}", num_examples=n) for i, n in enumerate((3, 7, 11))]
    after = aggregated(method, lab.start(method), clients)
    assert not any(value.any() for value in side_product(after).values())


def test_fedit_is_exact_where_all_clients_share_one_a(lab):
    method = made(lab, "fedit")
    state = lab.start(method)
    updates = [lab.update(method, state, TOP, seed=seed)[0] for seed in range(3)]
    shared = {name: value for name, value in updates[0].adapters.items() if name.endswith(".A")}
    updates = [replace(update, adapters={**update.adapters, **shared}) for update in updates]
    close(lab.effective(method, aggregated(method, state, updates)), mean_of_products(updates, lab.shape.alpha))


def test_terms_keep_their_size_when_factors_change_hands():
    """alpha 6: rank 3 has scale 2, rank 2 has scale 3, and 2 b a = 3 b' a' for each of the terms that are kept."""
    adapters = {"layers.0.up.A": torch.full((1, 3, 2), 3.0), "layers.0.up.B": torch.full((1, 4, 3), 1.0)}
    for split in ("balanced", "b"):
        small = pairs(at_rank(adapters, 6.0, 2, split), 6.0)["layers.0.up"]
        assert small.scale == 3.0
        torch.testing.assert_close(small.product(), torch.full((1, 4, 2), 2 * 3.0 * 2))
        back = pairs(at_rank(at_rank(adapters, 6.0, 2, split), 6.0, 3, split), 6.0)["layers.0.up"]
        torch.testing.assert_close(back.product(), small.product())


def test_hetlora_weighs_by_the_norm_of_each_experts_update(lab):
    method = made(lab, "hetlora")
    state = lab.start(method)
    updates = lab.round(method, state)
    after = aggregated(method, state, updates)
    padded = [at_rank(update.adapters, lab.shape.alpha, 7) for update in updates]
    norms = torch.stack(
        [pairs(p, lab.shape.alpha)["layers.1.down"].product().double().flatten(1).norm(dim=1) for p in padded]
    )
    weights = norms / norms.sum(0)
    torch.testing.assert_close(weights.sum(0), torch.ones(EXPERTS, dtype=torch.float64))
    for key in ("layers.1.down.A", "layers.1.down.B"):
        mean = sum(w[:, None, None] * p[key].double() for w, p in zip(weights, padded, strict=True))
        torch.testing.assert_close(after.adapters[key].double(), mean, rtol=1e-5, atol=1e-7)


def test_hetlora_falls_back_to_examples_where_every_norm_is_zero(lab):
    method = made(lab, "hetlora")
    state = lab.start(method)
    updates = lab.round(method, state, noise=0.0)
    moved = replace(
        updates[0], adapters={n: v + 1.0 if n.endswith(".A") else v for n, v in updates[0].adapters.items()}
    )
    after = aggregated(method, state, [moved, *updates[1:]])
    mean = WeightedMean()
    for update in (moved, *updates[1:]):
        mean.add(at_rank(update.adapters, lab.shape.alpha, 7), update.num_examples)
    expected = mean.result(state.adapters)
    assert all(torch.equal(after.adapters[name], expected[name]) for name in expected)


def test_hetloras_penalty_pulls_on_tails_alone_and_has_a_true_gradient(lab):
    method = made(lab, "hetlora", decay=0.5, penalty=0.3)
    state = lab.warm(method)
    profile = lab.profile(method, TOP)  # rank 7: the tail starts at 3
    hooks = method.install(lab.model, method.dispatch(state, profile), profile, torch.Generator())
    (penalty,) = hooks.penalties
    penalty().backward()
    a, b = lab.model.adapter["layers.0.up.A"], lab.model.adapter["layers.0.up.B"]
    assert not a.grad[:, :3].any() and not b.grad[:, :, :3].any()
    norms = b.detach()[2, :, 3:].norm() / a.detach()[2, 3:].norm()
    torch.testing.assert_close(a.grad[2, 3:], 0.3 * norms * a.detach()[2, 3:])
    lab.model.clear()


def test_hetlora_prunes_for_good_when_the_tail_shrinks(lab):
    method = made(lab, "hetlora", decay=0.5)
    state = lab.warm(method)
    profile = lab.profile(method, TOP, "shrinking")
    for expected in (3, 1, 1):
        hooks = method.install(lab.model, method.dispatch(state, profile), profile, torch.Generator())
        for parameter in lab.model.adapter.values():
            parameter.data.mul_(0.5)
        trained = {name: value.detach().clone() for name, value in lab.model.adapter.items()}
        told = {"client": "shrinking", "adapters": trained, "extras": hooks.extras()}
        state = aggregated(method, state, [replace(lab.update(method, state, TOP)[0], **told)])
        assert int(state.of(RankState).rank["shrinking"]) == expected
        assert not state.adapters["layers.0.up.B"][:, :, expected:].any()  # the tail was cut on arrival
        payload = method.dispatch(state, profile)
        assert {value.shape[1] for name, value in payload.items() if name.endswith(".A")} == {expected}
    assert method.dispatch(state, lab.profile(method, TOP, "another"))["layers.0.up.A"].shape[1] == 7


@pytest.mark.parametrize("rank", [0, -1, 8, 10**9])
def test_hetlora_takes_no_rank_that_an_update_cannot_have(lab, rank):
    method = made(lab, "hetlora")
    update, _ = lab.update(method, lab.start(method), TOP)
    assert method.validate_update(update) is None
    lie = replace(update, extras=update.extras | {"rank": torch.tensor(rank)})
    assert method.validate_update(lie) == f"its new rank is {rank}, expected 1 to {RANKS[TOP]}"


@pytest.mark.parametrize("decay", [0.01, 0.5, 0.99])
def test_hetlora_never_prunes_below_one(decay):
    assert all(1 <= pruned_rank(rank, decay) <= rank for rank in range(1, 65))
    assert pruned_rank(100, 0.29) == 29  # 0.29 * 100 is 28.999...


def test_ffa_sends_no_a_and_all_clients_share_the_first_one(lab):
    method = made(lab, "ffa_lora")
    state = lab.start(method)
    update, _ = lab.update(method, state, 0)
    for tensors in (state.adapters, method.dispatch(state, lab.profile(method, 0)), update.adapters):
        assert tensors and not any(name.endswith(".A") for name in tensors)
    start = lab.model.fresh_adapter(4, generator_for(lab.shape.seed, "adapter"), shared_a=True, router=True)
    method.install(lab.model, state.adapters, lab.profile(method, 0), torch.Generator())
    up, _ = lab.model.layers[0].routing.adapter
    assert torch.equal(up.a, start["layers.0.up.A"]) and not up.a.requires_grad and up.b.requires_grad
    lab.model.clear()


def test_fed_sbs_fixed_factors_are_orthonormal_and_its_core_alone_travels(lab):
    method = made(lab, "fed_sb")
    fixed = basis(lab.model, lab.shape)
    for name, value in fixed.items():
        gram = value @ value.mT if name.endswith(".A") else value.mT @ value
        torch.testing.assert_close(gram, torch.eye(4).expand(len(value), -1, -1), atol=1e-6, rtol=0)
    again, other = basis(lab.model, lab.shape), basis(lab.model, replace(lab.shape, seed=1))
    for key in ("up.A", "up.B", "down.A", "down.B"):  # one draw per layer and matrix from the run's seed
        name = f"layers.0.{key}"
        assert torch.equal(fixed[name], again[name]) and not torch.allclose(fixed[name], other[name])
        assert not torch.allclose(fixed[name], fixed[f"layers.1.{key}"])
    sent = method.dispatch(lab.start(method), lab.profile(method, 0))
    shapes = {(layer_of_experts(name) is None, *value.shape) for name, value in sent.items() if name.endswith(".R")}
    assert shapes == {(False, EXPERTS, 4, 4), (True, 1, 4, 4)}
    assert all(name.endswith((".R", ".router")) for name in sent)


def test_a_side_factor_computes_what_merging_it_would(lab):
    """Logits and gradients of adapter and side factor, against the side factor added to a copy of the base."""
    ids = torch.tensor([[3, 7, 11, 2, 5], [4, 9, 30, 1, 8]])
    method = made(lab, "fedex_lora")
    state, profile = lab.warm(method), lab.profile(method, TOP)
    stock = OlmoeForCausalLM(lab.model.model.config).eval()
    stock.load_state_dict(lab.model.model.state_dict())
    merged = SparseModel(stock)
    dense = side_product(state)
    for layer in merged.layers:
        layer.experts.gate_up_proj += dense[f"layers.{layer.index}.up"].float()
        layer.experts.down_proj += dense[f"layers.{layer.index}.down"].float()
        for name, projection in layer.attention.projections.items():
            projection.weight += dense[f"layers.{layer.index}.attention.{name}"][0].float()
    plain = {name: value for name, value in state.adapters.items() if not name.startswith("side.")}
    seen = []
    for model, payload in ((lab.model, state.adapters), (merged, plain)):
        install_adapter(model, payload, profile, lab.shape.alpha)
        logits = model.model(input_ids=ids).logits
        logits.square().mean().backward()
        seen.append({"logits": logits.detach()} | {name: value.grad for name, value in model.adapter.items()})
        model.clear()
    close(*seen, atol=1e-6)


def test_a_grown_side_factor_keeps_other_experts_to_the_bit():
    """Rank 3 + 2 exceeds the limit of 4: expert 0 is recompressed, expert 1 is padded."""
    draw = torch.Generator().manual_seed(0)
    old = LoraPair(torch.randn(2, 3, 5, generator=draw), torch.randn(2, 4, 3, generator=draw))
    new = LoraPair(torch.randn(2, 2, 5, generator=draw), torch.randn(2, 4, 2, generator=draw))
    new.b[1] = 0
    both = side.grown(old, new)
    assert both.rank == 4
    torch.testing.assert_close(both.product(), old.product() + new.product(), atol=1e-5, rtol=1e-5)
    assert torch.equal(both.a[1, :3], old.a[1]) and torch.equal(both.b[1, :, :3], old.b[1])


def test_counts_decide_who_was_touched_not_tensors():
    before = {"layers.0.up.A": torch.zeros(2, 1, 3), "layers.0.router": torch.zeros(2, 3)}
    before["layers.0.attention.q_proj.A"] = torch.zeros(1, 1, 3)
    after = {name: value + 1 for name, value in before.items()}
    kept = keep_untouched(before, after, torch.tensor([[0, 5]]))
    assert not kept["layers.0.up.A"][0].any() and kept["layers.0.up.A"][1].all() and kept["layers.0.router"].all()
    assert kept["layers.0.attention.q_proj.A"].all()
