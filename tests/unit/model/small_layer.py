"""One real SparseLayer in float64 with frozen experts of any layout, small enough for the oracles."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import oracles
from ubsmoe.maths.pseudo_gradient import PseudoGradient, parameter_signal
from ubsmoe.model.adapter import MatrixAdapter
from ubsmoe.model.experts import routed_experts
from ubsmoe.model.layer import SparseLayer

TOKENS, EXPERTS, HIDDEN, WIDTH, RANK = 9, 6, 5, 3, 2


class Router(nn.Module):
    """Softmax over all experts, then top-k; OLMoE's rule, in the precision of its input."""

    def __init__(self, top_k: int, renormalise: bool) -> None:
        super().__init__()
        self.top_k, self.renormalise = top_k, renormalise
        self.weight = nn.Parameter(normal(EXPERTS, HIDDEN, seed=11))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight)
        weights, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True) if self.renormalise else weights, index


class SmallLayer:
    """Router, experts and a trained adapter (B not zero), with the three gradients a scope may name."""

    def __init__(self, layout: str, top_k: int, *, k_max: int = 4, renormalise: bool = False, seed: int = 0) -> None:
        self.experts = oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH)
        self.router = Router(k_max, renormalise)
        self.layer = SparseLayer(0, self.router, self.experts)
        self.factors = random_factors(self.experts, seed)
        up = MatrixAdapter(self.factors.up_a, self.factors.up_b)
        down = MatrixAdapter(self.factors.down_a, self.factors.down_b)
        self.layer.routing = replace(self.layer.routing, top_k=top_k, adapter=(up, down), lora_scale=self.factors.scale)
        object.__setattr__(self.experts, "sparse", self.layer)
        # what the router reads and what the experts read are kept apart, to see which path a gradient takes
        self.seen_by_router = normal(TOKENS, HIDDEN, seed=seed + 20).requires_grad_()
        self.seen_by_experts = self.seen_by_router.detach().clone().requires_grad_()
        self.delta = normal(TOKENS, HIDDEN, seed=seed + 30)

    @property
    def leaves(self) -> list[Tensor]:
        """Four adapter tensors, router weight, the router's input, the experts' input."""
        return [*self.factors.leaves(), self.router.weight, self.seen_by_router, self.seen_by_experts]

    def output(self, settings: PseudoGradient | None, generator: torch.Generator | None = None) -> Tensor:
        """The layer as it runs in a model."""
        self.layer.routing = replace(self.layer.routing, pseudo_gradient=settings, generator=generator)
        self.layer.take_mass()
        logits, weights, index = self.router(self.seen_by_router)
        weights = self.layer.observe(logits, weights, index)
        return routed_experts(self.experts, self.seen_by_experts, index, weights)

    def gradients(self, settings: PseudoGradient | None, generator: torch.Generator | None = None) -> list[Tensor]:
        """dL/d(leaves) with dL/dy = delta, and with what a client adds before its step."""
        y = self.output(settings, generator)
        grads = list(torch.autograd.grad(y, self.leaves, self.delta))
        if (mass := self.layer.take_mass()) is not None:
            assert settings is not None
            grads[:4] = [g + parameter_signal(settings, g, mass) for g in grads[:4]]
        return grads

    def scores(self) -> tuple[Tensor, Tensor]:
        """Probabilities [T, M] and which experts were chosen, by loops of its own."""
        p = (self.seen_by_router @ self.router.weight.T).softmax(-1)
        chosen = torch.zeros_like(p, dtype=torch.bool)
        for t, row in enumerate(p.tolist()):
            for i in sorted(range(EXPERTS), key=row.__getitem__)[-self.router.top_k :]:
                chosen[t, i] = True
        return p, chosen

    def oracle_gradients(self, weights: Tensor) -> list[Tensor]:
        """dL/d(leaves) of the mixture with these weights [T, M] over all experts, by autograd through loops."""
        y = oracles.weighted_sum(self.experts, self.factors, self.seen_by_experts, weights)
        return list(torch.autograd.grad(y, self.leaves, self.delta, retain_graph=True))


def random_factors(module: Any, seed: int = 0) -> oracles.Factors:
    """A float64 adapter without a zero factor, requiring gradients."""
    up = 1 if isinstance(module, oracles.GatelessExperts) else 2
    shapes = ((RANK, HIDDEN), (up * WIDTH, RANK), (RANK, WIDTH), (HIDDEN, RANK))
    leaves = [normal(module.num_experts, *s, seed=seed + n).requires_grad_() for n, s in enumerate(shapes)]
    return oracles.Factors(*leaves, scale=0.7)


def normal(*shape: int, seed: int) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
