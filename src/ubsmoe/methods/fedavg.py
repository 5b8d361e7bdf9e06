"""Naive sparse mixture of experts: clients activate K_c experts, the server averages.

    theta <- theta + sum_c p_c (theta_c - theta),    p_c = n_c / sum n

No balancing and no signal for inactive experts: what UB-SMoE is compared with. With every budget at 1 it is plain federated
averaging of LoRA factors. The parts of UB-SMoE are put around this method, and [method.averaging] replaces p_c.

Source: FedAvg (McMahan et al. 2017, arXiv 1602.05629), on LoRA factors as in FedIT (arXiv 2305.05644).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, install_adapter
from ubsmoe.model.surgery import SparseModel


def fedavg(shape: RunShape) -> Method:
    """Build the method; it has no settings.

    >>> def client(name: str, examples: float, value: float) -> Contribution:
    ...     return Contribution(name, examples, {"w": torch.tensor([[value]])}, torch.ones(1, 2), tokens=2.0, assignments=2.0)
    >>> method = fedavg(RunShape(num_layers=1, num_experts=2, k_max=1, rank=1, alpha=1.0))
    >>> before = State({"w": torch.tensor([[9.0]])})
    >>> method.aggregate(before, [client("a", 1.0, 0.0), client("b", 3.0, 4.0)]).adapters  # (1 * 0 + 3 * 4) / 4
    {'w': tensor([[3.]])}
    """

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return dict(state.adapters)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, shape.alpha)
        return Hooks()

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        mean = shape.mean()
        for one in contributions:
            mean.add(one.adapters, one.weights or shape.weigh(one))
        return replace(state, adapters=mean.result(state.adapters))

    return Method("fedavg", State, dispatch, install, aggregate, weigh=shape.weigh)
