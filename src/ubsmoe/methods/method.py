"""What a federated method is: a value made of four functions.

    start(adapter)                      -> State      what the server holds before round 1
    dispatch(state, profile)            -> payload    what one client (or one tier's evaluation) gets
    install(model, payload, profile, generator) -> Hooks   put it on the shared base; leaves no trace after model.clear()
    aggregate(state, contributions)     -> State      consume the contributions one by one, in client order

A method is one file that reads like its section of the paper, and one line in the table. What it needs inside the training loop it
returns as hooks. A part, such as Dynamic Modulated Routing, takes a method and returns one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ubsmoe.costs.compensation import Skipped
from ubsmoe.costs.shape import FLOAT32, ModelShape, Trained, budget_top_k
from ubsmoe.costs.traffic import Traffic, adapter_traffic, update_bytes
from ubsmoe.costs.workload import WireDtype
from ubsmoe.errors import UserError
from ubsmoe.maths import routing
from ubsmoe.maths.means import Mean, Weight, WeightedMean
from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.hooks import Hooks as Hooks
from ubsmoe.methods.refusals import Refusable
from ubsmoe.methods.state import State as State
from ubsmoe.model.adapter import layer_of_experts
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True)
class Contribution:
    """What a method averages: a client's update as it counts, or the noisy mean of a private round.

    `weight` is n_c, the number of examples. `expert_tokens` [L, M] are the tokens routed to each expert, out of `tokens`; each row
    sums to `assignments`, the (token, expert) assignments of a layer. `extras` is what one method alone needs. `loss` is the
    mean training loss, None where it is not told. `weights` are those of its tensors where they are settled: in the sum of a round.
    """

    client: str
    weight: float
    adapters: Tensors
    expert_tokens: Tensor
    tokens: float
    assignments: float
    extras: Tensors = field(default_factory=dict)
    loss: float | None = None
    weights: "Mapping[str, Weight] | None" = None

    @cached_property
    def utilization(self) -> Float[Tensor, "L M"]:
        """Share of the tokens that used each expert, float64: a_i / n."""
        return routing.utilization(self.expert_tokens, self.tokens)

    @cached_property
    def shares(self) -> Float[Tensor, "L M"]:
        """Share of the assignments that went to each expert, float64: each row sums to 1."""
        return self.expert_tokens.double() / max(self.assignments, 1)


def contribution(update: Update, most: float = math.inf) -> Contribution:
    """An update as it counts when nothing robust or private acts on it.

    Args:
        update: what a client sent.
        most: examples that it may count for; a client that announced more counts as if it had as many, tokens included.
    """
    share = min(1.0, most / max(update.num_examples, 1))
    return Contribution(
        client=update.client,
        weight=share * update.num_examples,
        adapters=update.adapters,
        expert_tokens=update.expert_tokens if share == 1 else share * update.expert_tokens.double(),
        tokens=share * update.tokens,
        assignments=share * update.assignments,
        extras=update.extras,
        loss=update.loss,
    )


Weigh = Callable[[Contribution], Weight | dict[str, Weight]]
"""How much a contribution weighs: one number, or per tensor a number or one per expert [M]."""


def by_examples(one: Contribution) -> Weight:
    """n_c, the weight of federated averaging."""
    return one.weight


def by_use(exponent: float) -> Weigh:
    """The weights of activation-aware averaging: (a_{c,i} / tokens_c)^t n_c for expert i.

    A trained router and attention learn from every token, whoever was chosen: their weight is the examples alone. So is all
    at t = 0.
    """

    def weigh(one: Contribution) -> dict[str, Weight]:
        use = one.utilization**exponent * one.weight
        layers = {name: layer_of_experts(name) for name in one.adapters}
        return {name: one.weight if layer is None else use[layer] for name, layer in layers.items()}

    return weigh


def observing(contributions: Iterable[Contribution], see: Callable[[Contribution], None]) -> Iterator[Contribution]:
    """The same contributions, each shown to `see` as it passes: how a part looks at what the method inside it aggregates."""
    for one in contributions:
        see(one)
        yield one


@dataclass(frozen=True)
class RunShape:
    """What a method may know about the run: sizes of the base and of the adapter, and how the run averages.

    `seed` is the run's, for draws that server and clients make alike. `batch_tokens` is the most tokens of one training batch.
    `shared_a` says that all experts of a layer start from one A, `attention` that attention projections have LoRA too. `mean`
    makes the running mean that methods average with: plain, or Byzantine-robust. `weigh` gives its weights where a method has none.
    `side_rank` is the most directions that all rounds of the run can fold into a side factor, None for no bound. `top_ks` are the K
    in use, 0 below one expert; with `elastic` a client may run any up to its own. `rank_at_budget`: rank varies, and K with it.
    `num_clients` is how many clients there are, of which a round may ask fewer.
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
    weigh: Weigh = by_examples
    side_rank: int | None = None
    top_ks: tuple[int, ...] = ()
    elastic: bool = False
    rank_at_budget: bool = False
    batch_tokens: int | None = None
    num_clients: int = 1


