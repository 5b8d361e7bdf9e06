"""What a federated method is: a value made of four functions.

    start(adapter)                      -> State      what the server holds before round 0
    dispatch(state, profile)            -> payload    what one client (or one tier's evaluation) gets
    install(model, payload, profile, generator) -> Hooks   put it on the shared base; leaves no trace after model.clear()
    aggregate(state, updates)           -> State      consume the updates one by one, in client order

A method lives in one file, reads like its section of the paper and is one line in METHODS. It never copies the training loop:
what it needs inside the loop it returns as hooks.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ubsmoe.costs.shape import ModelShape
from ubsmoe.maths.means import Mean, Weight, WeightedMean
from ubsmoe.maths.routing import budget_top_k
from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True)
class Base:
    """What a method may know about the run: sizes of the base and of the adapter.

    `seed` is the run's, for draws that server and clients make alike; `shared_a` says that all experts of a layer start
    from one A, `attention` that there is LoRA on attention projections too. `mean` makes the running mean that methods
    average with: plain, or a rule that stands liars.
    """

    num_layers: int
    num_experts: int
    k_max: int
    rank: int
    alpha: float
    seed: int = 0
    shared_a: bool = True
    attention: bool = False
    mean: Callable[[], Mean] = WeightedMean


@dataclass(frozen=True)
class State:
    """What the server keeps: the global adapter, and whatever else the method needs to go on (both are checkpointed).

    `adapters` is what clients get, by its names on the wire: trained tensors and, in some methods, a frozen side factor.
    """

    adapters: dict[str, Tensor]
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Hooks:
    """What a method does inside a client's step.

    `penalty` is added to the loss of every micro-batch; `before_step` runs between backward and the optimiser's step;
    `parameters` are trained beside the adapter; `extras` is read when training ends and travels in Update.extras.
    """

    penalty: Callable[[], Tensor] | None = None
    before_step: Callable[[], None] | None = None
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    extras: Callable[[], dict[str, Tensor]] = dict


Protection = Literal["robust", "privacy"]
"""[robust] and [privacy] of a run file: rules that stand lying clients, and differential privacy."""

FACTORS_APART: Mapping[Protection, str] = dict.fromkeys(
    ("robust", "privacy"),
    "it needs each client's own factors, and no rule or noise on their mean is one on the updates'",
)
"""Why a method that works on single clients' factors refuses both."""

USE_WEIGHS: Mapping[Protection, str] = {
    "privacy": "it weighs each client by its own use of an expert, which noise on the clients' mean does not cover"
}
"""Why an activation-aware method refuses noise."""

LAWS: dict[str, str] = {
    "identical_clients": "clients that all return the same update leave exactly that update, whatever their weights",
    "lone_client": "one client of the largest budget, alone in a round, comes back as it was",
    "client_order": "the order in which replies arrive does not matter",
    "client_names": "what clients are called does not matter",
    "example_scale": "every number of examples times seven changes nothing",
    "client_halves": "a client weighs as much as two that return the same update from half its examples each",
    "untouched_expert": "an expert whose weights nobody changed stays bit for bit",
    "no_clients": "a round without replies leaves the state as it was",
    "predicted_bytes": "what is sent has exactly the bytes that costs predict; without this law, at most that many",
}
"""The laws of the test battery that a method may decline in `Method.exempt`."""

Elements = int | Callable[[ModelShape, int], int]
"""A number of float32 elements, or how to count them from the base's shape and the client's rank."""


@dataclass(frozen=True)
class Method:
    """A federated method.

    `varies` says what a tier's budget sets: the experts per token or the LoRA rank. `exempt` names laws of the
    battery that this method does not keep, each with the reason, `refuses` the protections it cannot run under, likewise.
    `pair_fraction` is the share of missing (token, expert) pairs that a client computes beside the routed ones, and
    `pairs_reach_input` says whether they send a gradient to the layer's input too; costs charge for both. `factors_up`
    names the factors that clients return, of A, B and a core R. `extra_down` and `extra_up` count what travels beside them,
    in float32 elements; down, below zero where less than an adapter travels. `fault` says what is wrong with the values of
    an update whose form is right, or nothing: what `aggregate` could not take.
    """

    name: str
    start: Callable[[dict[str, Tensor]], State]
    dispatch: Callable[[State, Profile], dict[str, Tensor]]
    install: Callable[[SparseModel, Tensors, Profile, torch.Generator], Hooks]
    aggregate: Callable[[State, Iterable[Update]], State]
    varies: Literal["top_k", "rank"] = "top_k"
    exempt: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[Protection, str] = field(default_factory=dict)
    pair_fraction: float = 0.0
    pairs_reach_input: bool = False
    factors_up: str = "AB"
    extra_down: Elements = 0
    extra_up: Elements = 0
    fault: Callable[[Update], str | None] = lambda update: None

    def profile(
        self, base: Base, client: str, tier: int, budget: float, tier_rank: int, num_examples: int = 0
    ) -> Profile:
        """What a client of a tier can afford under this method: fewer experts, or a smaller rank at K_max."""
        sparse = self.varies == "top_k"
        return Profile(
            client=client,
            tier=tier,
            budget=budget,
            top_k=budget_top_k(base.k_max, budget) if sparse else base.k_max,
            rank=base.rank if sparse else tier_rank,
            num_examples=num_examples,
        )

    def extra_elements(self, shape: ModelShape, rank: int) -> tuple[int, int]:
        """(down, up): float32 elements beside the factors of a client of this rank; a side factor at its largest."""
        down, up = self.extra_down, self.extra_up
        return down(shape, rank) if callable(down) else down, up(shape, rank) if callable(up) else up


def adapter_part(payload: Tensors) -> dict[str, Tensor]:
    """The adapter's tensors of a payload; whatever else a method sends has another prefix."""
    return {name: value for name, value in payload.items() if name.startswith("layers.")}


def side_part(payload: Tensors) -> dict[str, Tensor]:
    """The frozen side factor of a payload, `side.layers.{l}.{up|down}.A` and `.B`; empty for most methods."""
    return {name: value for name, value in payload.items() if name.startswith("side.")}


def activation_weights(update: Update, power: float, total: int) -> dict[str, Weight]:
    """Weight of each tensor in activation-aware averaging, per expert: (tokens routed to it / total)^power times examples.

    A trained router and attention learn from every token, whoever was chosen: their weight is the examples alone. So is all
    at power 0.
    """
    share = (update.expert_tokens.double() / max(total, 1)) ** power * update.num_examples
    layers = {name: layer_of_experts(name) for name in update.adapters}
    return {name: update.num_examples if layer is None else share[layer] for name, layer in layers.items()}


def install_adapter(model: SparseModel, payload: Tensors, profile: Profile, alpha: float) -> None:
    """The common part of `install`: the adapter in place, the client's K set."""
    model.load_adapter(adapter_part(payload), alpha, side_part(payload))
    model.set_top_k(profile.top_k)


def pack(state: State) -> dict[str, Tensor]:
    """A state as one flat dict of tensors, for disk."""
    return {**state.adapters, **{f"server.{name}": value for name, value in state.extras.items()}}


def unpack(tensors: dict[str, Tensor]) -> State:
    """The state that a checkpoint's or a run's tensors hold."""
    extras = {name.removeprefix("server."): value for name, value in tensors.items() if name.startswith("server.")}
    return State({name: value for name, value in tensors.items() if not name.startswith("server.")}, extras)
