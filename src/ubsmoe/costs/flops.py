"""FLOPs of training, counted from a shape and not measured. The letters are those of all modules here.

    h      hidden size               M     experts per MoE layer        L, L_m   layers, MoE layers
    f      expert width              K     experts used per token       r        LoRA rank
    S      sequence length           V     vocabulary                   m0       index of the first MoE layer
    u      matrices before the activation: 2 when gated, fused into one [u f, h], else 1

Counted: every matrix product, 2 FLOPs per multiply-add: the projections and scores of attention (all S x S pairs, as
eager attention computes them; kernels that skip the causal half or what a sliding window hides do less), router,
experts, their LoRA, shared expert, dense layers, and the head at every position (a loss on the answers alone needs it
there only). Not counted: norms, softmax, activations, rotary embeddings, embedding look-ups, biases, sorting tokens by
expert, elementwise products such as phi or the gate weights, and optimiser steps. Padding is computed like any other
token, except that no padding is routed to experts (`batch_flops`). The tests compare every formula with torch's own counter.
"""

from dataclasses import asdict, dataclass

from ubsmoe.costs.shape import ModelShape
from ubsmoe.costs.workload import Batch, Workload


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, by where they are spent."""

    attention_projections: int
    attention_scores: int
    attention_lora: int
    router: int
    experts: int
    expert_lora: int
    shared_expert: int
    dense: int
    head: int
    compensation: int = 0

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values())


def forward_flops_per_token(shape: ModelShape, top_k: int, workload: Workload) -> Flops:
    """FLOPs of one forward pass per token of the workload's batch, padding and logits included.

        2 [ L (attention + S heads (head_dim + value_dim)) + L_m (M h + K ((u+1) f h + r (2 h + (u+1) f)) + shared)
            + dense + V h ]

    Affine in K, in r and in S. A trained router is a difference beside the frozen one, so it doubles M h. LoRA on attention
    adds r (out + in) for each projection of an MoE layer.

    Raises:
        ValueError: if `top_k` is not in 0..M.

    >>> shape = ModelShape(1, 1, 4, 3, 8, 2, 2, 2, 2, vocab=10)
    >>> forward_flops_per_token(shape, top_k=2, workload=Workload(1, Batch.full(1, 5))).experts  # 2 * K * 3 f h
    144
    """
    shape.check_top_k(top_k)
    rank, trained, moe = workload.rank, workload.trained, 2 * shape.num_moe_layers
    return Flops(
        attention_projections=2 * shape.num_layers * shape.attention_weights,
        attention_scores=2 * shape.num_layers * _score_products(shape, workload),
        attention_lora=moe * trained.attention * shape.attention_lora_weights(rank),
        router=moe * (1 + trained.router) * shape.router_weights,
        experts=moe * top_k * shape.expert_weights,
        expert_lora=moe * top_k * shape.lora_weights(rank),
        shared_expert=moe * shape.shared_weights,
        dense=2 * shape.dense_layers * shape.dense_weights,
        head=2 * shape.vocab * shape.hidden,
        compensation=moe * _compensation(shape, top_k, workload),
    )


def backward_flops_per_token(shape: ModelShape, top_k: int, workload: Workload) -> Flops:
    """FLOPs of one backward pass per token when only the experts' LoRA (and what else is asked for) is trained.

    - A frozen matrix passes the gradient on, 1x its forward, and gets no weight gradient. Scores have two inputs: 2x.
    - LoRA's thin matrices do both: 2x their forward.
    - Nothing under m0 is trained, so the gradient stops at the first MoE layer's own input: no backward for the layers
      below, for that layer's attention, router and shared expert, nor through its gate_up and A towards the input.
    - A trained router's difference adds its weight gradient in every MoE layer, and passes on like the frozen one.
    - With LoRA on attention the gradient reaches that layer's feed-forward input and its attention too, and stops at the
      projections that read the layer's own input.

    No recomputation: gradient checkpointing adds a forward without the head, flash attention half of the scores' backward.

    Raises:
        ValueError: if `top_k` is not in 0..M, or the rank is 0, since then no expert is trained.
    """
    shape.check_top_k(top_k)
    rank, trained = workload.rank, workload.trained
    if rank < 1:
        raise ValueError(f"rank must be >= 1 where experts are trained; got {rank}")
    reached = shape.moe_layers_above + trained.attention  # MoE layers whose feed-forward input carries a gradient
    experts, expert_lora = _expert_backward(shape, rank, shape.num_moe_layers, reached)
    later = sum(out * into for out, into in shape.attention_later)
    unreached = rank * sum(into for _, into in shape.attention_first)
    lora = 2 * shape.num_moe_layers * shape.attention_lora_weights(rank) - unreached
    return Flops(
        attention_projections=2 * (shape.layers_above * shape.attention_weights + trained.attention * later),
        attention_scores=4 * (shape.layers_above + trained.attention) * _score_products(shape, workload),
        attention_lora=2 * trained.attention * lora,
        router=2 * (reached + trained.router * (shape.num_moe_layers + reached)) * shape.router_weights,
        experts=top_k * experts,
        expert_lora=top_k * expert_lora,
        shared_expert=2 * reached * shape.shared_weights,
        dense=2 * shape.dense_layers_above * shape.dense_weights,
        head=2 * shape.vocab * shape.hidden,
        compensation=2 * reached * _compensation(shape, top_k, workload),
    )


def pseudo_gradient_flops_per_token(shape: ModelShape, top_k: int, workload: Workload) -> float:
    """Extra FLOPs per trained token, forward and backward, of pseudo-gradients that really run missing experts.

    `sampled` runs a fraction q of the M - K missing (token, expert) pairs of every MoE layer, `oracle` all of them
    (q = 1), each at the price of an active pair. Modes that only rescale known gradients add no matrix product: q = 0.

    Source: ours.
    """
    reaching = shape.moe_layers_above if workload.pairs_reach_input else 0
    flops = reaching * _pair_flops(shape, workload.rank, reaches_input=True)
    flops += (shape.num_moe_layers - reaching) * _pair_flops(shape, workload.rank, reaches_input=False)
    return missing_pairs(shape, top_k, workload) * flops


def batch_flops(shape: ModelShape, top_k: int, workload: Workload) -> float:
    """FLOPs of the workload's batch, forward and backward: logits only where there is a label, experts only where a token is read.

    Gradient checkpointing adds a forward pass without logits.
    """
    batch, again = workload.batch, workload.recomputing
    forward, backward = (count(shape, top_k, workload) for count in (forward_flops_per_token, backward_flops_per_token))
    rest = sum(
        part.total - part.head - part.experts - part.expert_lora - part.compensation
        for part in [forward] * (1 + again) + [backward]
    )
    experts = 0.0
    for layer, tokens in enumerate(tokens_of_experts(shape, batch)):
        reached = layer > 0 or workload.trained.attention  # something below learns from this layer's input
        routed = _pair_flops(shape, workload.rank, reached, again)
        missing = _pair_flops(shape, workload.rank, reached and workload.pairs_reach_input, again)
        extra = 2 * _compensation(shape, top_k, workload) * (1 + again + reached)
        experts += tokens * (extra + top_k * routed + missing_pairs(shape, top_k, workload) * missing)
    return batch.tokens * rest + experts + batch.labelled * (forward.head + backward.head)


def missing_pairs(shape: ModelShape, top_k: int, workload: Workload) -> float:
    """Experts per token that a pseudo-gradient runs beside the routed ones; at K = 0 no expert runs at all."""
    return workload.pair_fraction * (shape.num_experts - top_k) * bool(top_k)


def tokens_of_experts(shape: ModelShape, batch: Batch) -> list[int]:
    """Tokens that go through the experts of each MoE layer: the real ones; in a last layer, the labelled ones.

    Where dense layers lie between, the shape does not say which kind comes last: then all are real ones.
    """
    last = batch.real if shape.dense_layers_above else batch.labelled
    return [batch.real] * shape.moe_layers_above + [last]


def _pair_flops(shape: ModelShape, rank: int, reaches_input: bool, recomputing: bool = False) -> int:
    """FLOPs of one (token, expert) pair of one layer, forward and backward, with or without the layer's input gradient."""
    forward = 2 * (shape.expert_weights + shape.lora_weights(rank))
    return (1 + recomputing) * forward + sum(_expert_backward(shape, rank, 1, int(reaches_input)))


def _expert_backward(shape: ModelShape, rank: int, layers: int, reaching: int) -> tuple[int, int]:
    """Backward of one expert per layer: (frozen matrices, LoRA); in so many of the `layers` it reaches the input."""
    wide = shape.expert_width * shape.hidden
    frozen = layers * wide + reaching * shape.up_matrices * wide
    unreached = (layers - reaching) * rank * shape.hidden
    return 2 * frozen, 2 * (2 * layers * shape.lora_weights(rank) - unreached)


def _compensation(shape: ModelShape, top_k: int, workload: Workload) -> int:
    """Multiply-adds per token and layer beside those of K whole experts: C(x), and what LoRA on slices costs more.

    A slice has the expert's frozen weights in n parts, but A of the first matrix and B of the second whole.
    """
    if (skipped := workload.skipped) is None:
        return 0
    more = skipped.runs(top_k) - top_k
    return skipped.multiply_adds(shape, top_k) + more * 2 * workload.rank * shape.hidden


def _score_products(shape: ModelShape, workload: Workload) -> int:
    """Multiply-adds per token and layer of Q K^T and of P V."""
    return workload.batch.length * shape.heads * (shape.head_dim + shape.value_dim)
