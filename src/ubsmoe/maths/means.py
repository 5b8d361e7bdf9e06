"""Weighted means of clients' tensors that need the memory of one client, however many come.

    mean = Σ_c w_c x_c / Σ_c w_c,    per tensor, or per expert along a fused tensor's first axis

Both sums are kept in float64. For float32 tensors and narrower that makes the properties of a federated mean hold bit for
bit: clients that agree give back exactly what they agree on (the sums' rounding is 2⁻⁵³ per client, half a float32
step is 2⁻²⁵), so a tensor nobody changed comes back unchanged, and what nobody has weight on is the fallback itself.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

Weight = int | float | Tensor
"""One number, or one per expert: [M], along the first axis of the tensor it weighs."""


class Mean(Protocol):
    """What a method averages with: the plain `WeightedMean`, or a rule of maths/robust.py."""

    def add(self, tensors: Mapping[str, Tensor], weight: Weight | Mapping[str, Weight]) -> None:
        """Count one client's tensors."""
        ...

    def result(self, fallback: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean under each name of `fallback`."""
        ...


class WeightedMean:
    """A running weighted mean of named tensors: `add` each client's, then ask for the `result`.

    Its state is Σ w x and Σ w, so partial sums of several servers, or masked ones, can be merged. Sums are taken in the
    order of the calls: add clients in a fixed order if results must be equal bit for bit.

    >>> mean = WeightedMean()
    >>> mean.add({"experts": torch.tensor([[1.0, 1.0], [5.0, 5.0]])}, weight=torch.tensor([1.0, 0.0]))
    >>> mean.add({"experts": torch.tensor([[4.0, 4.0], [9.0, 9.0]])}, weight=torch.tensor([2.0, 0.0]))
    >>> mean.result({"experts": torch.tensor([[0.0, 0.0], [7.0, 7.0]])})["experts"]
    tensor([[3., 3.],
            [7., 7.]])
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: Weight | Mapping[str, Weight]) -> None:
        """Count one client's tensors.

        Args:
            tensors: any subset of names; each name has its own Σ w. Nothing with zero weight is looked at, so an expert
                a client did not train may hold anything.
            weight: one for all tensors, or one per name; each a number or [M], one per expert.

        Raises:
            ValueError: if a weight is negative, not finite, or of another length than the tensor's first axis; if a
                tensor has another shape than before. Nothing has been counted then.
        """
        weights = weight if isinstance(weight, Mapping) else dict.fromkeys(tensors, weight)
        checked = {name: self._checked(name, tensor, weights) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if name not in self._sums:
                # -0.0 is what adds to every float, signed zeros too, without changing it
                self._sums[name] = torch.full_like(tensor, -0.0, dtype=torch.float64)
                self._weights[name] = torch.zeros(tensor.shape[:1], dtype=torch.float64, device=tensor.device)
            self._count(name, tensor.detach(), checked[name].to(tensor.device))

    def result(self, fallback: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean under each name of `fallback`, in its dtype; where Σ w = 0, the fallback bit for bit.

        Raises:
            ValueError: if tensors were added that the fallback does not have, or under another shape.
        """
        if unknown := sorted(self._sums.keys() - fallback.keys()):
            raise ValueError(f"tensors {unknown} were averaged but are not among the {len(fallback)} expected ones")
        return {name: self._mean(name, tensor) for name, tensor in fallback.items()}

    def _count(self, name: str, tensor: Tensor, weight: Tensor) -> None:
        self._weights[name] += weight
        if tensor.ndim == 0:
            self._sums[name] += weight * tensor.double() if weight > 0 else -0.0
            return
        rows = weight > 0
        if rows.all():  # the same sum, without picking rows out and putting them back
            self._sums[name] += _along_first_axis(weight, tensor) * tensor
            return
        column = _along_first_axis(weight[rows], tensor)
        self._sums[name][rows] += column * tensor[rows]

    def _mean(self, name: str, fallback: Tensor) -> Tensor:
        if name not in self._sums:
            return fallback.clone()
        total, weight = self._sums[name], _along_first_axis(self._weights[name], fallback)
        if total.shape != fallback.shape:
            raise ValueError(f"{name}: averaged {[*total.shape]}, expected {[*fallback.shape]}")
        return torch.where(weight > 0, (total / weight).to(fallback.dtype), fallback)

    def _checked(self, name: str, tensor: Tensor, weights: Mapping[str, Weight]) -> Tensor:
        if name in self._sums and tensor.shape != self._sums[name].shape:
            raise ValueError(f"{name}: got {[*tensor.shape]}, but earlier clients sent {[*self._sums[name].shape]}")
        return checked_weight(name, tensor, weights)


def checked_weight(name: str, tensor: Tensor, weights: Mapping[str, Weight]) -> Tensor:
    """A tensor's weight as float64 [M], or [] for a scalar tensor.

    Raises:
        ValueError: if there is none, or it is negative, not finite, or of another length than the first axis.
    """
    if name not in weights:
        raise ValueError(f"no weight was given for tensor {name!r}")
    weight = torch.as_tensor(weights[name], dtype=torch.float64)
    if not isfinite(weight.sum()) or (weight < 0).any():
        raise ValueError(f"{name}: weights must be finite and not negative, got {weights[name]}")
    if weight.ndim and weight.shape != tensor.shape[:1]:
        raise ValueError(f"{name}: {[*weight.shape]} weights for {[*tensor.shape]}; expected one per expert")
    return weight.expand(tensor.shape[:1])


def _along_first_axis(weight: Tensor, tensor: Tensor) -> Tensor:
    """[M] as [M, 1, ..., 1], to multiply a tensor with as many axes as `tensor`."""
    return weight.reshape(weight.shape + (1,) * (tensor.ndim - weight.ndim))
