"""The Universal Pseudo-Gradient (PG), a part: experts that a token did not use receive a learning signal from it.

    g_i <- g_i + strength * signal_i(mass of the tokens that missed expert i, gradients of the active experts)

The signal is added during local training, between backward and the optimiser's step; the modes that run missing experts act inside
the backward pass. What each mode computes stands in maths/pseudo_gradient.py.

The paper says that a signal is rebuilt from the router's probabilities and the active experts' gradients, scaled by the
sparsity. Its formula is not public: every mode, its strength and its scope are a reconstruction. Each default has its row in
docs/tables.md, Screening (pg_mode, pg_strength, pg_scope).

Source: UB-SMoE (arXiv 2605.16690), PG.
"""

from dataclasses import replace

import torch

from ubsmoe.maths.pseudo_gradient import PseudoGradient, parameter_signal
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.method import Hooks, Method, RunShape, refuse
from ubsmoe.methods.refusals import WHOLE_BATCH
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel


def with_pseudo_gradient(method: Method, shape: RunShape, settings: PseudoGradient) -> Method:
    """The method, its clients' inactive experts learning from a pseudo-gradient.

    Args:
        method: what clients and server do otherwise.
        shape: sizes of the run.
        settings: [method.pg].

    Raises:
        ValueError: for settings that make no sense in this run, or a method that refuses a pseudo-gradient.
    """
    refuse(method, "pg")
    if settings.mode == "client_mean" and "experts" in settings.scope and settings.strength > 0 and not shape.shared_a:
        raise ValueError(
            "pg.mode 'client_mean' averages gradients over experts, which has no meaning unless they start from one A; "
            "set adapter.shared_a = true or another pg.mode"
        )

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        model.set_pseudo_gradient(settings, generator)
        if settings.is_exact or settings.mode == "off" or "experts" not in settings.scope:
            return hooks
        return hooks.and_then(Hooks(before_step=[lambda: _add_signal(model, settings)]))

    return replace(
        method,
        install=install,
        pair_fraction=settings.pair_fraction,
        # it draws once per forward pass
        refuses={**method.refuses, **(WHOLE_BATCH if settings.mode == "sampled" else {})},
        pairs_reach_input=settings.is_exact and "hidden" in settings.scope,
    )


def _add_signal(model: SparseModel, settings: PseudoGradient) -> None:
    """Add the pseudo-gradient of this step to the experts' gradients, then start the next step's masses at zero."""
    masses = [layer.take_mass() for layer in model.layers]
    for name, parameter in model.adapter.items():
        index = layer_of_experts(name)
        mass = None if index is None else masses[index]
        if mass is not None and parameter.grad is not None:
            parameter_signal(settings, parameter.grad, mass, into=parameter.grad)
