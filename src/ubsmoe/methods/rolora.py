"""RoLoRA: clients train and send B in odd rounds, A in even ones.

    round 1, 3, ...    B <- sum_c p_c B_c,    A as it was        exact: sum_c p_c s B_c A = s B A
    round 2, 4, ...    A <- sum_c p_c A_c,    B as it was        exact: sum_c p_c s B A_c = s B A

The rank stays r, half of an adapter travels up, and A leaves its first draw, which FFA-LoRA's and FedSVD's cannot. Aggregation is
linear in what is sent: the server needs sum_c n_c B_c, or of A, and no client's own, so this fits secure aggregation, [robust] and
[privacy].

The paper has the two steps and their order. Ours: weights p_c, which may be an expert's own ([method.averaging] exponent). A
round without replies is not a turn. An expert whose B is still zero in a round that trains A gets no gradient and waits for the
next one.

Source: RoLoRA (Chen et al. 2025, arXiv 2502.01755).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.factors import freeze
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, keeping_back, observing
from ubsmoe.methods.refusals import OWN_WEIGHTS
from ubsmoe.model.surgery import SparseModel

EXEMPT: Mapping[str, str] = {"predicted_bytes": "A and B differ in size, and what is predicted is the larger, B"}


@dataclass(frozen=True)
class TurnState:
    """How many rounds have been aggregated: B is trained at an even number, A at an odd one; int64."""

    turn: Tensor


def rolora(shape: RunShape) -> Method:
    """Build the method; it has no settings."""
    method = with_alternating_factors(fedavg(shape), shape)
    return replace(method, name="rolora", refuses={**method.refuses, **OWN_WEIGHTS})


def with_alternating_factors(method: Method, shape: RunShape) -> Method:
    """A method whose clients train one factor at a time.

    Args:
        method: its `aggregate` leaves the mean of what clients send in the state.
        shape: sizes of the run; none of them matters here.
    """

    def start(adapter: dict[str, Tensor]) -> State:
        return method.start(adapter).having(TurnState(torch.tensor(0)))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        # a name, not a number: what an update looks like must follow from the form of the payload, without values
        return {**method.dispatch(state, profile), f"frozen.{resting(state)}": torch.zeros(0)}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        freeze(model, "A" if "frozen.A" in payload else "B")
        return hooks

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        weight = 0.0

        def see(one: Contribution) -> None:
            nonlocal weight
            weight += one.weight

        after = method.aggregate(state, observing(contributions, see))
        return after.having(TurnState(state.of(TurnState).turn + 1)) if weight else after

    return replace(
        method,
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        keeps=(*method.keeps, TurnState),
        traffic=keeping_back(method.traffic, "A"),
        exempt={**method.exempt, **EXEMPT},
    )


def resting(state: State) -> Literal["A", "B"]:
    """The factor that is not trained in the round that begins with this state."""
    return "B" if state.of(TurnState).turn % 2 else "A"
