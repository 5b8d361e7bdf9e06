"""FLoRA: stack the clients' factors, fold the stack into the base, start the next round from a fresh adapter.

    B = [B_1 ... B_K],  A = [p_1 s_1 A_1; ...; p_K s_K A_K],    B A = sum_c p_c s_c B_c A_c,    W <- W + B A

Exact for any mixture of ranks: nothing is averaged but the update itself. Weight and scale go on A alone; on both
factors they would count twice. Every round each client draws its own A (uniform, as at the start of any LoRA) and B =
0.

Ours: W stays frozen and the sum of all stacks is a side factor beside it (side.py), recompressed without loss when
its rank would exceed the matrix's; a payload is the whole side factor and no adapter, while the paper sends one
round's stack. An expert that a client did not activate has B = 0 and adds nothing, so its step shrinks by that
client's share: p is not renormalised. The server needs each client's own factors, so this method cannot run under
secure aggregation, and it holds all of a round's at once.

Source: FLoRA (Wang et al. 2024, arXiv 2409.05976).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ubsmoe.costs.traffic import adapter_traffic
from ubsmoe.maths.lora import LoraPair, stack
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.factors import mean_routers, pairs, routers, shares
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State
from ubsmoe.methods.refusals import OWN_FACTORS
from ubsmoe.methods.side import SIDE_GROWS, empty_side, fold, install_fresh, largest_side, side_traffic
from ubsmoe.model.surgery import SparseModel

Summed = Callable[[Sequence[LoraPair], Sequence[float]], LoraPair]
"""From the clients' pairs for one matrix, and their weights, to what is folded in."""

EXEMPT: Mapping[str, str] = {"predicted_bytes": SIDE_GROWS}


def flora(shape: RunShape) -> Method:
    """Build the method; it has no settings."""
    return folding("flora", shape, stack)


def folding(name: str, shape: RunShape, summed: Summed) -> Method:
    """A method of FLoRA's life cycle: train a fresh adapter, sum the clients', fold the sum into the base."""

    def start(adapter: dict[str, Tensor]) -> State:
        return State(empty_side(adapter) | routers(adapter))

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_fresh(model, payload, profile, shape, generator)
        return Hooks()

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        clients = list(contributions)
        if not any(one.weight for one in clients):
            return state
        weights, factors = shares(clients), [pairs(one.adapters, shape.alpha) for one in clients]
        sums = {matrix: summed([client[matrix] for client in factors], weights) for matrix in factors[0]}
        return replace(state, adapters=fold(state.adapters, sums) | mean_routers(state.adapters, clients))

    return replace(
        fedavg(shape),
        name=name,
        start=start,
        install=install,
        aggregate=aggregate,
        varies="rank",
        refuses=OWN_FACTORS,
        side_elements=partial(largest_side, shape),
        traffic=side_traffic(partial(adapter_traffic, down=""), shape),  # no adapter goes down, but trained routers do
        exempt=EXEMPT,
    )
