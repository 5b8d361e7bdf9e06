"""Loss-free balancing: naive sparse mixture of experts whose routers choose with a bias that the server steers.

    A(x) = top-K_c of s_i + b_i,   gate weights from s_i alone,   b_i <- b_i + steps u sign(mean_j load_j - load_i)

s_i is the router's score (after softmax or sigmoid) and load_i = sum_c a_{c,i} / sum_c assignments_c the share of expert i in
all that the round's clients routed; under a robust rule, that rule's mean of their shares. An expert below the mean load
becomes easier to choose, by a fixed step; no loss is added, and no gradient bent. The bias travels with the adapter and
holds in evaluation too. Aggregation is FedAvg.

The paper moves b after every batch. Loads are known to the server once a round, so a round makes `steps_per_round`
equal moves at once (ours). u = 0.001 is the paper's for sigmoid scores; softmax scores are about 1/M and call for
smaller steps. Families that choose by more than scores (groups; DeepSeek-V3 with its own such bias) are refused: see
`SparseModel.set_selection_bias`.

Source: Auxiliary-Loss-Free Load Balancing (Wang et al. 2024, arXiv 2408.15664), algorithm 1.
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
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True)
class BiasState:
    """The selection bias b [L, M], float32."""

    bias: Tensor


def lossfree(
    shape: RunShape,
    *,
    step: Annotated[float, Field(ge=0)] = 1e-3,
    steps_per_round: Annotated[int, Field(ge=0)] = 1,
) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        step: u, how far one move shifts a bias, in units of the router's scores.
        steps_per_round: moves per round.
    """
    method, size = fedavg(shape), (shape.num_layers, shape.num_experts)

    def start(adapter: dict[str, Tensor]) -> State:
        return State(adapter).having(BiasState(torch.zeros(size)))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return {**state.adapters, "bias": state.of(BiasState).bias}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        model.set_selection_bias(payload["bias"])
        return hooks

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        loads = shape.mean()

        def see(one: Contribution) -> None:  # not `shares`: of the sum of a round those are weighed by examples
            loads.add({"load": one.expert_tokens.double() / max(one.assignments, 1)}, one.assignments)

        seen = observing(contributions, see)
        after = method.aggregate(state, seen)
        load = loads.result({"load": torch.zeros(size, dtype=torch.float64)})["load"]
        move = step * steps_per_round * torch.sign(load.mean(-1, keepdim=True) - load)
        return after.having(BiasState(state.of(BiasState).bias + move.float()))

    return replace(
        method,
        name="lossfree",
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        keeps=(BiasState,),
        traffic=sending(method.traffic, down=shape.num_layers * shape.num_experts),
    )
