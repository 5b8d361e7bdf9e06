"""FFA-LoRA: A is drawn once and frozen, clients train and send B alone.

    B <- sum_c p_c B_c,    p_c = n_c / sum n,    so that    sum_c p_c s B_c A = s B A    exactly

With one A for all, the mean of factors is the mean of updates. Half of an adapter travels: A is drawn from the run's
seed by whoever needs it, the same A that the server's adapter starts from.

Ranks are uniform, so a tier's budget sets its experts per token, as in naive averaging; with all budgets at 1 this is
the published method. A frozen A usually wants a larger train.learning_rate. An expert that a client did not activate
comes back as it was sent and counts with full weight; one that nobody activated stays, weight decay apart.

Source: FFA-LoRA (Sun et al. 2024, arXiv 2403.12313).
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ubsmoe.costs.traffic import adapter_traffic
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Hooks, Method, RunShape, State, adapter_part
from ubsmoe.methods.refusals import OWN_WEIGHTS
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for


def ffa_lora(shape: RunShape) -> Method:
    """Build the method; it has no settings."""

    def start(adapter: dict[str, Tensor]) -> State:
        return State({name: value for name, value in adapter.items() if not name.endswith(".A")})

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        drawn = model.fresh_adapter(
            shape.rank, generator_for(shape.seed, "adapter"), shared_a=shape.shared_a, attention=shape.attention
        )
        frozen = {name for name in drawn if name.endswith(".A")}
        model.load_adapter({**drawn, **adapter_part(payload)}, shape.alpha, frozen=frozen)
        model.set_top_k(profile.top_k)
        return Hooks()

    return replace(
        fedavg(shape),
        name="ffa_lora",
        start=start,
        install=install,
        refuses=OWN_WEIGHTS,
        traffic=partial(adapter_traffic, down="B", up="B"),
    )
