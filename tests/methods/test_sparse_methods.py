"""The methods that vary the number of active experts, worked by hand; the properties they share are in test_battery.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from methods.laboratory import aggregated
from ubsmoe.client.train import Trainer, language_loss, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.data.tokens import Tokens
from ubsmoe.maths.balance import gini, load_balancing_loss
from ubsmoe.maths.robust import TrimmedMean
from ubsmoe.messages import Task, Update
from ubsmoe.methods import build
from ubsmoe.methods.hfedmoe import Selection, bottleneck_score, importance, usage_weights
from ubsmoe.methods.lossfree import BiasState
from ubsmoe.methods.method import State, contribution
from ubsmoe.methods.modulation import ModulationState
from ubsmoe.methods.smoe_glb import ShareState
from ubsmoe.model.conventions import UnsupportedModel
from ubsmoe.model.surgery import SparseModel

LAYERS, EXPERTS = 2, 6
LOW, TOP = 0, 3  # tiers: K = 1 and K = 3
BATCH = {
    "input_ids": torch.tensor([[3, 9, 4, 7, 8], [5, 6, 11, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, 9, 4, 7, 8], [-100, 6, 11, -100, -100]]),
}


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def update(
    adapters: dict[str, Tensor], counts: list[int], *, top_k: int = 1, examples: int = 1, **extras: Tensor
) -> Update:
    """An update of one layer whose experts were used this often."""
    assignments = sum(counts)
    expert_tokens = torch.tensor([counts])
    return Update("c", 1, examples, adapters, expert_tokens, assignments // top_k, assignments, 1.0, 1.0, extras)


def one_layer(method: str, experts: int, **settings: object):
    """A method for a base of one layer, to aggregate updates made by hand."""
    return build(method, replace(SHAPE, num_layers=1, num_experts=experts), settings)


@pytest.fixture(autouse=True)
def _shape(lab):
    global SHAPE
    SHAPE = lab.shape


def factors(*values: float) -> dict[str, Tensor]:
    """One tensor, fused over experts, of one number per expert."""
    return {"layers.0.up.A": torch.tensor(values).reshape(-1, 1, 1)}


# ------------------------------------------------------------------------------------------------ balancing losses


def test_llb_adds_the_loss_of_every_layer_on_real_tokens(lab, model, install):
    hooks = install(build("smoe_llb", lab.shape, {"coefficient": 0.3}), LOW)
    out = model.model(**{k: BATCH[k] for k in ("input_ids", "attention_mask")}, output_router_logits=True)
    real = BATCH["attention_mask"].reshape(-1).bool()
    expected = 0.0
    for logits in out.router_logits:
        probs = logits[real].softmax(-1)
        share = torch.bincount(probs.argmax(-1), minlength=EXPERTS) / real.sum()
        expected += EXPERTS * (share * probs.mean(0)).sum().item()
    (penalty,) = hooks.penalties
    assert penalty().item() == pytest.approx(0.3 * expected, rel=1e-5)


def test_llb_reaches_routers_and_what_lies_below_them_and_no_more(lab, model, install):
    hooks = install(build("smoe_llb", lab.shape))
    language_loss(model, BATCH)
    (penalty,) = hooks.penalties
    penalty().backward()
    moved = {name for name, p in model.adapter.items() if p.grad is not None and p.grad.abs().sum() > 0}
    lower = {f"layers.0.{key}" for key in ("up.A", "up.B", "down.A", "down.B")}
    attention = {name for name in model.adapter if "attention" in name}
    assert moved == lower | attention | {"layers.0.router", "layers.1.router"}


def test_glb_weighs_clients_by_data_and_not_by_their_budget():
    method = one_layer("smoe_glb", 4)
    adapters = {"layers.0.up.A": torch.ones(4, 1, 1)}
    small = update(adapters, [4, 0, 0, 0], top_k=1, examples=3)  # f = (1, 0, 0, 0)
    large = update(adapters, [0, 10, 10, 0], top_k=2, examples=1)  # f = (0, 1/2, 1/2, 0)
    after = aggregated(method, method.start(adapters), [small, large])
    torch.testing.assert_close(after.of(ShareState).share, torch.tensor([[0.75, 0.125, 0.125, 0.0]]))


def test_glb_uses_the_broadcast_share(lab, model, install):
    method = build("smoe_glb", lab.shape, {"coefficient": 0.3})
    share = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.2, 0.3, 0.5]])
    hooks = install(method, LOW, lab.warm(method).having(ShareState(share)))
    language_loss(model, BATCH)
    expected = sum(
        load_balancing_loss(layer.scores(), layer.chosen(), layer.real_tokens(), share[layer.index])
        for layer in model.layers
    )
    (penalty,) = hooks.penalties
    torch.testing.assert_close(penalty(), 0.3 * expected)


def test_glb_pulls_at_nothing_before_it_knows_the_load(lab, model, install):
    method = build("smoe_glb", lab.shape, {"coefficient": 0.3})
    hooks = install(method, LOW, lab.start(method))
    language_loss(model, BATCH)
    (penalty,) = hooks.penalties
    assert penalty().item() == pytest.approx(0.3 * LAYERS)


def test_scores_are_kept_only_while_somebody_needs_them(lab, model, install):
    install(build("fedavg", lab.shape))
    language_loss(model, BATCH)
    assert all(layer.observed.logits is None and layer.observed.chosen is None for layer in model.layers)
    install(build("smoe_llb", lab.shape))
    language_loss(model, BATCH)
    assert all(layer.chosen().shape == (10, 3) for layer in model.layers)
    model.clear()
    assert all(
        layer.observed.logits is None and layer.observed.chosen is None and not layer.routing.recording
        for layer in model.layers
    )


# ------------------------------------------------------------------------------------------------ loss-free balancing


def test_lossfree_moves_every_bias_one_step_towards_the_mean_load():
    method = one_layer("lossfree", 4, step=0.01, steps_per_round=3)
    adapters = {"layers.0.up.A": torch.ones(4, 1, 1)}
    state = State(adapters).having(BiasState(torch.tensor([[0.5, 0.0, 0.0, 0.0]])))
    # loads 7, 1, 4, 4: the mean is 4
    after = aggregated(method, state, [update(adapters, [7, 0, 1, 0], examples=9), update(adapters, [0, 1, 3, 4])])
    torch.testing.assert_close(after.of(BiasState).bias, torch.tensor([[0.47, 0.03, 0.0, 0.0]]))


def test_one_liar_does_not_steer_lossfree_under_a_robust_rule():
    adapters = {"layers.0.up.A": torch.ones(4, 1, 1)}
    honest = [update(adapters, [7, 3, 3, 3]) for _ in range(4)]
    liar = update(adapters, [0, 10**12, 0, 0])
    state = State(adapters).having(BiasState(torch.zeros(1, 4)))
    shape = replace(SHAPE, num_layers=1, num_experts=4, mean=partial(TrimmedMean, 1))
    after = aggregated(build("lossfree", shape, {"step": 1.0}), state, [*honest, liar])
    assert after.of(BiasState).bias.tolist() == [[-1.0, 1.0, 1.0, 1.0]]


def test_lossfree_chooses_by_biased_scores_and_weighs_by_plain_ones(model):
    layer = model.layers[0]
    probs = torch.tensor([[0.3, 0.25, 0.2, 0.1, 0.1, 0.05]])
    weights, index = probs.topk(2)
    bias = torch.tensor([0.0, -0.1, 0.0, 0.0, 0.0, 0.2])
    layer.routing = replace(layer.routing, selection_bias=bias)  # sums .3 .15 .2 .1 .1 .25
    weights, index = layer.choose(probs.log(), weights, index)
    assert index.tolist() == [[0, 5]]
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.05]]))


def test_lossfree_keeps_a_familys_renormalisation(model, monkeypatch):
    layer = model.layers[0]
    monkeypatch.setattr(layer, "convention", replace(layer.convention, renormalises=True))
    probs = torch.tensor([[0.3, 0.25, 0.2, 0.1, 0.1, 0.05]])
    top, index = probs.topk(2)
    bias = torch.tensor([0.0, -0.1, 0.0, 0.0, 0.0, 0.2])
    layer.routing = replace(layer.routing, selection_bias=bias)
    weights, _ = layer.choose(probs.log(), 2.5 * top / top.sum(), index)  # a family whose weights sum to 2.5
    torch.testing.assert_close(weights, torch.tensor([[2.5 * 0.3 / 0.35, 2.5 * 0.05 / 0.35]]))


def test_lossfree_without_a_bias_yet_is_fedavg_bit_for_bit(lab, model, install):
    losses = []
    for name in ("fedavg", "lossfree"):
        method = build(name, lab.shape)
        state = lab.warm(build("fedavg", lab.shape))
        install(method, LOW, State(state.adapters, method.start({}).parts))
        losses.append(language_loss(model, BATCH).item())
        model.clear()
    assert losses[0] == losses[1]


def test_lossfree_evens_out_the_load(lab, model, install):
    method, inequality = build("lossfree", lab.shape, {"step": 5e-4}), []
    state, ids = lab.start(method), torch.arange(8 * 16).reshape(8, 16) % 29 + 2
    for _ in range(10):
        install(method, LOW, state)
        with model.counting(), torch.no_grad():
            model.model(input_ids=ids)
        used = model.expert_tokens()
        inequality.append(gini(used).mean().item())
        state = aggregated(method, state, [replace(lab.update(method, state, LOW, noise=0.0)[0], expert_tokens=used)])
    assert inequality[-1] < 0.6 * inequality[0]


def test_lossfree_refuses_a_family_that_chooses_by_groups():
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=31, hidden_size=24, intermediate_size=36, moe_intermediate_size=20,
        num_attention_heads=3,
        num_key_value_heads=3, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=3,
        n_shared_experts=1, q_lora_rank=17, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7,
        n_group=2, topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    grouped = SparseModel(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UnsupportedModel, match="groups"):
        grouped.set_selection_bias(torch.zeros(1, 8))


# ------------------------------------------------------------------------------------------------ FLAME, A3SMoE


def test_flame_weighs_each_expert_by_how_often_a_client_used_it():
    method, old = one_layer("flame", 3, exponent=2.0, learn_scale=False), factors(9.0, 9.0, 9.0)
    updates = [
        update(factors(1.0, 1.0, float("nan")), [3, 1, 0], examples=2),  # f^2 n = 2 9/16, 2 1/16, 0
        update(factors(5.0, 5.0, float("nan")), [1, 3, 0], examples=4),  # f^2 n = 4 1/16, 4 9/16, 0
    ]
    after = aggregated(method, State(old), updates).adapters["layers.0.up.A"].flatten()
    # the third expert nobody used: kept, whatever came back for it
    torch.testing.assert_close(after, torch.tensor([(18 + 20) / 22, (2 + 180) / 38, 9.0]))


def test_flame_frequencies_are_per_token_so_a_larger_budget_has_more_say():
    method = one_layer("flame", 2, learn_scale=False)
    updates = [update(factors(0.0, 0.0), [2, 2], top_k=1), update(factors(3.0, 3.0), [4, 4], top_k=2)]
    after = aggregated(method, State(factors(9.0, 9.0)), updates).adapters["layers.0.up.A"].flatten()
    torch.testing.assert_close(after, torch.tensor([2.0, 2.0]))  # f = 1/2 and 1


def test_a_client_that_never_used_an_expert_has_no_say_in_it():
    for name in ("flame", "a3smoe"):
        method = one_layer(name, 2)
        updates = [update(factors(1.0, 7.0), [4, 0]), update(factors(2.0, 2.5), [1, 3])]
        after = aggregated(method, method.start(factors(9.0, 9.0)), updates).adapters["layers.0.up.A"].flatten()
        assert after[1] == 2.5


def test_flame_at_exponent_zero_is_fedavg_and_at_one_without_scale_a3smoe(lab):
    updates = lab.round(build("fedavg", lab.shape), lab.warm(build("fedavg", lab.shape)))
    for name, settings in (("fedavg", {"exponent": 0.0}), ("a3smoe", {"exponent": 1.0})):
        other, flame = build(name, lab.shape), build("flame", lab.shape, settings | {"learn_scale": False})
        start = lab.start(other)
        expected, got = aggregated(other, start, updates).adapters, aggregated(flame, start, updates).adapters
        assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_flame_scales_the_sum_of_the_experts_and_learns_the_scale(lab, model, install):
    method = build("flame", lab.shape)
    hooks = install(method, LOW)
    (scale,) = hooks.parameters
    outputs = []
    model.layers[1].experts.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    for factor in (1.0, 2.5):
        scale.data[1] = factor
        language_loss(model, BATCH).backward()
    torch.testing.assert_close(outputs[1], 2.5 * outputs[0])
    assert (scale.grad != 0).all()
    assert hooks.extras()["scale.1"].tolist() == scale.tolist()


def test_flame_averages_scales_over_clients_of_one_k_and_hands_each_tier_its_own(lab):
    method = build("flame", lab.shape)
    state = lab.start(method)
    sent = [("scale.1", 2.0, 3), ("scale.1", 4.0, 1), ("scale.3", 9.0, 7)]
    plain = lab.update(method, state, TOP)[0]
    updates = [replace(plain, extras={key: torch.full((2,), value)}, num_examples=n) for key, value, n in sent]
    after = aggregated(method, state, updates)
    for tier, expected in ((0, 2.5), (2, 1.0), (3, 9.0)):  # K = 1, 2, 3; nobody had K = 2
        profile = lab.profile(method, tier)
        payload = method.dispatch(after, profile)
        assert [key for key in payload if key.startswith("scale")] == [f"scale.{profile.top_k}"]
        assert payload[f"scale.{profile.top_k}"].tolist() == [expected] * LAYERS


# ------------------------------------------------------------------------------------------------ HFedMoE

SCORES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])


def test_hfedmoe_scores_by_hand():
    torch.testing.assert_close(
        importance(SCORES, 0.25), torch.tensor([0.1, 0.05, 0.1]) + 0.75 * torch.tensor([0.7, 0.2, 0.7])
    )
    # means .4 .2 .4: the even expert tells nothing about a token, the others (.7 ln(7/4) + .1 ln(1/4)) / 2 = .1265
    told = torch.tensor([0.12655, 0.0, 0.12655])
    torch.testing.assert_close(
        bottleneck_score(SCORES, 0.25, 2.0), importance(SCORES, 0.25) - 2 * told, atol=1e-4, rtol=0
    )


def test_hfedmoe_picks_the_best_of_the_experts_a_real_token_uses():
    select = Selection(3, most=1, mean_share=1.0, bottleneck=0.0)
    padded, real = torch.cat([SCORES, torch.tensor([[0.0, 0.0, 1.0]])]), torch.tensor([True, True, False])
    # expert 0 and 2 tie at .4 in the mean, but only 0 and 1 are used
    assert select(padded, torch.tensor([[0], [1], [2]]), real).tolist() == [True, False, False]
    report = select.report()
    torch.testing.assert_close(report["usage"], torch.tensor([0.4, 0.0, 0.0]))  # 1 and 2 never learnt
    torch.testing.assert_close(report["importance"], torch.tensor([0.4, 0.0, 0.0]))


def test_hfedmoe_only_the_chosen_experts_have_a_gradient_and_the_output_is_the_same(lab, model, install):
    install(build("fedavg", lab.shape))
    plain = language_loss(model, BATCH)
    plain.backward()
    grads = {name: p.grad.clone() for name, p in model.adapter.items()}
    model.clear()
    method = build("hfedmoe", lab.shape)
    profile = replace(lab.profile(method, TOP), budget=0.34)  # two of six experts per batch, still K = 3
    method.install(model, method.dispatch(lab.warm(build("fedavg", lab.shape)), profile), profile, seed())
    loss = language_loss(model, BATCH)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for layer in range(LAYERS):
        norms = model.adapter[f"layers.{layer}.up.B"].grad.flatten(1).norm(dim=1)
        learns = model.layers[layer].routing.trainable_rule.trained
        assert learns.sum() == 2 and norms[learns].sum() > 0 and norms[~learns].sum() == 0
    learnt = model.layers[
        1
    ].routing.trainable_rule.trained  # above the last layer nothing was cut: its gradient is the plain one
    got = model.adapter["layers.1.up.B"].grad[learnt]
    torch.testing.assert_close(got, grads["layers.1.up.B"][learnt], rtol=1e-4, atol=1e-8)


def test_hfedmoe_takes_no_usage_that_no_router_has():
    method = one_layer("hfedmoe", 4)
    adapters = {"layers.0.up.A": torch.ones(4, 1, 1)}
    sound = {"usage": torch.full((1, 4), 0.25), "importance": torch.ones(1, 4)}
    assert method.fault(update(adapters, [1, 1, 1, 1], **sound)) is None
    lie = sound | {"importance": torch.tensor([[1.0, -2.0, 1.0, 1.0]])}
    assert method.fault(update(adapters, [1, 1, 1, 1], **lie)) == "importance reaches from -2 to 1, expected 0 to 1"


def test_hfedmoe_averages_experts_over_those_who_used_them_enough():
    method = one_layer("hfedmoe", 4, threshold=0.4)  # tau = 0.1
    names = ("layers.0.up.A", "layers.0.router", "layers.0.attention.q_proj.A")

    def client(value: float, examples: int, usage: list[float], weight: list[float]) -> Update:
        shapes = ((4, 1, 1), (4, 1), (1, 1, 2))
        adapters = {name: torch.full(shape, value) for name, shape in zip(names, shapes, strict=True)}
        extras = {"usage": torch.tensor([usage]), "importance": torch.tensor([weight])}
        return update(adapters, [1, 1, 1, 1], examples=examples, **extras)

    old = {name: torch.full_like(value, 9.0) for name, value in client(0.0, 1, [0] * 4, [0] * 4).adapters.items()}
    updates = [
        client(1.0, 1, [0.6, 0.2, 0.05, 0.0], [0.5, 0.5, 1.0, 1.0]),
        client(5.0, 3, [0.4, 0.05, 0.05, 0.0], [0.25, 1, 1, 1]),
    ]
    after = aggregated(method, State(old), updates).adapters
    assert after["layers.0.up.A"].flatten().tolist() == [4.0, 1.0, 9.0, 9.0]
    # alpha = .6 .5 + .2 .5 = .4 and .4 .25 = .1, normalised
    torch.testing.assert_close(after["layers.0.router"], torch.full((4, 1), (0.4 * 1 + 0.1 * 5) / 0.5))
    assert after["layers.0.attention.q_proj.A"].flatten().tolist() == [4.0, 4.0]  # (1 * 1 + 3 * 5) / 4


def test_hfedmoe_does_not_count_an_expert_that_never_learnt_even_without_a_threshold():
    client = update(factors(1.0, 1.0), [3, 3], usage=torch.tensor([[0.5, 0.0]]), importance=torch.tensor([[1.0, 0.0]]))
    assert usage_weights(contribution(client), tau=0.0)["layers.0.up.A"].tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------ UB-SMoE, part by part


def two_rounds(lab, name: str, settings: dict[str, object]) -> list[State]:
    method = build(name, lab.shape, settings)
    trainer = Trainer(
        lab.model,
        method,
        TrainSettings(local_steps=2, batch_size=2, learning_rate=1e-2),
        TierSettings(),
        seed=0,
        pad_id=0,
    )
    examples = [Tokens(tuple(2 + (7 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(6)]
    states = [lab.start(method)]
    for number in (1, 2):
        profiles = [lab.profile(method, tier, f"client-{tier}") for tier in (LOW, TOP)]
        tasks = [Task(number, profile, method.dispatch(states[-1], profile)) for profile in profiles]
        states.append(aggregated(method, states[-1], (train(trainer, task, examples) for task in tasks)))
    return states


@pytest.fixture(scope="module")
def fedavg_rounds(lab):
    return two_rounds(lab, "fedavg", {})


def same(left: State, right: State) -> bool:
    return all(torch.equal(value, right.adapters[name]) for name, value in left.adapters.items())


def test_ubsmoe_with_both_parts_off_is_fedavg_bit_for_bit(lab, fedavg_rounds):
    off = two_rounds(lab, "ubsmoe", {"dmr": False, "pg": False})
    assert all(same(left, right) for left, right in zip(off, fedavg_rounds, strict=True))
    assert not same(off[0], off[1])


def test_dmr_alone_is_fedavg_until_phi_has_moved(lab, fedavg_rounds):
    states = two_rounds(lab, "ubsmoe", {"pg": False, "dmr": {"momentum": 0.0}})
    assert same(states[1], fedavg_rounds[1]) and states[1].of(ModulationState).phi.abs().sum() > 0
    assert not same(states[2], fedavg_rounds[2])


def test_pg_alone_sends_no_phi(lab, fedavg_rounds):
    states = two_rounds(lab, "ubsmoe", {"dmr": False})
    assert states[-1].parts == () and not same(states[1], fedavg_rounds[1])
    method = build("ubsmoe", lab.shape, {"dmr": False})
    assert method.dispatch(states[-1], lab.profile(method, LOW)).keys() == states[-1].adapters.keys()


def test_pg_without_strength_is_pg_off(lab):
    off, weak = (two_rounds(lab, "ubsmoe", s) for s in ({"pg": False}, {"pg": {"strength": 0.0}}))
    assert same(off[-1], weak[-1])
