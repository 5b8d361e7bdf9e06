"""The Universal Pseudo-Gradient: a learning signal for the experts a token did not use.

    delta     dL/dy at the layer's output        J_i(x)  dE_i(x)/dTheta_i
    p_i(x)    gate weight expert i had or would have had (the router's score in the base's own units)
    A(x)      the K experts of token x           rho     the client's sparsity, larger for smaller K

Top-K gives expert i nothing from tokens with i not in A(x); missing is g_i = sum_{x: i not in A(x)} p_i(x) J_i(x)^T delta(x).
The paper says that a signal is rebuilt from the router's probabilities and the active experts' true gradients, scaled by the
sparsity; its exact expression is not public. Every mode below is therefore a reconstruction of ours, except `oracle`, which is
the definition. They are written with sums over tokens ("mass"), so that each is exact where its assumption holds:

    client_mean  rho * missing_i * mean_j g_j / active_j      if J_i^T delta were one and the same for all experts
    self_ipw     rho * missing_i / active_i * g_i             if J_i^T delta did not vary over tokens
    server       rho * missing_i / (missing_i + active_i) * G_i, G_i the other clients' update of i, at the active experts' scale
    sampled      g_i from a random fraction q of the missing pairs, times 1/q: unbiased
    oracle       g_i itself
    default_vector  nothing for the experts, but for the router what they would have answered on average (`ExpertMeans`)

Source: UB-SMoE (arXiv 2605.16690), PG; the modes and the two knobs (strength, scope) are this project's.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mode = Literal["off", "client_mean", "self_ipw", "server", "sampled", "oracle", "default_vector"]
Scope = Literal["experts", "router", "hidden"]
Sparsity = Literal["experts", "k_max", "inverse"]


@dataclass(frozen=True)
class PseudoGradient:
    """Which signal, how strong, and where it acts.

    `scope` names what receives it: the experts' parameters (the paper's reading), the router, the hidden state (with the last
    two the layer becomes a dense straight-through estimator). `fraction` is q of `sampled`; `limit` bounds the ratio of
    `self_ipw` and the `inverse` sparsity; `decay` is how slowly the means of `default_vector` forget.

    Raises:
        ValueError: for an unknown mode or scope, or numbers out of range.
    """

    mode: Mode = "client_mean"
    strength: float = 0.3
    scope: tuple[Scope, ...] = ("experts",)
    sparsity: Sparsity = "experts"
    fraction: float = 0.1
    limit: float = 10.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        for name, value, known in (
            ("pg_mode", self.mode, get_args(Mode)),
            ("pg_sparsity", self.sparsity, get_args(Sparsity)),
            *(("pg_scope", part, get_args(Scope)) for part in self.scope),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"pg_fraction must lie in (0, 1], got {self.fraction}")
        if self.strength < 0 or self.limit <= 0:
            raise ValueError(f"pg_strength must be >= 0 and pg_limit > 0, got {self.strength} and {self.limit}")
        if not self.scope:
            raise ValueError("pg_scope must name at least one of experts, router, hidden; 'off' is a pg_mode")
        if not 0 <= self.decay < 1:
            raise ValueError(f"pg_decay must lie in [0, 1), got {self.decay}")
        if self.mode == "default_vector" and set(self.scope) != {"router"}:
            raise ValueError("pg_mode 'default_vector' teaches the router and nobody else: pg_scope must be ['router']")
        if self.mode == "server" and set(self.scope) != {"experts"}:
            raise ValueError(
                "pg_mode 'server' sends updates of experts and knows no token: pg_scope must be ['experts']"
            )

    @property
    def is_exact(self) -> bool:
        """Whether the mode runs missing experts (and so costs compute)."""
        return self.mode in ("sampled", "oracle")

    @property
    def pair_fraction(self) -> float:
        """Share of the missing (token, expert) pairs that are computed: what costs.py charges for."""
        return {"sampled": self.fraction, "oracle": 1.0}.get(self.mode, 0.0) if self.strength > 0 else 0.0

    def rho(self, top_k: int, num_experts: int, k_max: int) -> float:
        """The client's sparsity rho_c: 1 - K/M, or 1 - K/K_max, or M/K clipped. Modes that add outputs need none."""
        if self.is_exact or self.mode == "default_vector":
            return 1.0
        choices = {
            "experts": 1 - top_k / num_experts,
            "k_max": 1 - top_k / k_max,
            "inverse": min(num_experts / top_k, self.limit),
        }
        return choices[self.sparsity]


