"""PEFT's layout of LoRA on fused experts, both ways.

    lora_A.weight [M r, in]     expert-major:  A.view(M, r, in)
    lora_B.weight [out, r M]    rank-major:    B.view(out, r, M).permute(2, 0, 1)

The two matrices of a layer nest: the one that the experts' class declares first is the inner, with `.base_layer` in its name; the
other has no mark at all. A router's difference D [M, h] becomes a pair of its own rank M: A = D, B = identity. On an attention
projection, M = 1, this is LoRA's usual layout.

Source: peft 0.21 (`peft.tuners.lora.layer.ParamWrapper`); the tests compare logits, since names prove nothing.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ubsmoe.errors import UserError, printable
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.conventions import router_matrix
from ubsmoe.model.expert_weights import up_name
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.surgery import SparseModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PACKING = {"lora_A": "expert-major [M r, in]", "lora_B": "rank-major [out, r M]"}
"""How the experts are packed into two dimensions, as the header of the weights says it: shapes alone would fit the other order."""


class AdapterMismatch(UserError):
    """A PEFT adapter that does not belong on this base; the message says what does not fit."""


def to_peft(
    sparse: SparseModel, adapter: Mapping[str, Tensor], alpha: float, base: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter as PEFT stores it.

    Args:
        sparse: the base it belongs to; gives the names.
        adapter: `layers.{l}.{up|down}.A` [M, r, in] and `.B` [M, out, r], maybe `layers.{l}.attention.{q_proj|...}.A` and
            `.B` with M = 1, and maybe `layers.{l}.router` [M, h].
        alpha: LoRA's numerator.
        base: name or folder of the base, for PEFT to find.

    Returns:
        The tensors of adapter_model.safetensors and the content of adapter_config.json.
    """
    tensors: dict[str, Tensor] = {}
    paths = _paths(sparse)
    for layer in sparse.layers:
        for name, (key, _) in _places(layer, paths).items():
            if f"{name}.A" not in adapter:
                continue  # an attention projection that has none
            a, b = adapter[f"{name}.A"], adapter[f"{name}.B"]
            tensors[f"{key}.lora_A.weight"] = a.reshape(-1, a.shape[2])
            tensors[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
        difference = adapter.get(f"layers.{layer.index}.router")
        if difference is not None:
            key = _wrapped(_router_path(layer, paths))
            tensors[f"{key}.lora_A.weight"] = difference
            tensors[f"{key}.lora_B.weight"] = torch.eye(len(difference))
    projections = {
        paths[module]
        for layer in sparse.layers
        for name, module in layer.attention.projections.items()
        if f"layers.{layer.index}.attention.{name}.A" in adapter
    }
    trained = [layer for layer in sparse.layers if f"layers.{layer.index}.router" in adapter]
    experts = {(_suffix(paths[layer.experts]), stored) for layer in sparse.layers for stored in _stored(layer)}
    own_rank = {_suffix(name): sparse.num_experts for name in sorted(_router_names(trained, paths))}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(value.shape[1] for name, value in adapter.items() if name.endswith(".A")),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(projections, paths.values()),
        "target_parameters": sorted(".".join(pair) for pair in experts) + sorted(own_rank),
        "rank_pattern": {re.escape(name): rank for name, rank in own_rank.items()},
        "alpha_pattern": {re.escape(name): rank for name, rank in own_rank.items()},
        "inference_mode": True,
    }
    return tensors, config


def from_peft(
    sparse: SparseModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], float]:
    """A PEFT adapter by our names, and its alpha.

    Raises:
        AdapterMismatch: if it is no LoRA on all fused experts of this base, or has more than that.
    """
    rank, alpha = _rank_and_alpha(config)
    given, adapter, paths = dict(tensors), {}, _paths(sparse)
    _refuse_own_scales(config, _router_names(sparse.layers, paths))
    for layer in sparse.layers:
        for name, (key, (experts, *shape)) in _places(layer, paths).items():
            if layer_of_experts(f"{name}.A") is None and f"{key}.lora_A.weight" not in given:
                continue
            a, b = (_take(given, f"{key}.lora_{factor}.weight") for factor in "AB")
            need = (experts * rank, shape[1]), (shape[0], rank * experts)
            if (tuple(a.shape), tuple(b.shape)) != need:
                raise AdapterMismatch(
                    f"{key} has factors {tuple(a.shape)} and {tuple(b.shape)}; rank {rank} with M = {experts} on "
                    f"this base ({sparse.model.config.model_type}) needs {need[0]} and {need[1]}"
                )
            adapter[f"{name}.A"] = a.view(experts, rank, -1).float()
            adapter[f"{name}.B"] = b.view(-1, rank, experts).permute(2, 0, 1).float()
        key = _wrapped(_router_path(layer, paths))
        if f"{key}.lora_A.weight" in given:
            own = _own_scale(config, _router_names([layer], paths)[0], alpha / rank)
            a, b = (_take(given, f"{key}.lora_{factor}.weight") for factor in "AB")
            adapter[f"layers.{layer.index}.router"] = own * (b.float() @ a.float())
    if given:
        raise AdapterMismatch(
            f"the adapter also changes {', '.join(sorted(given)[:3])}; only LoRA on fused experts, on the "
            "attention of layers with experts, and on routers can be used here"
        )
    return adapter, alpha


