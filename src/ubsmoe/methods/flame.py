"""FLAME: budgeted sparse mixture of experts with a learned output scale and activation-aware averaging.

    y(x) = s_c sum_{i in A_c(x)} w_i E_i(x)                                          s_c learned by the client
    theta_i <- sum_c g_{c,i} theta_{c,i} / sum_c g_{c,i},   g_{c,i} = (a_{c,i} / tokens_c)^t n_c

a_{c,i} counts the tokens that client c routed to expert i; t = 0 is FedAvg. With K_c < K_max the sum of a layer
shrinks (by how much depends on the router), and s_c, which takes the place of a fixed K_max / K_c, makes up for it.
An expert nobody used stays bit for bit (the formula is 0/0 there); a client that never used an expert has no say in
it unless t = 0.

The paper leaves open, and we chose: one s per SMoE layer; it starts at 1, on top of tiers.rescale (with "ratio" the
product starts at K_max / K_c; 1 is the better start where the top experts hold more of the weight than their number
says); clients are stateless here, so the server averages s with weights n_c over the clients of the same K_c and
hands it to them, and to evaluation at that K_c, next time; t = 1. A client of a larger budget has larger frequencies:
they mix budget and preference, as the formula does. Factors are averaged, not products.
Elastic steps at a smaller K use the s of the client's own K_c; train.weight_decay pulls s towards 0 like any
parameter.

Source: FLAME (Le et al. 2025, arXiv 2506.16600): the scale, the frequencies and their weights.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.method import USE_WEIGHS, Base, Hooks, Method, State, activation_weights, install_adapter
from ubsmoe.model.surgery import SparseModel


def flame(base: Base, *, exponent: float = 1.0, learn_scale: bool = True) -> Method:
    """Build the method.

    Args:
        base: sizes of the run.
        exponent: t, how much use counts; 0 is FedAvg.
        learn_scale: whether s is learned; without it, s = 1.

    Raises:
        ValueError: for a negative exponent.
    """
    if exponent < 0:
        raise ValueError(f"exponent must be at least 0, got {exponent}")

    def start(adapter: dict[str, Tensor]) -> State:
        budgets = range(1, base.k_max + 1) if learn_scale else ()
        return State(adapter, {_scale_of(top_k): torch.ones(base.num_layers) for top_k in budgets})

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        name = _scale_of(profile.top_k)
        return {**state.adapters, name: state.extras[name]} if learn_scale else dict(state.adapters)

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        install_adapter(model, payload, profile, base.alpha)
        if not learn_scale:
            return Hooks()
        name = _scale_of(profile.top_k)
        scale = torch.nn.Parameter(payload[name].to(next(iter(model.adapter.values())).device, copy=True))
        model.set_output_scale(scale)
        return Hooks(parameters=[scale], extras=lambda: {name: scale.detach().cpu().clone()})

    def aggregate(state: State, updates: Iterable[Update]) -> State:
        mean, scales = base.mean(), base.mean()
        for update in updates:
            mean.add(update.adapters, activation_weights(update, exponent, update.tokens))
            scales.add(update.extras, update.num_examples)
        return State(mean.result(state.adapters), scales.result(state.extras))

    scalars = base.num_layers if learn_scale else 0
    return Method(
        "flame", start, dispatch, install, aggregate, refuses=USE_WEIGHS, extra_down=scalars, extra_up=scalars
    )


def _scale_of(top_k: int) -> str:
    """The name of the output scales [L] of clients with this many experts per token."""
    return f"scale.{top_k}"
