"""A federation small enough to run in half a second: a random two-layer mixture, four clients in two tiers, one question."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from ubsmoe.config import RunSettings, parse_run, with_overrides
from ubsmoe.model.load import shipped_path


def write_base(folder: Path) -> Path:
    """A random OLMoE of 2 layers, 6 experts, K_max 4, with the shipped tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=4, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_settings(base: Path, changes: dict[str, Any] | None = None) -> RunSettings:
    """Three rounds of one step; `changes` are dotted settings."""
    table: dict[str, Any] = {
        "seed": 3,
        "threads": 1,
        "model": {"base": str(base)},
        "adapter": {"rank": 3, "alpha": 6.0},
        "tiers": {"budgets": [0.5, 1.0], "ranks": [2, 3]},
        "clients": {"count": 4},
        "data": {"synthetic": {"train_examples": 40, "test_examples": 8, "entities": 8}},
        "train": {"rounds": 3, "local_steps": 1, "batch_size": 2},
        "evaluate": {"max_new_tokens": 1, "max_examples": 1, "mc_accuracy": False},
    }
    return parse_run(with_overrides(table, changes or {}))
