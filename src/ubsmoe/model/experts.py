"""What transformers calls in place of its own experts function: the kernel, and the signals that act around it.

Registered once as an experts implementation, it serves every family that follows that interface. Pseudo-gradients enter here, since
this is where hidden states, gate weights and experts meet.

Only tokens whose output somebody reads go through experts: not padding, and in the last layer only where logits are asked for.
Every token is routed and counted all the same.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ubsmoe.maths import pseudo_gradient as pg
from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel_choice import run_assignments
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.routing import Passing

IMPLEMENTATION = "ubsmoe"

Assignments = tuple[Int[Tensor, " N"], Int[Tensor, " N"], Float[Tensor, " N"]]
"""Token, expert and gate weight of each (token, expert) assignment."""


def routed_experts(
    module: nn.Module,
    hidden: Float[Tensor, "T h"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T h"]:
    """What transformers calls in place of its own experts function. `module.sparse` is the layer that surgery attached."""
    layer = module.sparse
    assert isinstance(layer, SparseLayer)
    if layer.routing.probe:
        layer.routing.probe(_passing(layer, hidden, top_k_index, top_k_weights))
    y, scale = _expert_sum(layer, hidden, top_k_index, top_k_weights), layer.routing.output_scale
    y = y + _skipped_sum(layer, hidden) if layer.skipped is not None else y
    return y if scale is None else y * scale.to(y.dtype)


def _passing(
    layer: SparseLayer,
    hidden: Float[Tensor, "T h"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Passing:
    """What the probe sees: the tokens whose output is read."""
    considered, gates = layer.considered or (top_k_index, top_k_weights)
    skipped = hidden.new_zeros(len(hidden), layer.num_experts) if layer.skipped is None else layer.skipped
    parts, needed = (hidden, considered, gates, top_k_index, top_k_weights, skipped), layer.needed_tokens()
    return Passing(*(parts if needed is None else (part[needed.to(part.device)] for part in parts)))


def _skipped_sum(layer: SparseLayer, hidden: Float[Tensor, "T h"]) -> Float[Tensor, "T h"]:
    """C(x), what stands for the experts that were skipped, at the tokens whose output is read."""
    own, skipped, token = layer.routing.compensation, layer.skipped, layer.needed_rows()
    compensation = own.at(layer.routing.top_k) if own else None
    if compensation is None or skipped is None:
        return torch.zeros_like(hidden)
    if token is None:
        return compensation(hidden, skipped)
    return torch.zeros_like(hidden).index_copy(0, token, compensation(hidden[token], skipped[token]))


def _expert_sum(
    layer: SparseLayer,
    hidden: Float[Tensor, "T h"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T h"]:
    """sum_{i in A(x)} w_i E_i(x), with the gradient that the client's settings ask for."""
    if top_k_index.shape[1] == 0:  # K = 0: no expert is read
        return torch.zeros_like(hidden)
    (base, lora), settings = layer.run_weights(hidden), layer.routing.pseudo_gradient
    assignments = _assignments(layer.needed_rows(), top_k_index, top_k_weights)
    if layer.routing.trainable_rule is not None and torch.is_grad_enabled():
        return _partly_trainable(layer.trainable_experts(top_k_index), base, hidden, assignments, lora)
    if settings is None or not torch.is_grad_enabled() or top_k_index.shape[1] == layer.num_experts:
        return run_assignments(hidden, *assignments, base, lora)

    # gate weight that each missing expert would have had: its score, in the units of this token's own gate weights
    with torch.set_grad_enabled("router" in settings.scope):
        scores = layer.scores()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top_k_index, True)
        total = top_k_weights.sum(-1, keepdim=True)
        would_be = scores * (total / scores.gather(1, top_k_index).sum(-1, keepdim=True)).detach()
    if settings.is_exact:
        y = run_assignments(hidden, *assignments, base, lora)
        missing = _missing_output(settings, layer, hidden, would_be, ~chosen, base, lora)
        return pg.straight_through(y, settings.strength * missing)

    rho = settings.rho(top_k_index.shape[1], layer.num_experts)
    if "experts" in settings.scope:  # added to the parameters' gradients before the step
        layer.add_mass(pg.routing_mass(would_be, chosen, layer.real_tokens(), rho))
    if settings.scope == ("experts",):
        return run_assignments(hidden, *assignments, base, lora)
    missing_share = (would_be.masked_fill(chosen, 0).sum(-1, keepdim=True) / total.detach()).to(hidden.dtype)
    inputs, strength = hidden, settings.strength * rho
    if "hidden" in settings.scope:
        inputs = pg.scale_gradient(hidden, 1 + strength * missing_share.detach())
    y = run_assignments(inputs, *assignments, base, lora)
    # an unseen expert is taken to answer like the mean of the active ones
    return pg.straight_through(y, strength * missing_share * y.detach()) if "router" in settings.scope else y


def _assignments(
    token: Int[Tensor, " needed"] | None, top_k_index: Int[Tensor, "T K"], top_k_weights: Float[Tensor, "T K"]
) -> Assignments:
    """The assignments of some tokens, or of all."""
    if token is None:
        token = torch.arange(len(top_k_index), device=top_k_index.device)
    else:
        top_k_index, top_k_weights = top_k_index[token], top_k_weights[token]
    return token.repeat_interleave(top_k_index.shape[1]), top_k_index.reshape(-1), top_k_weights.reshape(-1)


def _missing_output(
    settings: pg.PseudoGradient,
    layer: SparseLayer,
    hidden: Float[Tensor, "T h"],
    would_be: Float[Tensor, "T M"],
    missing: Bool[Tensor, "T M"],
    base: ExpertWeights,
    lora: Lora,
) -> Float[Tensor, "T h"]:
    """sum over (a random fraction of) missing assignments of p_i E_i(x), with gradient only to what the scope names."""
    needed = layer.needed_tokens()
    if needed is not None:
        missing = missing & needed.to(missing.device).unsqueeze(-1)
    token, expert = pg.missing_assignments(missing, settings.pair_fraction, layer.routing.generator)
    weight = would_be[token, expert] / settings.pair_fraction
    return run_assignments(
        hidden if "hidden" in settings.scope else hidden.detach(),
        token,
        expert,
        weight if "router" in settings.scope else weight.detach(),
        base,
        lora if "experts" in settings.scope else lora.detached(),
    )


def _partly_trainable(
    trainable: Bool[Tensor, " M"],
    base: ExpertWeights,
    hidden: Float[Tensor, "T h"],
    assignments: Assignments,
    lora: Lora,
) -> Float[Tensor, "T h"]:
    """The same output, but only the experts that are `trainable` on this batch have a backward pass."""
    token, expert, weight = assignments
    kept = trainable[expert]
    y = run_assignments(hidden, token[kept], expert[kept], weight[kept], base, lora)
    if kept.all():
        return y
    with torch.no_grad():
        rest = run_assignments(hidden, token[~kept], expert[~kept], weight[~kept], base, lora)
    return y + rest


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
