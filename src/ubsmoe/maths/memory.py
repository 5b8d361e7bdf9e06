"""An estimate of what one training step holds in memory. The legend of letters is in `ubsmoe.maths.costs`."""

from dataclasses import asdict, dataclass

from ubsmoe.maths.shape import ModelShape

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step at its peak, by what they hold."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values())


def peak_memory_bytes(
    shape: ModelShape,
    top_k: int,
    rank: int,
    batch_size: int,
    sequence_length: int,
    dtype_bytes: int,
    router_trained: bool = False,
    optimizer_moments: int = 2,
) -> Memory:
    """Bytes of the model, its adapters, their gradients and optimiser state, saved activations and working space.

    Only `activations` and `working` fall with K; all experts stay resident. `activations` is what autograd keeps from
    forward to backward, checked against torch in the tests; `working` is the larger of the loss (logits, log-softmax,
    two gradients) and the backward of one MoE layer. The sum takes all parts at one moment, which is an upper bound.

    Assumed: base and activations in `dtype_bytes`, trained tensors, norms and loss in float32; fused attention, which
    keeps no S x S scores; LoRA on the routed rows only; no gradient checkpointing; frozen matrices keep nothing. Left
    out: the Python process, the allocator's slack, the optimiser's temporaries, copies a server or an engine keeps.

    Args:
        shape: the model.
        top_k: K, experts per token.
        rank: LoRA rank.
        batch_size: sequences per step.
        sequence_length: tokens per sequence, padding included.
        dtype_bytes: 4 for float32, 2 for bfloat16.
        router_trained: whether the routers are trained too.
        optimizer_moments: float32 numbers kept per trained element: 2 for AdamW, 1 for SGD with momentum.

    Raises:
        ValueError: if `top_k`, `rank` or `sequence_length` is impossible for this shape.
    """
    shape.check(top_k, rank, sequence_length)
    tokens = batch_size * sequence_length
    trained = FLOAT32 * shape.trained_elements(rank, router_trained)
    loss = shape.vocab * (dtype_bytes + 3 * FLOAT32)
    layer = top_k * (2 * shape.hidden + (1 + shape.up_matrices) * shape.expert_width) * dtype_bytes
    experts = _saved_by_experts(shape, top_k, rank)
    routing = shape.num_moe_layers * top_k * (INT64 + dtype_bytes)  # which token a pair is of, and its weight
    others = _saved_by_attention(shape) + _saved_by_dense(shape)
    return Memory(
        weights=shape.parameters * dtype_bytes,
        adapters=trained,
        gradients=trained,
        optimizer=optimizer_moments * trained,
        activations=tokens * (dtype_bytes * (experts + others) + FLOAT32 * _saved_by_norms(shape) + routing),
        working=tokens * max(loss, layer),
    )


def _saved_by_experts(shape: ModelShape, top_k: int, rank: int) -> int:
    """Elements per token: the layer's input, and for each pair what comes before the activation and LoRA's narrow parts."""
    pair = shape.up_matrices * shape.expert_width + 2 * rank
    return shape.num_moe_layers * (top_k * pair + shape.hidden)


def _saved_by_attention(shape: ModelShape) -> int:
    """Elements per token: queries, keys, values and output of each layer above m0."""
    kv_heads = shape.heads if shape.latent else shape.kv_heads
    return shape.layers_above * (shape.heads + kv_heads) * (shape.head_dim + shape.value_dim)


def _saved_by_dense(shape: ModelShape) -> int:
    """Elements per token: both factors of the gated activation and its input, or the input alone; the shared output."""
    width = shape.moe_layers_above * shape.shared_width + shape.dense_layers_above * shape.dense_width
    return (2 * shape.up_matrices - 1) * width + shape.moe_layers_above * shape.hidden * shape.shared_gate


def _saved_by_norms(shape: ModelShape) -> int:
    """Elements per token, in float32: the input of every norm above m0, of the last one, and the routers' softmax."""
    qk = (shape.heads + shape.kv_heads) * shape.head_dim if shape.qk_norm else 0
    return shape.layers_above * (2 * shape.hidden + qk) + shape.hidden + shape.moe_layers_above * shape.num_experts
