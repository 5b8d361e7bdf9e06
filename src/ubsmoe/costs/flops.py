"""What a tier pays: FLOPs per token, bytes on the wire per round, bytes of memory. Counted from a shape, not measured.

    h      hidden size               M     experts per MoE layer        L, L_m   layers, MoE layers
    f      expert width              K     experts used per token       r        LoRA rank
    S      sequence length           V     vocabulary                   m0       index of the first MoE layer
    u      matrices before the activation: 2 when gated, fused into one [u f, h], else 1

Counted: every matrix product, 2 FLOPs per multiply-add: the projections and scores of attention (all S x S pairs, as
eager attention computes them; kernels that skip the causal half or what a sliding window hides do less), router,
experts, their LoRA, shared expert, dense layers, and the head at every position (a loss on the answers alone needs it
there only). Not counted: norms, softmax, activations, rotary embeddings, embedding look-ups, biases, sorting tokens by
expert, elementwise products such as phi or the gate weights, and optimiser steps. Padding is computed like any other
token, but for routed experts, which nobody asks about it (`pair_flops`). The tests compare every formula with torch's own
counter.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ubsmoe.costs.memory import peak_memory_bytes
from ubsmoe.costs.shape import EXPERTS_ONLY, ModelShape, Trained
from ubsmoe.costs.traffic import WireDtype, payload_bytes
from ubsmoe.maths.routing import budget_top_k


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

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class TierCost:
    """What one tier pays.

    `train_flops_per_token` is forward, backward and pseudo-gradients; `relative_to_top` is its ratio to the top tier's.
    """

    tier: int
    budget: float
    top_k: int
    rank: int
    forward_flops_per_token: int
    backward_flops_per_token: int
    train_flops_per_token: int
    relative_to_top: float
    upload_bytes: int
    download_bytes: int
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, int | float]:
        """Ready for JSON."""
        return asdict(self)


def forward_flops_per_token(
    shape: ModelShape, top_k: int, rank: int, sequence_length: int, trained: Trained = EXPERTS_ONLY
) -> Flops:
    """FLOPs of one forward pass per token of a sequence of that length, logits included.

        2 [ L (attention + S heads (head_dim + value_dim)) + L_m (M h + K ((u+1) f h + r (2 h + (u+1) f)) + shared)
            + dense + V h ]

    Affine in K, in r and in S. A trained router is a difference beside the frozen one, so it doubles M h. LoRA on attention
    adds r (out + in) for each projection of an MoE layer.

    Args:
        shape: the model.
        top_k: K, experts per token.
        rank: LoRA rank of every expert matrix; 0 for none.
        sequence_length: S, padding included.
        trained: what is trained beside the experts.

    Raises:
        ValueError: if `top_k` is not in 1..M, or `rank` or `sequence_length` is impossible.

    >>> shape = ModelShape(1, 1, 4, 3, 8, 2, 2, 2, 2, vocab=10)
    >>> forward_flops_per_token(shape, top_k=2, rank=1, sequence_length=5).experts  # 2 * K * 3 f h
    144
    """
    shape.check(top_k, rank, sequence_length)
    moe = 2 * shape.num_moe_layers
    return Flops(
        attention_projections=2 * shape.num_layers * shape.attention_weights,
        attention_scores=2 * shape.num_layers * _score_products(shape, sequence_length),
        attention_lora=moe * trained.attention * shape.attention_lora_weights(rank),
        router=moe * (1 + trained.router) * shape.router_weights,
        experts=moe * top_k * shape.expert_weights,
        expert_lora=moe * top_k * shape.lora_weights(rank),
        shared_expert=moe * shape.shared_weights,
        dense=2 * shape.dense_layers * shape.dense_weights,
        head=2 * shape.vocab * shape.hidden,
    )


def backward_flops_per_token(
    shape: ModelShape, top_k: int, rank: int, sequence_length: int, trained: Trained = EXPERTS_ONLY
) -> Flops:
    """FLOPs of one backward pass per token when only the experts' LoRA (and what else is asked for) is trained.

    - A frozen matrix passes the gradient on, 1x its forward, and gets no weight gradient. Scores have two inputs: 2x.
    - LoRA's thin matrices do both: 2x their forward.
    - Nothing under m0 is trained, so the gradient stops at the first MoE layer's own input: no backward for the layers
      below, for that layer's attention, router and shared expert, nor through its gate_up and A towards the input.
    - A trained router's difference adds its weight gradient in every MoE layer, and passes on like the frozen one.
    - With LoRA on attention the gradient reaches that layer's feed-forward input and its attention too, and stops at the
      projections that read the layer's own input.

    No recomputation: gradient checkpointing adds a forward without the head, flash attention half of the scores' backward.

    Args:
        shape: the model.
        top_k: K, experts per token.
        rank: LoRA rank of every expert matrix.
        sequence_length: S, padding included.
        trained: what is trained beside the experts.

    Raises:
        ValueError: as `forward_flops_per_token`; and if `rank` is below 1, since then no expert is trained.
    """
    shape.check(top_k, rank, sequence_length, least_rank=1)
    attention = trained.attention
    reached = shape.moe_layers_above + attention  # MoE layers whose feed-forward input carries a gradient
    experts, expert_lora = _expert_backward(shape, rank, shape.num_moe_layers, reached)
    later = sum(out * into for out, into in shape.attention_later)
    unreached = rank * sum(into for _, into in shape.attention_first)
    lora = 2 * shape.num_moe_layers * shape.attention_lora_weights(rank) - unreached
    return Flops(
        attention_projections=2 * (shape.layers_above * shape.attention_weights + attention * later),
        attention_scores=4 * (shape.layers_above + attention) * _score_products(shape, sequence_length),
        attention_lora=2 * attention * lora,
        router=2 * (reached + trained.router * (shape.num_moe_layers + reached)) * shape.router_weights,
        experts=top_k * experts,
        expert_lora=top_k * expert_lora,
        shared_expert=2 * reached * shape.shared_weights,
        dense=2 * shape.dense_layers_above * shape.dense_weights,
        head=2 * shape.vocab * shape.hidden,
    )


def pseudo_gradient_flops_per_token(
    shape: ModelShape, top_k: int, rank: int, fraction: float, through_hidden: bool = False
) -> float:
    """Extra FLOPs per trained token, forward and backward, of pseudo-gradients that really run missing experts.

    `sampled` runs a fraction q of the M - K missing (token, expert) pairs of every MoE layer, `oracle` all of them
    (q = 1), each at the price of an active pair. Modes that only rescale known gradients add no matrix product: q = 0.

    Args:
        shape: the model.
        top_k: K, experts per token.
        rank: LoRA rank of every expert matrix.
        fraction: q, in [0, 1].
        through_hidden: whether these pairs also send a gradient to the layer's input; if not, to their adapters only.

    Raises:
        ValueError: as `backward_flops_per_token`; and if `fraction` is outside [0, 1].

    Source: ours.
    """
    shape.check(top_k, rank, sequence_length=1, least_rank=1)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is a share of the missing pairs, in [0, 1]; got {fraction}")
    reaching = shape.moe_layers_above if through_hidden else 0
    flops = reaching * pair_flops(shape, rank, reaches_input=True)
    flops += (shape.num_moe_layers - reaching) * pair_flops(shape, rank, reaches_input=False)
    return fraction * (shape.num_experts - top_k) * flops


def pair_flops(shape: ModelShape, rank: int, reaches_input: bool, recomputing: bool = False) -> int:
    """FLOPs of one (token, expert) pair of one layer, forward and backward, with or without the layer's input gradient."""
    forward = 2 * (shape.expert_weights + shape.lora_weights(rank))
    return (1 + recomputing) * forward + sum(_expert_backward(shape, rank, 1, int(reaches_input)))


