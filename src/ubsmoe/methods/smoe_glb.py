"""SMoE-GLB: the load-balancing loss with everybody's load, broadcast by the server, in place of the client's own.

    loss + lambda sum_l M sum_i fbar_{l,i} P_{l,i},   fbar_{l,i} = sum_c p_c a_{c,l,i} / slots_c,   p_c = n_c / sum n

a_{c,l,i} counts the tokens client c routed to expert i and slots_c = tokens x K_c all its choices, so that a client
of a large budget has no more say than its data. Since only P has a gradient, a global fbar in each local loss is
exact, but for its age: it is last round's. Before the first round fbar is even, which makes the loss a constant.
Experts may specialise on a client as long as the federation as a whole uses them evenly. Aggregation is FedAvg; as
for routers, see smoe_llb.

Global-batch balancing sums counts over the workers of one step; over clients and rounds it is our reading.

Source: global-batch load balancing (Qiu et al., ACL 2025, arXiv 2501.11873), carried over to federated rounds.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.method import Base, Hooks, Method, State, install_adapter
from ubsmoe.methods.smoe_llb import balance_penalty, check_coefficient
from ubsmoe.model.surgery import SparseModel


def smoe_glb(base: Base, *, coefficient: float = 0.01) -> Method:
    """Build the method.

    Args:
        base: sizes of the run.
        coefficient: lambda, the weight of the balancing loss.

    Raises:
        ValueError: for a negative coefficient.
    """
    check_coefficient(coefficient)

    def start(adapter: dict[str, Tensor]) -> State:
        even = torch.full((base.num_layers, base.num_experts), 1 / base.num_experts)
        return State(adapter, {"share": even})

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return {**state.adapters, "share": state.extras["share"]}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, base.alpha)
        model.record()
        return Hooks(penalty=lambda: coefficient * balance_penalty(model, payload["share"]))

    def aggregate(state: State, updates: Iterable[Update]) -> State:
        mean, load = base.mean(), base.mean()
        for update in updates:
            mean.add(update.adapters, update.num_examples)
            load.add({"share": update.expert_tokens / max(update.assignments, 1)}, update.num_examples)
        return State(mean.result(state.adapters), load.result(state.extras))

    return Method("smoe_glb", start, dispatch, install, aggregate, extra_down=base.num_layers * base.num_experts)
