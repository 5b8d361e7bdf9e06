"""What a client has set on an SMoE layer, and what was seen of its tokens: two frozen values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ubsmoe.maths.pseudo_gradient import Mass, PseudoGradient
from ubsmoe.model.adapter import MatrixAdapter
from ubsmoe.model.compensation import LayerCompensation

Rescale = Literal["none", "mass", "k_max"]

TrainableRule = Callable[
    [Float[Tensor, "T M"], Int[Tensor, "T K"], Bool[Tensor, " T"] | None],
    Bool[Tensor, " M"],
]
"""Scores, chosen experts and real tokens of a batch -> the experts that are trained on it."""


@dataclass(frozen=True)
class Passing:
    """What goes through one layer's experts: T(x) with its gate weights, A(x) likewise, and the weights of what is skipped."""

    hidden: Float[Tensor, "T h"]
    considered: Int[Tensor, "T k_max"]
    gates: Float[Tensor, "T k_max"]
    run: Int[Tensor, "T K"]
    run_gates: Float[Tensor, "T K"]
    skipped: Float[Tensor, "T M"]


Probe = Callable[[Passing], None]


@dataclass(frozen=True)
class Routing:
    """What the current client has set on a layer. To change it, put a `dataclasses.replace` of it in its place.

    Attributes:
        top_k: K, experts per token.
        num_candidates: N_p, the number of best experts of a token that phi may move.
        phi: shift of the logits.
        adapter: what is put on the up and on the down matrix.
        lora_scale: alpha / rank.
        router_delta: trained difference of the router's weight.
        selection_bias: added to the scores for the choice alone.
        output_scale: factor on the sum over the routed experts.
        pseudo_gradient: None if it is off.
        generator: draws the assignments of the `sampled` pseudo-gradient.
        trainable_rule: which experts are trained on a batch; None for all.
        recording: keep the logits and the choice of every forward pass.
        compensation: what stands for the experts of T(x) that are skipped; gate weights are then those of K_max.
        probe: sees what goes through the experts.
    """

    top_k: int
    num_candidates: int
    phi: Float[Tensor, " M"] | None = None
    adapter: tuple[MatrixAdapter, MatrixAdapter] | None = None
    lora_scale: float = 1.0
    router_delta: Float[Tensor, "M h"] | None = None
    selection_bias: Float[Tensor, " M"] | None = None
    output_scale: Float[Tensor, ""] | None = None
    pseudo_gradient: PseudoGradient | None = None
    generator: torch.Generator | None = None
    trainable_rule: TrainableRule | None = None
    recording: bool = False
    compensation: LayerCompensation | None = None
    probe: Probe | None = None


@dataclass(frozen=True)
class Observed:
    """What a layer has seen of the current client's tokens.

    Attributes:
        expert_tokens: real tokens routed to each expert since counting began.
        mass: routing mass of the micro-batches since it was last taken.
        attention_mask: of the last batch, 0 on padding; None if nothing is padded.
        read: positions of the last batch whose experts' output is read; None for all real ones.
        rows: the tokens of the last batch, counted through, whose experts' output is read; None for all.
        logits: of the last forward pass, with their graph; kept while recording or under a pseudo-gradient.
        chosen: experts of each token in that pass.
        trainable_experts: those that the rule chose for the last batch.
    """

    expert_tokens: Int[Tensor, " M"]
    mass: Mass | None = None
    attention_mask: Shaped[Tensor, "B S"] | None = None
    read: Bool[Tensor, "B S"] | None = None
    rows: Int[Tensor, " needed"] | None = None
    logits: Float[Tensor, "T M"] | None = None
    chosen: Int[Tensor, "T K"] | None = None
    trainable_experts: Bool[Tensor, " M"] | None = None


def positions(mask: Shaped[Tensor, "B S"] | None) -> Int[Tensor, " marked"] | None:
    """Where a mask of a batch is not 0, its tokens counted through; None without a mask."""
    return None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