@dataclass
class Mass:
    """Gate weight of each expert summed over tokens: those that used it, those that did not, and rho times the latter.

    `scaled_missing` is kept apart since rho belongs in front of a clipped or bounded ratio, not inside it.
    """

    active: Float[Tensor, " M"]
    missing: Float[Tensor, " M"]
    scaled_missing: Float[Tensor, " M"]

    def __add__(self, other: "Mass") -> "Mass":
        """The masses of two batches together."""
        return Mass(
            self.active + other.active, self.missing + other.missing, self.scaled_missing + other.scaled_missing
        )


@torch.no_grad()
def routing_mass(
    weights: Float[Tensor, "T M"], chosen: Bool[Tensor, "T M"], real: Bool[Tensor, " T"] | None = None, rho: float = 1.0
) -> Mass:
    """Sum gate weights over tokens, active and missing pairs apart; padding (`real` False) counts nothing."""
    if real is not None:
        weights = weights * real.unsqueeze(-1)
    missing = weights.masked_fill(chosen, 0)
    active, missing = (weights - missing).sum(0), missing.sum(0)
    return Mass(active, missing, scaled_missing=rho * missing)


def client_mean(grads: Float[Tensor, "M *S"], mass: Mass, into: Tensor | None = None) -> Float[Tensor, "M *S"]:
    """Give rho missing_i times the mean, over experts that were active, of gradient per unit of mass.

    It points the same way for every expert, so it needs experts that share one A at the start: with B = 0 the gradients of
    different B_i are then comparable; with unrelated A's the mean is orthogonal to what is missing.
    """
    return _add_outer(_start(into, grads), mass.scaled_missing, _per_mass(grads, mass))


def self_ipw(
    grads: Float[Tensor, "M *S"], mass: Mass, limit: float, into: Tensor | None = None
) -> Float[Tensor, "M *S"]:
    """Each expert's own gradient times rho min(missing_i / active_i, limit); `client_mean` if it was never active."""
    never, into = mass.active <= 0, _start(into, grads)
    mean = _per_mass(grads, mass) if never.any() else None
    tiny = torch.finfo(mass.active.dtype).tiny
    ratio = mass.scaled_missing / torch.maximum(mass.active, mass.missing / limit).clamp_min(tiny)
    into.addcmul_(_like(ratio.masked_fill(never, 0), grads), grads)
    return into if mean is None else _add_outer(into, mass.scaled_missing * never, mean)


def unit_rows(global_update: Float[Tensor, "M *S"]) -> Float[Tensor, "M *S"]:
    """Each expert's update at length 1; zero for one that nobody changed."""
    length = global_update.flatten(1).norm(dim=1)
    return global_update / _like(torch.where(length > 0, length, torch.inf), global_update)


def server(
    grads: Float[Tensor, "M *S"], mass: Mass, direction: Float[Tensor, "M *S"], into: Tensor | None = None
) -> Float[Tensor, "M *S"]:
    """Minus the server's mean update of an expert, times rho, the share missed and the active experts' gradient norm.

    An update is a sum of optimiser steps, not a gradient: its `direction` is kept (`unit_rows`, once a round) and its length is
    not, since as it stands it acts as a momentum and diverges.
    """
    used, into = mass.active > 0, _start(into, grads)
    scale = grads.flatten(1).norm(dim=1)[used].sum() / used.sum().clamp_min(1)
    share = mass.scaled_missing / (mass.missing + mass.active).clamp_min(torch.finfo(mass.active.dtype).tiny)
    return into.addcmul_(_like(-share * scale, grads), direction)


def parameter_signal(
    settings: PseudoGradient,
    grads: Float[Tensor, "M *S"],
    mass: Mass,
    direction: Tensor | None = None,
    into: Tensor | None = None,
) -> Float[Tensor, "M *S"]:
    """The signal that a mode without extra expert computation adds to the gradient of one fused tensor.

    `direction` is what `server` needs. The signal is added in place to `into`, which may be `grads` itself: a step then costs two
    or three passes over the gradients.
    """
    mass = replace(mass, scaled_missing=settings.strength * mass.scaled_missing)  # every mode is linear in it
    if settings.mode == "client_mean":
        return client_mean(grads, mass, into)
    if settings.mode == "self_ipw":
        return self_ipw(grads, mass, settings.limit, into)
    assert settings.mode == "server", settings.mode
    return server(grads, mass, torch.zeros_like(grads) if direction is None else direction, into)


