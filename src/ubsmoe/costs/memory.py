"""An estimate of what one training step holds in memory. The legend of letters is in `ubsmoe.costs.flops`."""

from dataclasses import asdict, dataclass

from ubsmoe.costs.shape import EXPERTS_ONLY, ModelShape, Trained

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes that a client holds at the peak of a training step, by what they are."""

    weights: int
    task: int
    adapters: int
    optimizer: int
    gradients: int
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
    trained: Trained = EXPERTS_ONLY,
    optimizer_moments: int = 2,
    real: int | None = None,
    labelled: int | None = None,
    accumulating: bool = False,
    pair_fraction: float = 0.0,
    recomputing: bool = False,
) -> Memory:
    """Bytes of the base, the task as received, the adapter in training, its optimiser, and what one step adds to them.

    A step has two high tides, and the higher one is returned: where backward begins (all activations, and the working space
    of the loss or of one layer), and where the optimiser steps (all gradients, two copies of the largest tensor). In between
    gradients come as activations go, so neither tide holds both, unless gradients are accumulated.

    `activations` is what autograd and the kernel keep from forward to backward, checked against torch in the tests; it falls
    with K, as `working` does. All experts stay resident.

    Assumed: base and activations in `dtype_bytes`, trained tensors, norms and loss in float32; fused attention, which
    keeps no S x S scores; LoRA on the routed rows only; frozen matrices keep nothing; with gradient checkpointing an MoE
    layer keeps what the average one does. Left out: python and its libraries, the data, the allocator's slack, and in one
    process what the server and the engine hold.

    Args:
        shape: the model.
        top_k: K, experts per token.
        rank: LoRA rank.
        batch_size: sequences per forward pass.
        sequence_length: tokens per sequence, padding included.
        dtype_bytes: 4 for float32, 2 for bfloat16.
        trained: what is trained beside the experts.
        optimizer_moments: float32 numbers kept per trained element: 2 for AdamW, 1 for SGD with momentum.
        real: tokens that are no padding, which alone go through experts; all when left out.
        labelled: positions that have a label, whose logits and last experts alone are computed; all when left out.
        accumulating: whether gradients of an earlier forward pass are there already.
        pair_fraction: share of the missing (token, expert) pairs that a pseudo-gradient runs too.
        recomputing: gradient checkpointing: layers keep their input, and one at a time the rest.

    Raises:
        ValueError: if `top_k`, `rank` or `sequence_length` is impossible for this shape.
    """
    shape.check(top_k, rank, sequence_length)
    tokens = batch_size * sequence_length
    adapter = FLOAT32 * shape.trained_elements(rank, trained)
    real, labelled = (tokens if count is None else count for count in (real, labelled))
    loss = labelled * shape.vocab * (3 * FLOAT32 + dtype_bytes % FLOAT32)
    layer = dtype_bytes * _held_by_layer(shape, tokens, top_k) + 2 * adapter // shape.num_moe_layers
    pairs = (top_k + pair_fraction * (shape.num_experts - top_k)) * sum(tokens_of_experts(shape, real, labelled))
    # which token a pair is of, and its weight, beside what the experts keep
    experts = pairs * (dtype_bytes * _saved_by_pair(shape, rank) + INT64 + dtype_bytes)
    inputs = shape.num_moe_layers * shape.hidden
    others = inputs + _saved_by_attention(shape, rank, trained.attention) + _saved_by_dense(shape, trained.attention)
    b_again = shape.num_moe_layers * shape.num_experts * rank * (shape.hidden + shape.up_matrices * shape.expert_width)
    saved = experts + tokens * (dtype_bytes * others + FLOAT32 * _saved_by_norms(shape, trained.attention))
    if recomputing:
        layer += round(saved / shape.num_moe_layers)
        saved = dtype_bytes * tokens * shape.hidden * shape.num_layers
    activations = dtype_bytes * b_again + saved
    always = {"weights": shape.parameters * dtype_bytes, "task": adapter, "adapters": adapter}
    always["optimizer"] = optimizer_moments * adapter
    largest = FLOAT32 * shape.num_experts * rank * max(shape.hidden, shape.up_matrices * shape.expert_width)
    backward = Memory(
        **always, gradients=accumulating * adapter, activations=round(activations), working=max(loss, layer)
    )
    step = Memory(**always, gradients=adapter, activations=0, working=2 * largest)
    return max(backward, step, key=lambda tide: tide.total)


def _held_by_layer(shape: ModelShape, tokens: int, top_k: int) -> int:
    """Elements while one MoE layer goes backward: the gradients around it, and the rows of its busiest expert.

    That expert is taken to have twice an even share of the pairs.
    """
    rows = min(tokens, -(-2 * tokens * top_k // shape.num_experts))
    inner = (2 * shape.up_matrices + 1) * shape.expert_width  # before and after the activation, and gradients of both
    return 4 * tokens * shape.hidden + rows * (2 * shape.hidden + inner)


def tokens_of_experts(shape: ModelShape, real: int, labelled: int) -> list[int]:
    """Tokens that go through the experts of each MoE layer: the real ones; in a last layer, the labelled ones.

    Where dense layers lie between, the shape does not say which kind comes last: then all are real ones.
    """
    last = real if shape.dense_layers_above else labelled
    return [real] * shape.moe_layers_above + [last]


def _saved_by_pair(shape: ModelShape, rank: int) -> int:
    """Elements per (token, expert) pair: what comes before the activation, and LoRA's narrow parts."""
    return shape.up_matrices * shape.expert_width + 2 * rank


def _saved_by_attention(shape: ModelShape, rank: int, trained: bool) -> int:
    """Elements per token: queries, keys, values and output of each layer above m0; LoRA's inputs and narrow parts.

    The output is kept once, as what the last projection read too. Latent values are a view of what their projection wrote,
    and keep all of it; their output is copied before it is projected.
    """
    kv_heads = shape.heads if shape.latent else shape.kv_heads
    each = (shape.heads + kv_heads) * (shape.head_dim + shape.value_dim)
    if shape.latent:
        each += shape.heads * (shape.head_dim - shape.latent.rope_dim)
    first, later = shape.attention_first, shape.attention_later
    inputs = shape.hidden + (sum(into for _, into in later) if shape.latent else 0)
    lora = inputs + rank * len(first + later)
    return (shape.layers_above + trained) * each + trained * shape.num_moe_layers * lora


def _saved_by_dense(shape: ModelShape, attention: bool) -> int:
    """Elements per token: both factors of the gated activation and its input, or the input alone; the shared output."""
    reached = shape.moe_layers_above + attention
    width = reached * shape.shared_width + shape.dense_layers_above * shape.dense_width
    return (2 * shape.up_matrices - 1) * width + reached * shape.hidden * shape.shared_gate


def _saved_by_norms(shape: ModelShape, attention: bool) -> int:
    """Elements per token, in float32: the input of every norm above m0, of the last one, and the routers' softmax."""
    qk = (shape.heads + shape.kv_heads) * shape.head_dim if shape.qk_norm else 0
    if shape.latent:
        qk = (shape.latent.q_rank or 0) + shape.latent.kv_rank + shape.latent.rope_dim
    above = shape.layers_above * (2 * shape.hidden + qk) + shape.hidden + shape.moe_layers_above * shape.num_experts
    return above + attention * (shape.hidden + qk + shape.num_experts)
