"""SMoE-GLB: the load-balancing loss with everybody's load, broadcast by the server, in place of the client's own.

    loss + lambda sum_l M sum_i fbar_{l,i} P_{l,i},   fbar_{l,i} = sum_c p_c a_{c,l,i} / assignments_c,   p_c = n_c / sum n

a_{c,l,i} counts the tokens client c routed to expert i and assignments_c = tokens x K_c all its choices, so that a client
of a large budget has no more say than its data. Since only P has a gradient, a global fbar in each local loss is
exact, but for its age: it is last round's. Before the first round fbar is even, which makes the loss a constant.
Experts may specialise on a client as long as the federation as a whole uses them evenly. Aggregation is FedAvg; as
for routers, see smoe_llb.

Global-batch balancing sums counts over the workers of one step; over clients and rounds it is our reading.

Source: global-batch load balancing (Qiu et al., ACL 2025, arXiv 2501.11873), carried over to federated rounds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, observing, sending
from ubsmoe.methods.refusals import WHOLE_BATCH
from ubsmoe.methods.smoe_llb import balance_penalty
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True)
class ShareState:
    """The federation's share fbar [L, M] of the last round's assignments, float32."""

    share: Tensor


def smoe_glb(shape: RunShape, *, coefficient: Annotated[float, Field(ge=0)] = 0.01) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        coefficient: lambda, the weight of the balancing loss.
    """
    method = fedavg(shape)

    def start(adapter: dict[str, Tensor]) -> State:
        even = torch.full((shape.num_layers, shape.num_experts), 1 / shape.num_experts)
        return State(adapter).having(ShareState(even))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return {**state.adapters, "share": state.of(ShareState).share}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        method.install(model, payload, profile, generator)
        model.record()
        return Hooks(penalties=[lambda: coefficient * balance_penalty(model, payload["share"])])

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        share = shape.mean()
        seen = observing(contributions, lambda one: share.add({"share": one.shares.float()}, one.weight))
        after = method.aggregate(state, seen)
        return after.having(ShareState(**share.result({"share": state.of(ShareState).share})))

    return replace(
        method,
        name="smoe_glb",
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        keeps=(ShareState,),
        refuses=WHOLE_BATCH,
        traffic=sending(method.traffic, down=shape.num_layers * shape.num_experts),
    )
