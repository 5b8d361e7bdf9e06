"""Experts at a part of their width: of each, the intermediate channels that matter most, and what the adapter does to those.

    E_i(x) = sum_j act(pre_j) W2_j     a slice keeps the j of one expert's own list, f / n of f channels

The narrowed matrices are gathered one by one when they are read, so slices take no memory beside the base's, however that is
stored.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.on_demand import OnDemand


@dataclass(frozen=True)
class NarrowedExperts(OnDemand):
    """One matrix of every expert with some of its outputs (`of_outputs`) or inputs, laid out in memory as the whole one is."""

    whole: Float[Tensor, "M in out"] | OnDemand
    kept: Int[Tensor, "M kept"]
    of_outputs: bool
    is_transposed: bool = field(init=False)
    stored: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        whole, (_, rows, columns), kept = self.whole, self.whole.shape, self.kept.shape[1]
        by_rows = whole.is_transposed if isinstance(whole, OnDemand) else whole.stride(2) == 1
        narrowed = (rows, kept) if self.of_outputs else (kept, columns)
        object.__setattr__(self, "is_transposed", by_rows)
        object.__setattr__(self, "stored", narrowed if by_rows else narrowed[::-1])

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """As of the whole ones."""
        return self.whole.kind if isinstance(self.whole, OnDemand) else (self.whole.dtype, self.whole.device)

    def read(self, expert: int, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "in out"]:
        """One expert's slice, copied into `out`."""
        whole = self.whole.unbind()[expert] if isinstance(self.whole, OnDemand) else self.whole[expert]
        as_stored, kept = whole if self.is_transposed else whole.t(), self.kept[expert]
        if self.of_outputs == self.is_transposed:  # columns: twice as fast as index_select in bfloat16
            torch.gather(as_stored, 1, kept.expand(len(as_stored), -1), out=out)
        else:
            torch.index_select(as_stored, 0, kept, out=out)
        return out if self.is_transposed else out.t()

    def all_at_once(self) -> Float[Tensor, "M in out"]:
        """All of them in memory, for an accelerator's grouped product."""
        assert isinstance(self.whole, Tensor)
        index = self.kept.unsqueeze(1) if self.of_outputs else self.kept.unsqueeze(2)
        return torch.take_along_dim(self.whole, index, dim=1 + self.of_outputs)


@dataclass(frozen=True)
class Slices:
    """A layer's experts, narrowed. `columns` are where the kept `channels` stand in the first matrix, gate and linear part."""

    channels: Int[Tensor, "M kept"]
    columns: Int[Tensor, "M kept_pre"]
    weights: ExpertWeights

    @classmethod
    def of(cls, base: ExpertWeights, channels: Int[Tensor, "M kept"]) -> "Slices":
        """These channels of every expert.

        Raises:
            ValueError: for an activation whose gate and linear part stand in an order of their own.
        """
        columns = first_matrix_columns(base, channels)
        narrowed = replace(
            base,
            up=NarrowedExperts(base.up, columns, of_outputs=True),
            down=NarrowedExperts(base.down, channels, of_outputs=False),
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
