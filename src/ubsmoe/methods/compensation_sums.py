r"""The fit by the clients' sums: exact federated least squares, so that no text moves and the server needs none.

    client of the largest tier    G_c = sum z z^T,  H_c = sum z y^T, ...    over its own examples, once, before it trains
    server                        G = sum_c G_c, ...   then the closed form of maths/compensation.py

Sums are whole numbers of 2^-24 (`Sums.fixed`): they add up without rounding, so the fit is the same to the bit in any order of
clients, and that on the pooled examples but for those roundings. They are asked for in round 1, every `every` rounds, and as
long as no client of the largest tier has answered; the round after has the map, and until then clients run as without one.

One client's sums are in the fit with the weight of its tokens. So they must be those of some tokens, of no more than a client
looks at, and the root mean squares of z and y are held against those of the round's first clients (server/peers.py).

Source: ours.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ubsmoe.costs.shape import ModelShape, Trained
from ubsmoe.costs.traffic import Traffic
from ubsmoe.costs.workload import WireDtype
from ubsmoe.maths.compensation import Sums, fit_low_rank
from ubsmoe.messages import Profile, Tensors, Update
from ubsmoe.methods.method import Contribution, Hooks, Method, RunShape, State, observing
from ubsmoe.methods.refusals import Refusable
from ubsmoe.model.compensation_fit import FormSettings
from ubsmoe.model.compensation_sums import no_sums, passed_sums
from ubsmoe.model.surgery import SparseModel

SUMS, WANTED = "sums", "fit.top_ks"
INT64 = 8
LARGEST = 2.0**56  # of a client's sum: those of a hundred clients still fit an int64
REFUSES: Mapping[Refusable, str] = {
    "robust": "its rules average weights, and no rule of it averages outer products; fit on the server, or leave [robust] out",
    "privacy": "noise on the mean of updates does not cover outer products of hidden states; fit on the server",
    "secure_aggregation": "words of secure sums have bounds that outer products of hidden states do not keep; fit on the server",
}


@dataclass(frozen=True)
class FitState:
    """How many rounds have been aggregated, and whether any of them brought a fit."""

    rounds: Tensor
    fitted: Tensor


Keep = Callable[[State, dict[str, Tensor], Tensor], State]
"""A state, the maps' tensors `{layer}.{K}.{u|v|c}`, the share explained [K in use, L] -> the state that has them."""