def tier_costs(
    shape: ModelShape,
    budgets: Sequence[float],
    *,
    rank: int,
    batch_size: int,
    sequence_length: int,
    ranks: Sequence[int] | None = None,
    k_max: int | None = None,
    dtype_bytes: int = 4,
    trained: Trained = EXPERTS_ONLY,
    pseudo_gradient_fraction: float = 0.0,
    through_hidden: bool = False,
    optimizer_moments: int = 2,
    accumulating: bool = False,
    wire_dtype: WireDtype = "float32",
    factors_up: str = "AB",
    extra_upload_bytes: int = 0,
    extra_download_bytes: int = 0,
    recomputing: bool = False,
) -> list[TierCost]:
    """The bill of every tier: K_c = max(1, floor(K_max budget)) at one rank, or K_max for all at its own of `ranks`.

    The top tier, to which the others are compared, is the one with the largest budget.

    On OLMoE-1B-7B, r = 8, logits counted, K = 6, 4, 2 instead of 8 save 16.9, 33.8, 50.7 % of a forward pass at S = 256
    (55.4 % for K = 2 without the head). Longer sequences dilute it: K = 2 saves 46.2 % at S = 2048 and 41.9 % at
    S = 4096 (45.1 % without the head). The paper's 45 % lies in this range, near S = 2560; what it counted we do not
    know. Forward and backward together save about the same, 50.4 % at S = 256. Ranks 4 instead of 32 at K = 8 save
    2.1 % at S = 512, 4 instead of 64 4.3 %; the paper says 5 %.

    Args:
        shape: the model.
        budgets: beta of each tier, in (0, 1].
        rank: LoRA rank of all tiers, unless `ranks` gives each its own.
        batch_size: sequences per step, for the memory.
        sequence_length: tokens per sequence, padding included.
        ranks: LoRA rank of each tier; then every tier runs K_max.
        k_max: experts per token at budget 1, if not the model's own.
        dtype_bytes: of the base and the activations.
        trained: what is trained beside the experts, and travels.
        pseudo_gradient_fraction: as `fraction` in `pseudo_gradient_flops_per_token`.
        through_hidden: as there.
        optimizer_moments: as in `peak_memory_bytes`.
        accumulating: as there.
        wire_dtype: of the updates; tasks travel in float32.
        factors_up: as in `update_bytes`.
        extra_upload_bytes: what the method adds to each update.
        extra_download_bytes: what the method adds to each task.
        recomputing: gradient checkpointing: a second forward pass, without the head, and less memory.

    Raises:
        ValueError: if there are no budgets, one is outside (0, 1], or `ranks` has another length.

    Source: UB-SMoE (arXiv 2605.16690), setting and Figure 3.
    """
    if not budgets or (ranks is not None and len(ranks) != len(budgets)):
        raise ValueError(
            f"expected one budget per tier, and one rank per tier if ranks vary; got {budgets} and {ranks}"
        )
    k_max = k_max or shape.k_max
    bills = []
    for tier, budget in enumerate(budgets):
        top_k, r = (budget_top_k(k_max, budget), rank) if ranks is None else (k_max, ranks[tier])
        forward = forward_flops_per_token(shape, top_k, r, sequence_length, trained)
        backward = backward_flops_per_token(shape, top_k, r, sequence_length, trained).total
        backward += recomputing * (forward.total - forward.head)
        extra = pseudo_gradient_flops_per_token(shape, top_k, r, pseudo_gradient_fraction, through_hidden)
        wire = payload_bytes(
            shape,
            r,
            trained,
            wire_dtype=wire_dtype,
            factors_up=factors_up,
            extra_upload_bytes=extra_upload_bytes,
            extra_download_bytes=extra_download_bytes,
        )
        memory = peak_memory_bytes(
            shape, top_k, r, batch_size, sequence_length, dtype_bytes, trained, optimizer_moments,
            accumulating=accumulating, pair_fraction=pseudo_gradient_fraction, recomputing=recomputing,
        )  # fmt: skip
        bills.append(
            TierCost(
                tier=tier,
                budget=budget,
                top_k=top_k,
                rank=r,
                forward_flops_per_token=forward.total,
                backward_flops_per_token=backward,
                train_flops_per_token=forward.total + backward + round(extra),
                relative_to_top=1.0,
                upload_bytes=wire.upload_bytes,
                download_bytes=wire.download_bytes,
                peak_memory_bytes=memory.total,
            )
        )
    top = max(bills, key=lambda bill: bill.budget).train_flops_per_token
    return [replace(bill, relative_to_top=bill.train_flops_per_token / top) for bill in bills]


def _expert_backward(shape: ModelShape, rank: int, layers: int, reaching: int) -> tuple[int, int]:
    """Backward of one expert per layer: (frozen matrices, LoRA); in so many of the `layers` it reaches the input."""
    wide = shape.expert_width * shape.hidden
    frozen = layers * wide + reaching * shape.up_matrices * wide
    unreached = (layers - reaching) * rank * shape.hidden
    return 2 * frozen, 2 * (2 * layers * shape.lora_weights(rank) - unreached)


def _score_products(shape: ModelShape, sequence_length: int) -> int:
    """Multiply-adds per token and layer of Q K^T and of P V."""
    return sequence_length * shape.heads * (shape.head_dim + shape.value_dim)
