"""One SMoE layer under surgery: what a client has set on it, and the router that obeys it.

A router keeps its object and gets a subclass of its own class: its logits are shifted by phi, its choice is counted and its
weights rescaled on the way out.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ubsmoe.maths import routing
from ubsmoe.maths.pseudo_gradient import ExpertMeans, Mass, PseudoGradient
from ubsmoe.model.adapter import MatrixAdapter
from ubsmoe.model.attention import AttentionLora
from ubsmoe.model.conventions import observe_router
from ubsmoe.model.expert_weights import Lora, up_name

Rescale = Literal["none", "ratio", "mass"]

TrainableRule = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Scores [T, M], chosen experts [T, K] and real tokens [T] of a batch -> [M] bool, the experts that learn from it."""


class SparseLayer:
    """One SMoE layer seen by us: its router, its experts, its attention, and what the current client has set on them."""

    def __init__(
        self, index: int, router: nn.Module, experts: nn.Module, projections: Mapping[str, nn.Linear] | None = None
    ) -> None:
        self.index, self.router, self.experts = index, router, experts
        self.attention = AttentionLora(projections or {})
        self.num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        self.k_max = int(router.top_k)  # type: ignore[arg-type]
        self.convention = observe_router(router, self.num_experts)
        self.rescale: Rescale = "none"
        self.counting = False
        self.recomputing = False  # for its numbers alone (recompute.py): what happens on the side has happened
        self.attention_mask: Tensor | None = None
        self.read: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the client: stock budget, no modulation, no adapter, no counts."""
        self.top_k = self.k_max
        self.phi: Tensor | None = None
        self.num_candidates = self.num_experts
        self.adapter: tuple[MatrixAdapter, MatrixAdapter] | None = None
        self.attention.clear()
        self.lora_scale = 1.0
        self.router_delta: Tensor | None = None
        self.pseudo: PseudoGradient | None = None
        self.generator: torch.Generator | None = None
        self.recording = False
        self.logits: Tensor | None = None
        self.chosen: Tensor | None = None
        self.selection_bias: Tensor | None = None
        self.output_scale: Tensor | None = None
        self.trainable_rule: TrainableRule | None = None
        self.learning: Tensor | None = None
        self.expert_means: ExpertMeans | None = None
        self.expert_tokens = torch.zeros(self.num_experts, dtype=torch.int64)
        self.mass: Mass | None = None

    @property
    def lora(self) -> Lora | None:
        """The adapter as the kernel takes it: one pair of factors per matrix, put together anew for each forward."""
        if self.adapter is None:
            return None
        up, down = self.adapter
        return Lora(*up.joined(), *down.joined(), self.lora_scale)

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.router.top_k)  # type: ignore[arg-type]

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.router.top_k = value  # type: ignore[assignment]

    def shift(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The router's logits as this client sees them: plus a trained difference of the router, plus phi on the candidates."""
        if self.router_delta is not None:
            logits = logits + nn.functional.linear(hidden.to(logits.dtype), self.router_delta.to(logits.dtype))
        if self.phi is not None:
            logits = routing.modulate(logits, self.phi, self.num_candidates)
        return logits

    def choose(self, logits: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The router's weights and choice; with a selection bias, the K best of score plus bias, weighed by score."""
        if self.selection_bias is None:
            return weights, index
        scores = self._score(logits)
        chosen = (scores + self.selection_bias).topk(index.shape[1], dim=-1).indices
        kept, total = scores.gather(-1, chosen), weights.sum(-1, keepdim=True).detach()
        # the family's own unit: what its weights sum to, or what it multiplies a score by
        if self.convention.renormalises:
            unit = total / kept.sum(-1, keepdim=True)
        else:
            unit = total / scores.gather(-1, index).sum(-1, keepdim=True).detach()
        return (kept * unit).to(weights.dtype), chosen

    def observe(self, logits: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Count a routing decision and give the weights the scale of the budget."""
        if not self.recomputing:
            kept = self.recording or self.pseudo is not None
            self.logits, self.chosen = (logits, index) if kept else (None, None)
            if self.counting:
                self.expert_tokens += self._count(index).cpu()
        if self.rescale == "none" or self.convention.renormalises or index.shape[1] == self.k_max:
            return weights
        if self.rescale == "ratio":
            return weights * (self.k_max / index.shape[1])
        return weights * routing.mass_ratio(self._score(logits), self.k_max, index).to(weights.dtype)

    def scores(self) -> Tensor:
        """Scores [T, M] of the last forward pass, with their graph; kept while recording or under a pseudo-gradient."""
        assert self.logits is not None
        return self._score(self.logits)

    def real_tokens(self) -> Tensor | None:
        """[T] bool, False on padding; None when nothing is padded."""
        return None if self.attention_mask is None else self.attention_mask.reshape(-1).bool()

    def needed_tokens(self) -> Tensor | None:
        """[T] bool, the tokens whose experts' answer is read: the real ones, or of them those of `read`; None for all."""
        return self.real_tokens() if self.read is None else self.read.reshape(-1)

    def add_mass(self, mass: Mass) -> None:
        """Accumulate routing mass over the micro-batches of a step."""
        if not self.recomputing:
            self.mass = mass if self.mass is None else self.mass + mass

    def matrices(self, attention: bool) -> dict[str, tuple[int, int, int]]:
        """(M, out, in) of what an adapter can sit on: "up", "down", and with `attention` "attention.q_proj" and so on.

        Raises:
            UnsupportedModel: if `attention` is asked for and there is none.
        """
        found = {name: (self.num_experts, *shape) for name, shape in self.shapes().items()}
        if attention:
            found |= {f"attention.{name}": (1, *shape) for name, shape in self.attention.shapes().items()}
        return found

    def learning_experts(self, index: Tensor) -> Tensor:
        """[M] bool: who learns from this batch, by the method's rule."""
        if not self.recomputing:
            assert self.trainable_rule is not None
            with torch.no_grad():
                self.learning = self.trainable_rule(self.scores(), index, self.real_tokens())
        assert self.learning is not None
        return self.learning

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the two expert matrices, whatever way they are stored."""
        found = {}
        for name, stored in (("up", up_name(self.experts)), ("down", "down_proj")):
            _, rows, columns = getattr(self.experts, stored).shape
            found[name] = (columns, rows) if self.experts.is_transposed else (rows, columns)
        return found

    def _score(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.softmax(-1) if self.convention.scoring == "softmax" else logits.sigmoid()

    def _count(self, index: Tensor) -> Tensor:
        real = self.real_tokens()
        if real is not None:
            index = index[real.to(index.device)]
        return torch.bincount(index.reshape(-1), minlength=self.num_experts)


class _Shift(TorchFunctionMode):
    """Inside a router's forward: shift the result of the one linear map that gives a logit per expert."""

    def __init__(self, layer: SparseLayer) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == self.layer.num_experts:
            return self.layer.shift(args[0], out)
        return out


class _BudgetedRouter:
    """Mixed in front of a router's own class, so that `isinstance` and recorded outputs keep working."""

    sparse: SparseLayer

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.sparse
        if layer.phi is None and layer.router_delta is None:
            logits, weights, index = super().forward(*args, **kwargs)  # type: ignore[misc]
        else:
            with _Shift(layer):
                logits, weights, index = super().forward(*args, **kwargs)  # type: ignore[misc]
        weights, index = layer.choose(logits, weights, index)
        return logits, layer.observe(logits, weights, index), index


def attach(layer: SparseLayer) -> None:
    """Let the layer's router and experts know it."""
    router = layer.router
    router.__class__ = type(f"Budgeted{type(router).__name__}", (_BudgetedRouter, type(router)), {})
    # plain objects: nothing of ours may enter the module tree or the state dict
    object.__setattr__(router, "sparse", layer)
    object.__setattr__(layer.experts, "sparse", layer)


def is_attached(router: nn.Module) -> bool:
    """Whether the router already obeys some layer."""
    return isinstance(router, _BudgetedRouter)