def check_packing(said: Mapping[str, str], where: str) -> None:
    """Raise AdapterMismatch for weights whose header states another order than PEFT's; most adapters state none."""
    for factor, order in PACKING.items():
        if said.get(factor, order) != order:
            raise AdapterMismatch(
                f"{where} states that {factor} is {printable(said[factor])!r}; PEFT reads {order!r}, so pack it like that"
            )


def _targets(projections: set[str], paths: Iterable[str]) -> list[str]:
    """What names these modules and no others: q_proj and so on, or whole paths where other layers have the like."""
    short = {path.rpartition(".")[2] for path in projections}
    alike = {path for path in paths if path.rpartition(".")[2] in short}
    return sorted(short if alike == projections else projections)


def _rank_and_alpha(config: Mapping[str, Any]) -> tuple[int, float]:
    """r, and the alpha that gives the adapter's factor as alpha / r."""
    kind, rank, alpha = config.get("peft_type"), config.get("r"), config.get("lora_alpha")
    if kind != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise AdapterMismatch(f"{CONFIG} describes {kind} with r = {rank} and lora_alpha = {alpha}; expected LORA")
    for key in ("use_dora", "modules_to_save", "lora_bias"):
        if config.get(key):
            raise AdapterMismatch(f"{CONFIG} sets {key}, which has no counterpart here")
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _refuse_own_scales(config: Mapping[str, Any], routers: Sequence[str]) -> None:
    """Experts and attention have one alpha / r, the config's; routers may have their own."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in routers):
                raise AdapterMismatch(
                    f"{key} gives {pattern!r} a rank or alpha of its own; only routers can have that here"
                )


def _own_scale(config: Mapping[str, Any], name: str, otherwise: float) -> float:
    """alpha / r of one parameter that may have its own of both."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float((config.get("alpha_pattern") or {}).get(pattern, config["lora_alpha"])) / float(rank)
    return otherwise


def _paths(sparse: SparseModel) -> dict[Any, str]:
    """The name of every module in the base."""
    return {module: name for name, module in sparse.model.named_modules()}


def _router_path(layer: SparseLayer, paths: Mapping[Any, str]) -> str:
    """The module that owns a router's matrix."""
    owner, _ = router_matrix(layer.router, layer.convention)
    return f"{paths[layer.router]}.{owner}".rstrip(".")


def _router_names(layers: Iterable[SparseLayer], paths: Mapping[Any, str]) -> list[str]:
    """The routers' matrices as parameters of the base."""
    return [f"{paths[layer.router]}.{layer.convention.weight}" for layer in layers]


def _places(layer: SparseLayer, paths: Mapping[Any, str]) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Of every matrix that can have an adapter, by our name: what PEFT calls its wrapper, and (M, out, in)."""
    experts, names = _wrapped(paths[layer.experts]), {up_name(layer.experts): "up", "down_proj": "down"}
    inner, outer = (names[stored] for stored in _stored(layer))
    keys = {inner: f"{experts}.base_layer", outer: experts}
    keys |= {f"attention.{name}": _wrapped(paths[module]) for name, module in layer.attention.projections.items()}
    shapes = layer.matrices(attention=bool(layer.attention.projections))
    return {f"layers.{layer.index}.{name}": (key, shapes[name]) for name, key in keys.items()}


def _stored(layer: SparseLayer) -> list[str]:
    """The two matrices in the order in which the experts' class declares them."""
    ours = (up_name(layer.experts), "down_proj")
    return [name for name, _ in layer.experts.named_parameters(recurse=False) if name in ours]


def _wrapped(path: str) -> str:
    return f"base_model.model.{path}"


def _suffix(path: str) -> str:
    """A module's name within its layer: model.layers.3.mlp.experts gives mlp.experts."""
    return re.sub(r"^.*\.\d+\.", "", path)


def _take(given: dict[str, Tensor], name: str) -> Tensor:
    if name not in given:
        raise AdapterMismatch(
            f"the adapter lacks {name}: expected both factors, and LoRA on every expert matrix of this base"
        )
    return given.pop(name)
