"""SCAFFOLD: federated averaging in which each client corrects its steps by how its data pull it away from the others.

    client c   y <- y - eta (d(y) - c_c + c)                      each local step, from y = x; c_c = 0 before its first round
               c_c <- c_c - c + (x - y) / sum eta                 option II; stays with the client
    server     x <- x + sum_c p_c (y_c - x)                       p_c = n_c / sum n over the round's clients
               c <- c + |S|/N sum_c p_c ((x - y_c) / sum eta - c)

d is the direction of the local optimiser: with plain SGD the gradient, as in the paper. sum eta is over the steps of a round, which
makes K eta at a constant rate. What a client's control variate changes by follows from y_c and sum eta, so that it need not travel.
S are the round's clients, N all of them; with S = N, c is the mean of all c_c. The server's learning rate is 1.

Ours: p_c in the place of equal weights, since x is averaged so; other optimisers than SGD. A client whose update the server drops
has moved its control variate all the same. A run that begins from another one begins with c = 0.

Source: SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378), algorithm 1.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ubsmoe.costs.shape import FLOAT32, ModelShape, Trained
from ubsmoe.costs.traffic import Traffic
from ubsmoe.costs.workload import WireDtype
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.hooks import OWN, Hooks
from ubsmoe.methods.method import Contribution, Method, RunShape, State, observing
from ubsmoe.methods.refusals import Refusable
from ubsmoe.model.surgery import SparseModel

CONTROL, RATE = "control.", "rate"
REFUSES: Mapping[Refusable, str] = {
    "privacy": "it makes its control variate of each client's update, which noise on their mean does not cover",
    "secure_aggregation": "it divides each update by the client's own step sizes, which a sum of updates does not tell",
    "averaging": "it corrects clients towards the plain mean of their factors",
}


@dataclass(frozen=True)
class ControlState:
    """The server's control variate c, by the names of the adapter's tensors, float32."""

    control: Mapping[str, Tensor]


def scaffold(shape: RunShape) -> Method:
    """Build the method; it has no settings."""
    method = fedavg(shape)

    def start(adapter: dict[str, Tensor]) -> State:
        return method.start(adapter).having(ControlState({n: torch.zeros_like(x) for n, x in adapter.items()}))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        common = state.of(ControlState).control
        return method.dispatch(state, profile) | {f"{CONTROL}{name}": value for name, value in common.items()}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        sent = {name: y.detach().clone() for name, y in model.adapter.items()}
        common = {name: payload[f"{CONTROL}{name}"].to(x.device) for name, x in sent.items()}
        zeros = {name: torch.zeros_like(x) for name, x in sent.items()}
        own = {name: payload.get(f"{OWN}{name}", zero).to(zero.device) for name, zero in zeros.items()}
        rates: list[float] = []

        @torch.no_grad()
        def correct(rate: float) -> None:
            rates.append(rate)
            for name, y in model.adapter.items():
                y.sub_(rate * (common[name] - own[name]))

        def keeps() -> dict[str, Tensor]:
            gradient = _mean_direction(sent, model.adapter, sum(rates))
            return {name: own[name] - common[name] + gradient.get(name, common[name]) for name in own}

        def extras() -> dict[str, Tensor]:
            return {RATE: torch.tensor(float(sum(rates)))}

        return hooks.and_then(Hooks(after_step=[correct], keeps=keeps, extras=extras))

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        common, changes, count = state.of(ControlState).control, shape.mean(), 0

        def see(one: Contribution) -> None:
            nonlocal count
            gradient = _mean_direction(state.adapters, one.adapters, float(one.extras[RATE]))
            changes.add({f"{CONTROL}{n}": gradient.get(n, c) - c for n, c in common.items()}, one.weight)
            count += 1

        after = method.aggregate(state, observing(contributions, see))
        change = changes.result({f"{CONTROL}{name}": torch.zeros_like(c) for name, c in common.items()})
        share = min(1.0, count / shape.num_clients)
        return after.having(ControlState({n: c + share * change[f"{CONTROL}{n}"] for n, c in common.items()}))

    def traffic(base: ModelShape, rank: int, trained: Trained, wire_dtype: WireDtype) -> Traffic:
        control = method.traffic(base, rank, trained, "float32").download_bytes
        return method.traffic(base, rank, trained, wire_dtype) + Traffic(control, FLOAT32)

    return replace(
        method,
        name="scaffold",
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        keeps=(ControlState,),
        refuses=REFUSES,
        ranges={RATE: (0.0, 1e6)},
        traffic=traffic,
        client_state=(ControlState,),
    )


def _mean_direction(before: Tensors, after: Tensors, rate: float) -> dict[str, Tensor]:
    """(x - y) / sum eta by name; nothing where no step was taken, or all at a rate of zero."""
    return {name: (value - after[name].detach()) / rate for name, value in before.items()} if rate else {}
