"""Costs against torch's own FLOP counter, against what autograd really keeps, and against an example worked by hand.

Sizes differ from one another, so that a swapped pair cannot pass. Models are built with random weights.
"""

import json
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ubsmoe.costs.flops import backward_flops_per_token, forward_flops_per_token, pseudo_gradient_flops_per_token
from ubsmoe.costs.memory import mapped_memory_bytes, own_memory_bytes, peak_memory_bytes
from ubsmoe.costs.shape import EXPERTS_ONLY, ModelShape, Trained
from ubsmoe.costs.tiers import Tier, TierCost, tier_costs
from ubsmoe.costs.traffic import Traffic, adapter_traffic, count_bytes
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.maths.pseudo_gradient import PseudoGradient, Scope
from ubsmoe.model.presets import FAMILIES, model_shape, shape_from_config
from ubsmoe.model.surgery import SparseModel

BATCH, LENGTH, RANK = 2, 13, 3
COMMON: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MIXED: dict[str, Any] = dict(intermediate_size=36, moe_intermediate_size=20)  # families with dense layers
GROUPS: dict[str, Any] = dict(n_group=1, topk_group=1)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7, n_shared_experts=2
)
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": dict(intermediate_size=20, num_experts=11),
    "flex_olmo": dict(intermediate_size=20, num_experts=11),
    "mixtral": dict(intermediate_size=20, num_local_experts=11, head_dim=10),
    "minimax_m2": dict(intermediate_size=20, num_local_experts=11, head_dim=14),
    "gpt_oss": dict(intermediate_size=20, num_local_experts=11, head_dim=14),
    "granitemoe": dict(intermediate_size=20, num_local_experts=11, tie_word_embeddings=True),
    "qwen2_moe": dict(**MIXED, num_experts=11, shared_expert_intermediate_size=28, mlp_only_layers=[0]),
    "qwen3_moe": dict(**MIXED, num_experts=11, head_dim=14, decoder_sparse_step=2),
    "glm4_moe": dict(**MIXED, **GROUPS, n_routed_experts=11, n_shared_experts=1, first_k_dense_replace=1, head_dim=14),
    "dots1": dict(**MIXED, **GROUPS, n_routed_experts=11, n_shared_experts=3, first_k_dense_replace=1, head_dim=14),
    "deepseek_v2": dict(**MIXED, **LATENT, n_routed_experts=11, first_k_dense_replace=1, q_lora_rank=None),
    "deepseek_v3": dict(**MIXED, **LATENT, **GROUPS, n_routed_experts=11, first_k_dense_replace=2, q_lora_rank=17),
}
TRAINED = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
every_way = pytest.mark.parametrize(
    "trained",
    [EXPERTS_ONLY, Trained(router=True), Trained(attention=True), Trained(router=True, attention=True)],
    ids=["experts", "router", "attention", "router and attention"],
)
# the product's experts add LoRA in place; torch's counter knows addmm but not addmm_
IN_PLACE = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}

ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 97 + 3
olmoe = model_shape("olmoe-1b-7b")
shapes = st.builds(
    ModelShape,
    num_layers=st.integers(3, 6),
    num_moe_layers=st.integers(1, 2),
    hidden=st.integers(1, 64),
    expert_width=st.integers(1, 64),
    num_experts=st.integers(8, 16),
    k_max=st.integers(1, 8),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 16),
    vocab=st.integers(1, 200),
    first_moe_layer=st.integers(0, 1),
    shared_width=st.integers(0, 8),
    dense_width=st.integers(1, 64),
    gated=st.booleans(),
)


def work(rank: int = RANK, length: int = LENGTH, trained: Trained = EXPERTS_ONLY, **facts: Any) -> Workload:
    return Workload(rank, Batch.full(BATCH, length), trained, **facts)


def one_tier(budget: float = 0.25, top_k: int = 2, **facts: Any) -> TierCost:
    return tier_costs(olmoe, [Tier(budget, top_k, rank=8)], work(8, 256, **facts))[0]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, attention: str = "eager", **sizes: Any) -> tuple[Any, ModelShape]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **CONFIGS[family], **sizes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    return model.eval(), shape_from_config(config)


stock = cache(build)  # for tests that leave the model as it was


def build_trainable(
    family: str, top_k: int, trained: Trained = EXPERTS_ONLY, **kwargs: Any
) -> tuple[SparseModel, ModelShape]:
    model, shape = build(family, **kwargs)
    sparse = SparseModel(model)
    adapter = sparse.fresh_adapter(RANK, torch.Generator().manual_seed(0), shared_a=True, **asdict(trained))
    sparse.load_adapter(adapter, alpha=2.0)
    sparse.set_top_k(top_k)
    return sparse, shape


