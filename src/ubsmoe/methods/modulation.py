"""Dynamic Modulated Routing (DMR), a part: the server shifts router logits so that all experts are used alike.

    clients route with    m_i = s_i + phi_i    on the N_p best experts of each token
    the server moves      phi <- zeta phi + (1 - zeta) tanh(u* / (u_i + eps) - 1),    u* = mean_i u_i

u_i = sum_c p_c a_{c,i} / tokens_c is the utilization of expert i. phi travels with the adapter and holds in evaluation too.
With `phi = "trained"` clients train phi as well, kept in [phi_min, phi_max] by a penalty, and the server moves the mean of theirs.

The paper states the shift, the tanh target, the momentum and the trained variant. Ours: the defaults N_p = 2 K_max and zeta = 0.9,
and which side zeta weighs. Each default has its row in docs/tables.md, Screening (momentum, num_candidates, phi).

Source: UB-SMoE (arXiv 2605.16690), DMR, steps 1-8; the formulas are in maths/routing.py.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ubsmoe.maths import routing
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, observing, refuse, sending
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class Modulation:
    """[method.dmr]."""

    num_candidates: int | None = None
    """N_p, experts per token that phi may move; 2 K_max when left out."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """zeta, the share of the old phi that stays."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Keeps u* / u finite."""
    phi: Literal["server", "trained"] = "server"
    """Whether utilization alone moves phi, or clients train it too."""
    phi_penalty: Annotated[float, Field(ge=0)] = 1e-2
    """lambda of the penalty outside [phi_min, phi_max], for a trained phi."""
    phi_min: float = -1.0
    """Lower end of that range."""
    phi_max: float = 1.0
    """Upper end of that range."""


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class ModulationState:
    """phi and the utilization u of the last round, [L, M] each, float32."""

    phi: Tensor
    utilization: Tensor


def with_modulation(method: Method, shape: RunShape, settings: Modulation) -> Method:
    """The method, its routers modulated.

    Args:
        method: what clients and server do otherwise.
        shape: sizes of the run.
        settings: [method.dmr].

    Raises:
        ValueError: for settings that do not fit the base, or a method that refuses modulation.
    """
    refuse(method, "dmr")
    num_candidates = min(2 * shape.k_max, shape.num_experts)
    if settings.num_candidates is not None:
        num_candidates = settings.num_candidates
    if not shape.k_max <= num_candidates <= shape.num_experts:
        raise ValueError(
            f"dmr.num_candidates must lie in K_max..M = {shape.k_max}..{shape.num_experts}, got {num_candidates}"
        )
    if settings.phi_min >= settings.phi_max:
        raise ValueError(f"dmr.phi_min must be below dmr.phi_max, got {settings.phi_min} and {settings.phi_max}")
    trained, size = settings.phi == "trained", (shape.num_layers, shape.num_experts)
    beyond = (settings.phi_max - settings.phi_min) / 2  # the penalty begins at the range's ends, it does not stop there
    ends = min(settings.phi_min, -1.0) - beyond, max(settings.phi_max, 1.0) + beyond

    def start(adapter: dict[str, Tensor]) -> State:
        return method.start(adapter).having(ModulationState(torch.zeros(size), torch.zeros(size)))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return {**method.dispatch(state, profile), "phi": state.of(ModulationState).phi}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        phi = payload["phi"].to(model.device, copy=True)
        if not trained:
            model.set_phi(phi, num_candidates)
            return hooks
        parameter = torch.nn.Parameter(phi)
        model.set_phi(parameter, num_candidates)
        penalty = routing.phi_range_penalty
        return hooks.and_then(
            Hooks(
                penalties=[lambda: settings.phi_penalty * penalty(parameter, settings.phi_min, settings.phi_max)],
                parameters=[parameter],
                extras=lambda: {"phi": parameter},
            )
        )

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        mean, before, weight = shape.mean(), state.of(ModulationState), 0.0

        def see(one: Contribution) -> None:
            nonlocal weight
            mean.add({"utilization": one.utilization} | ({"phi": one.extras["phi"]} if trained else {}), one.weight)
            weight += one.weight

        after = method.aggregate(state, observing(contributions, see))
        if not weight:
            return after
        means = mean.result({"utilization": torch.zeros(size, dtype=torch.float64), "phi": before.phi.double()})
        target = routing.phi_target(means["utilization"], settings.epsilon)
        phi = routing.phi_update(means["phi"], target, settings.momentum)
        phi = phi.float().clamp(*ends)  # noise can lead a trained phi out, and machines refuse one there
        return after.having(ModulationState(phi, means["utilization"].float()))

    def event(state: State) -> dict[str, Any]:
        return {**method.event(state), "phi": state.of(ModulationState).phi.tolist()}

    phi_size = shape.num_layers * shape.num_experts
    return replace(
        method,
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        event=event,
        keeps=(*method.keeps, ModulationState),
        ranges={**method.ranges, "phi": ends},
        traffic=sending(method.traffic, down=phi_size, up=trained * phi_size),
    )
