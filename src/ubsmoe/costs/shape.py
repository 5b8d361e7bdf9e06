"""The sizes of a sparse-MoE decoder and the elements of its parts. The legend of letters is in `ubsmoe.costs.flops`."""

import math
from dataclasses import dataclass

FLOAT32, INT64 = 4, 8
"""Bytes of a number."""


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's MLA: queries through `q_rank` or (None) directly, keys and values through `kv_rank`.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    q_rank: int | None
    kv_rank: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Trained:
    """What is trained beside the experts' LoRA: the routers' differences, LoRA on the attention of every MoE layer."""

    router: bool = False
    attention: bool = False


EXPERTS_ONLY = Trained()


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a model's costs depend on. Build one with `ubsmoe.model.presets.model_shape`.

    `head_dim` is the width of one query or key, `first_moe_layer` the index m0; `shared_width` and `dense_width` are 0
    where a model has no shared expert or no dense layers. Every layer is either dense or MoE; the dense ones may lie
    under m0 and between MoE layers.

    Raises:
        ValueError: if the sizes contradict each other.
    """

    num_layers: int
    num_moe_layers: int
    hidden: int
    expert_width: int
    num_experts: int
    k_max: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    first_moe_layer: int = 0
    shared_width: int = 0
    shared_gate: bool = False
    dense_width: int = 0
    gated: bool = True
    qk_norm: bool = False
    tied_embeddings: bool = False
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.k_max <= self.num_experts:
            raise ValueError(f"k_max must lie in 1..num_experts = {self.num_experts}, got {self.k_max}")
        if not 1 <= self.num_moe_layers <= self.num_layers - self.first_moe_layer:
            raise ValueError(
                f"{self.num_moe_layers} MoE layers from layer {self.first_moe_layer} on exceed {self.num_layers} layers"
            )
        if self.dense_layers and not self.dense_width:
            raise ValueError(f"{self.dense_layers} layers are dense, so dense_width must be positive")

    @property
    def dense_layers(self) -> int:
        """Layers whose feed-forward part has no experts."""
        return self.num_layers - self.num_moe_layers

    @property
    def layers_above(self) -> int:
        """Layers over m0: those whose input carries a gradient."""
        return self.num_layers - self.first_moe_layer - 1

    @property
    def moe_layers_above(self) -> int:
        """MoE layers over m0."""
        return self.num_moe_layers - 1

    @property
    def dense_layers_above(self) -> int:
        """Dense layers over m0: everything under it is dense."""
        return self.dense_layers - self.first_moe_layer

    @property
    def value_dim(self) -> int:
        """Width of one value head."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def up_matrices(self) -> int:
        """u: 2 when the activation is gated, else 1."""
        return 2 if self.gated else 1

    @property
    def attention_first(self) -> list[tuple[int, int]]:
        """(out, in) of the attention projections that read the layer's input."""
        queries, latent = self.heads * self.head_dim, self.latent
        if latent is None:
            outs = [queries, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        else:
            outs = [latent.q_rank or queries, latent.kv_rank + latent.rope_dim]
        return [(out, self.hidden) for out in outs]

    @property
    def attention_later(self) -> list[tuple[int, int]]:
        """(out, in) of those that read what others wrote."""
        found = [(self.hidden, self.heads * self.value_dim)]
        if self.latent:
            keys_values = self.heads * (self.head_dim - self.latent.rope_dim + self.value_dim)
            found.append((keys_values, self.latent.kv_rank))
            if self.latent.q_rank:
                found.append((self.heads * self.head_dim, self.latent.q_rank))
        return found

    @property
    def attention_weights(self) -> int:
        """Elements of one layer's attention projections."""
        return sum(out * into for out, into in self.attention_first + self.attention_later)

    @property
    def router_weights(self) -> int:
        """Elements of one router: M h."""
        return self.num_experts * self.hidden

    @property
    def expert_weights(self) -> int:
        """Elements of one expert: (u + 1) f h."""
        return self.feed_forward_weights(self.expert_width)

    @property
    def shared_weights(self) -> int:
        """Elements of one layer's shared expert, with its gate."""
        return self.feed_forward_weights(self.shared_width) + self.hidden * self.shared_gate

    @property
    def dense_weights(self) -> int:
        """Elements of one dense layer's feed-forward part."""
        return self.feed_forward_weights(self.dense_width)

    @property
    def parameters(self) -> int:
        """Elements of all matrices; norms and biases, well below 0.1 % of a real model, are left out."""
        moe = self.num_experts * self.expert_weights + self.router_weights + self.shared_weights
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        feed_forward = self.num_moe_layers * moe + self.dense_layers * self.dense_weights
        return self.num_layers * self.attention_weights + feed_forward + embeddings

    def feed_forward_weights(self, width: int) -> int:
        """Elements of a feed-forward block of that inner width: (u + 1) width h."""
        return (self.up_matrices + 1) * width * self.hidden

    def lora_weights(self, rank: int) -> int:
        """Elements of one expert's fused LoRA: r (h + u f) for gate_up and r (f + h) for down."""
        return rank * (2 * self.hidden + (self.up_matrices + 1) * self.expert_width)

    def attention_lora_weights(self, rank: int) -> int:
        """Elements of LoRA on one layer's attention projections: r (out + in) for each."""
        return rank * sum(out + into for out, into in self.attention_first + self.attention_later)

    def trained_elements(self, rank: int, trained: Trained = EXPERTS_ONLY) -> int:
        """Trained elements of the whole model: every expert's LoRA, and what else is trained."""
        beside = trained.router * self.router_weights + trained.attention * self.attention_lora_weights(rank)
        return self.num_moe_layers * (self.num_experts * self.lora_weights(rank) + beside)

    def check_top_k(self, top_k: int) -> None:
        """Raise ValueError unless this model can run with K = `top_k`; 0 where something stands for all experts."""
        if not 0 <= top_k <= self.num_experts:
            raise ValueError(f"top_k must lie in 0..num_experts = {self.num_experts}, got {top_k}")


def budget_top_k(k_max: int, budget: float, least: int = 1) -> int:
    """Experts per token that a budget buys: max(least, floor(K_max * budget)).

    Args:
        k_max: K_max.
        budget: beta.
        least: 0 where something stands for skipped experts, so that a device below one expert takes part.

    Raises:
        ValueError: if the budget is outside (0, 1].

    Source: UB-SMoE, setting; the lower bounds are ours.

    >>> [budget_top_k(8, budget) for budget in (0.1, 0.25, 0.5, 0.75, 1.0)]
    [1, 2, 4, 6, 8]
    """
    if not 0 < budget <= 1:
        raise ValueError(f"a budget must lie in (0, 1], got {budget}")
    # 0.29 * 100 is 28.999999999999996: a budget that means a whole number must get it
    return max(least, math.floor(k_max * budget + 1e-9))
