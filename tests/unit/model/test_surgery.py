"""Surgery against stock transformers: bit for bit where nothing was set, by formula where something was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ubsmoe.maths import routing
from ubsmoe.maths.pseudo_gradient import PseudoGradient
from ubsmoe.model.conventions import UnsupportedModel, observe_router
from ubsmoe.model.identity import weights_sha256
from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, HIDDEN, RENORMALISES, VOCAB, tiny, words

every_family = pytest.mark.parametrize("family", FAMILIES)
UNNORMALISED = sorted(set(FAMILIES) - RENORMALISES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_adapter(
    sparse: SparseModel, rank: int = 3, *, router: bool = False, attention: bool = False, seed: int = 5
) -> dict[str, Tensor]:
    """An adapter that changes something: no factor is zero."""
    tensors = sparse.fresh_adapter(rank, generator(seed), shared_a=False, router=router, attention=attention)
    return {name: 0.3 * torch.randn(value.shape, generator=generator(seed)) for name, value in tensors.items()}


def everything(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter."""
    model.requires_grad_(True).zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def assert_bit_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def experts_per_layer(sparse: SparseModel, ids: Tensor, **inputs: Any) -> list[Tensor]:
    """The experts each token went to, [T, K] per layer."""
    seen: list[Tensor] = []
    hooks = [layer.router.register_forward_hook(lambda m, a, out: seen.append(out[2])) for layer in sparse.layers]
    with torch.no_grad():
        sparse.model(input_ids=ids, **inputs)
    for hook in hooks:
        hook.remove()
    return seen


@every_family
def test_surgery_without_settings_is_bit_equal_to_stock_in_logits_loss_and_gradients(family: str) -> None:
    model, ids = tiny(family), words()
    stock = everything(model, ids)
    assert any("expert" in name for name in stock) and any("gate" in name or "router" in name for name in stock)
    sparse = SparseModel(model)
    assert_bit_equal(everything(model, ids), stock)
    zero = torch.zeros(len(sparse.layers), sparse.num_experts)
    for num_candidates in (None, sparse.k_max, sparse.num_experts):
        sparse.set_phi(zero, num_candidates)
        assert_bit_equal(everything(model, ids), stock)


@every_family
def test_generation_hands_the_head_rows_that_lie_one_after_another(family: str) -> None:
    """Of a strided view torch copies the whole head once per row: 13 GB for 64 prompts at OLMoE's size."""
    model = SparseModel(tiny(family)).model
    seen: list[tuple[bool, tuple[int, ...]]] = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append((args[0].is_contiguous(), tuple(args[0].shape[:2])))
    )
    model.generate(input_ids=words(), do_sample=False, max_new_tokens=2, pad_token_id=0, eos_token_id=None)
    assert seen == [(True, (len(words()), 1))] * 2


@every_family
def test_a_fresh_adapter_changes_logits_by_rounding_only(family: str) -> None:
    model, ids = tiny(family), words()
    stock = model(ids).logits
    sparse = SparseModel(model)
    sparse.load_adapter(sparse.fresh_adapter(3, generator(), shared_a=True, router=True), alpha=6.0)
    assert (model(ids).logits - stock).abs().max() <= 1e-6 * stock.abs().max().clamp_min(1)


@every_family
def test_an_adapter_gives_what_merged_weights_give(family: str) -> None:
    model, ids = tiny(family), words()
    merged = copy.deepcopy(model)
    sparse = SparseModel(model)
    tensors = random_adapter(sparse)
    sparse.load_adapter(tensors, alpha=1.5)
    layers = [m for m in merged.modules() if hasattr(m, "down_proj") and hasattr(m, "is_transposed")]
    with torch.no_grad():
        for index, experts in enumerate(layers):
            for weight, key in ((experts.gate_up_proj, "up"), (experts.down_proj, "down")):
                delta = 0.5 * tensors[f"layers.{index}.{key}.B"] @ tensors[f"layers.{index}.{key}.A"]
                weight += delta.mT if experts.is_transposed else delta
    ours, theirs, stock = model(ids).logits, merged(ids).logits, tiny(family)(ids).logits
    assert (theirs - stock).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp_min(1)


