"""From the name of a base to the sizes that costs are counted from. No weights are loaded; a preset needs no transformers."""

import json
import logging
import re
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from ubsmoe.config import ConfigError, ModelSettings, RunSettings
from ubsmoe.costs.shape import LatentAttention, ModelShape
from ubsmoe.costs.workload import ExpertFormat, format_named
from ubsmoe.data.hub import go_offline_without_network
from ubsmoe.errors import UserError

Config = Any
"""A configuration of transformers, or what stands for one: its attributes are read by name, and families differ in them."""

PRESETS = {
    "olmoe-1b-7b": "configs/olmoe-1b-7b.json",
    "qwen3-30b-a3b": "configs/qwen3-30b-a3b.json",
    "ubsmoe-tiny": "ubsmoe-tiny/config.json",
}
HUB_IDS = {"olmoe-1b-7b": "allenai/OLMoE-1B-7B-0924", "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B"}
"""Where the weights of a named base are, if they do not ship: the sizes of both are known offline."""

MOST_LAYERS, MOST_EXPERTS = 1000, 1 << 16  # far above any model's; more is a file that is made to fill the memory
QUANT_METHOD = "ubsmoe"
"""In the config.json of a base with quantised experts, so that transformers refuses it instead of reading bytes as weights."""

FLOAT8_BLOCK = (128, 128)

EXPECTED = (
    f"expected {', '.join(PRESETS)}, a folder with a transformers model, or a Hugging Face model id whose code is part of "
    "transformers"
)
"""What model.base may be."""

# Families whose sizes the tests compare with a real model, parameter for parameter and FLOP for FLOP. Others may look
# alike and hide a convolution or a state space, so they are refused, not guessed.
FAMILIES = (
    "deepseek_v2", "deepseek_v3", "dots1", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_moe",
)  # fmt: skip
QK_NORM = {"dots1", "flex_olmo", "minimax_m2", "olmoe", "qwen3_moe"}


def model_shape(name_or_path: str | Path) -> ModelShape:
    """The sizes of a sparse-MoE model: a preset, offline; a folder; or a Hugging Face model id.

    Code that ships with a model is never run.

    Raises:
        UserError: if there is no such model, it is dense, or it is of a family whose sizes have not been verified.

    >>> model_shape("olmoe-1b-7b").parameters
    6919028736
    """
    name, config = str(name_or_path), _config(str(name_or_path))
    check_sparse(config, name)
    return shape_from_config(config)


def check_sparse(config: Config, name: str) -> None:
    """Raise UserError for the configuration of a dense model, or of numbers of experts and layers that no model has."""
    layers, experts = int(_first(_text(config), "num_hidden_layers") or 0), _num_experts(config)
    if layers > MOST_LAYERS or experts > MOST_EXPERTS:
        raise UserError(
            f"model.base: {name} has {layers} layers of {experts} experts by its config.json; expected at most {MOST_LAYERS} of "
            f"{MOST_EXPERTS}"
        )
    if not experts:
        raise UserError(
            f"{name} is a dense model ({config.model_type}): it has no experts to choose from. "
            f"Set model.base to a sparse mixture of experts, such as {', '.join(PRESETS)}"
        )
    top_k = _first(_text(config), "num_experts_per_tok", "moe_topk")
    if isinstance(top_k, int) and not 1 <= top_k <= experts:
        raise UserError(
            f"model.base: {name} runs {top_k} of {experts} experts by its config.json; expected 1 to {experts}"
        )


def check_length(config: Config, max_length: int, name: str) -> None:
    """Raise ConfigError for texts longer than a model has positions for."""
    positions = getattr(_text(config), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise ConfigError(
            f"data.max_length is {max_length}, but {name} has {positions} positions; lower it to {positions} or less"
        )


def shape_from_config(config: Config) -> ModelShape:
    """The sizes of the model that transformers would build from this configuration.

    Raises:
        UserError: if it has no experts, or is of a family whose sizes have not been verified.
    """
    experts = _num_experts(config)
    if not experts or config.model_type not in FAMILIES:
        fault = "has not been verified" if experts else "has no experts"
        raise UserError(f"cannot count the costs of {config.model_type}: it {fault}; known: {', '.join(FAMILIES)}")
    moe_layers = _moe_layers(config)
    if not moe_layers:
        raise UserError(f"this {config.model_type} configuration makes every layer dense; see first_k_dense_replace")
    heads = config.num_attention_heads
    latent = _latent_attention(config)
    width = _first(config, "moe_intermediate_size", "intermediate_size")
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_moe_layers=len(moe_layers),
        first_moe_layer=moe_layers[0],
        hidden=config.hidden_size,
        expert_width=width,
        num_experts=experts,
        k_max=config.num_experts_per_tok,
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads") or heads,
        head_dim=_head_dim(config, latent),
        vocab=config.vocab_size,
        shared_width=_first(config, "shared_expert_intermediate_size")
        or width * (_first(config, "n_shared_experts") or 0),
        shared_gate=hasattr(config, "shared_expert_intermediate_size"),
        dense_width=config.intermediate_size if len(moe_layers) < config.num_hidden_layers else 0,
        qk_norm=config.model_type in QK_NORM or bool(_first(config, "use_qk_norm")),
        tied_embeddings=bool(config.tie_word_embeddings),
        latent=latent,
    )


