"""Frozen experts in fewer bits: each matrix of each expert is quantised by itself and dequantised when it runs.

    int8   eight bits per number, a scale per stored row
    nf4    four bits per number, a scale per 64 numbers in a row

bitsandbytes computes the same numbers as maths/nf4.py, about four times as fast (bench/quantised_step.py).
"""

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ubsmoe.costs.workload import ExpertFormat
from ubsmoe.maths.nf4 import BLOCK, dequantise_nf4, quantise_nf4
from ubsmoe.maths.quantise import quantise
from ubsmoe.model.on_demand import OnDemand

PACKED_DTYPE: dict[ExpertFormat, torch.dtype] = {"int8": torch.int8, "nf4": torch.uint8}
SCALES: dict[ExpertFormat, str] = {"int8": "scale", "nf4": "absmax"}
"""What scales are called, after gate_up_ or down_. For nf4 as in bitsandbytes' Experts4bit, where what is packed keeps its name."""


@dataclass(frozen=True)
class QuantisedExperts(OnDemand):
    """Each matrix dequantised when it is read. `stored` is as the family stores it."""

    format: ExpertFormat
    packed: Shaped[Tensor, "M bytes"]
    scales: Float[Tensor, "M scales"]
    stored: tuple[int, int]
    is_transposed: bool
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """The dtype that it is dequantised to."""
        return self.dtype, self.packed.device

    def read(self, expert: int, out: Float[Tensor, "rows columns"]) -> Float[Tensor, "in out"]:
        """One expert's matrix, dequantised; int8 into `out`."""
        packed, scales = self.packed[expert], self.scales[expert]
        if self.format == "int8":
            matrix = out.copy_(packed.view(self.stored)).mul_(scales.to(out.dtype).unsqueeze(1))
        else:
            matrix = _dequantise_nf4(packed, scales, self.stored, out.dtype)
        return matrix if self.is_transposed else matrix.t()


def quantised(
    matrix: Float[Tensor, "rows columns"], format: ExpertFormat
) -> tuple[Shaped[Tensor, " bytes"], Float[Tensor, " scales"]]:
    """One expert's matrix as it is stored, in fewer bits, and its scales."""
    if format == "nf4":
        return quantise_nf4(matrix)
    steps, scales = quantise(matrix.float(), dim=1)
    return steps.view(-1), scales.view(-1)


def packed_sizes(stored: tuple[int, int], format: ExpertFormat) -> tuple[int, int]:
    """Bytes of one packed matrix, and how many scales it has."""
    size = stored[0] * stored[1]
    return (size, stored[0]) if format == "int8" else (-(-size // 2), -(-size // BLOCK))


def packed_names(name: str, format: ExpertFormat) -> tuple[str, str]:
    """The names of a matrix's packed numbers and of its scales in a file.

    >>> packed_names("layers.0.mlp.experts.gate_up_proj", "nf4")
    ('layers.0.mlp.experts.gate_up_proj', 'layers.0.mlp.experts.gate_up_absmax')
    """
    return name, f"{name.removesuffix('_proj')}_{SCALES[format]}"


def put_in_place(
    experts: Any,
    stored: str,
    format: ExpertFormat,
    packed: Shaped[Tensor, "M bytes"],
    scales: Float[Tensor, "M scales"],
) -> None:
    """Let an experts module hold a quantised matrix instead of its parameter, of which name, shape and dtype stay."""
    setattr(experts, stored, nn.Parameter(getattr(experts, stored).to("meta"), requires_grad=False))
    for kind, tensor in (("packed", packed.view(PACKED_DTYPE[format])), ("scales", scales)):
        # buffers, so that they go to a device with the module
        experts.register_buffer(f"{stored}_{kind}", tensor, persistent=False)
    experts.expert_format = format


def quantise_in_place(experts: Any, names: tuple[str, str], format: ExpertFormat) -> None:
    """Quantise both matrices of a module whose weights are in memory."""
    for stored in names:
        parts = [quantised(matrix, format) for matrix in getattr(experts, stored).detach()]
        put_in_place(experts, stored, format, *(torch.stack(part) for part in zip(*parts, strict=True)))


def format_of(experts: nn.Module) -> ExpertFormat | None:
    """How a module's experts are quantised; None if they are not."""
    return getattr(experts, "expert_format", None)


def quantised_matrix(experts: Any, stored: str) -> QuantisedExperts:
    """What `put_in_place` put there."""
    parameter = getattr(experts, stored)
    return QuantisedExperts(
        experts.expert_format,
        getattr(experts, f"{stored}_packed"),
        getattr(experts, f"{stored}_scales"),
        tuple(parameter.shape[1:]),
        bool(experts.is_transposed),
        parameter.dtype,
    )


def _dequantise_nf4(
    packed: Shaped[Tensor, " bytes"], absmax: Float[Tensor, " blocks"], shape: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    if dtype not in (torch.float32, torch.bfloat16) or not _has_bitsandbytes():
        return dequantise_nf4(packed, absmax, shape, dtype)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, "nf4", shape, dtype)


@cache
def _has_bitsandbytes() -> bool:
    """Whether its operators are there; the import takes seconds, so it waits for the first quantised expert."""
    if find_spec("bitsandbytes") is None:
        return False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports kernels that are not used here
    import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401

    return True