@every_family
def test_clear_restores_the_stock_model_bit_for_bit(family: str) -> None:
    model, ids = tiny(family), words()
    stock, before, keys = everything(model, ids), weights_sha256(model), list(model.state_dict())
    sparse = SparseModel(model, rescale="mass")
    sparse.load_adapter(random_adapter(sparse, router=True), alpha=2.0)
    sparse.set_top_k(1)
    sparse.set_phi(torch.ones(len(sparse.layers), sparse.num_experts).cumsum(1), sparse.k_max + 1)
    sparse.set_pseudo_gradient(PseudoGradient("oracle", scope=("experts", "router", "hidden")))
    assert list(model.state_dict()) == keys
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.AdamW(sparse.adapter.values(), 0.1).step()
    assert not torch.equal(loss, stock["loss"])
    sparse.clear()
    assert_bit_equal(everything(model, ids), stock)
    assert weights_sha256(model) == before and list(model.state_dict()) == keys
    assert all(layer.observed.mass is None and layer.observed.logits is None for layer in sparse.layers)


@every_family
def test_experts_without_tokens_get_exactly_zero_gradient_and_the_base_gets_none(family: str) -> None:
    sparse = SparseModel(tiny(family))
    sparse.load_adapter(random_adapter(sparse), alpha=2.0)
    sparse.set_top_k(1)
    ids = words(1, 3)
    routed = experts_per_layer(sparse, ids)
    sparse.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in sparse.model.parameters())
    for layer, chosen in zip(sparse.layers, routed, strict=True):
        used = torch.zeros(sparse.num_experts, dtype=torch.bool)
        used[chosen.reshape(-1)] = True
        assert not used.all()
        for key in ("up.A", "up.B", "down.A", "down.B"):
            grad = sparse.adapter[f"layers.{layer.index}.{key}"].grad
            assert grad is not None
            assert torch.equal(grad[~used], torch.zeros_like(grad[~used]))
            assert grad[used].any()


@every_family
def test_k_sets_how_many_experts_a_token_gets_and_they_are_the_best_ones(family: str) -> None:
    sparse, ids = SparseModel(tiny(family)), words()
    full = experts_per_layer(sparse, ids)
    for top_k in range(1, sparse.k_max + 1):
        sparse.set_top_k(top_k)
        first = experts_per_layer(sparse, ids)[0]
        assert first.shape == (ids.numel(), top_k)
        assert all(set(few) <= set(many) for few, many in zip(first.tolist(), full[0].tolist(), strict=True))
    for wrong in (0, sparse.k_max + 1):
        with pytest.raises(ValueError, match="top_k must lie in"):
            sparse.set_top_k(wrong)


@every_family
def test_a_large_phi_selects_its_expert_wherever_it_is_a_candidate(family: str) -> None:
    # one group: a group limit could rule an expert out whatever its logit
    sparse, ids = SparseModel(tiny(family, **({"n_group": 1} if family == "deepseek_v3" else {}))), words(2, 6)
    if family == "deepseek_v3":  # a sigmoid saturates at 1, and the correction bias then decides
        for layer in sparse.layers:
            layer.router.e_score_correction_bias.zero_()
    logits, n_p = unmodulated(sparse, ids), sparse.k_max + 1
    rank = (logits.unsqueeze(1) > logits.unsqueeze(2)).sum(-1)  # how many experts are better, per token and expert
    expert = int(((rank < n_p).float().mean(0) - 0.5).abs().argmin())
    is_candidate = rank[:, expert] < n_p
    assert is_candidate.any() and not is_candidate.all()
    phi = torch.zeros(len(sparse.layers), sparse.num_experts)
    phi[0, expert] = 50.0
    sparse.set_phi(phi)
    assert (experts_per_layer(sparse, ids)[0] == expert).any(-1).all()
    sparse.set_phi(phi, n_p)
    assert torch.equal((experts_per_layer(sparse, ids)[0] == expert).any(-1), is_candidate)


