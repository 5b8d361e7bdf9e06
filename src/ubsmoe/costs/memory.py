"""An estimate of what one training step holds in memory. The legend of letters is in `ubsmoe.costs.flops`."""

from dataclasses import asdict, dataclass, replace

from ubsmoe.costs.flops import missing_pairs, tokens_of_experts
from ubsmoe.costs.shape import FLOAT32, INT64, ModelShape
from ubsmoe.costs.weights import mapped_bytes, weight_bytes
from ubsmoe.costs.workload import Workload

SIDE_COPIES = 3.5
"""Of a side factor: as received, in place, joined with each layer's adapter, and of B the kernel's copy (`bench/plan.py`)."""


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
    side: int = 0
    compensation: int = 0

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values())


def peak_memory_bytes(shape: ModelShape, top_k: int, workload: Workload) -> Memory:
    """Bytes of the base, the task as received, the adapter in training, its optimiser, and what one step adds to them.

    What stands for skipped experts is counted by itself.

    A step has two peaks, and the higher one is returned: where backward begins (all activations, and the working space of the
    loss or of one layer), and where the optimiser steps (all gradients, two copies of the largest tensor). In between gradients
    come as activations go, so neither peak holds both, unless gradients are accumulated.

    `activations` is what autograd and the kernel keep from forward to backward, checked against torch in the tests; it falls
    with K, as `working` does. All experts stay resident.

    Assumed: base and activations in `dtype_bytes`, trained tensors, norms and loss in float32; fused attention, which
    keeps no S x S scores; LoRA on the routed rows only; frozen matrices keep nothing; with gradient checkpointing an MoE
    layer keeps what the average one does. Left out: python and its libraries, the data, the allocator's slack, and in one
    process what the server and the engine hold.

    Raises:
        ValueError: if `top_k` is not in 0..M.
    """
    return max(_peaks(shape, top_k, workload), key=lambda peak: peak.total)


def mapped_memory_bytes(shape: ModelShape, top_k: int, workload: Workload) -> int:
    """Bytes that must be in memory during steps of a CPU whose base is mapped from disk."""
    return own_memory_bytes(shape, top_k, workload) + mapped_bytes(shape, workload.experts, workload.dtype_bytes, top_k)


def own_memory_bytes(shape: ModelShape, top_k: int, workload: Workload) -> int:
    """The part of `mapped_memory_bytes` that no other process shares and no file holds.

    A client keeps what it frees (`ubsmoe.client.allocator`), and tensors of one phase of a step seldom fit where those of another
    were. After some steps both peaks of `peak_memory_bytes` are held beside each other, each part at its largest, and what a step
    frees a second time, as holes: activations, working space and gradients. In NF4 the gradients leave holes twice, since they come
    between matrices that are made anew whenever an expert is read. A rule that fits measured steps (`bench/step_memory.py`).
    """
    at_backward, at_step = (asdict(replace(peak, weights=0)) for peak in _peaks(shape, top_k, workload))
    held = {part: max(size, at_step[part]) for part, size in at_backward.items()}
    holes = held["activations"] + held["working"] + held["gradients"] * (2 if workload.experts == "nf4" else 1)
    return sum(held.values()) + holes


def evaluation_memory_bytes(shape: ModelShape, top_k: int, workload: Workload, rows: int, labelled: int) -> int:
    """Bytes while questions are answered: weights, adapter, the cache of keys and values, and one layer's or the logits' work.

    Args:
        shape: the model.
        top_k: K.
        workload: its batch is a batch of prompts, `length` with all that is written after them.
        rows: sequences in the cache, one per candidate or beam of a prompt.
        labelled: positions whose logits are there at once, in the base's dtype; a few rows at a time are in float32, left out here.
    """
    adapter = FLOAT32 * shape.trained_elements(workload.rank, workload.trained)
    kv_heads = shape.heads if shape.latent else shape.kv_heads
    cached = rows * workload.batch.length * shape.num_layers * kv_heads * (shape.head_dim + shape.value_dim)
    layer = workload.dtype_bytes * _held_by_layer(shape, workload.batch.tokens, top_k)
    logits = workload.dtype_bytes * labelled * shape.vocab
    return (
        weight_bytes(shape, workload.experts, workload.dtype_bytes)
        + 2 * adapter
        + workload.dtype_bytes * cached
        + _compensation(shape, top_k, workload)
        + max(layer, logits)
    )


