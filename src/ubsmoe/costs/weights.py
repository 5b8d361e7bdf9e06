"""Bytes of a base's weights, by how its experts are stored."""

from typing import Literal

from ubsmoe.costs.shape import ModelShape

ExpertFormat = Literal["own", "int8", "nf4"]
"""As the base's other weights; or by itself, one matrix after another."""

INT8_SCALE, NF4_BLOCK, ABSMAX = 4, 64, 4  # bytes per row, elements per block, bytes per block


def expert_bytes(shape: ModelShape, experts: ExpertFormat, dtype_bytes: int) -> int:
    """Bytes of all routed experts.

        own     every element in the base's dtype
        int8    one byte per element, one float32 scale per row
        nf4     half a byte per element, one float32 per block of 64

    >>> shape = ModelShape(1, 1, 64, 32, 8, 2, 2, 2, 32, vocab=10)  # 8 experts of 3 * 32 * 64 elements, 128 rows
    >>> [expert_bytes(shape, format, 2) for format in ("own", "int8", "nf4")]
    [98304, 53248, 27648]
    """
    count = shape.num_moe_layers * shape.num_experts
    rows = shape.up_matrices * shape.expert_width + shape.hidden
    each = {
        "own": dtype_bytes * shape.expert_weights,
        "int8": shape.expert_weights + INT8_SCALE * rows,
        "nf4": shape.expert_weights // 2 + ABSMAX * (shape.expert_weights // NF4_BLOCK),
    }
    return count * each[experts]


def other_bytes(shape: ModelShape, dtype_bytes: int) -> int:
    """Bytes of everything but the routed experts."""
    return dtype_bytes * shape.parameters - expert_bytes(shape, "own", dtype_bytes)
