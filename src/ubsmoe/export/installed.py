"""What a SparseModel has in place, as plain tensors: read off, put on again, or merged into the weights.

Reading what a method has installed, rather than what its server keeps, serves every method alike: cores are multiplied in and
side factors stand beside the trained ones, along the rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ubsmoe.export.sidecar import Sidecar
from ubsmoe.model.adapter import MatrixAdapter
from ubsmoe.model.compensation import compensation_tensors
from ubsmoe.model.conventions import router_matrix, top_k_name
from ubsmoe.model.expert_weights import up_name
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True)
class Installed:
    """One tier's adapter and routing, whichever method made them.

    `adapter` holds `layers.{l}.{up|down}.A` [M, r, in] and `.B` [M, out, r], maybe `layers.{l}.attention.{q_proj|...}.A`
    [1, r, in] and `.B` [1, out, r], all of one rank r, and maybe `layers.{l}.router` [M, h], float32 on the CPU. `routing` is
    what a `Sidecar` says under the same names. `compensation` stands for skipped experts, by the names that `set_compensation`
    takes.
    """

    adapter: dict[str, Tensor]
    alpha: float
    routing: dict[str, Any]
    compensation: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """r."""
        return next(value.shape[1] for name, value in self.adapter.items() if name.endswith(".A"))


@torch.no_grad()
def read_installed(sparse: SparseModel) -> Installed:
    """Read off what is in place now.

    Raises:
        ValueError: if no adapter is.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    adapter: dict[str, Tensor] = {}
    for layer in sparse.layers:
        if layer.routing.adapter is None:
            raise ValueError("no adapter is in place on this model, so there is nothing to export")
        for name, matrix in zip(("up", "down"), layer.routing.adapter, strict=True):
            factors[f"layers.{layer.index}.{name}"] = _plain(matrix)
        for name, matrix in layer.attention.adapters.items():
            factors[f"layers.{layer.index}.attention.{name}"] = _plain(matrix)
        if layer.routing.router_delta is not None:
            adapter[f"layers.{layer.index}.router"] = _on_cpu(layer.routing.router_delta)
    rank = max(a.shape[1] for a, _ in factors.values())
    for name, (a, b) in factors.items():
        adapter[f"{name}.A"] = _on_cpu(pad(a, (0, 0, 0, rank - a.shape[1])))
        adapter[f"{name}.B"] = _on_cpu(pad(b, (0, rank - b.shape[2])))
    compensation = compensation_tensors([layer.routing.compensation for layer in sparse.layers])
    alpha = sparse.layers[0].routing.lora_scale * rank
    return Installed(adapter, alpha, _routing(sparse), {name: value.cpu() for name, value in compensation.items()})


def install(
    sparse: SparseModel,
    adapter: Mapping[str, Tensor],
    sidecar: Sidecar,
    compensation: Mapping[str, Tensor] | None = None,
) -> None:
    """Put an export on its base, or on its merged weights (then `adapter` is empty).

    Raises:
        ValueError: if a tensor is missing, unknown, or of another shape than this base needs.
    """
    if not adapter and sidecar.compensated:
        # what stands for skipped experts is added by the experts that take an adapter; this one adds nothing
        adapter = sparse.fresh_adapter(1, torch.Generator(), shared_a=True)
    if adapter:
        sparse.load_adapter(adapter, sidecar.alpha)
    for layer in sparse.layers:
        layer.rescale = sidecar.rescale
    sparse.limit_k_max(sidecar.k_max)
    sparse.set_top_k(sidecar.top_k)
    if sidecar.compensated:
        sparse.set_compensation(compensation or {})
    if sidecar.phi:
        sparse.set_phi(torch.tensor(sidecar.phi, device=sparse.device), sidecar.num_candidates)
    if sidecar.selection_bias:
        sparse.set_selection_bias(torch.tensor(sidecar.selection_bias))
    if sidecar.output_scale:
        sparse.set_output_scale(torch.tensor(sidecar.output_scale, device=sparse.device))


@torch.no_grad()
def merge(sparse: SparseModel, installed: Installed) -> dict[str, Any]:
    """Add an adapter to the weights for good, and whatever of the routing stock weights and config can carry.

        W <- W + alpha / r B A,    router <- router + its difference,    down <- output scale * down

    K goes into the config. phi goes into a router's own bias where there is one and phi moves all experts. The output scale stays
    where a compensation does, which it multiplies too.

    Returns:
        The routing that is left for the sidecar.
    """
    left = dict(installed.routing)
    scale = installed.alpha / installed.rank
    scales = None if left["compensated"] else left.pop("output_scale")
    modules: list[tuple[Any, Any]] = [(layer.router, layer.experts) for layer in sparse.layers]
    attention = [layer.attention.projections for layer in sparse.layers]
    for index, (router, experts) in enumerate(modules):
        for name, stored in (("up", up_name(experts)), ("down", "down_proj")):
            matrix = f"layers.{index}.{name}"
            _add(getattr(experts, stored), installed.adapter, matrix, scale, experts.is_transposed)
        for name, projection in attention[index].items():
            if f"layers.{index}.attention.{name}.A" in installed.adapter:
                _add(projection.weight[None], installed.adapter, f"layers.{index}.attention.{name}", scale, False)
        if (difference := installed.adapter.get(f"layers.{index}.router")) is not None:
            _, weight = router_matrix(router, sparse.layers[index].convention)
            weight.copy_(weight.float() + difference.to(weight.device))
        if scales:
            experts.down_proj.mul_(scales[index])
            if experts.has_bias:
                experts.down_proj_bias.mul_(scales[index])
    biases = [getattr(router, "bias", None) for router, _ in modules]
    if left["phi"] and left["num_candidates"] == sparse.num_experts and all(isinstance(b, Tensor) for b in biases):
        for (router, _), row in zip(modules, left.pop("phi"), strict=True):
            router.bias.add_(torch.tensor(row).to(router.bias))
    setattr(sparse.model.config, top_k_name(sparse.model.config), left["top_k"])
    return left


def _add(weight: Tensor, adapter: Mapping[str, Tensor], matrix: str, scale: float, transposed: Any) -> None:
    """Expert by expert, so that no second copy of a layer is formed; in float32, rounded once."""
    for expert, (a, b) in enumerate(zip(adapter[f"{matrix}.A"], adapter[f"{matrix}.B"], strict=True)):
        delta = (scale * (b @ a)).to(weight.device)
        weight[expert] = (weight[expert].float() + (delta.T if transposed else delta)).to(weight.dtype)


def _plain(matrix: MatrixAdapter) -> tuple[Tensor, Tensor]:
    """A and B of the whole; beside a side factor, the directions of a fresh adapter that add nothing are left out."""
    a, b = matrix.joined()
    if matrix.side is not None:
        used = (b != 0).any(dim=1).any(dim=0)
        if used.any():
            a, b = a[:, used], b[:, :, used]
    return a, b


def _routing(sparse: SparseModel) -> dict[str, Any]:
    first = sparse.layers[0]

    def rows(name: str) -> list[Any] | None:
        values = [getattr(layer.routing, name) for layer in sparse.layers]
        return None if values[0] is None else [value.detach().float().tolist() for value in values]

    return {
        "top_k": first.routing.top_k,
        "k_max": first.k_max,
        "rescale": "none" if first.rescale == "mass" and first.convention.renormalises else first.rescale,
        "num_candidates": first.routing.num_candidates,
        "phi": rows("phi"),
        "selection_bias": rows("selection_bias"),
        "output_scale": rows("output_scale"),
        "compensated": first.routing.compensation is not None,
    }


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
