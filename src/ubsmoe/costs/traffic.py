"""Bytes of tensors on the wire, from a shape alone. The legend of letters is in `ubsmoe.costs.flops`; headers are not counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from ubsmoe.costs.shape import EXPERTS_ONLY, FLOAT32, INT64, ModelShape, Trained
from ubsmoe.costs.workload import WireDtype

_WIDTH = {"float32": FLOAT32, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client's tensors in one round, each way, when every expert travels; headers and counts are not in it."""

    download_bytes: int
    upload_bytes: int

    def __add__(self, other: "Traffic") -> "Traffic":
        """What both send."""
        return Traffic(self.download_bytes + other.download_bytes, self.upload_bytes + other.upload_bytes)


def adapter_traffic(
    shape: ModelShape,
    rank: int,
    trained: Trained = EXPERTS_ONLY,
    wire_dtype: WireDtype = "float32",
    down: str = "AB",
    up: str = "AB",
) -> Traffic:
    """The traffic of a method that sends these factors of the adapter, `down` in float32 and `up` in the wire's precision.

    Linear in r. gate and up share an A: 7168 r elements per expert of OLMoE, else 9216 r.

    >>> adapter_traffic(ModelShape(1, 1, 4, 3, 8, 2, 2, 2, 2, vocab=10), rank=1)  # 8 experts x (2 h + 3 f) x 4 bytes
    Traffic(download_bytes=544, upload_bytes=544)
    """
    return Traffic(
        download_bytes=update_bytes(shape, rank, factors=down, trained=trained),
        upload_bytes=update_bytes(shape, rank, wire_dtype, factors=up, trained=trained),
    )


def update_bytes(
    shape: ModelShape,
    rank: int,
    dtype: WireDtype = "float32",
    *,
    factors: str = "AB",
    trained: Trained = EXPERTS_ONLY,
    touched: Sequence[int] | None = None,
) -> int:
    """Bytes of the trained tensors in one update, exactly.

        sum over SMoE layers of    T (elements w + 4 rows [int8]) + M tensors [T < M] + attention,    w = 4, 2 or 1

    Per expert, fused: gate_up A [r, h] and B [u f, r], down A [r, f] and B [h, r], or cores R [r, r]; a router's row [h].
    int8 adds one float32 per row: r on either side of every matrix, one for a router. Where not all experts travel, each
    tensor says in M bytes which do. LoRA on attention is counted as one expert's, and always travels.

    Args:
        shape: the model.
        rank: LoRA rank of every expert matrix.
        dtype: the run's wire.dtype.
        factors: which of A, B and R the client trains and returns.
        trained: what is trained beside the experts.
        touched: T, how many experts of each layer changed; all when left out.

    >>> shape = ModelShape(1, 1, 4, 3, 8, 2, 2, 2, 2, vocab=10)
    >>> [update_bytes(shape, 1, dtype) for dtype in ("float32", "bfloat16", "int8")]  # int8: 8 x (17 + 4 x 4 rows)
    [544, 272, 264]
    >>> update_bytes(shape, 1, touched=[3])  # 3 x 68 bytes, and 8 for each of 4 tensors
    236
    """
    h, f, wide = shape.hidden, shape.expert_width, shape.up_matrices * shape.expert_width
    elements = {"A": rank * (h + f), "B": rank * (wide + h), "R": 2 * rank * rank}
    projections = shape.attention_first + shape.attention_later
    on_projections = {
        "A": rank * sum(into for _, into in projections),
        "B": rank * sum(out for out, _ in projections),
        "R": len(projections) * rank * rank,
    }

    def size(elements: int, rows: int) -> int:
        return _WIDTH[dtype] * elements + (4 * rows if dtype == "int8" else 0)

    expert = size(sum(elements[factor] for factor in factors), 2 * rank * len(factors)) + trained.router * size(h, 1)
    attention = size(sum(on_projections[factor] for factor in factors), len(projections) * rank * len(factors))
    tensors, experts = 2 * len(factors) + trained.router, shape.num_experts
    layers = [experts] * shape.num_moe_layers if touched is None else touched
    per_layer = trained.attention * attention
    return sum(count * expert + (tensors * experts if count < experts else 0) + per_layer for count in layers)


def count_bytes(shape: ModelShape) -> int:
    """Bytes of the counts in an update, int64: `expert_tokens` per MoE layer and expert, `tokens` and `assignments`."""
    return INT64 * (shape.num_moe_layers * shape.num_experts + 2)