@dataclass(frozen=True)
class Calibration:
    """What the server fits on text before round 1 and `every` so many rounds (0: no more): `tokens` of it, from the base.

    `fit(state, model, text, profile, generator)` gives the next state, and the base is as it was; `profile` is the largest tier's.
    """

    fit: Callable[[State, SparseModel, Mapping[str, Tensor], Profile, torch.Generator], State]
    tokens: int
    every: int


TrafficOf = Callable[[ModelShape, int, Trained, WireDtype], Traffic]
"""Bytes of one client's tensors in one round, from the base's shape, the client's rank, what is trained, the wire's precision."""


@dataclass(frozen=True)
class Method:
    """A federated method.

    `varies` says what a tier's budget sets: the experts per token or the LoRA rank. `keeps` names the classes of its state's parts.
    `exempt` names properties of the battery that this method does not have, `refuses` sections of a run file that make no sense
    with it, each with the reason. `event` is what the method tells of its state in a round's event. `pair_fraction` is the share
    of missing (token, expert) assignments that a client computes beside the routed ones, and `pairs_reach_input` says whether
    they send a gradient to the layer's input too; costs charge for both. `traffic` counts the bytes of a client's tensors, at
    most where they vary, `side_elements` the float32 numbers of a side factor. `weigh` gives the weights by which `aggregate`
    averages adapters, so that a client can add to a sum; a method that needs more refuses `secure_aggregation`. `ranges` says where
    the values of an extra lie, by its name or by what its name begins with; an update outside is dropped, and a machine refuses a
    task outside. `validate_update` says what else is wrong with the values of an update whose names and shapes are right, or
    nothing. `judged`: what of extras updates are compared by; `skipped`: what stands for skipped experts; `calibration`: the fit;
    `client_state`: the parts of its state that go with what each client keeps for itself (`Hooks.keeps`).
    """

    name: str
    start: Callable[[dict[str, Tensor]], State]
    dispatch: Callable[[State, Profile], dict[str, Tensor]]
    install: Callable[[SparseModel, Tensors, Profile, torch.Generator], Hooks]
    aggregate: Callable[[State, Iterable[Contribution]], State]
    varies: Literal["top_k", "rank"] = "top_k"
    keeps: tuple[type, ...] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[Refusable, str] = field(default_factory=dict)
    event: Callable[[State], dict[str, Any]] = lambda state: {}
    pair_fraction: float = 0.0
    pairs_reach_input: bool = False
    traffic: TrafficOf = adapter_traffic
    weigh: Weigh = by_examples
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    side_elements: Callable[[ModelShape, Trained], int] = lambda base, trained: 0
    skipped: Skipped | None = None
    calibration: Calibration | None = None
    client_state: tuple[type, ...] = ()
    validate_update: Callable[[Update], str | None] = lambda update: None
    judged: Callable[[Tensors], Tensors] = lambda extras: {n: v for n, v in extras.items() if v.is_floating_point()}

    def extras_range(self, name: str) -> tuple[float, float]:
        """The smallest and the largest value that this extra may have."""
        return self.ranges.get(name.partition(".")[0], (-math.inf, math.inf))

    def fault(self, update: Update) -> str | None:
        """What is wrong with the values of an update whose names and shapes are right; None if nothing is."""
        return self.out_of_range(update.extras) or self.validate_update(update)

    def out_of_range(self, extras: Tensors) -> str | None:
        """Which of these, up or down, lies outside its range; None if none does."""
        for name, value in extras.items():
            low, high = self.extras_range(name)
            if (low, high) != (-math.inf, math.inf) and not ((value >= low) & (value <= high)).all():
                return f"{name} reaches from {value.min():g} to {value.max():g}, expected {low:g} to {high:g}"
        return None

    def check_stateless(self) -> None:
        """Raise UserError if clients have to keep something from round to round, which nodes of Flower do not."""
        if self.client_state:
            raise UserError(
                f"method.name: under {self.name} each client keeps tensors of its own from round to round, and nodes of Flower "
                "keep nothing; leave out --engine, so that the run folder holds them"
            )

    def varies_top_k(self, shape: RunShape) -> bool:
        """Whether a tier's budget sets its experts per token under this method."""
        return self.varies == "top_k" or shape.rank_at_budget

    def profile(
        self, shape: RunShape, client: str, tier: int, budget: float, tier_rank: int, num_examples: int = 0
    ) -> Profile:
        """What a client of a tier can afford under this method: fewer experts, a smaller rank, or both."""
        least = self.skipped.least_top_k if self.skipped else 1
        return Profile(
            client=client,
            tier=tier,
            budget=budget,
            top_k=budget_top_k(shape.k_max, budget, least) if self.varies_top_k(shape) else shape.k_max,
            rank=shape.rank if self.varies == "top_k" else tier_rank,
            num_examples=num_examples,
        )