def export_memory_bytes(shape: ModelShape, workload: Workload) -> dict[str, int]:
    """Bytes while an adapter is exported, and while a model is merged, whose base counts as far as it is not mapped.

    The adapter is there as its file, read, put in place, read off, and in the export's layout; a merged layer as it is in
    memory and as it is in a file.
    """
    adapter = FLOAT32 * shape.trained_elements(workload.rank, workload.trained)
    layer = workload.dtype_bytes * (shape.num_experts * shape.expert_weights + shape.attention_weights)
    ends = workload.dtype_bytes * shape.vocab * shape.hidden * (1 if shape.tied_embeddings else 2)
    return {"peft": 4 * adapter, "merged": 3 * adapter + max(2 * layer, ends)}


def _peaks(shape: ModelShape, top_k: int, workload: Workload) -> tuple[Memory, Memory]:
    """What is held where backward begins, and where the optimiser steps."""
    shape.check_top_k(top_k)
    adapter = FLOAT32 * shape.trained_elements(workload.rank, workload.trained)
    at_step = Memory(
        weights=weight_bytes(shape, workload.experts, workload.dtype_bytes),
        side=round(SIDE_COPIES * FLOAT32 * workload.side_elements),
        compensation=_compensation(shape, top_k, workload),
        task=adapter,
        adapters=adapter,
        optimizer=workload.optimizer_moments * adapter,
        gradients=adapter,
        activations=0,
        working=2
        * FLOAT32
        * shape.num_experts
        * workload.rank
        * max(shape.hidden, shape.up_matrices * shape.expert_width),
    )
    activations, layer = _activations(shape, top_k, workload)
    working = max(_loss(shape, workload), layer + 2 * adapter // shape.num_moe_layers)
    gradients = workload.accumulating * adapter
    at_backward = replace(at_step, gradients=gradients, activations=activations, working=working)
    return at_backward, at_step


def _compensation(shape: ModelShape, top_k: int, workload: Workload) -> int:
    return workload.skipped.held_bytes(shape, top_k, workload.dtype_bytes) if workload.skipped else 0


def _activations(shape: ModelShape, top_k: int, workload: Workload) -> tuple[int, int]:
    """Bytes kept from forward to backward by all layers, and what one MoE layer takes while it goes backward."""
    tokens, width = workload.batch.tokens, workload.dtype_bytes
    saved = _saved_by_experts(shape, top_k, workload) + tokens * _saved_per_token(shape, workload)
    layer = width * _held_by_layer(shape, tokens, top_k)
    if workload.recomputing:
        layer += round(saved / shape.num_moe_layers)
        saved = width * tokens * shape.hidden * shape.num_layers
    # the kernel's copies of B, which backward reads again
    outs = shape.hidden + shape.up_matrices * shape.expert_width
    b = shape.num_moe_layers * shape.num_experts * workload.rank * outs
    return round(width * b + saved), layer


def _saved_by_experts(shape: ModelShape, top_k: int, workload: Workload) -> float:
    """Bytes of all (token, expert) pairs: what the experts keep, which token a pair is of, and its weight."""
    running = top_k + missing_pairs(shape, top_k, workload)
    pairs = running * sum(tokens_of_experts(shape, workload.batch))
    return pairs * (workload.dtype_bytes * _saved_by_pair(shape, workload.rank) + INT64 + workload.dtype_bytes)


def _saved_per_token(shape: ModelShape, workload: Workload) -> int:
    """Bytes per token of everything but the routed experts: inputs of MoE layers, attention, dense parts, norms."""
    attention = workload.trained.attention
    elements = shape.num_moe_layers * shape.hidden
    elements += _saved_by_attention(shape, workload.rank, attention) + _saved_by_dense(shape, attention)
    return workload.dtype_bytes * elements + FLOAT32 * _saved_by_norms(shape, attention)


def _loss(shape: ModelShape, workload: Workload) -> int:
    """Bytes of the logits with a label, in float32 three times over, and once more in a narrower dtype."""
    return workload.batch.labelled * shape.vocab * (3 * FLOAT32 + workload.dtype_bytes % FLOAT32)


def _held_by_layer(shape: ModelShape, tokens: int, top_k: int) -> int:
    """Elements while one MoE layer goes backward: the gradients around it, and the rows of its busiest expert.

    That expert is taken to have twice an even share of the pairs.
    """
    rows = min(tokens, -(-2 * tokens * top_k // shape.num_experts))
    inner = (2 * shape.up_matrices + 1) * shape.expert_width  # before and after the activation, and gradients of both
    return 4 * tokens * shape.hidden + rows * (2 * shape.hidden + inner)


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