def is_preset(name: str) -> bool:
    """Whether a base's sizes are known without asking anybody, by its short name or its hub id."""
    return name in PRESETS or name in HUB_IDS.values()


def dtype_of(settings: ModelSettings) -> Literal["float32", "bfloat16"]:
    """The precision that a run computes in: what model.dtype says, or the checkpoint's own.

    A checkpoint in float16, which CPUs do not train in, and the shipped base, whose published results are so, are taken as
    float32.

    Raises:
        UserError: if there is no such base.

    >>> dtype_of(ModelSettings(base="olmoe-1b-7b")), dtype_of(ModelSettings(base="ubsmoe-tiny"))
    ('bfloat16', 'float32')
    """
    if settings.dtype != "auto":
        return settings.dtype
    stored = getattr(_config(settings.base), "dtype", None)
    shipped = settings.base in PRESETS.keys() - HUB_IDS.keys()
    return "bfloat16" if str(stored).endswith("bfloat16") and not shipped else "float32"


def experts_of(settings: ModelSettings) -> ExpertFormat | None:
    """What the experts are quantised to: what model.experts says, or a prepared base. Raises UserError if there is no such base."""
    return settings.experts or prepared_format(_config(settings.base))


def tier_formats(settings: RunSettings) -> list[ExpertFormat | None]:
    """The same of each tier."""
    tiers = settings.tiers
    if tiers.experts is None:
        return [experts_of(settings.model)] * len(tiers.budgets)
    return [format_named(name) for name in tiers.experts]


def prepared_format(config: Config) -> Any:
    """int8 or nf4 for the configuration of a prepared base with quantised experts; None for any other."""
    found = getattr(config, "quantization_config", None)
    return found.get("experts") if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD else None


def in_float8(config: Config) -> bool:
    """Whether a checkpoint is of float8 numbers with a scale to each block of 128 x 128, as Qwen3 and DeepSeek-V3 are published."""
    found = getattr(config, "quantization_config", None)
    kind = (found.get("quant_method"), found.get("weight_block_size")) if isinstance(found, dict) else None
    return kind == ("fp8", [*FLOAT8_BLOCK])


def checked_k_max(k_max: int | None, stock: int, base: str) -> int:
    """Experts per token at budget 1: `k_max`, or the base's own. Raises ConfigError if it is above that."""
    if k_max is not None and k_max > stock:
        raise ConfigError(
            f"tiers.k_max is {k_max}, but {base} was trained with {stock} experts per token; expected 1..{stock}"
        )
    return k_max or stock


def check_place(place: str | Path) -> None:
    """Raise ValueError unless this is a folder or looks like a hub id: a misspelt folder is no question to the hub."""
    folder = Path(place)
    packed = [folder] if folder.suffix == ".gguf" else list(folder.glob("*.gguf"))
    if packed and not (folder / "config.json").is_file():
        raise ValueError(
            f"{packed[0].name} is a GGUF file, whose weights are packed; name the checkpoint it was made from"
        )
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names in place of this one
        raise ValueError(
            "it holds adapter_config.json, an adapter; name its base here, and the adapter as adapter.start"
        )
    if folder.is_dir():
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        raise ValueError("no such folder, and a Hugging Face id has the form owner/name")
    go_offline_without_network()


def quieten() -> None:
    """Silence what transformers and the hub's client print: whatever fails is said in a sentence of ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _config(name: str) -> Config:
    name = next((short for short, id in HUB_IDS.items() if id == name), name)
    return _preset(name) if name in PRESETS else _from_folder_or_hub(name)


def _preset(name: str) -> SimpleNamespace:
    """What a preset's file says, by the names of transformers."""
    asset = resources.files("ubsmoe") / "assets" / PRESETS[name]
    return SimpleNamespace(**json.loads(asset.read_text(encoding="utf-8")))


def _from_folder_or_hub(name: str) -> Config:
    from transformers import AutoConfig

    quieten()
    try:
        check_place(name)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many types: not JSON, no field, a check of transformers' own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.base: no usable model configuration at {name!r} ({reason}); {EXPECTED}") from None


def _first(config: Config, *names: str) -> Any:
    """The first of these attributes that is there and set: families name the same size differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _num_experts(config: Config) -> int:
    config = _text(config)
    names = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
    found = _first(config, *names) or _first(_first(config, "ffn_config"), *names)
    return max(found, default=0) if isinstance(found, list | tuple) else int(found or 0)


def _text(config: Config) -> Config:
    """The part of a configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _moe_layers(config: Config) -> list[int]:
    """Indices of the layers with experts, by the three keys that families use to keep some layers dense."""
    dense = set(_first(config, "mlp_only_layers") or ())
    step = _first(config, "decoder_sparse_step") or 1
    layers = range(_first(config, "first_k_dense_replace") or 0, config.num_hidden_layers)
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def _latent_attention(config: Config) -> LatentAttention | None:
    if not _first(config, "kv_lora_rank"):
        return None
    return LatentAttention(config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim)


def _head_dim(config: Config, latent: LatentAttention | None) -> int:
    """Width of one query: DeepSeek's `head_dim` names its rotary part only."""
    if latent:
        return int(config.qk_nope_head_dim) + latent.rope_dim
    return int(_first(config, "head_dim") or config.hidden_size // config.num_attention_heads)
