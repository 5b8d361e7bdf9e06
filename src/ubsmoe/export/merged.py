"""A merged model, written layer by layer: beside the base, which is only read, memory holds one layer.

    W <- W + alpha / r B A,    router <- router + its difference,    down <- output scale * down

A base that is mapped stays mapped. Files have the names and the layout of the checkpoint that the base was loaded from.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubsmoe.export.effect import Untouched, adds
from ubsmoe.export.installed import Installed
from ubsmoe.model.checkpoint import INDEX
from ubsmoe.model.conventions import top_k_name
from ubsmoe.model.expert_weights import up_name
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.stored import as_stored, weights_by_layer
from ubsmoe.model.surgery import SparseModel
from ubsmoe.storage import exportfolder
from ubsmoe.storage.json_text import encode_json

Changes = dict[str, Callable[[Tensor], Tensor]]
"""By the base's name of a parameter: what makes the merged one of it."""


@dataclass(frozen=True)
class Merge:
    """An adapter and its routing as changes of the base's weights; `routing` is what its files cannot hold."""

    changes: Changes
    routing: dict[str, Any]


def merge(sparse: SparseModel, installed: Installed) -> Merge:
    """How the base's weights become merged ones; nothing is computed yet. K goes into the config.

    phi goes into a router's own bias where there is one and phi moves all experts. The output scale stays where a compensation
    does, which it multiplies too.
    """
    left = dict(installed.routing)
    scales, phi = None if left["compensated"] else left.pop("output_scale"), left["phi"]
    biased = all(isinstance(getattr(layer.router, "bias", None), Tensor) for layer in sparse.layers)
    in_bias = phi is not None and biased and left["num_candidates"] == sparse.num_experts
    if in_bias:
        left.pop("phi")
    paths, changes = {module: name for name, module in sparse.model.named_modules()}, Changes()
    for layer in sparse.layers:
        own = _of_layer(layer, installed, scales[layer.index] if scales else 1.0)
        if in_bias:
            own[layer.router, "bias"] = partial(_added, delta=torch.tensor(phi[layer.index]))
        changes |= {f"{paths[module]}.{name}": change for (module, name), change in own.items()}
    return Merge(changes, left)


@torch.no_grad()
def write_merged(sparse: SparseModel, changes: Changes, top_k: int, folder: Path) -> None:
    """Write the whole model into a folder, as transformers' `save_pretrained` would; the model in memory is left as it was."""
    model = sparse.model
    groups, files, size = weights_by_layer(model), dict[str, str](), 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        part = as_stored(
            model, {name: changes[name](value) if name in changes else value for name, value in group.items()}
        )
        exportfolder.write_tensors(folder / file, part)
        files |= dict.fromkeys(part, file)
        size += sum(tensor.nbytes for tensor in part.values())
    exportfolder.put_text(
        folder / INDEX, encode_json({"metadata": {"total_size": size}, "weight_map": files}, 2).decode()
    )
    config = copy.deepcopy(model.config)
    setattr(config, top_k_name(config), top_k)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _of_layer(
    layer: SparseLayer, installed: Installed, output_scale: float
) -> dict[tuple[Any, str], Callable[[Tensor], Tensor]]:
    """The changes of one layer, by module and name of its parameter."""
    adapter, alpha_over_rank = installed.adapter, installed.alpha / installed.rank
    experts, prefix = layer.experts, f"layers.{layer.index}"
    found: dict[tuple[Any, str], Callable[[Tensor], Tensor]] = {}

    def factors(matrix: str) -> dict[str, Any]:
        a, b = adapter[f"{prefix}.{matrix}.A"], adapter[f"{prefix}.{matrix}.B"]
        return {"a": a, "b": b, "scale": alpha_over_rank}

    turned = bool(experts.is_transposed)
    found[experts, up_name(experts)] = partial(_with_lora, **factors("up"), turned=turned)
    found[experts, "down_proj"] = partial(_with_lora, **factors("down"), turned=turned, times=output_scale)
    if experts.has_bias and output_scale != 1.0:
        found[experts, "down_proj_bias"] = lambda bias: bias * output_scale
    for name, projection in layer.attention.projections.items():
        if f"{prefix}.attention.{name}.A" in adapter:
            found[projection, "weight"] = partial(_with_one_lora, **factors(f"attention.{name}"))
    if (difference := adapter.get(f"{prefix}.router")) is not None:
        found[layer.router, layer.convention.weight] = partial(_added, delta=difference)
    return found


@dataclass(frozen=True)
class Survival:
    """What of an adapter's change outlives rounding to the base's precision: as a share of it, and the experts that lost all."""

    share: float
    lost: Untouched


@torch.no_grad()
def survival(sparse: SparseModel, installed: Installed) -> Survival:
    """How much of the adapter would be left in merged expert weights W', in which a change below W's rounding vanishes.

    share = sum <W' - W, D> / sum |D|^2    over experts and layers, D = alpha / r B A: 1 for all of it, 0 for none
    """
    kept, wanted, lost = 0.0, 0.0, Untouched()
    for layer in sparse.layers:
        for matrix, stored in (("up", up_name(layer.experts)), ("down", "down_proj")):
            name, weight = f"layers.{layer.index}.{matrix}", getattr(layer.experts, stored)
            turned = bool(layer.experts.is_transposed)
            a, b = installed.adapter[f"{name}.A"], installed.adapter[f"{name}.B"]
            for expert in adds(a, b).nonzero().flatten().tolist():
                own, scale = weight[expert, None], installed.alpha / installed.rank
                added = partial(_with_lora, a=a[expert, None], b=b[expert, None], scale=scale, turned=turned)
                change = added(torch.zeros_like(own, dtype=torch.float32))
                left = added(own).float() - own.float()
                kept, wanted = kept + float((left * change).sum()), wanted + float(change.square().sum())
                if not left.any():
                    lost.setdefault(name, []).append(expert)
    return Survival(kept / wanted if wanted else 1.0, lost)


def _with_lora(weight: Tensor, a: Tensor, b: Tensor, scale: float, turned: bool = False, times: float = 1.0) -> Tensor:
    """A fused tensor [M, ...] with LoRA merged, expert by expert; in float32, rounded once."""
    out = torch.empty_like(weight)
    for expert in range(len(weight)):
        delta = (scale * (b[expert] @ a[expert])).to(weight.device)
        out[expert] = times * (weight[expert].float() + (delta.T if turned else delta))
    return out


def _with_one_lora(weight: Tensor, **factors: Any) -> Tensor:
    return _with_lora(weight[None], **factors)[0]


def _added(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.float() + delta.to(weight.device)).to(weight.dtype)
