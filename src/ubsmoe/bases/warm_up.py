"""What upcycling asks of data: which inner dimensions act most, and routers that use the experts evenly."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ubsmoe.maths.balance import load_balancing_loss
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.surgery import SparseModel


def warm_up(sparse: SparseModel, batches: Iterable[dict[str, Tensor]], learning_rate: float = 1e-3) -> list[float]:
    """Train the routers alone, on the balancing loss alone: while experts are alike nothing else has a gradient.

    Args:
        sparse: an upcycled model; everything but its routers stays frozen.
        batches: input_ids and attention_mask [B, S].
        learning_rate: Adam's.

    Returns:
        The loss of each step, mean over layers; 1 is perfect balance.
    """
    weights = [weight.requires_grad_(True) for layer in sparse.layers for weight in layer.router.parameters()]
    optimizer, losses = torch.optim.Adam(weights, learning_rate), []
    sparse.record()
    try:
        for batch in batches:
            inputs = _router_inputs(sparse, batch)
            loss = torch.stack([_balance(*pair) for pair in zip(sparse.layers, inputs, strict=True)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        sparse.clear()
    return losses


@torch.no_grad()
def _router_inputs(sparse: SparseModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each router sees. No router's own loss reaches another, so nothing else of the forward pass is kept."""
    seen: list[Tensor] = []
    hooks = [layer.router.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in sparse.layers]
    try:
        sparse.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _balance(layer: SparseLayer, hidden: Tensor) -> Tensor:
    layer.router(hidden)
    return load_balancing_loss(layer.scores(), layer.chosen(), layer.real_tokens())


@torch.no_grad()
def mean_activations(dense: Any, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Per layer the mean |activation| [f] of each inner dimension of a dense model's feed-forward, over real tokens.

    Args:
        dense: a Llama-shaped model.
        batches: input_ids and attention_mask [B, S]; at least one.
    """
    layers = dense.model.layers
    sums = [torch.zeros(dense.config.intermediate_size) for _ in layers]
    tokens = 0
    for batch in batches:
        real = batch["attention_mask"].bool()

        def add(total: Tensor, inner: Tensor, real: Tensor = real) -> None:
            total.add_(inner[real].float().abs().sum(0).cpu())

        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, total=total, add=add: add(total, args[0]))
            for layer, total in zip(layers, sums, strict=True)
        ]
        try:
            dense.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        tokens += int(real.sum())
    return [total / tokens for total in sums]
