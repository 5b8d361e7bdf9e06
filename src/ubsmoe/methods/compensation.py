r"""Compensation for skipped experts, a part: a client at K < K_max answers almost as at K_max, for a few percent of an expert.

    y(x) = sum_{i in A(x)} w_i E_i(x) + C_K(x),    C_K(x) ~ sum_{i in T(x) \\ A(x)} w_i E_i(x)

T(x) are the K_max experts that the base runs, A(x) the K of largest gate weight, w_i the gate weights at K_max. The forms of C
stand in model/compensation.py. The server fits them before round 1, and every so many rounds, on text that the base writes
itself (server/calibration.py), so that no data of a client is needed; or the clients of the largest tier do, by sums
(compensation_sums.py). They travel with the adapter and hold in training, evaluation and generation. At K_max nothing changes, to
the bit.

At K = 1 what is lost is a function and no gradient, which neither DMR nor a pseudo-gradient gives back (docs/results.md).

Source: ours. Known before: a constant (MoNE, arXiv 2507.00390), trained vectors (Compressed Experts, arXiv 2503.00634). To our
knowledge new: one map for the sum, the gates among its features, in closed form; with slices; in federated training.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ubsmoe.costs.compensation import Skipped
from ubsmoe.costs.shape import ModelShape, Trained
from ubsmoe.costs.traffic import Traffic
from ubsmoe.costs.workload import WireDtype
from ubsmoe.messages import Profile, Tensors
from ubsmoe.methods.compensation_sums import with_clients_sums
from ubsmoe.methods.method import Calibration, Hooks, Method, RunShape, State, refuse
from ubsmoe.model.compensation import PREFIX
from ubsmoe.model.compensation_fit import FormSettings, Text, fit_compensation
from ubsmoe.model.surgery import SparseModel


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class CompensationState:
    """What was fitted, `{layer}.{K}.{name}` and `{layer}.channels`; the share explained is [K in use, L]."""

    compensation: Mapping[str, Tensor]
    explained: Tensor

    def by_name(self) -> dict[str, Tensor]:
        """All of it, by the names that `SparseModel.set_compensation` takes."""
        return {PREFIX + name: value for name, value in self.compensation.items()}


def with_compensation(method: Method, shape: RunShape, settings: FormSettings) -> Method:
    """The method, its clients below K_max compensated.

    Args:
        method: what clients and server do otherwise.
        shape: sizes of the run, and the K in use.
        settings: [method.compensation].

    Raises:
        ValueError: for a method that refuses it.
    """
    refuse(method, "compensation")
    if not method.varies_top_k(shape):
        return method  # every client runs K_max experts: nothing is skipped
    least = int(settings.form == "none" or settings.fit == "clients")
    small = sorted({max(k, least) for k in shape.top_ks if k < shape.k_max})
    elastic = len(small) if shape.elastic else 0
    sums = len(small) if settings.fit == "clients" else 0
    skipped = Skipped(settings.form, settings.rank, settings.slices, shape.k_max, least, elastic, sums)

    def start(adapter: dict[str, Tensor]) -> State:
        return method.start(adapter).having(CompensationState({}, torch.zeros(len(small), shape.num_layers)))

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        payload = method.dispatch(state, profile)
        if profile.top_k >= shape.k_max and not shape.elastic:
            return payload
        larger = [str(top_k) for top_k in small if top_k >= profile.top_k]
        wanted = {"channels", *(map(str, small) if shape.elastic else larger[:1])}
        own = state.of(CompensationState).compensation
        return payload | {PREFIX + name: value for name, value in own.items() if name.split(".")[1] in wanted}

    def install(model: SparseModel, payload: Tensors, profile: Profile, generator: torch.Generator) -> Hooks:
        own = {name: value for name, value in payload.items() if name.startswith(PREFIX)}
        if own or settings.fit == "server":  # before the clients' first sums there is nothing to put in place
            model.set_compensation(own)
        return method.install(model, payload, profile, generator)

    def fit(state: State, model: SparseModel, text: Text, profile: Profile, generator: torch.Generator) -> State:
        try:
            method.install(model, method.dispatch(state, profile), profile, generator)
            found = fit_compensation(model, text, small, settings)
        finally:
            model.clear()
        tensors = {name.removeprefix(PREFIX): value for name, value in found.tensors.items()}
        return keep(state, tensors, torch.tensor([found.explained[top_k] for top_k in small]))

    def keep(state: State, tensors: dict[str, Tensor], explained: Tensor) -> State:
        return state.having(CompensationState(tensors, explained))

    def event(state: State) -> dict[str, object]:
        shares = state.of(CompensationState).explained.tolist()
        return {**method.event(state), "explained": {str(k): own for k, own in zip(small, shares, strict=True)}}

    def traffic(base: ModelShape, rank: int, trained: Trained, wire_dtype: WireDtype) -> Traffic:
        down = skipped.sent_bytes(base) if small else 0
        return method.traffic(base, rank, trained, wire_dtype) + Traffic(down, 0)

    compensated = replace(
        method,
        start=start,
        dispatch=dispatch,
        install=install,
        event=event,
        keeps=(*method.keeps, CompensationState),
        traffic=traffic,
        exempt={**method.exempt, "predicted_bytes": "a client that skips no expert is sent no compensation"},
        skipped=skipped,
        calibration=Calibration(fit, settings.tokens, settings.every) if small and settings.form != "none" else None,
    )
    if settings.fit == "clients" and small:
        return with_clients_sums(compensated, shape, settings, small, keep)
    return compensated
