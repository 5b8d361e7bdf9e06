"""FLAME: budgeted sparse mixture of experts with a learned output scale and activation-aware averaging.

    y(x) = s_c sum_{i in A_c(x)} w_i E_i(x)                                          s_c learned by the client
    theta_i <- sum_c g_{c,i} theta_{c,i} / sum_c g_{c,i},   g_{c,i} = (a_{c,i} / tokens_c)^t n_c

a_{c,i} counts the tokens that client c routed to expert i; t = 0 is FedAvg. With K_c < K_max the sum of a layer
shrinks (by how much depends on the router), and s_c, which takes the place of a fixed K_max / K_c, makes up for it.
An expert nobody used stays bit for bit (the formula is 0/0 there); a client that never used an expert has no say in
it unless t = 0.

The paper leaves open, and we chose: one s per SMoE layer; it starts at 1, on top of tiers.rescale; clients are stateless
here, so the server averages s with weights n_c over the clients of the same K_c and hands it to them, and to evaluation at
that K_c, next time; t = 1. A client of a larger budget has larger frequencies: they mix budget and preference, as the
formula does. Factors are averaged, not products. Elastic steps at a smaller K use the s of the client's own K_c;
train.weight_decay pulls s towards 0 like any parameter.

Source: FLAME (Le et al. 2025, arXiv 2506.16600): the scale, the frequencies and their weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, by_use, observing, sending
from ubsmoe.methods.refusals import OWN_WEIGHTS, USE_WEIGHS
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True)
class ScaleState:
    """The output scales s [L], float32, of each number of experts per token: "1", "2", ..., K_max."""

    scale: Mapping[str, Tensor]


def flame(shape: RunShape, *, exponent: Annotated[float, Field(ge=0)] = 1.0, learn_scale: bool = True) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        exponent: t, how much use counts; 0 is FedAvg.
        learn_scale: whether s is learned; without it, s = 1.
    """
    method = fedavg(replace(shape, weigh=by_use(exponent)))
    method = replace(method, name="flame", refuses={**USE_WEIGHS, **OWN_WEIGHTS})
    return with_output_scale(method, shape) if learn_scale else method


def with_output_scale(method: Method, shape: RunShape) -> Method:
    """The method, each client's layers multiplied by learned scales, one set per K."""

    def start(adapter: dict[str, Tensor]) -> State:
        ones = {str(top_k): torch.ones(shape.num_layers) for top_k in range(min((1, *shape.top_ks)), shape.k_max + 1)}
        return method.start(adapter).having(ScaleState(ones))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        scale = state.of(ScaleState).scale[str(profile.top_k)]
        return {**method.dispatch(state, profile), f"scale.{profile.top_k}": scale}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks, name = method.install(model, payload, profile, generator), f"scale.{profile.top_k}"
        scale = torch.nn.Parameter(payload[name].to(model.device, copy=True))
        model.set_output_scale(scale)
        return hooks.and_then(Hooks(parameters=[scale], extras=lambda: {name: scale}))

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        mean = shape.mean()

        def see(one: Contribution) -> None:
            own = {name.removeprefix("scale."): s for name, s in one.extras.items() if name.startswith("scale.")}
            mean.add(own, one.weight)

        after = method.aggregate(state, observing(contributions, see))
        return after.having(ScaleState(mean.result(state.of(ScaleState).scale)))

    return replace(
        method,
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        keeps=(*method.keeps, ScaleState),
        ranges={**method.ranges, "scale": (0.0, 2.0 * shape.k_max)},  # K_max / K_c is what it makes up for
        traffic=sending(method.traffic, down=shape.num_layers, up=shape.num_layers),
    )
