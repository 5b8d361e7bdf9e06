"""What transformers calls in place of its own experts function: the kernel, and the signals that act around it.

Registered once as an experts implementation, it serves every family that follows that interface. Pseudo-gradients enter here, since
this is where hidden states, gate weights and experts meet.

Only tokens whose answer somebody reads go through experts: not padding, and in the last layer only where logits are asked for.
Every token is routed and counted all the same.
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
    lora, top_k = layer.lora, top_k_index.shape[1]
    needed = layer.needed_tokens()
    pairs = _pairs(needed, top_k_index, top_k_weights)
    if layer.trainable_rule is not None and torch.is_grad_enabled():
        return _partly_learning(layer.learning_experts(top_k_index), base, hidden, *pairs, lora)
    settings: pg.PseudoGradient | None = layer.pseudo
    if settings is None or not torch.is_grad_enabled() or top_k == layer.num_experts:
        return run_pairs(hidden, *pairs, base, lora)

    # gate weight that each missing expert would have had: its score, in the units of this token's own gate weights
    with torch.set_grad_enabled("router" in settings.scope):
        scores = layer.scores()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top_k_index, True)
        total = top_k_weights.sum(-1, keepdim=True)
        would_be = scores * (total / scores.gather(1, top_k_index).sum(-1, keepdim=True)).detach()
    if settings.mode == "default_vector":
        every_pair = _pairs(layer.real_tokens(), top_k_index, top_k_weights)
        y = _watched_sum(settings, layer, base, hidden, *every_pair)
        missing = would_be.masked_fill(chosen, 0) @ layer.expert_means.vectors().to(would_be.dtype)
        return pg.straight_through(y, settings.strength * missing.to(y.dtype))

    rho = settings.rho(top_k, layer.num_experts, layer.k_max)
    strength = settings.strength * rho
    if settings.is_exact:
        missing = ~chosen if needed is None else ~chosen & needed.to(chosen.device).unsqueeze(-1)
        y = run_pairs(hidden, *pairs, base, lora)
        return pg.straight_through(
            y, strength * _missing_output(settings, layer, hidden, would_be, missing, base, lora)
        )

    if "experts" in settings.scope:
        layer.add_mass(pg.routing_mass(would_be, chosen, layer.real_tokens(), rho))
    if settings.scope == ("experts",):
        return run_pairs(hidden, *pairs, base, lora)
    missing_share = (would_be.masked_fill(chosen, 0).sum(-1, keepdim=True) / total.detach()).to(hidden.dtype)
    inputs = hidden
    if "hidden" in settings.scope:
        inputs = pg.scale_gradient(hidden, 1 + strength * missing_share.detach())
    y = run_pairs(inputs, *pairs, base, lora)
    # an unseen expert is taken to answer like the mean of the active ones
    return pg.straight_through(y, strength * missing_share * y.detach()) if "router" in settings.scope else y


def _pairs(needed: Tensor | None, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and gate weight [P] of each pair of the tokens that are `needed`."""
    if needed is None:
        token = torch.arange(len(top_k_index), device=top_k_index.device)
    else:
        (token,) = needed.to(top_k_index.device).nonzero(as_tuple=True)
        top_k_index, top_k_weights = top_k_index[token], top_k_weights[token]
    return token.repeat_interleave(top_k_index.shape[1]), top_k_index.reshape(-1), top_k_weights.reshape(-1)


def _missing_output(
    settings: pg.PseudoGradient,
    layer: Any,
    hidden: Tensor,
    would_be: Tensor,
    missing: Tensor,
    base: ExpertWeights,
    lora: Lora,
) -> Tensor:
    """sum over (a random fraction of) missing pairs of p_i E_i(x), with gradient only to what the scope names."""
    token, expert = pg.missing_pairs(missing, settings.pair_fraction, layer.generator)
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
    expert: Tensor,
    weight: Tensor,
) -> Tensor:
    """The layer's sum by way of each pair's own output, [P, h], which the running means of the experts need."""
    pair = torch.arange(len(token), device=token.device)
    out = run_pairs(hidden[token], pair, expert, torch.ones_like(weight), base, layer.lora)
    if layer.expert_means is None:
        layer.expert_means = pg.ExpertMeans(layer.num_experts, hidden.shape[1], settings.decay, hidden.device)
    if not layer.recomputing:
        layer.expert_means.update(out.detach(), expert)
    return torch.zeros_like(hidden).index_add(0, token, (out * weight.unsqueeze(-1)).to(hidden.dtype))


def _partly_learning(
    learning: Tensor,
    base: ExpertWeights,
    hidden: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    lora: Lora,
) -> Tensor:
    """The same output, but only the experts that are `learning` [M] from this batch have a backward pass."""
    learns = learning[expert]
    y = run_pairs(hidden, token[learns], expert[learns], weight[learns], base, lora)
    if learns.all():
        return y
    with torch.no_grad():
        rest = run_pairs(hidden, token[~learns], expert[~learns], weight[~learns], base, lora)
    return y + rest


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