def counted_step(sparse: SparseModel) -> tuple[int, int]:
    """FLOPs of forward and of backward, as torch saw them."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        loss = sparse.model(ids, use_cache=False).logits.float().logsumexp(-1).mean()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def test_every_supported_family_is_compared_with_a_real_model():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_shape_has_exactly_the_matrices_of_the_model_it_describes(family):
    model, shape = stock(family)
    matrices = [p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "bias" not in name]
    assert shape.parameters == sum(matrices)


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_flops_are_those_torch_counts_at_every_budget(family):
    model, shape = stock(family)
    for top_k in (8, 6, 4, 2):
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = top_k
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids, use_cache=False)
        assert counter.get_total_flops() == ids.numel() * forward_flops_per_token(shape, top_k, work(0)).total


@every_way
@pytest.mark.parametrize("family", TRAINED)
def test_a_training_step_costs_what_torch_counts(family, trained):
    sparse, shape = build_trainable(family, top_k=8, trained=trained)
    for top_k in (8, 2):
        sparse.set_top_k(top_k)
        forward, backward = counted_step(sparse)
        assert forward == ids.numel() * forward_flops_per_token(shape, top_k, work(trained=trained)).total
        assert backward == ids.numel() * backward_flops_per_token(shape, top_k, work(trained=trained)).total


class PlainLora(nn.Module):
    """The textbook's adapter on one matrix, left to autograd: an oracle that shares no code with the product."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.weight = weight.detach()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]))
        self.b = nn.Parameter(torch.randn(weight.shape[0], rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) + nn.functional.linear(nn.functional.linear(x, self.a), self.b)


@pytest.mark.parametrize("input_needs_gradient", [False, True], ids=["first MoE layer", "a later layer"])
def test_the_backward_of_one_expert_is_that_of_plain_lora(input_needs_gradient):
    tokens, hidden, width = 17, 10, 6
    up, down = PlainLora(torch.randn(2 * width, hidden), RANK), PlainLora(torch.randn(hidden, width), RANK)
    x = torch.randn(tokens, hidden, requires_grad=input_needs_gradient)
    gate, value = up(x).chunk(2, dim=-1)
    y = down(nn.functional.silu(gate) * value)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # a model of one such layer, or the second of two
    one = ModelShape(1, 1, hidden, width, 5, 2, 1, 1, 1, vocab=1)
    ours = backward_flops_per_token(one, top_k=1, workload=work(length=1))
    if input_needs_gradient:
        two = replace(one, num_layers=2, num_moe_layers=2)
        both = backward_flops_per_token(two, top_k=1, workload=work(length=1))
        ours = replace(ours, experts=both.experts - ours.experts, expert_lora=both.expert_lora - ours.expert_lora)
    assert counter.get_total_flops() == tokens * (ours.experts + ours.expert_lora)


def test_the_oracle_pseudo_gradient_costs_what_torch_counts():
    sparse, shape = build_trainable("olmoe", top_k=2)
    plain = sum(counted_step(sparse))
    scopes: tuple[tuple[Scope, ...], ...] = (("experts",), ("experts", "hidden"))
    for scope in scopes:
        sparse.set_pseudo_gradient(PseudoGradient("oracle", scope=scope))
        extra = sum(counted_step(sparse)) - plain
        workload = work(pair_fraction=1.0, pairs_reach_input="hidden" in scope)
        assert extra == ids.numel() * pseudo_gradient_flops_per_token(shape, 2, workload)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 5), st.integers(1, 40))
def test_flops_are_affine_in_top_k(shape, rank, length):
    def forward(top_k):
        return forward_flops_per_token(shape, top_k, work(rank, length)).total

    def backward(top_k):
        return backward_flops_per_token(shape, top_k, work(rank + 1, length)).total

    for cost in (forward, backward):
        slope = cost(2) - cost(1)
        assert slope > 0
        assert [cost(k) for k in (4, 6, 8)] == [cost(1) + (k - 1) * slope for k in (4, 6, 8)]


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 64), st.booleans(), st.booleans())
def test_adapter_bytes_are_linear_in_rank(shape, rank, router, attention):
    def upload(r):
        return adapter_traffic(shape, r, Trained(router, attention)).upload_bytes

    fixed = upload(0)
    assert upload(rank) - fixed == rank * (upload(1) - fixed)
    assert fixed == (4 * shape.num_moe_layers * shape.num_experts * shape.hidden if router else 0)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 7), st.integers(1, 5))
