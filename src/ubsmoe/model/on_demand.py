"""Matrices of all experts of which one is in memory at a time: what the kernel multiplies with is made when it is read."""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

_scratch = threading.local()


class OnDemand(ABC):
    """One matrix of every expert; it stands where the kernel takes a tensor [M, in, out].

    `stored` is (rows, columns) of one as it is made, `is_transposed` says that rows are inputs.
    """

    stored: tuple[int, int]
    is_transposed: bool

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """Where its matrices are made."""

    @abstractmethod
    def read(self, expert: int, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "in out"]:
        """One expert's matrix, where it can be in `out`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, in, out)."""
        return (len(self), *(self.stored if self.is_transposed else self.stored[::-1]))

    def __getitem__(self, expert: int) -> Float[Tensor, "in out"]:
        dtype, device = self.kind
        return self.read(expert, torch.empty(self.stored, dtype=dtype, device=device))

    def unbind(self) -> "InScratch":
        """One matrix at a time, as the kernel reads them: each is gone when the next one is read."""
        return InScratch(self)


@dataclass(frozen=True)
class InScratch:
    """The matrices in one piece of memory, which all layers of a thread share."""

    experts: OnDemand
    memory: Float[Tensor, "rows columns"] = field(init=False)

    def __post_init__(self) -> None:
        # by class, since one that is narrowed is made of one that is dequantised
        kind = (type(self.experts), *self.experts.kind)
        size, held = torch.Size(self.experts.stored).numel(), cast(Any, _scratch.__dict__)
        if kind not in held or held[kind].numel() < size:
            held[kind] = torch.empty(size, dtype=kind[1], device=kind[2])
        object.__setattr__(self, "memory", held[kind][:size].view(self.experts.stored))

    def __getitem__(self, expert: int) -> Float[Tensor, "in out"]:
        return self.experts.read(expert, self.memory)
