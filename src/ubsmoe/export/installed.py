"""What a SparseModel has in place, as plain tensors: read off, or put on again.

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
    if adapter:
        sparse.load_adapter(adapter, sidecar.alpha)
    for layer in sparse.layers:
        layer.rescale = sidecar.rescale
    sparse.limit_k_max(sidecar.k_max)
    if sidecar.compensated:
        sparse.set_compensation(compensation or {})
    sparse.set_top_k(sidecar.top_k)
    if sidecar.phi:
        sparse.set_phi(torch.tensor(sidecar.phi, device=sparse.device), sidecar.num_candidates)
    if sidecar.selection_bias:
        sparse.set_selection_bias(torch.tensor(sidecar.selection_bias))
    if sidecar.output_scale:
        sparse.set_output_scale(torch.tensor(sidecar.output_scale, device=sparse.device))


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
