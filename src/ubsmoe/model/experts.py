"""What transformers calls in place of its own experts function: the kernel, and the signals that act around it.

Registered once as an experts implementation, it serves every family that follows that interface. Pseudo-gradients enter here, since
this is where hidden states, gate weights and experts meet.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ubsmoe.maths import pseudo_gradient as pg
from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel import run_pairs

IMPLEMENTATION = "ubsmoe"


def routed_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of its own experts function. `module.sparse` is the layer that surgery attached."""
    layer: Any = module.sparse
    y = _expert_sum(layer, ExpertWeights.of(module), hidden, top_k_index, top_k_weights)
    return y if layer.output_scale is None else y * layer.output_scale.to(y.dtype)


def _expert_sum(layer: Any, base: ExpertWeights, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """sum_{i in A(x)} w_i E_i(x), with the gradient that the layer's settings ask for."""
    lora = layer.lora
    top_k = top_k_index.shape[1]
    token = torch.arange(hidden.shape[0], device=hidden.device).repeat_interleave(top_k)
    if layer.learners is not None and torch.is_grad_enabled():
        return _partly_learning(layer, base, hidden, token, top_k_index, top_k_weights)
    settings: pg.PseudoGradient | None = layer.pseudo
    if settings is None or not torch.is_grad_enabled() or top_k == layer.num_experts:
        return run_pairs(hidden, token, top_k_index.reshape(-1), top_k_weights.reshape(-1), base, lora)

    # gate weight that each missing expert would have had: its score, in the units of this token's own gate weights
    scores = layer.scores()
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top_k_index, True)
    total = top_k_weights.sum(-1, keepdim=True)
    unit = (total / scores.gather(1, top_k_index).sum(-1, keepdim=True)).detach()
    would_be = scores * unit
    if settings.mode == "default_vector":
        y = _watched_sum(settings, layer, base, hidden, token, top_k_index, top_k_weights)
        missing = (would_be * ~chosen) @ layer.expert_means.vectors().to(would_be.dtype)
        return pg.straight_through(y, settings.strength * missing.to(y.dtype))

    rho = settings.rho(top_k, layer.num_experts, layer.k_max)
    strength = settings.strength * rho
    missing_share = ((would_be * ~chosen).sum(-1, keepdim=True) / total.detach()).to(hidden.dtype)

    inputs = hidden
    if "hidden" in settings.scope and not settings.is_exact:
        inputs = pg.scale_gradient(hidden, 1 + strength * missing_share.detach())
    y = run_pairs(inputs, token, top_k_index.reshape(-1), top_k_weights.reshape(-1), base, lora)

    if settings.is_exact:
        return pg.straight_through(y, strength * _missing_output(settings, layer, hidden, would_be, chosen, base, lora))
    if "router" in settings.scope:
        # an unseen expert is taken to answer like the mean of the active ones
        y = pg.straight_through(y, strength * missing_share * y.detach())
    if "experts" in settings.scope:
        layer.add_mass(pg.routing_mass(would_be, chosen, layer.real_tokens(), rho))
    return y


def _missing_output(
    settings: pg.PseudoGradient,
    layer: Any,
    hidden: Tensor,
    would_be: Tensor,
    chosen: Tensor,
    base: ExpertWeights,
    lora: Lora,
) -> Tensor:
    """sum over (a random fraction of) missing pairs of p_i E_i(x), with gradient only to what the scope names."""
    token, expert = pg.missing_pairs(chosen, settings.pair_fraction, layer.generator)
    weight = would_be[token, expert] / settings.pair_fraction
    return run_pairs(
        hidden if "hidden" in settings.scope else hidden.detach(),
        token,
        expert,
        weight if "router" in settings.scope else weight.detach(),
        base,
        lora if "experts" in settings.scope else lora.detached(),
    )


def _watched_sum(
    settings: pg.PseudoGradient,
    layer: Any,
    base: ExpertWeights,
    hidden: Tensor,
    token: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The layer's sum by way of each pair's own output, [P, h], which the running means of the experts need."""
    expert, weight = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    pair = torch.arange(len(token), device=token.device)
    out = run_pairs(hidden[token], pair, expert, torch.ones_like(weight), base, layer.lora)
    if layer.expert_means is None:
        layer.expert_means = pg.ExpertMeans(layer.num_experts, hidden.shape[1], settings.decay, hidden.device)
    real = layer.real_tokens()
    seen = slice(None) if real is None else real.to(token.device)[token]
    if not layer.running_again:
        layer.expert_means.update(out.detach()[seen], expert[seen])
    return torch.zeros_like(hidden).index_add(0, token, (out * weight.unsqueeze(-1)).to(hidden.dtype))


def _partly_learning(
    layer: Any, base: ExpertWeights, hidden: Tensor, token: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same output, but only the experts that the layer picks for this batch have a backward pass."""
    expert, weight = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    learns, lora = layer.learning_experts(top_k_index)[expert], layer.lora
    y = run_pairs(hidden, token[learns], expert[learns], weight[learns], base, lora)
    if learns.all():
        return y
    with torch.no_grad():
        rest = run_pairs(hidden, token[~learns], expert[~learns], weight[~learns], base, lora)
    return y + rest


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
