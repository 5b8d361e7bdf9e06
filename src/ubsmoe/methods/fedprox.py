"""FedProx: federated averaging whose clients are held near what the server sent.

    loss + mu/2 sum |theta - theta_sent|^2

mu = 0 is FedAvg, and aggregation is FedAvg's. Routers count when they are trained.

Source: FedProx (Li et al. 2020, arXiv 1812.06127), equation 2.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Hooks, Method, RunShape
from ubsmoe.model.surgery import SparseModel


def fedprox(shape: RunShape, *, mu: Annotated[float, Field(ge=0)] = 0.01) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        mu: how strongly clients are held.
    """
    method = fedavg(shape)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        sent = {name: value.detach().clone() for name, value in model.adapter.items()}

        def penalty() -> Tensor:
            distances = [(value - sent[name]).square().sum() for name, value in model.adapter.items()]
            return mu / 2 * torch.stack(distances).sum()

        return hooks.and_then(Hooks(penalties=[penalty]))

    return replace(method, name="fedprox", install=install)