def test_all_missing_pairs_cost_what_the_missing_experts_would(shape, top_k, rank):
    def experts(k):
        parts = forward_flops_per_token(shape, k, work(rank, 1)), backward_flops_per_token(shape, k, work(rank, 1))
        return sum(part.experts + part.expert_lora for part in parts)

    def pairs(fraction, reach_input=False):
        return pseudo_gradient_flops_per_token(
            shape, top_k, work(rank, pair_fraction=fraction, pairs_reach_input=reach_input)
        )

    extra = pairs(1.0, reach_input=True)
    assert extra == experts(shape.num_experts) - experts(top_k)
    assert pairs(0.0) == 0
    assert pairs(0.25) * 4 == pytest.approx(pairs(1.0))


@every_way
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_adapter_bytes_are_those_of_the_adapters_a_client_gets(family, trained):
    sparse, shape = build_trainable(family, top_k=2, trained=trained)
    size = sum(tensor.numel() * tensor.element_size() for tensor in sparse.adapter.values())
    assert adapter_traffic(shape, RANK, trained) == Traffic(size, size)
    counts = [
        torch.zeros(shape.num_moe_layers, shape.num_experts, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
    ]
    assert count_bytes(shape) == sum(tensor.numel() * tensor.element_size() for tensor in counts)


@pytest.mark.parametrize("attention", [False, True], ids=["experts", "attention"])
@pytest.mark.parametrize(("family", "top_k"), [("olmoe", 8), ("olmoe", 2), ("qwen2_moe", 2), ("deepseek_v3", 8)])
def test_saved_activations_are_near_what_autograd_keeps(family, top_k, attention):
    trained = Trained(attention=attention)
    # torch's fused attention, which keeps no scores, wants queries and values of one width
    latent = {"v_head_dim": 16} if family == "deepseek_v3" else {}
    sparse, shape = build_trainable(family, top_k, trained, attention="sdpa", hidden_size=96, **latent)
    resident = {t.untyped_storage().data_ptr() for t in (*sparse.model.parameters(), *sparse.adapter.values())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = sparse.model(ids, use_cache=False)
    predicted = peak_memory_bytes(shape, top_k, work(trained=trained)).activations
    measured = sum(storage.nbytes() for storage in kept.values())
    measured += sum(
        t.nbytes for name, t in sparse.adapter.items() if name.endswith(".B") and "attention" not in name
    )  # the kernel's copies, out of sight
    assert output.logits.requires_grad
    assert predicted == pytest.approx(measured, rel=0.05)


def test_memory_parts_of_a_model_worked_by_hand():
    shape = ModelShape(
        2, 2, hidden=6, expert_width=5, num_experts=4, k_max=2, heads=3, kv_heads=1, head_dim=2, vocab=50
    )
    workload = Workload(rank=1, batch=Batch.full(3, 7), dtype_bytes=2)
    memory = peak_memory_bytes(shape, 2, workload)
    # per layer: q and o 36 each, k and v 12 each; router 24; 4 experts of 3 * 5 * 6; embeddings and head 300 each
    assert memory.weights == 2 * (2 * (96 + 24 + 360) + 600)
    # per layer and expert: gate_up 6 + 10, down 5 + 6
    assert memory.task == memory.adapters == 4 * 2 * 4 * 27 and memory.gradients == 0
    assert memory.optimizer == 2 * memory.adapters
    assert memory.working == 21 * 50 * (2 + 12)
    assert memory.total == sum((memory.weights, memory.adapters * 4, memory.activations, memory.working))
    held = peak_memory_bytes(shape, 2, replace(workload, accumulating=True))
    assert held.gradients == held.adapters and held.total == memory.total + held.gradients
    # a CPU keeps what it frees: gradients lie beside activations and the loss's work, and each leaves as much in holes
    freed = memory.adapters + memory.activations + memory.working
    own = 4 * memory.adapters + 2 * freed
    assert own_memory_bytes(shape, 2, workload) == own_memory_bytes(shape, 2, replace(workload, experts="int8")) == own
    assert own_memory_bytes(shape, 2, replace(workload, experts="nf4")) == own + memory.adapters
    fewer = peak_memory_bytes(shape, 2, replace(workload, batch=Batch(3, 7, 21, labelled=20)))
    assert fewer.working == 20 * 50 * (2 + 12)


def test_quantised_experts_are_counted_with_their_scales():
    """OLMoE: 6.44e9 elements of experts in 16 layers; 64 experts of 2048 + 2048 rows."""
    shape = model_shape("olmoe-1b-7b")
    experts, rest = 16 * 64 * 3 * 2048 * 1024, 2 * (shape.parameters - 16 * 64 * 3 * 2048 * 1024)
    workload = Workload(rank=8, batch=Batch.full(1, 128), dtype_bytes=2)
    memory = {kind: peak_memory_bytes(shape, 2, replace(workload, experts=kind)) for kind in (None, "int8", "nf4")}
    assert memory[None].weights == rest + 2 * experts
    assert memory["int8"].weights == rest + experts + 4 * 16 * 64 * (2048 + 2048)
    assert memory["nf4"].weights == rest + experts // 2 + 4 * experts // 64


def test_of_a_mapped_base_one_layer_and_the_ends_stay():
    """OLMoE: 64 experts of 3 * 2048 * 1024, four attention projections and two norms of q and k, 2 x 50,304 rows of 2,048."""
    shape, workload = model_shape("olmoe-1b-7b"), Workload(rank=8, batch=Batch.full(1, 128), dtype_bytes=2)
    kept = mapped_memory_bytes(shape, 2, workload) - own_memory_bytes(shape, 2, workload)
    assert kept == 2 * (64 * 3 * 2048 * 1024 + shape.attention_weights + 2 * 50304 * 2048)
    nf4 = replace(workload, experts="nf4")
    saved = kept - (mapped_memory_bytes(shape, 2, nf4) - own_memory_bytes(shape, 2, nf4))
    assert saved == 64 * 3 * 2048 * 1024 * (4 - 1 - 4 / 32) / 2


def test_a_large_adapter_peaks_where_the_optimiser_steps():
    shape = ModelShape(
        4, 4, hidden=6, expert_width=5, num_experts=4, k_max=2, heads=3, kv_heads=1, head_dim=2, vocab=50
    )
    memory = peak_memory_bytes(shape, 1, Workload(rank=100, batch=Batch.full(1, 1)))
    assert memory.gradients == memory.adapters == 4 * 4 * 4 * 100 * 27 and memory.activations == 0
    assert memory.working == 2 * 4 * 4 * 100 * 10  # the largest tensor is gate_up's B, twice 5 wide


def test_olmoe_forward_flops_worked_by_hand():
    per_layer_attention = 4 * 2048 * 2048  # q, k, v, o
    per_layer_scores = 2 * 512 * 16 * 128  # Q K^T and P V, 512 keys, 16 heads of 128
    router = 64 * 2048
    per_expert = 3 * 2048 * 1024  # gate, up, down
    per_adapter = 8 * (2048 + 2048) + 8 * (
        1024 + 2048
    )  # gate_up: A [8, 2048], B [2048, 8]; down: A [8, 1024], B [2048, 8]
    head = 50304 * 2048
    fixed = 2 * (16 * (per_layer_attention + per_layer_scores + router) + head)
    slope = 2 * 16 * (per_expert + per_adapter)
    assert (fixed, slope) == (814_219_264, 203_161_600)

    flops = {k: forward_flops_per_token(olmoe, k, work(8, 512)).total for k in (2, 4, 6, 8)}
    assert flops == {2: 1_220_542_464, 4: 1_626_865_664, 6: 2_033_188_864, 8: 2_439_512_064}
    assert 1 - flops[2] / flops[8] == pytest.approx(0.49968, abs=1e-5)


def test_olmoe_savings_quoted_in_the_docstring_of_tier_costs():
    def saved(length, head=True, training=False, k=2):
        def cost(top_k):
            passes = [forward_flops_per_token(olmoe, top_k, work(8, length))]
            passes += [backward_flops_per_token(olmoe, top_k, work(8, length))] if training else []
            return sum(flops.total - (0 if head else flops.head) for flops in passes)

        return round(100 * (1 - cost(k) / cost(8)), 1)

    assert [saved(256, k=k) for k in (6, 4, 2)] == [16.9, 33.8, 50.7]
    assert (saved(256, head=False), saved(256, training=True)) == (55.4, 50.4)
    assert (saved(2048), saved(2560), saved(4096), saved(4096, head=False)) == (46.2, 45.0, 41.9, 45.1)
    ranks = {r: forward_flops_per_token(olmoe, 8, work(r, 512)).total for r in (4, 32, 64)}
    assert [round(100 * (1 - ranks[4] / ranks[r]), 1) for r in (32, 64)] == [2.1, 4.3]


def test_tiers_of_olmoe_cost_what_their_k_does_and_send_the_same_bytes():
    tiers = [Tier(k / 8, k, rank=8) for k in (2, 4, 6, 8)]
    costs = tier_costs(olmoe, tiers, work(8, 256))
    assert [cost.top_k for cost in costs] == [2, 4, 6, 8]
    assert [round(cost.relative_to_top, 4) for cost in costs] == [0.4956, 0.6637, 0.8319, 1.0]
    # 16 layers x 64 experts x 8 x (2 * 2048 + 3 * 1024) x 4 bytes; up, a count of int64 per layer and expert, and two more
    assert {cost.download_bytes for cost in costs} == {234_881_024}
    assert {cost.upload_bytes for cost in costs} == {234_881_024 + 8 * (16 * 64 + 2)}
    memory = [cost.peak_memory_bytes for cost in costs]
    assert memory == sorted(set(memory))


def test_varying_the_rank_changes_the_bytes_and_hardly_the_flops():
    weak, top = tier_costs(olmoe, [Tier(0.25, 8, rank=4), Tier(1.0, 8, rank=32)], work(8, 256))
    assert (weak.rank, top.rank) == (4, 32)
    assert top.download_bytes == 8 * weak.download_bytes
    assert 0.95 < weak.relative_to_top < 1


def test_the_bytes_of_a_tier_are_those_of_what_is_trained_in_the_wires_dtype_or_the_methods_own():
    whole = Trained(router=True, attention=True)
    cost = one_tier(trained=whole, wire_dtype="bfloat16")
    expected = adapter_traffic(olmoe, 8, whole, "bfloat16")
    assert cost.download_bytes == expected.download_bytes
    assert cost.upload_bytes == expected.upload_bytes + count_bytes(olmoe)
    own = tier_costs(olmoe, [Tier(1.0, 8, rank=3)], work(8), lambda shape, rank: Traffic(100 * rank, 10 * rank))[0]
    assert (own.download_bytes, own.upload_bytes) == (300, 30 + count_bytes(olmoe))


def test_a_tier_costs_its_pseudo_gradients_too():
    extra = one_tier(pair_fraction=0.5).train_flops_per_token - one_tier().train_flops_per_token
    assert extra == round(pseudo_gradient_flops_per_token(olmoe, 2, work(8, pair_fraction=0.5)))


def test_pseudo_gradients_that_reach_the_hidden_state_cost_more_and_missing_pairs_take_memory():
    plain, pairs = one_tier(), one_tier(pair_fraction=0.5)
    deep = one_tier(pair_fraction=0.5, pairs_reach_input=True)
    extra = deep.train_flops_per_token - plain.train_flops_per_token
    workload = work(8, pair_fraction=0.5, pairs_reach_input=True)
    assert extra == round(pseudo_gradient_flops_per_token(olmoe, 2, workload))
    assert extra > pairs.train_flops_per_token - plain.train_flops_per_token
    assert pairs.peak_memory_bytes > plain.peak_memory_bytes > one_tier(optimizer_moments=1).peak_memory_bytes


def test_a_cost_is_json_with_the_promised_keys():
    cost = one_tier().as_dict()
    assert json.loads(json.dumps(cost)) == cost
    assert list(cost) == [
        "tier",
        "budget",
        "top_k",
        "rank",
        "experts",
        "forward_flops_per_token",
        "backward_flops_per_token",
        "train_flops_per_token",
        "relative_to_top",
        "upload_bytes",
        "download_bytes",
        "peak_memory_bytes",
        "mapped_memory_bytes",
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda: forward_flops_per_token(olmoe, 65, work()),
        lambda: forward_flops_per_token(olmoe, -1, work()),
        lambda: backward_flops_per_token(olmoe, 65, work()),
        lambda: backward_flops_per_token(olmoe, 8, work(rank=0)),
        lambda: peak_memory_bytes(olmoe, 65, work()),
        lambda: work(rank=-1),
        lambda: work(length=0),
        lambda: work(pair_fraction=1.5),
        lambda: replace(olmoe, k_max=65),
        lambda: replace(olmoe, num_moe_layers=17),
        lambda: replace(olmoe, num_moe_layers=15),
    ],
)
def test_impossible_settings_are_refused(call):
    with pytest.raises(ValueError, match=r"got|exceed|must be"):
        call()
