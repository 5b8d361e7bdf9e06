"""Naive sparse mixture of experts: clients activate K_c experts, the server averages.

    theta <- theta + sum_c p_c (theta_c - theta),    p_c = n_c / sum n

No balancing and no signal for inactive experts: what UB-SMoE is compared with. With every budget at 1 it is plain federated
averaging of LoRA factors.

Source: FedAvg (McMahan et al. 2017, arXiv 1602.05629), on LoRA factors as in FedIT (arXiv 2305.05644).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.method import Base, Hooks, Method, State, install_adapter
from ubsmoe.model.surgery import SparseModel


def fedavg(base: Base) -> Method:
    """Build the method; it has no settings."""

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return dict(state.adapters)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, base.alpha)
        return Hooks()

    def aggregate(state: State, updates: Iterable[Update]) -> State:
        mean = base.mean()
        for update in updates:
            mean.add(update.adapters, update.num_examples)
        return State(mean.result(state.adapters))

    return Method("fedavg", State, dispatch, install, aggregate)