def unmodulated(sparse: SparseModel, ids: Tensor) -> Tensor:
    """The first layer's logits, no phi being set."""
    seen: list[Tensor] = []
    hook = sparse.layers[0].router.register_forward_hook(lambda m, a, out: seen.append(out[0].detach()))
    sparse.model(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek_v2", "deepseek_v3"}))
def test_recorded_router_logits_survive_and_show_phi(family: str) -> None:
    model, ids = tiny(family), words()
    stock = model(ids, output_router_logits=True).router_logits
    sparse = SparseModel(model)
    recorded = model(ids, output_router_logits=True).router_logits
    assert len(recorded) == len(sparse.layers)
    for one, other in zip(recorded, stock, strict=True):
        assert torch.equal(one, other)
    phi = torch.arange(float(len(sparse.layers) * sparse.num_experts)).view(len(sparse.layers), -1)
    sparse.set_phi(phi)
    moved = model(ids, output_router_logits=True).router_logits
    torch.testing.assert_close(moved[0].float(), stock[0].float() + phi[0])


class WithNoise(torch.nn.Module):
    """OLMoE's router behind a second map of the same output width, as a noisy top-k router has one."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.noise = torch.nn.Linear(HIDDEN, router.num_experts)
        self.weight, self.top_k, self.seen = router.weight, router.top_k, Tensor()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen = self.noise(hidden)
        logits = torch.nn.functional.linear(hidden, self.weight)
        weights, index = logits.softmax(-1).topk(self.top_k)
        return logits, weights, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phi_goes_to_the_map_of_the_routers_own_weight_not_to_another_of_its_width(dtype: torch.dtype) -> None:
    model = tiny("olmoe")
    for decoder in model.model.layers:
        decoder.mlp.gate = WithNoise(decoder.mlp.gate)
    sparse, hidden = SparseModel(model.to(dtype)), torch.randn(5, HIDDEN, generator=generator()).to(dtype)
    layer = sparse.layers[0]
    assert layer.convention.weight == "weight"
    logits, noise = layer.router(hidden)[0], layer.router.seen
    sparse.set_phi(torch.ones(2, 7))
    assert torch.equal(layer.router(hidden)[0], logits + 1) and torch.equal(layer.router.seen, noise)


def test_phi_reaches_a_router_that_casts_its_weight_first() -> None:
    layer = (sparse := SparseModel(tiny("deepseek_v2").to(torch.bfloat16))).layers[0]
    hidden = torch.randn(5, HIDDEN, generator=generator()).to(torch.bfloat16)
    logits = layer.router(hidden)[0]
    assert logits.dtype == torch.float32  # of a float32 copy of a bfloat16 weight
    sparse.set_phi(torch.ones(len(sparse.layers), 7))
    assert torch.equal(layer.router(hidden)[0], logits + 1)


def test_a_router_whose_logits_are_no_single_linear_map_is_refused() -> None:
    class Summed(WithNoise):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = torch.nn.functional.linear(hidden, self.weight) + self.noise(hidden)
            weights, index = logits.softmax(-1).topk(self.top_k)
            return logits, weights, index

    with pytest.raises(UnsupportedModel, match="Summed computes its logits by other means than one linear map"):
        observe_router(Summed(tiny("olmoe").model.layers[0].mlp.gate).requires_grad_(False), 7)


def test_phi_moves_candidates_only_in_an_example_worked_by_hand() -> None:
    model = tiny("olmoe")
    sparse = SparseModel(model)
    with torch.no_grad():
        sparse.layers[0].router.weight.copy_(torch.eye(7, HIDDEN))
    hidden = torch.zeros(1, HIDDEN)
    hidden[0, :7] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    phi = torch.zeros(len(sparse.layers), 7)
    phi[0, 4], phi[0, 5] = 3.5, 9.0  # expert 4 is fifth best, expert 5 sixth
    sparse.set_phi(phi, num_candidates=5)
    sparse.set_top_k(2)
    logits, weights, index = sparse.layers[0].router(hidden)
    assert logits.tolist() == [[6.0, 5.0, 4.0, 3.0, 5.5, 1.0, 0.0]]
    assert index.tolist() == [[0, 4]]
    torch.testing.assert_close(weights, logits.softmax(-1)[:, [0, 4]])


def test_a_trained_phi_gets_its_gradient_and_is_seen_after_each_step() -> None:
    sparse, ids = SparseModel(tiny("olmoe")), words()
    sparse.load_adapter(random_adapter(sparse), alpha=2.0)
    sparse.set_top_k(2)
    phi = torch.nn.Parameter(torch.zeros(len(sparse.layers), sparse.num_experts))
    sparse.set_phi(phi)
    losses = []
    for _ in range(3):
        phi.grad = None
        loss = sparse.model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert phi.grad is not None and (phi.grad.abs().sum(1) > 0).all()
        losses.append(loss.item())
        with torch.no_grad():
            phi -= 0.01 * phi.grad
    assert losses[0] > losses[1] > losses[2]


@every_family
def test_counts_ignore_padding_on_either_side(family: str) -> None:
    sparse, ids = SparseModel(tiny(family)), words(1, 5)
    sparse.set_top_k(2)
    with sparse.counting(), torch.no_grad():
        sparse.model(input_ids=ids)
    bare = sparse.expert_tokens()
    assert (bare.sum(1) == 5 * 2).all()
    mask = torch.ones_like(ids)
    for side in ((0, 3), (3, 0)):
        padded = {
            "input_ids": torch.nn.functional.pad(ids, side),
            "attention_mask": torch.nn.functional.pad(mask, side),
        }
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        with sparse.counting(), torch.no_grad():
            sparse.model(**padded)
        counted = sparse.expert_tokens()
        assert (counted.sum(1) == 5 * 2).all(), "padding was counted"
        assert torch.equal(counted, bare)
        with sparse.counting(), torch.no_grad():  # the mask by position
            sparse.model(padded["input_ids"], padded["attention_mask"], padded["position_ids"])
        assert torch.equal(sparse.expert_tokens(), bare)
    embedded = sparse.model.get_input_embeddings()(torch.nn.functional.pad(ids, (3, 0)))
    with sparse.counting(), torch.no_grad():
        sparse.model(inputs_embeds=embedded, attention_mask=torch.nn.functional.pad(mask, (3, 0)))
    assert (sparse.expert_tokens().sum(1) == 5 * 2).all()


def test_counts_start_from_zero_and_stop_outside_the_block() -> None:
    sparse, ids = SparseModel(tiny("olmoe")), words(2, 4)
    for _ in range(2):
        with sparse.counting(), torch.no_grad():
            sparse.model(input_ids=ids)
            sparse.model(input_ids=ids)
        sparse.model(input_ids=ids)
        assert (sparse.expert_tokens().sum(1) == 2 * 8 * sparse.k_max).all()


@pytest.mark.filterwarnings("ignore:.*generation flags.*")
def test_counts_ignore_padding_during_generation_too() -> None:
    sparse = SparseModel(tiny("olmoe"))
    ids, mask = words(2, 5), torch.ones(2, 5, dtype=torch.int64)
    ids[0, :2], mask[0, :2] = 0, 0
    with sparse.counting(), torch.no_grad():
        out = sparse.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    new = out.shape[1] - ids.shape[1]
    assert new == 4
    fed = int(mask.sum()) + 2 * (new - 1)  # the last word is never fed back
    assert (sparse.expert_tokens().sum(1) == fed * sparse.k_max).all()


@pytest.mark.parametrize("family", UNNORMALISED)
@pytest.mark.parametrize("rescale", ["none", "mass"])
@pytest.mark.parametrize("below", [0, 1])  # how far the run's K_max is below the base's own K
def test_rescale_gives_the_output_of_a_small_budget_the_scale_of_k_max(family: str, rescale: Any, below: int) -> None:
    sparse, hidden = SparseModel(tiny(family), rescale), torch.randn(11, HIDDEN, generator=generator())
    sparse.limit_k_max(sparse.k_max - below)
    layer = sparse.layers[0]
    assert not layer.convention.renormalises and layer.convention.scoring == "softmax"
    _, full, index = layer.router(hidden)
    assert index.shape[1] == sparse.k_max
    plain = SparseModel(tiny(family)).layers[0].router
    plain.top_k = sparse.k_max
    assert torch.equal(full, plain(hidden)[1])  # at K_max nothing is rescaled
    for top_k in range(1, sparse.k_max):
        sparse.set_top_k(top_k)
        plain.top_k = top_k
        weights, bare = layer.router(hidden)[1], plain(hidden)[1]
        if rescale == "none":
            assert torch.equal(weights, bare)
        else:
            torch.testing.assert_close(weights.sum(-1), full.sum(-1))
            torch.testing.assert_close(weights / weights.sum(-1, True), bare / bare.sum(-1, True))


@pytest.mark.parametrize("family", sorted(RENORMALISES))
def test_rescale_leaves_families_that_renormalise_alone(family: str) -> None:
    one, other = SparseModel(tiny(family), "mass"), SparseModel(tiny(family))
    assert one.layers[0].convention.renormalises
    for sparse in (one, other):
        sparse.set_top_k(2)
    assert torch.equal(one.model(words()).logits, other.model(words()).logits)


@pytest.mark.parametrize("scale", [1e-4, 0.02, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conventions_are_seen_through_flat_and_sharp_routers_in_any_precision(scale: float, dtype: torch.dtype) -> None:
    expected = {"olmoe": (False, "softmax"), "deepseek_v3": (True, "sigmoid"), "gpt_oss": (True, "softmax")}
    for family, (renormalises, scoring) in expected.items():
        router = next(
            getattr(m, "gate", None) or m.router for m in tiny(family).modules()
            if hasattr(getattr(m, "experts", None), "is_transposed")
        )  # fmt: skip
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.mul_(scale)
        seen = observe_router(router.to(dtype), router.num_experts)
        assert (seen.renormalises, seen.scoring) == (renormalises, scoring), family


def test_norm_topk_prob_is_noticed() -> None:
    assert SparseModel(tiny("olmoe", norm_topk_prob=True)).layers[0].convention.renormalises
    assert not SparseModel(tiny("deepseek_v3", norm_topk_prob=False)).layers[0].convention.renormalises


def test_phimoe_is_refused_since_it_always_takes_two() -> None:
    model = tiny("phimoe", intermediate_size=20, num_local_experts=7, num_experts_per_tok=2)
    with pytest.raises(UnsupportedModel, match=r"PhimoeTopKRouter ignores top_k \(asked for 1 .*got 2\)"):
        SparseModel(model)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM has no mixture-of-experts layers"):
        SparseModel(tiny("llama", intermediate_size=20))


def test_a_router_that_answers_in_another_form_is_refused_in_words() -> None:
    class Odd(torch.nn.Linear):
        top_k = 2

    with pytest.raises(UnsupportedModel, match="Odd cannot be run"):
        observe_router(Odd(HIDDEN, 7), 7)

    class Flat(torch.nn.Linear):
        top_k = 2

        def forward(self, hidden: Tensor) -> Any:
            logits = super().forward(hidden)
            return logits, *(t[:, : self.top_k] for t in logits.square().sort(descending=True))

    with pytest.raises(UnsupportedModel, match="neither by softmax nor by sigmoid"):
        observe_router(Flat(HIDDEN, 7), 7)


def test_a_model_can_be_operated_on_once_only() -> None:
    sparse = SparseModel(tiny("olmoe"))
    with pytest.raises(ValueError, match="already belongs to a SparseModel"):
        SparseModel(sparse.model)


@every_family
def test_logits_at_equals_full_logits_at_the_kept_positions(family: str) -> None:
    sparse, ids = SparseModel(tiny(family)), words(3, 6)
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    keep = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    with torch.no_grad():
        full = sparse.model(input_ids=ids, attention_mask=mask).logits
        some = sparse.logits_at(ids, mask, keep)
        again = sparse.model(input_ids=ids, attention_mask=mask).logits
    assert some.shape == (6, VOCAB)
    torch.testing.assert_close(some, full[:, :-1][keep], rtol=1e-5, atol=1e-6)
    assert torch.equal(again, full), "the hook was left behind"


@every_family
def test_a_zero_router_delta_is_bit_equal_and_a_trained_one_changes_routing(family: str) -> None:
    sparse, ids = SparseModel(tiny(family)), words()
    tensors = random_adapter(sparse)
    sparse.load_adapter(tensors, alpha=2.0)
    without = sparse.model(ids).logits
    routers = {f"layers.{layer.index}.router": torch.zeros(sparse.num_experts, HIDDEN) for layer in sparse.layers}
    sparse.load_adapter(tensors | routers, alpha=2.0)
    assert torch.equal(sparse.model(ids).logits, without)
    before = experts_per_layer(sparse, ids)
    sparse.model(input_ids=ids, labels=ids).loss.backward()
    trained = [sparse.adapter[name] for name in routers]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    torch.optim.AdamW(trained, lr=1.0).step()
    after = experts_per_layer(sparse, ids)
    assert any(not torch.equal(a.sort(-1)[0], b.sort(-1)[0]) for a, b in zip(before, after, strict=True))


def test_a_router_delta_is_an_addition_to_the_routers_weight() -> None:
    sparse, ids = SparseModel(tiny("gpt_oss")), words()
    tensors = random_adapter(sparse, router=True)
    sparse.load_adapter(tensors, alpha=2.0)
    ours = sparse.model(ids).logits
    merged = SparseModel(tiny("gpt_oss"))
    merged.load_adapter({name: value for name, value in tensors.items() if "router" not in name}, alpha=2.0)
    for layer in merged.layers:
        layer.router.weight.data += tensors[f"layers.{layer.index}.router"]
    torch.testing.assert_close(ours, merged.model(ids).logits, rtol=1e-4, atol=1e-5)


@every_family
def test_lora_on_attention_is_an_addition_to_the_projections_weights(family: str) -> None:
    """Logits, and the gradient of A, against a base whose projections hold s B A."""
    sparse, merged, ids = SparseModel(tiny(family)), SparseModel(tiny(family)), words()
    tensors = random_adapter(sparse, attention=True)
    experts = {name: value for name, value in tensors.items() if "attention" not in name}
    assert len(tensors) == len(experts) + 2 * sum(len(layer.attention.projections) for layer in sparse.layers)
    assert len(tensors) >= len(experts) + 8 * len(sparse.layers)
    sparse.load_adapter(tensors, alpha=2.0)
    out = sparse.model(input_ids=ids, labels=ids)
    out.loss.backward()
    merged.load_adapter(experts, alpha=2.0)
    without = merged.model(ids).logits
    weights = {}
    for layer in merged.layers:
        for name, projection in layer.attention.projections.items():
            key = f"layers.{layer.index}.attention.{name}"
            projection.weight.data += 2.0 / 3 * (tensors[f"{key}.B"][0] @ tensors[f"{key}.A"][0])
            weights[key] = projection.weight.requires_grad_()
    theirs = merged.model(input_ids=ids, labels=ids)
    theirs.loss.backward()
    torch.testing.assert_close(out.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    assert (out.logits - without).abs().max() > 0.01
    for key, weight in weights.items():
        expected = 2.0 / 3 * tensors[f"{key}.B"][0].T @ weight.grad
        torch.testing.assert_close(sparse.adapter[f"{key}.A"].grad[0], expected, rtol=1e-3, atol=1e-6)


def test_lora_on_attention_comes_off_without_a_trace() -> None:
    sparse, ids = SparseModel(tiny("deepseek_v3")), words()
    stock = sparse.model(ids).logits
    tensors = random_adapter(sparse, attention=True)
    for _ in range(2):  # the second in place of the first, not on top of it
        sparse.load_adapter(tensors, alpha=2.0)
    once = sparse.model(ids).logits
    sparse.load_adapter(tensors, alpha=2.0)
    assert torch.equal(sparse.model(ids).logits, once)
    sparse.load_adapter({name: value for name, value in tensors.items() if "attention" not in name}, alpha=2.0)
    assert not sparse.layers[0].attention.adapters
    sparse.clear()
    assert torch.equal(sparse.model(ids).logits, stock)


def test_lora_on_attention_leaves_the_draw_of_the_experts_alone() -> None:
    sparse = SparseModel(tiny("mixtral"))
    with_it = sparse.fresh_adapter(3, generator(), shared_a=True, attention=True)
    assert torch.equal(with_it["layers.0.up.A"], sparse.fresh_adapter(3, generator(), shared_a=True)["layers.0.up.A"])
    assert with_it["layers.1.attention.k_proj.A"].shape == (1, 3, 24)
    assert (
        with_it["layers.1.attention.k_proj.B"].shape == (1, 8, 3) and not with_it["layers.1.attention.k_proj.B"].any()
    )


def test_a_layer_without_attention_projections_is_refused_only_when_they_are_asked_for() -> None:
    model = tiny("olmoe")
    layer = model.model.layers[1]
    del layer.self_attn
    layer.forward = lambda hidden, **_: hidden + layer.mlp(hidden)
    sparse = SparseModel(model)
    assert sparse.fresh_adapter(3, generator(), shared_a=True)
    with pytest.raises(
        UnsupportedModel, match=r'without attention projections \(self_attn\); set adapter.attention = "froz'
    ):
        sparse.fresh_adapter(3, generator(), shared_a=True, attention=True)


def test_a_fresh_adapter_has_zero_b_and_one_a_for_all_experts_if_asked() -> None:
    sparse = SparseModel(tiny("gpt_oss"))
    for shared in (True, False):
        tensors = sparse.fresh_adapter(3, generator(), shared_a=shared)
        assert tensors["layers.1.up.A"].shape == (7, 3, 24) and tensors["layers.1.up.B"].shape == (7, 40, 3)
        assert tensors["layers.1.down.A"].shape == (7, 3, 20) and tensors["layers.1.down.B"].shape == (7, 24, 3)
        for name, value in tensors.items():
            if name.endswith("B"):
                assert not value.any()
            else:
                assert value.abs().max() <= 1 / value.shape[2] ** 0.5
                assert torch.equal(value[0], value[1]) == shared
        assert not torch.equal(tensors["layers.0.up.A"], tensors["layers.1.up.A"])


def test_load_adapter_takes_copies() -> None:
    sparse = SparseModel(tiny("olmoe"))
    tensors = random_adapter(sparse)
    sparse.load_adapter(tensors, alpha=2.0)
    next(iter(sparse.adapter.values())).data.add_(1)
    assert torch.equal(next(iter(tensors.values())), next(iter(random_adapter(sparse).values())))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0.up.A", None, "lacks layers.0.up.A"),
        ("layers.0.up.A", (7, 24), "layers.0.up.A has shape"),
        ("layers.1.up.B", (7, 3, 40), "layers.1.up.B has shape"),
        ("layers.1.down.A", (7, 4, 20), r"layers.1.down.A has shape \(7, 4, 20\), this base needs \(7, 3, 20\)"),
        ("layers.1.router", (1, 24), r"layers.1.router has shape \(1, 24\), this base needs \(7, 24\)"),
        ("layers.1.attention.k_proj.B", None, "lacks layers.1.attention.k_proj.B"),
        ("layers.1.attention.k_proj.B", (8, 3), r"k_proj.B has shape \(8, 3\), this base needs \(1, 8, 3\)"),
        ("layers.1.attention.qkv_proj.A", (1, 3, 24), "does not know: layers.1.attention.qkv_proj.A"),
        ("layers.9.up.A", (7, 3, 24), "does not know: layers.9.up.A"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...] | None, message: str) -> None:
    sparse = SparseModel(tiny("olmoe"))
    tensors = random_adapter(sparse, attention=True)
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        sparse.load_adapter(tensors, alpha=2.0)
    assert not sparse.adapter


def test_a_phi_of_another_shape_is_refused_rather_than_broadcast() -> None:
    sparse = SparseModel(tiny("olmoe"))
    for shape in ((2, 1), (3, 7), (7,)):
        with pytest.raises(ValueError, match="phi has shape"):
            sparse.set_phi(torch.zeros(shape))


def test_a_copy_of_an_operated_model_is_independent() -> None:
    sparse, ids = SparseModel(tiny("olmoe")), words()
    twin = copy.deepcopy(sparse)
    twin.set_top_k(1)
    assert sparse.layers[0].routing.top_k == 4 and twin.layers[0].router.top_k == 1
    assert twin.layers[0].router is not sparse.layers[0].router
    assert not torch.equal(twin.model(ids).logits, sparse.model(ids).logits)


def test_candidates_are_taken_from_the_unmodulated_logits_with_the_trained_router() -> None:
    sparse, hidden = SparseModel(tiny("olmoe")), torch.randn(9, HIDDEN, generator=generator())
    tensors = random_adapter(sparse, router=True)
    sparse.load_adapter(tensors, alpha=2.0)
    phi = torch.randn(len(sparse.layers), 7, generator=generator(3))
    sparse.set_phi(phi, 5)
    layer = sparse.layers[1]
    raw = hidden @ (layer.router.weight + tensors["layers.1.router"]).T
    torch.testing.assert_close(layer.router(hidden)[0], routing.modulate(raw, phi[1], 5))