def adapter_part(payload: Tensors) -> dict[str, Tensor]:
    """The adapter's tensors of a payload; whatever else a method sends has another prefix."""
    return {name: value for name, value in payload.items() if name.startswith("layers.")}


def side_part(payload: Tensors) -> dict[str, Tensor]:
    """The frozen side factor of a payload, `side.layers.{l}.{up|down}.A` and `.B`; empty for most methods."""
    return {name: value for name, value in payload.items() if name.startswith("side.")}


def install_adapter(model: SparseModel, payload: Tensors, profile: Profile, alpha: float) -> None:
    """The common part of `install`: the adapter in place, the client's K set."""
    model.load_adapter(adapter_part(payload), alpha, side_part(payload))
    model.set_top_k(profile.top_k)


def refuse(method: Method, section: Refusable) -> None:
    """Raise UserError if a section of the run file makes no sense with the method."""
    if reason := method.refuses.get(section):
        name = f"[method.{section}]" if section in ("dmr", "pg", "averaging", "compensation") else f"[{section}]"
        raise UserError(
            f"{'micro_batch' if section == 'micro_batch' else name} cannot be combined with method {method.name}: {reason}"
        )


def sending(traffic: TrafficOf, down: int = 0, up: int = 0) -> TrafficOf:
    """The traffic of a method that sends so many float32 numbers more, down to a client and up from it."""

    def both(base: ModelShape, rank: int, trained: Trained, wire_dtype: WireDtype) -> Traffic:
        return traffic(base, rank, trained, wire_dtype) + Traffic(FLOAT32 * down, FLOAT32 * up)

    return both


def keeping_back(traffic: TrafficOf, factor: Literal["A", "B"]) -> TrafficOf:
    """The traffic of a method whose clients do not train this factor of the adapter, and so do not send it up."""

    def both(base: ModelShape, rank: int, trained: Trained, wire_dtype: WireDtype) -> Traffic:
        kept = update_bytes(base, rank, wire_dtype, factors=factor, trained=replace(trained, router=False))
        return traffic(base, rank, trained, wire_dtype) + Traffic(0, -kept)

    return both
