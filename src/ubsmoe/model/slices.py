"""Experts at a part of their width: of each, the intermediate channels that matter most, and what the adapter does to those.

    E_i(x) = sum_j act(pre_j) W2_j     a slice keeps the j of one expert's own list, f / n of f channels

The narrowed matrices are copies: products read no more than they need, and of a base that is mapped from disk the rest is never
read again.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ubsmoe.model.expert_weights import ExpertWeights, Lora


@dataclass(frozen=True)
class Slices:
    """A layer's experts, narrowed. `columns` are where the kept `channels` stand in the first matrix, gate and linear part."""

    channels: Int[Tensor, "M kept"]
    columns: Int[Tensor, "M kept_pre"]
    weights: ExpertWeights

    @classmethod
    def of(cls, base: ExpertWeights, channels: Int[Tensor, "M kept"]) -> "Slices":
        """Copy these channels of every expert.

        Raises:
            ValueError: for an activation whose gate and linear part stand in an order of their own.
        """
        columns = first_matrix_columns(base, channels)
        narrowed = replace(
            base,
            up=torch.stack([base.up[i].T.index_select(0, own) for i, own in enumerate(columns)]).transpose(1, 2),
            down=torch.stack([base.down[i].index_select(0, own) for i, own in enumerate(channels)]),
            up_bias=None if base.up_bias is None else base.up_bias.gather(1, columns),
        )
        return cls(channels, columns, narrowed)

    def lora(self, whole: Lora) -> Lora:
        """The adapter on these channels alone; gradients reach the whole one."""
        up = self.columns.unsqueeze(2).expand(-1, -1, whole.up_b.shape[2])
        down = self.channels.unsqueeze(1).expand(-1, whole.down_a.shape[1], -1)
        return replace(whole, up_b=whole.up_b.gather(1, up), down_a=whole.down_a.gather(2, down))


def first_matrix_columns(base: ExpertWeights, channels: Int[Tensor, "M kept"]) -> Int[Tensor, "M kept_pre"]:
    """The columns of `up` that these channels of the activation depend on: one each, or a gate and a linear part.

    Raises:
        ValueError: if they stand neither in halves nor side by side.
    """
    width, pre = base.down.shape[1], base.up.shape[2]
    if pre == width:
        return channels
    halves = torch.cat([channels, width + channels], dim=1)
    if base.is_swiglu or _acts_alone(base, [0, width]):
        return halves
    if _acts_alone(base, [0, 1]):
        return torch.stack([2 * channels, 2 * channels + 1], dim=2).flatten(1)
    raise ValueError("this family's gate and linear part stand neither in halves nor side by side; set slices = 1")


def channels_by_importance(importance: Float[Tensor, "M f"], slices: int) -> Int[Tensor, "M kept"]:
    """The most important f / slices channels of every expert, in the order of the base's own."""
    return importance.topk(importance.shape[1] // slices, dim=1).indices.sort(dim=1).values


def _acts_alone(base: ExpertWeights, columns: list[int]) -> bool:
    """Whether channel 0 of the activation, and no other, depends on these pre-activations."""
    probe = torch.linspace(-1, 1, base.up.shape[2], device=base.down[0].device).unsqueeze(0)
    moved = probe.clone()
    moved[0, columns] += 0.25
    changed = (base.activation(moved) != base.activation(probe))[0]
    return bool(changed[0]) and int(changed.sum()) == 1
