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
    sampled      g_i from a random fraction q of the missing assignments, times 1/q: unbiased
    oracle       g_i itself

Source: UB-SMoE (arXiv 2605.16690), PG; the modes and the two knobs (strength, scope) are this project's.
"""

import dataclasses
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

Mode = Literal["off", "client_mean", "self_ipw", "sampled", "oracle"]
Scope = Literal["experts", "router", "hidden"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PseudoGradient:
    """Which signal, how strong, and where it acts.

    Attributes:
        mode: the estimator, as listed at the top of this file.
        strength: factor on the signal.
        scope: what receives it: the experts' parameters (the paper's reading), the router, the hidden state. With all three
            the layer is a dense straight-through estimator.
        fraction: q, the share of missing assignments that `sampled` computes.
        limit: upper bound of the ratio missing / active in `self_ipw`.

    Raises:
        ValidationError: (a ValueError) for an unknown mode or scope, or a number out of range.
    """

    mode: Mode = "client_mean"
    strength: Annotated[float, Field(ge=0)] = 0.3
    scope: Annotated[tuple[Scope, ...], Field(min_length=1)] = ("experts",)
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    limit: Annotated[float, Field(gt=0)] = 10.0

    @property
    def is_exact(self) -> bool:
        """Whether the mode runs missing experts (and so costs compute)."""
        return self.mode in ("sampled", "oracle")

    @property
    def pair_fraction(self) -> float:
        """Share of the missing (token, expert) assignments that are computed, which costs FLOPs."""
        return {"sampled": self.fraction, "oracle": 1.0}.get(self.mode, 0.0) if self.strength > 0 else 0.0

    def rho(self, top_k: int, num_experts: int) -> float:
        """The client's sparsity rho_c = 1 - K/M. An exact mode adds what is missing itself, so it needs no such factor."""
        return 1.0 if self.is_exact else 1 - top_k / num_experts


@dataclasses.dataclass(frozen=True)
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
    """Sum gate weights over tokens, active and missing assignments apart; padding (`real` False) counts nothing."""
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


def parameter_signal(
    settings: PseudoGradient, grads: Float[Tensor, "M *S"], mass: Mass, into: Tensor | None = None
) -> Float[Tensor, "M *S"]:
    """The signal that `client_mean` or `self_ipw` adds to the gradient of one fused tensor.

    It is added in place to `into`, which may be `grads` itself: a step then costs two or three passes over the gradients.
    """
    # both estimators are linear in scaled_missing, so that the strength can be multiplied into it
    mass = dataclasses.replace(mass, scaled_missing=settings.strength * mass.scaled_missing)
    if settings.mode == "client_mean":
        return client_mean(grads, mass, into)
    assert settings.mode == "self_ipw", settings.mode
    return self_ipw(grads, mass, settings.limit, into)


def _per_mass(grads: Tensor, mass: Mass) -> Tensor:
    """Gradient per unit of mass, its mean over the experts that were active, [S] flat; theirs alone is not zero."""
    used = mass.active > 0
    share = torch.where(used, mass.active, torch.inf).reciprocal() / used.sum().clamp_min(1)
    return share.to(grads.dtype) @ grads.flatten(1)


def _start(into: Tensor | None, grads: Tensor) -> Tensor:
    return torch.zeros_like(grads) if into is None else into


def _add_outer(into: Tensor, per_expert: Tensor, direction: Tensor) -> Tensor:
    return into.addcmul_(_like(per_expert, into), direction.view(into.shape[1:]))


def missing_assignments(
    missing: Bool[Tensor, "T M"], fraction: float, generator: torch.Generator | None
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Tokens and experts of the missing assignments, each kept with probability `fraction`, drawn from `generator`."""
    if fraction < 1:
        assert generator is not None, "sampled assignments need a generator of their own: the global one is never used"
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
