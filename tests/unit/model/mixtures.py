"""A tiny random configuration of every mixture family that the installed transformers has, found by looking, not by a list."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
SMALL: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=24,
    shared_experts_intermediate_size=24, dense_intermediate_size=48, shared_intermediate_size=24, head_dim=8,
    moe_shared_expert_intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=512,
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8, num_experts_per_tok=4, moe_topk=4, moe_k=4,
    moe_top_k=4, num_experts_per_token=4, n_group=2, num_expert_group=2, topk_group=1, q_lora_rank=12, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, linear_head_dim=8, linear_num_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, sliding_window=64, index_topk=64,
    index_head_dim=16, index_n_heads=2, first_k_dense_replace=1, pad_token_id=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
KINDS = ("layer_types", "mlp_layer_types")
WRAPPERS = {"dots3_note", "gemma4", "llama4", "qwen3_5_moe", "qwen4_exp"}
"""Configurations of models for pictures too; the text part is a family of its own."""

# what the rules above cannot know
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": dict(num_experts_per_tok=4, n_group=1, num_key_value_heads=4),
    "dots3_note_text": dict(per_layer_config={}, head_dim=16),
    "dots1": dict(n_routed_experts=8, num_experts_per_tok=4, n_shared_experts=1),
    "gemma4_text": dict(
        enable_moe_block=True, num_experts=8, top_k_experts=4, moe_intermediate_size=24, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=4096, per_layer_config=None,
    ),
    "granitemoehybrid": dict(
        mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "hunyuan_v1_moe": dict(head_dim=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "longcat_flash": dict(num_layers=2, zero_expert_num=2, ffn_hidden_size=48, expert_ffn_hidden_size=24),
    "nemotron_h": dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"], mamba_num_heads=4, mamba_head_dim=16,
        ssm_state_size=8, n_groups=1, num_hidden_layers=4,
    ),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=64, indexer_compress_ratio=4, hc_lowrank=8,
    ),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=16),
}  # fmt: skip


def families() -> Iterator[str]:
    """Every family with experts among transformers' causal language models."""
    root = Path(transformers.__file__).parent / "models"
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        modules = (root / model_type_to_module_name(family)).glob("modeling_*.py")
        if any("Experts(" in path.read_text(encoding="utf-8") for path in modules):
            yield family


def tiny_config(family: str) -> Any:
    """Its own configuration with every size made small, and one layer of each kind.

    Raises:
        Exception: of transformers', where sizes of this family have names or rules of their own.
    """
    default = CONFIG_MAPPING[family]()
    said = default.to_dict()
    names = {name: said.get(default.attribute_map.get(name, name)) for name in {*SMALL, "num_key_value_heads", *KINDS}}
    chosen = {name: value for name, value in SMALL.items() if names[name] is not None}
    if heads := names["num_key_value_heads"]:
        chosen["num_key_value_heads"] = 4 if heads == said.get("num_attention_heads") else min(heads, 2)
    for name in KINDS:
        if kinds := names[name]:
            chosen[name] = (list(dict.fromkeys(kinds)) + [kinds[-1]] * LAYERS)[:LAYERS]
    return CONFIG_MAPPING[family](**chosen | OWN.get(family, {}))
