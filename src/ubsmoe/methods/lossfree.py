"""Loss-free balancing: naive sparse mixture of experts whose routers choose with a bias that the server steers.

    A(x) = top-K_c of s_i + b_i,   gate weights from s_i alone,   b_i <- b_i + steps u sign(mean_j load_j - load_i)

s_i is the router's score (after softmax or sigmoid) and load_i = sum_c a_{c,i} / sum_c slots_c the share of expert i in
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

import torch
from torch import Tensor

from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.method import Base, Hooks, Method, State, install_adapter
from ubsmoe.model.surgery import SparseModel


def lossfree(base: Base, *, step: float = 1e-3, steps_per_round: int = 1) -> Method:
    """Build the method.

    Args:
        base: sizes of the run.
        step: u, how far one move shifts a bias, in units of the router's scores.
        steps_per_round: moves per round.

    Raises:
        ValueError: for a step or number of moves below 0.
    """
    if step < 0 or steps_per_round < 0:
        raise ValueError(f"step and steps_per_round must be at least 0, got {step} and {steps_per_round}")

    def start(adapter: dict[str, Tensor]) -> State:
        return State(adapter, {"bias": torch.zeros(base.num_layers, base.num_experts)})

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return {**state.adapters, "bias": state.extras["bias"]}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, base.alpha)
        model.set_selection_bias(payload["bias"])
        return Hooks()

    def aggregate(state: State, updates: Iterable[Update]) -> State:
        mean, loads = base.mean(), base.mean()
        for update in updates:
            mean.add(update.adapters, update.num_examples)
            loads.add({"load": update.expert_tokens.double() / max(update.assignments, 1)}, update.assignments)
        load = loads.result({"load": torch.zeros(base.num_layers, base.num_experts, dtype=torch.float64)})["load"]
        moved = step * steps_per_round * torch.sign(load.mean(-1, keepdim=True) - load)
        return State(mean.result(state.adapters), {"bias": state.extras["bias"] + moved.float()})

    return Method("lossfree", start, dispatch, install, aggregate, extra_down=base.num_layers * base.num_experts)