def _per_mass(grads: Tensor, mass: Mass) -> Tensor:
    """Gradient per unit of mass, its mean over the experts that were active, [S] flat; theirs alone is not zero."""
    used = mass.active > 0
    share = torch.where(used, mass.active, torch.inf).reciprocal() / used.sum().clamp_min(1)
    return share.to(grads.dtype) @ grads.flatten(1)


def _start(into: Tensor | None, grads: Tensor) -> Tensor:
    return torch.zeros_like(grads) if into is None else into


def _add_outer(into: Tensor, per_expert: Tensor, direction: Tensor) -> Tensor:
    return into.addcmul_(_like(per_expert, into), direction.view(into.shape[1:]))


class ExpertMeans:
    """Default MoE's vectors: what each expert has answered on average, forgetting the past by `decay` a batch.

        E_i <- mean of E_i(x) over the batch's tokens that used expert i, smoothed as Adam's moments are, bias correction
        included; an expert without a token keeps its vector, and is zero until its first

    Only the gradient uses them: y = y_sparse + y_def - sg(y_def), y_def = sum_{i not in A} p_i E_i, so that inference
    is unchanged; Default MoE adds y_def to the output. Constant vectors leave the experts' parameters without a signal;
    the weights p_i pass it to the router, trained or not, and through it to the hidden state. The E_i are the client's
    own and start anew every round: averaging them over clients, M h numbers per layer, is left out.

    Source: Default MoE (arXiv 2504.12463).

    >>> means = ExpertMeans(num_experts=2, width=1, decay=0.5)
    >>> means.update(outputs=torch.tensor([[1.0], [3.0]]), expert=torch.tensor([1, 1]))
    >>> means.update(outputs=torch.tensor([[5.0]]), expert=torch.tensor([1]))
    >>> means.vectors()  # (0.25 * 2 + 0.5 * 5) / (0.25 + 0.5)
    tensor([[0.],
            [4.]])
    """

    def __init__(self, num_experts: int, width: int, decay: float, device: torch.device | None = None) -> None:
        self.decay = decay
        self._sums = torch.zeros(num_experts, width, device=device)
        self._weights = torch.zeros(num_experts, 1, device=device)

    @torch.no_grad()
    def update(self, outputs: Float[Tensor, "P h"], expert: Int[Tensor, " P"]) -> None:
        """Take in a batch: the output of each (token, expert) pair and which expert it was."""
        count = torch.bincount(expert, minlength=len(self._sums)).unsqueeze(-1)
        mean = torch.zeros_like(self._sums).index_add_(0, expert, outputs.float()) / count.clamp_min(1)
        active = count > 0
        self._sums = torch.where(active, self.decay * self._sums + (1 - self.decay) * mean, self._sums)
        self._weights = torch.where(active, self.decay * self._weights + (1 - self.decay), self._weights)

    def vectors(self) -> Float[Tensor, "M h"]:
        """E_i of every expert."""
        return self._sums / torch.where(self._weights > 0, self._weights, 1.0)


def missing_pairs(
    missing: Bool[Tensor, "T M"], fraction: float, generator: torch.Generator | None
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Tokens and experts of the missing pairs, each kept with probability `fraction`, drawn from `generator`."""
    if fraction < 1:
        assert generator is not None, "sampled pairs need a generator of their own: the global one is never used"
        draw = torch.rand(missing.shape, generator=generator)
        missing = missing & (draw < fraction).to(missing.device)
    token, expert = missing.nonzero(as_tuple=True)
    return token, expert


def straight_through(value: Tensor, signal: Tensor) -> Tensor:
    """`value` in the forward pass, the gradient of `value + signal` in the backward pass."""
    return value + (signal - signal.detach())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def scale_gradient(value: Float[Tensor, "T h"], factor: Float[Tensor, "T 1"]) -> Float[Tensor, "T h"]:
    """`value` in the forward pass, its gradient times `factor` in the backward pass."""
    scaled: Tensor = _ScaleGradient.apply(value, factor.to(value.dtype))
    return scaled


def _like(per_expert: Tensor, grads: Tensor) -> Tensor:
    """[M] as [M, 1, ...] beside a fused tensor [M, ...]."""
    return per_expert.view(-1, *(1,) * (grads.dim() - 1))