def with_clients_sums(method: Method, shape: RunShape, settings: FormSettings, small: list[int], keep: Keep) -> Method:
    """The method, its maps fitted from the sums of the largest tier's clients.

    Args:
        method: with a compensation.
        shape: sizes of the run.
        settings: [method.compensation].
        small: the K below K_max in use.
        keep: puts what was fitted into a state.

    Raises:
        ValueError: for a form that is more than one map, or where no tier runs K_max experts.
    """
    if settings.form != "map" or settings.slices > 1:
        raise ValueError(
            f"compensation.fit 'clients' sums what one whole map needs, got form {settings.form!r} with slices "
            f"{settings.slices}; set form = 'map' and slices = 1, or fit = 'server'"
        )
    if shape.k_max not in shape.top_ks:
        raise ValueError(
            f"compensation.fit 'clients' asks clients that run K_max = {shape.k_max} experts, and no tier does; add budget 1 to "
            "tiers.budgets, or set fit = 'server'"
        )
    wanted = torch.tensor(small)

    def start(adapter: dict[str, Tensor]) -> State:
        return method.start(adapter).having(FitState(torch.tensor(0), torch.tensor(0)))

    def is_due(state: State) -> bool:
        own = state.of(FitState)
        return not own.fitted or bool(settings.every and int(own.rounds) % settings.every == 0)

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        payload = method.dispatch(state, profile)
        return payload | {WANTED: wanted} if profile.top_k == shape.k_max and is_due(state) else payload

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        hooks = method.install(model, payload, profile, generator)
        if WANTED not in payload:
            return hooks
        found = no_sums(model, small)

        def look(batches: Iterable[Mapping[str, Tensor]]) -> None:
            found.update(passed_sums(model, batches, small, settings.tokens))

        return hooks.and_then(Hooks(before_training=[look], extras=lambda: _named(found)))

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        totals: dict[str, Tensor] = {}
        seen = 0

        def see(one: Contribution) -> None:
            nonlocal seen
            seen += 1
            own = {name: value for name, value in one.extras.items() if name.startswith(f"{SUMS}.")}
            totals.update({name: totals[name] + value if totals else value for name, value in own.items()})

        after = method.aggregate(state, observing(contributions, see))
        if not seen:
            return after
        own = after.of(FitState)
        found = _fit(totals, shape.num_layers, small, settings) if totals else None
        after = after.having(FitState(own.rounds + 1, torch.tensor(int(bool(own.fitted) or found is not None))))
        return keep(after, *found) if found else after

    most = math.inf if shape.batch_tokens is None else settings.tokens + shape.batch_tokens

    def validate_update(update: Update) -> str | None:
        for place, own in _places(update.extras):
            if own.count > most:
                return f"{place}.count is of {own.count:g} tokens, a client looks at {most:g} at most"
            if fault := own.fault():
                return f"{place}: {fault}"
        return method.validate_update(update)

    def judged(extras: Tensors) -> Tensors:
        sizes = {
            f"{place.replace('.', '-')}.{name}": (total / own.count).sqrt()
            for place, own in _places(extras)
            for name, total in (("z", own.gram.diagonal()), ("y", own.energy))
        }
        return {**method.judged(extras), **sizes}

    def traffic(base: ModelShape, rank: int, trained: Trained, wire_dtype: WireDtype) -> Traffic:
        up = method.skipped.sums_bytes(base) if method.skipped else 0
        return method.traffic(base, rank, trained, wire_dtype) + Traffic(INT64 * len(small), up)

    return replace(
        method,
        start=start,
        dispatch=dispatch,
        install=install,
        aggregate=aggregate,
        traffic=traffic,
        keeps=(*method.keeps, FitState),
        refuses={**method.refuses, **REFUSES},
        ranges={**method.ranges, SUMS: (-LARGEST, LARGEST)},
        exempt={
            **method.exempt,
            "predicted_bytes": "clients of the largest tier alone send sums, in the rounds of a fit",
        },
        calibration=None,
        validate_update=validate_update,
        judged=judged,
    )


def _named(found: Mapping[tuple[int, int], Sums]) -> dict[str, Tensor]:
    return {
        f"{SUMS}.{layer}.{top_k}.{name}": value
        for (layer, top_k), sums in found.items()
        for name, value in sums.fixed().items()
    }


def _places(extras: Tensors) -> Iterator[tuple[str, Sums]]:
    """The sums among extras, one place after another, under the beginning of its names."""
    for place in sorted({name.rpartition(".")[0] for name in extras if name.startswith(f"{SUMS}.")}):
        own = {name: value for name, value in extras.items() if name.rpartition(".")[0] == place}
        yield place, Sums.of_fixed({name.rpartition(".")[2]: value for name, value in own.items()})


def _fit(
    totals: Mapping[str, Tensor], layers: int, small: list[int], settings: FormSettings
) -> tuple[dict[str, Tensor], Tensor] | None:
    """The maps and what they explain; None if sums are such that no regression makes anything of them."""
    tensors: dict[str, Tensor] = {}
    explained = torch.zeros(len(small), layers)
    for place, sums in _places(totals):
        try:
            own = fit_low_rank(sums, settings.rank, settings.ridge)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return None
        where = place.removeprefix(f"{SUMS}.")
        layer, top_k = map(int, where.split("."))
        tensors |= {f"{where}.{name}": getattr(own, name).float() for name in ("u", "v", "c")}
        explained[small.index(top_k), layer] = own.explained
    return (tensors, explained) if all(value.isfinite().all() for value in tensors.values()) else None
