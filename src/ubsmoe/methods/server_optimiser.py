"""A server optimiser, a part: the server takes the round's mean change as a gradient, and a step of its own.

    Delta = mean_c theta_c - theta,    as the method inside averages
    momentum    m <- beta1 m + Delta                                      theta <- theta + eta m
    adam        m <- beta1 m + (1 - beta1) Delta
                v <- beta2 v + (1 - beta2) Delta^2                        theta <- theta + eta m / (sqrt v + tau)
    yogi        v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)            likewise

v begins at tau^2. eta = 1 with beta1 = 0 and `momentum` is the method inside. FedAvgM, FedAdam and FedYogi are `fedavg` with this
part. The factors of an expert that no client trained move on with their momentum.

Ours: the default eta of adam and yogi, a step of the size that LoRA factors move in a round.

Source: Adaptive Federated Optimization (Reddi et al. 2021, arXiv 2003.00295), algorithm 2; FedAvgM (Hsu et al. 2019, arXiv
1909.06335), section 4.3.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ubsmoe.config.plug_ins import OrPlugIn, load
from ubsmoe.errors import UserError
from ubsmoe.methods.method import Contribution, Method, RunShape, State, observing

GOES_ON = "the server goes on moving as it moved in earlier rounds"
EXEMPT: Mapping[str, str] = {"lone_client": GOES_ON, "identical_clients": GOES_ON, "untouched_expert": GOES_ON}
DEFAULT_RATE = {"momentum": 1.0, "adam": 0.01, "yogi": 0.01}


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class ServerOptimiser:
    """[method.server]."""

    rule: Annotated[Literal["momentum", "adam", "yogi"], OrPlugIn()] = "adam"
    """Which step, or a plug-in `rule(change, memory, settings) -> (step, memory)`."""
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    """eta; 1 for momentum and plug-ins, 0.01 for adam and yogi when left out."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the mean change that stays."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of the mean squared change that stays."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """How far the steps adapt: a smaller one evens them out more."""


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class OptimiserState:
    """m and v, by the names of the adapter's tensors, float32; of a plug-in its memory is m."""

    change_mean: Mapping[str, Tensor]
    change_square: Mapping[str, Tensor]


def with_server_optimiser(method: Method, shape: RunShape, settings: ServerOptimiser) -> Method:
    """The method, its server taking steps of its own.

    Args:
        method: what clients and server do otherwise; gives the mean.
        shape: sizes of the run.
        settings: [method.server].

    Raises:
        UserError: for a method whose server does something else than average.
    """
    if reason := method.refuses.get("averaging"):
        raise UserError(f"[method.server] cannot be combined with method {method.name}: {reason}")
    rate = DEFAULT_RATE.get(settings.rule, 1.0) if settings.learning_rate is None else settings.learning_rate
    settings = replace(settings, learning_rate=rate)

    def start(adapter: dict[str, Tensor]) -> State:
        return method.start(adapter).having(OptimiserState({}, {}))

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        weight = 0.0

        def see(one: Contribution) -> None:
            nonlocal weight
            weight += one.weight

        mean = method.aggregate(state, observing(contributions, see))
        if not weight:
            return mean
        adapters, memory = dict(mean.adapters), state.of(OptimiserState)
        first, second = dict(memory.change_mean), dict(memory.change_square)
        for name, before in state.adapters.items():
            change = mean.adapters[name] - before
            step, first[name], square = _step(settings, change, first.get(name), second.get(name))
            adapters[name] = before + step
            second |= {} if square is None else {name: square}
        return replace(mean, adapters=adapters).having(OptimiserState(first, second))

    return replace(
        method,
        start=start,
        aggregate=aggregate,
        keeps=(*method.keeps, OptimiserState),
        exempt={**method.exempt, **EXEMPT},
    )


def _step(
    settings: ServerOptimiser, change: Tensor, mean: Tensor | None, square: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The step of one tensor, and the next m and v."""
    eta, beta = settings.learning_rate or 1.0, settings.beta1
    if settings.rule not in DEFAULT_RATE:
        step, memory = load(settings.rule, "method.server.rule")(change, mean, settings)
        return step, memory, None
    mean = torch.zeros_like(change) if mean is None else mean
    if settings.rule == "momentum":
        mean = beta * mean + change
        return eta * mean, mean, None
    mean = beta * mean + (1 - beta) * change
    new, old = change.square(), torch.full_like(change, settings.tau**2) if square is None else square
    away = (1 - settings.beta2) * ((old - new) if settings.rule == "adam" else new * (old - new).sign())
    square = old - away
    return eta * mean / (square.sqrt() + settings.tau), mean, square
