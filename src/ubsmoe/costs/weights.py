"""Bytes of a base's weights, by how its experts are stored."""

from ubsmoe.costs.shape import ModelShape
from ubsmoe.costs.workload import ExpertFormat

SCALE_BYTES, NF4_BLOCK = 4, 64  # of a row in int8, of a block in nf4; elements of a block


def weight_bytes(shape: ModelShape, experts: ExpertFormat | None, dtype_bytes: int) -> int:
    """Bytes of the base: its routed experts in their format, everything else in `dtype_bytes`."""
    rest = dtype_bytes * shape.parameters - expert_bytes(shape, None, dtype_bytes)
    return rest + expert_bytes(shape, experts, dtype_bytes)


def mapped_bytes(shape: ModelShape, experts: ExpertFormat | None, dtype_bytes: int, top_k: int) -> int:
    """What must stay in memory of a base that is mapped, since a step goes slowly without: one MoE layer, and both ends.

    The system drops what is not in use, and reads it again. At K = 0 no expert is ever read.
    """
    layer = bool(top_k) * expert_bytes(shape, experts, dtype_bytes) // shape.num_moe_layers
    return layer + dtype_bytes * (2 * shape.vocab * shape.hidden + shape.attention_weights)


def expert_bytes(shape: ModelShape, experts: ExpertFormat | None, dtype_bytes: int) -> int:
    """Bytes of all routed experts.

        None    every element in the base's dtype
        int8    one byte per element, one float32 scale per row
        nf4     half a byte per element, one float32 per block of 64

    >>> shape = ModelShape(1, 1, 64, 32, 8, 2, 2, 2, 32, vocab=10)  # 8 experts of 3 * 32 * 64 elements, 128 rows
    >>> [expert_bytes(shape, format, 2) for format in (None, "int8", "nf4")]
    [98304, 53248, 27648]
    """
    elements = shape.expert_weights
    rows = shape.up_matrices * shape.expert_width + shape.hidden
    each = {
        None: dtype_bytes * elements,
        "int8": elements + SCALE_BYTES * rows,
        "nf4": elements // 2 + SCALE_BYTES * elements // NF4_BLOCK,
    }
    return shape.num_moe_layers * shape.num_experts * each[experts]
