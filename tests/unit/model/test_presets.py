"""Presets load offline; other configurations become shapes or are refused with a reason."""

import json
from importlib import resources

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ubsmoe.errors import UserError
from ubsmoe.model.presets import FAMILIES, PRESETS, model_shape, shape_from_config


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def preset(name):
    """The preset as a configuration of transformers."""
    asset = resources.files("ubsmoe") / "assets" / PRESETS[name]
    return AutoConfig.for_model(**json.loads(asset.read_text(encoding="utf-8")))


def test_olmoe_preset_is_the_published_model():
    shape = model_shape("olmoe-1b-7b")
    assert (shape.num_layers, shape.num_moe_layers, shape.num_experts, shape.k_max) == (16, 16, 64, 8)
    assert (shape.hidden, shape.expert_width, shape.heads, shape.kv_heads, shape.head_dim) == (2048, 1024, 16, 16, 128)
    assert (shape.vocab, shape.tied_embeddings, shape.shared_width, shape.dense_width) == (50304, False, 0, 0)
    config = preset("olmoe-1b-7b")
    assert (config.norm_topk_prob, config.max_position_embeddings) == (False, 4096)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_read_as_transformers_would(name):
    assert model_shape(name) == shape_from_config(preset(name))


def test_olmoe_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset("olmoe-1b-7b"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 6_919_161_856
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert model_shape("olmoe-1b-7b").parameters == total - norms


def test_a_folder_is_read_as_it_was_saved(tmp_path):
    config = AutoConfig.for_model("mixtral", hidden_size=32, num_local_experts=6, num_experts_per_tok=3)
    config.save_pretrained(tmp_path)
    assert model_shape(tmp_path) == shape_from_config(config)


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2}, (3, 2)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (2, 1)),
        ("qwen2_moe", {"mlp_only_layers": [0, 3]}, (3, 1)),
        ("mixtral", {}, (5, 0)),
    ],
)
def test_dense_layers_are_told_from_moe_layers(family, settings, expected):
    shape = shape_from_config(AutoConfig.for_model(family, num_hidden_layers=5, **settings))
    assert (shape.num_moe_layers, shape.first_moe_layer) == expected


def test_a_dense_model_is_refused_by_name(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="dense model"):
        model_shape(tmp_path)
    with pytest.raises(UserError, match="has no experts"):
        shape_from_config(LlamaConfig())


def test_a_family_that_was_not_verified_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(UserError, match="jamba") as refusal:
        shape_from_config(AutoConfig.for_model("jamba"))
    assert all(family in str(refusal.value) for family in FAMILIES)


def test_a_configuration_without_any_moe_layer_is_refused():
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=4)
    with pytest.raises(UserError, match="every layer dense"):
        shape_from_config(config)


def test_code_that_ships_with_a_model_is_never_run(tmp_path):
    trap = tmp_path / "configuration_trap.py"
    trap.write_text("raise SystemExit('remote code ran')\n")
    table = {"model_type": "trap", "auto_map": {"AutoConfig": "configuration_trap.TrapConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="no usable model configuration"):
        model_shape(tmp_path)


def test_an_unknown_name_says_what_is_accepted():
    with pytest.raises(UserError, match=r"olmoe-1b-7b.*folder.*Hugging Face"):
        model_shape("no-such-base")
