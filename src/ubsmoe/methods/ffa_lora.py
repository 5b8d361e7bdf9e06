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

import torch
from torch import Tensor

from ubsmoe.costs.shape import ModelShape
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Base, Hooks, Method, State
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for


def ffa_lora(base: Base) -> Method:
    """Build the method; it has no settings."""

    def start(adapter: dict[str, Tensor]) -> State:
        return State({name: value for name, value in adapter.items() if not name.endswith(".A")})

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        drawn = model.fresh_adapter(
            base.rank, generator_for(base.seed, "adapter"), shared_a=base.shared_a, attention=base.attention
        )
        frozen = {name for name in drawn if name.endswith(".A")}
        model.load_adapter({**drawn, **payload}, base.alpha, frozen=frozen)
        model.set_top_k(profile.top_k)
        return Hooks()

    def without_a(shape: ModelShape, rank: int) -> int:
        """Minus the elements of every A: r h for gate and up, r f for down, r in for a projection of attention."""
        experts = shape.num_experts * (shape.hidden + shape.expert_width)
        attention = base.attention * sum(into for _, into in shape.attention_first + shape.attention_later)
        return -shape.num_moe_layers * rank * (experts + attention)

    return replace(fedavg(base), name="ffa_lora", start=start, install=install, factors_up="B", extra_down=without_a)
