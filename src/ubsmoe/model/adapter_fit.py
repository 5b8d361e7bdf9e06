"""Whether an adapter's tensors fit a base, said before any of them is put in place."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.layer import SparseLayer

Shapes = dict[str, tuple[int, ...]]


def check_fit(layers: Sequence[SparseLayer], tensors: Mapping[str, Tensor], side: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor is missing, unknown, or of another shape than these layers need.

    Args:
        layers: of the base.
        tensors: as `SparseModel.load_adapter` takes them.
        side: frozen factors beside them; may be empty.
    """
    needs, optional = _shapes(layers, tensors, side)
    given = {**tensors, **side}
    if missing := [key for key in needs if key not in given]:
        raise ValueError(f"the adapter lacks {missing[0]}: it was made for another base")
    if unknown := sorted(given.keys() - needs.keys() - optional.keys()):
        raise ValueError(f"the adapter has tensors this base does not know: {', '.join(unknown[:3])}")
    for key, tensor in given.items():
        need = needs.get(key) or optional[key]
        if tuple(tensor.shape) != need:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, this base needs {need}")


def _shapes(
    layers: Sequence[SparseLayer], tensors: Mapping[str, Tensor], side: Mapping[str, Tensor]
) -> tuple[Shapes, Shapes]:
    """The tensors that must be there, at the ranks of those that are, and those that may be."""
    needs, optional = Shapes(), Shapes()
    for layer in layers:
        prefix = f"layers.{layer.index}"
        rank = _rank(tensors, f"{prefix}.up.A")  # one for both matrices, since alpha / rank is one factor
        for name, (experts, out_features, in_features) in layer.matrices(bool(layer.attention.projections)).items():
            key = f"{prefix}.{name}"
            if layer_of_experts(key) is None and not any(f"{key}.{factor}" in tensors for factor in "ABR"):
                continue  # no adapter has to sit on an attention projection
            needs |= {f"{key}.A": (experts, rank, in_features), f"{key}.B": (experts, out_features, rank)}
            optional[f"{key}.R"] = (experts, rank, rank)
            beside = _rank(side, f"side.{key}.A")
            if side:
                needs[f"side.{key}.A"] = (experts, beside, in_features)
                needs[f"side.{key}.B"] = (experts, out_features, beside)
        optional[f"{prefix}.router"] = (layer.num_experts, layer.shapes()["up"][1])
    return needs, optional


def _rank(tensors: Mapping[str, Tensor], name: str) -> int:
    """The rank that a factor A has; 1 where it is missing or no such thing, which the check then says."""
    a = tensors.get(name)
    return a.shape[1] if a is not None and a.dim() == 3 else 1
