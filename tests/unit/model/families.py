"""Tiny random models of every family we promise, no two sizes alike."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, HIDDEN, WIDTH = 31, 24, 20
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DEEPSEEK: dict[str, Any] = dict(
    intermediate_size=36, moe_intermediate_size=WIDTH, num_experts_per_tok=3, n_shared_experts=2, num_hidden_layers=3,
    first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7,
    num_key_value_heads=3,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": dict(intermediate_size=WIDTH, num_experts=7, num_experts_per_tok=4),
    "mixtral": dict(intermediate_size=WIDTH, num_local_experts=7, num_experts_per_tok=4),
    "qwen2_moe": dict(
        intermediate_size=36, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=28, num_experts=7,
        num_experts_per_tok=4,
    ),
    "qwen3_moe": dict(
        intermediate_size=36, moe_intermediate_size=WIDTH, num_experts=7, num_experts_per_tok=4, head_dim=10,
    ),
    "deepseek_v2": dict(DEEPSEEK, n_routed_experts=7, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1),
    "deepseek_v3": dict(DEEPSEEK, n_routed_experts=8, q_lora_rank=17, n_group=2, topk_group=1),
    "gpt_oss": dict(intermediate_size=WIDTH, num_local_experts=7, num_experts_per_tok=4, head_dim=10),
    "granitemoe": dict(intermediate_size=WIDTH, num_local_experts=7, num_experts_per_tok=4, logits_scaling=2.0),
}  # fmt: skip
RENORMALISES = {"mixtral", "deepseek_v3", "gpt_oss", "granitemoe"}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model whose routers prefer some experts clearly, in eval mode."""
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES.get(family, {}) | changes))
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
            elif "rotary" not in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def words(rows: int = 3, length: int = 5, seed: int = 1) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
