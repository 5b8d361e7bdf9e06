"""One SMoE layer under surgery: what a client has set on it, what was seen of its tokens, and the router that obeys it.

A router keeps its object and gets a subclass of its own class: its logits are shifted by phi, its choice is counted and its
weights are rescaled on the way out.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ubsmoe.maths.pseudo_gradient import Mass
from ubsmoe.maths.routing import mass_ratio, modulate
from ubsmoe.model.attention import AttentionLora
from ubsmoe.model.conventions import LinearMaps, observe_router
from ubsmoe.model.expert_weights import ExpertWeights, Lora, up_name
from ubsmoe.model.routing import Observed, Rescale, Routing
from ubsmoe.model.slices import Slices


class SparseLayer:
    """One SMoE layer seen by us.

    Attributes:
        index: its number among the SMoE layers.
        router, experts, attention: its parts in the transformers model.
        k_max: experts per token at budget 1.
        rescale: what the output's scale at K < K_max is; a property of the run, not of a client.
        routing: what the current client has set.
        observed: what was seen since.
        counting: whether routed tokens are counted.
        recomputing: this forward pass repeats an earlier one for gradient checkpointing, so nothing is observed a second time.
        considered: T(x) and its gate weights, handed from the router to the experts within a forward pass.
        skipped: gate weights of the experts of T(x) that are not run, likewise.
    """

    considered: tuple[Int[Tensor, "T k_max"], Float[Tensor, "T k_max"]] | None
    skipped: Float[Tensor, "T M"] | None

    def __init__(
        self, index: int, router: nn.Module, experts: nn.Module, projections: Mapping[str, nn.Linear] | None = None
    ) -> None:
        self.index, self.router, self.experts = index, router, experts
        self.attention = AttentionLora(projections or {})
        self.num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        self.k_max = int(router.top_k)  # type: ignore[arg-type]
        self.convention = observe_router(router, self.num_experts)
        self.rescale: Rescale = "none"
        self.counting = self.recomputing = False
        self.clear()

    def clear(self) -> None:
        """Forget the client: stock budget, no modulation, no adapter, no counts."""
        self.attention.clear()
        self.routing = Routing(top_k=self.k_max, num_candidates=self.num_experts)
        self.observed = Observed(torch.zeros(self.num_experts, dtype=torch.int64))

    @property
    def routing(self) -> Routing:
        """What the current client has set."""
        return self._routing

    @routing.setter
    def routing(self, value: Routing) -> None:
        self._routing = value
        # the stock forward of every family reads K from here
        self.router.top_k = self.k_max if self.routes_at_k_max else value.top_k  # type: ignore[assignment]
        self.considered = self.skipped = None

    @property
    def routes_at_k_max(self) -> bool:
        """Whether the router answers as at K_max and the best K are taken from its answer."""
        return self.routing.compensation is not None or self.rescale == "k_max"

    @property
    def least_top_k(self) -> int:
        """The smallest K: none at all where something stands for skipped experts."""
        return int(self.routing.compensation is None)

    @property
    def is_sliced(self) -> bool:
        """Whether n K experts run, each at 1 / n of its width, instead of K: where T(x) has that many."""
        own = self.routing.compensation
        return own is not None and own.channels is not None and 0 < self.routing.top_k * own.slices <= self.k_max

    @property
    def num_run(self) -> int:
        """Experts per token that run, whole or in slices."""
        own = self.routing.compensation
        return self.routing.top_k * (own.slices if own and self.is_sliced else 1)

    @property
    def lora(self) -> Lora | None:
        """The adapter as the kernel takes it: one pair of factors per matrix, put together anew for each forward pass."""
        if self.routing.adapter is None:
            return None
        up, down = self.routing.adapter
        return Lora(*up.joined(), *down.joined(), self.routing.lora_scale)

    def whole_weights(self, like: Float[Tensor, "T h"]) -> tuple[ExpertWeights, Lora]:
        """The same, whole. Without an adapter a quantised base runs here, and one that is compensated."""
        base = ExpertWeights.of(self.experts)
        return base, self.lora or Lora.absent(base, like)

    def run_weights(self, like: Float[Tensor, "T h"]) -> tuple[ExpertWeights, Lora]:
        """What the kernel multiplies tokens such as these with: the experts and the adapter, whole or in slices."""
        base, lora = self.whole_weights(like)
        own = self.routing.compensation
        if not self.is_sliced or own is None or own.channels is None:
            return base, lora
        slices = Slices.of(base, own.channels)
        return slices.weights, slices.lora(lora)

    def shift(self, hidden: Float[Tensor, "T h"], logits: Float[Tensor, "T M"]) -> Float[Tensor, "T M"]:
        """The router's logits as this client sees them: plus a trained difference of the router, plus phi on the candidates."""
        if (delta := self.routing.router_delta) is not None:
            logits = logits + nn.functional.linear(hidden.to(logits.dtype), delta.to(logits.dtype))
        if self.routing.phi is not None:
            logits = modulate(logits, self.routing.phi, self.routing.num_candidates)
        return logits

    def choose(
        self, logits: Float[Tensor, "T M"], weights: Float[Tensor, "T K"], index: Int[Tensor, "T K"]
    ) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """The router's weights and choice; with a selection bias, the K best of score plus bias, weighed by score."""
        if self.routing.selection_bias is None:
            return weights, index
        scores = self._score(logits)
        chosen = (scores + self.routing.selection_bias).topk(index.shape[1], dim=-1).indices
        kept, total = scores.gather(-1, chosen), weights.sum(-1, keepdim=True).detach()
        # the family's own unit: what its weights sum to, or what it multiplies a score by
        if self.convention.renormalises:
            unit = total / kept.sum(-1, keepdim=True)
        else:
            unit = total / scores.gather(-1, index).sum(-1, keepdim=True).detach()
        return (kept * unit).to(weights.dtype), chosen

    def keep_best(
        self, logits: Float[Tensor, "T M"], weights: Float[Tensor, "T k_max"], index: Int[Tensor, "T k_max"]
    ) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """Of T(x) the experts that run, those of the largest gate weight, weighed as at K_max; the others' weights are kept."""
        self.considered = index, weights
        if self.num_run == index.shape[1] and not self.is_sliced:
            self.skipped = None
            return weights, index
        by = weights
        if self.routing.selection_bias is not None:
            by = (self._score(logits) + self.routing.selection_bias).gather(-1, index)
        best = by.detach().topk(self.num_run, dim=-1).indices
        kept, kept_weights = index.gather(-1, best), weights.gather(-1, best)
        self.skipped = torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, index, weights)
        if not self.is_sliced:
            self.skipped = self.skipped.scatter(-1, kept, torch.zeros_like(kept_weights))
        return kept_weights, kept

    def observe(
        self, logits: Float[Tensor, "T M"], weights: Float[Tensor, "T K"], index: Int[Tensor, "T K"]
    ) -> Float[Tensor, "T K"]:
        """Count a routing decision and give the weights the scale of the budget."""
        if not self.recomputing:
            kept = self.routing.recording or self.routing.pseudo_gradient is not None
            self.observed = replace(
                self.observed,
                logits=logits if kept else None,
                chosen=index if kept else None,
                expert_tokens=self.observed.expert_tokens + (self._count(index) if self.counting else 0),
            )
        by_mass = self.rescale == "mass" and self.routing.compensation is None
        if not by_mass or self.convention.renormalises or index.shape[1] == self.k_max:
            return weights
        return weights * mass_ratio(self._score(logits), self.k_max, index).to(weights.dtype)

    def scores(self) -> Float[Tensor, "T M"]:
        """Scores of the last forward pass, with their graph; kept while recording or under a pseudo-gradient."""
        assert self.observed.logits is not None
        return self._score(self.observed.logits)

    def chosen(self) -> Int[Tensor, "T K"]:
        """The experts of each token in the last forward pass; kept as long as `scores` are."""
        assert self.observed.chosen is not None
        return self.observed.chosen

    def real_tokens(self) -> Bool[Tensor, " T"] | None:
        """False on padding; None when nothing is padded."""
        mask = self.observed.attention_mask
        return None if mask is None else mask.reshape(-1).bool()

    def needed_tokens(self) -> Bool[Tensor, " T"] | None:
        """The tokens whose experts' output is read: the real ones, or only some of them (`Observed.read`); None for all."""
        read = self.observed.read
        return self.real_tokens() if read is None else read.reshape(-1)

    def needed_rows(self) -> Int[Tensor, " needed"] | None:
        """The positions of `needed_tokens`, found once for all layers of a batch: an accelerator's host waits for them."""
        needed, rows = self.needed_tokens(), self.observed.rows
        if needed is None:
            return None
        return needed.nonzero().squeeze(1) if rows is None else rows

    def add_mass(self, mass: Mass) -> None:
        """Accumulate routing mass over the micro-batches of a step."""
        if not self.recomputing:
            before = self.observed.mass
            self.observed = replace(self.observed, mass=mass if before is None else before + mass)

    def take_mass(self) -> Mass | None:
        """The routing mass since it was last taken; None if there was none. The next step starts anew."""
        mass, self.observed = self.observed.mass, replace(self.observed, mass=None)
        return mass

    def trainable_experts(self, index: Int[Tensor, "T K"]) -> Bool[Tensor, " M"]:
        """The experts that are trained on this batch, by the method's rule."""
        if not self.recomputing:
            assert self.routing.trainable_rule is not None
            with torch.no_grad():
                trainable = self.routing.trainable_rule(self.scores(), index, self.real_tokens())
            self.observed = replace(self.observed, trainable_experts=trainable)
        assert self.observed.trainable_experts is not None
        return self.observed.trainable_experts

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the two expert matrices, whatever way they are stored."""
        found = {}
        for name, stored in (("up", up_name(self.experts)), ("down", "down_proj")):
            _, rows, columns = getattr(self.experts, stored).shape
            found[name] = (columns, rows) if self.experts.is_transposed else (rows, columns)
        return found

    def matrices(self, attention: bool) -> dict[str, tuple[int, int, int]]:
        """(M, out, in) of what an adapter can sit on: "up", "down", and with `attention` "attention.q_proj" and so on.

        Raises:
            UnsupportedModel: if `attention` is asked for and there is none.
        """
        found = {name: (self.num_experts, *shape) for name, shape in self.shapes().items()}
        if attention:
            found |= {f"attention.{name}": (1, *shape) for name, shape in self.attention.shapes().items()}
        return found

    def _score(self, logits: Float[Tensor, "T M"]) -> Float[Tensor, "T M"]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.softmax(-1) if self.convention.scoring == "softmax" else logits.sigmoid()

    def _count(self, index: Int[Tensor, "T K"]) -> Int[Tensor, " M"]:
        real, counts = self.real_tokens(), torch.zeros(self.num_experts, dtype=torch.int64, device=index.device)
        each = torch.ones_like(index) if real is None else real.to(index).unsqueeze(1).expand_as(index)
        return counts.index_add_(0, index.reshape(-1), each.reshape(-1))


class _BudgetedRouter:
    """Mixed in front of a router's own class, so that `isinstance` and recorded outputs keep working."""

    sparse: SparseLayer

    def forward(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "T M"], Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        layer = self.sparse

        def shifted(name: str, hidden: Float[Tensor, "*T h"], out: Float[Tensor, "*T M"]) -> Float[Tensor, "*T M"]:
            return layer.shift(hidden, out) if name == layer.convention.weight else out

        if layer.routing.phi is None and layer.routing.router_delta is None:
            logits, weights, index = super().forward(*args, **kwargs)  # type: ignore[misc]
        else:
            with LinearMaps(layer.router, shifted):
                logits, weights, index = super().forward(*args, **kwargs)  # type: ignore[misc]
        weights, index = layer.choose(logits, weights, index)
        if layer.routes_at_k_max:
            weights, index = layer.keep_best(logits, weights, index)
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
