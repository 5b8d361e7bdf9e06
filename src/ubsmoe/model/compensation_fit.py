"""Fit a compensation on the activations of a base: layer by layer, on what the reduced model itself puts into each layer.

For every K in use, in one forward pass of the calibration text at this K: where the text arrives at a layer, everything below is
compensated already; there compute what is missing, y = sum over T(x) of w_i E_i(x) minus what is run; fit the form to it, put it
in place, and let the layer answer with it. Labels and test data are never seen. The adapter and the modulation that are in place
stay there: a later fit follows them.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from ubsmoe import progress
from ubsmoe.maths.compensation import Sums, fit_low_rank
from ubsmoe.model.compensation import PREFIX, Compensation
from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel_choice import run_assignments
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.routing import Passing
from ubsmoe.model.slices import channels_by_importance
from ubsmoe.model.surgery import SparseModel

Seen = TypeVar("Seen")
Form = Literal["map", "stand_ins", "elementwise", "constant", "none"]
Text = Mapping[str, Tensor]
"""input_ids and attention_mask [B, T] of all texts to fit on, padded."""


@checked(frozen=True, config=ConfigDict(allow_inf_nan=False))
class FormSettings:
    """What stands for the skipped experts."""

    form: Form = "map"
    """C(x): a map per layer and K, stand-ins or vectors or constants per expert, or nothing but the gate weights of K_max."""
    rank: Annotated[int, Field(ge=1)] = 64
    """r of a map or of the stand-ins."""
    slices: Annotated[int, Field(ge=1)] = 1
    """n: run n K experts at 1 / n of their width instead of K."""
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    """lambda, as a share of the features' mean variance."""
    tokens: Annotated[int, Field(ge=64)] = 4096
    """Tokens of text to fit on, which the base writes itself."""
    fit: Literal["server", "clients"] = "server"
    """Who fits: the server, on that text, or the clients of the largest tier, by sums over so many tokens of their own."""
    every: Annotated[int, Field(ge=0)] = 0
    """Rounds from one fit to the next; 0 fits once, before round 1."""


@dataclass(frozen=True)
class Fitted:
    """Tensors `compensation.{layer}.{K}.{name}` and `compensation.{layer}.channels`, and the share explained, by K and layer."""

    tensors: dict[str, Tensor]
    explained: dict[int, list[float]]


@torch.no_grad()
def fit_compensation(model: SparseModel, text: Text, top_ks: Iterable[int], settings: FormSettings) -> Fitted:
    """Fit every K below K_max on calibration text.

    Args:
        model: with an adapter in place, and whatever moves its routing. Its K and its compensation are changed.
        text: a few thousand tokens do.
        top_ks: the budgets in use.
        settings: the form.

    Raises:
        ValueError: for more slices than an expert has channels, or a family whose experts cannot be sliced.
    """
    tensors: dict[str, Tensor] = {}
    explained: dict[int, list[float]] = {}
    if settings.slices > 1:
        tensors |= _channels(model, text, settings.slices)
    for top_k in sorted({k for k in top_ks if k < model.k_max}):
        model.set_compensation(tensors)
        model.set_top_k(top_k)
        fitted = _at_every_layer(model, text, partial(_fit_in_place, settings=settings))
        explained[top_k] = [share for _, share in fitted]
        for layer, (found, _) in zip(model.layers, fitted, strict=True):
            tensors |= {f"{PREFIX}{layer.index}.{top_k}.{n}": t for n, t in vars(found).items() if t is not None}
    model.set_compensation(tensors)
    return Fitted({name: value.cpu() for name, value in tensors.items()}, explained)


def missing_sum(layer: SparseLayer, seen: Passing) -> Float[Tensor, "T h"]:
    """sum over T(x) of w_i E_i(x), minus what is run of it."""
    whole = experts_sum(seen.hidden, seen.considered, seen.gates, *layer.whole_weights(seen.hidden))
    return (whole - experts_sum(seen.hidden, seen.run, seen.run_gates, *layer.run_weights(seen.hidden))).float()


def _fit_in_place(layer: SparseLayer, seen: Passing, settings: FormSettings) -> tuple[Compensation, float]:
    """The form of one layer, which acts from now on, and the share of the missing sum that it explains."""
    missing, own = missing_sum(layer, seen), layer.routing.compensation
    assert own is not None
    found = _FORMS[settings.form](layer, seen, missing, settings)
    own.by_top_k[layer.routing.top_k] = found.to(seen.hidden.dtype)
    left = missing - found(seen.hidden.to(missing.dtype), seen.skipped)
    return found, 1 - float(left.square().sum() / missing.square().sum().clamp_min(1e-30))


def _fit_map(layer: SparseLayer, seen: Passing, missing: Float[Tensor, "T h"], settings: FormSettings) -> Compensation:
    features = torch.cat([seen.hidden, seen.skipped.to(seen.hidden.dtype)], dim=1)
    found = fit_low_rank(Sums.of(features, missing), settings.rank, settings.ridge)
    return Compensation(u=found.u.float(), v=found.v.float(), c=found.c.float())


def _fit_stand_ins(
    layer: SparseLayer, seen: Passing, missing: Float[Tensor, "T h"], settings: FormSettings
) -> Compensation:
    """Each expert's own regression on P x; P from the regression of all experts' outputs side by side."""
    outputs = [_expert_output(layer, seen, expert) for expert in range(layer.num_experts)]
    full = [fit_low_rank(Sums.of(x, y), x.shape[1], settings.ridge) for x, y in outputs if len(x)]
    spread = torch.linalg.cholesky(_covariance(seen.hidden, settings.ridge))
    # rows of all experts' maps, in the metric of x: their leading right singular vectors, taken back to x
    stacked = torch.cat([one.v @ one.u for one in full]) @ spread
    right = torch.linalg.eigh(stacked.T @ stacked).eigenvectors.flip(-1)[:, : settings.rank]
    p = torch.linalg.solve(spread.T, right).T
    q, b = torch.zeros(len(outputs), seen.hidden.shape[1], len(p)), torch.zeros(len(outputs), seen.hidden.shape[1])
    for expert, (x, y) in enumerate(outputs):
        if len(x):
            own = fit_low_rank(Sums.of(x.double() @ p.T, y), len(p), settings.ridge)
            q[expert], b[expert] = (own.v @ own.u).float(), own.c.float()
    return Compensation(p=p.float(), q=q.to(seen.hidden.device), b=b.to(seen.hidden.device))


def _fit_elementwise(
    layer: SparseLayer, seen: Passing, missing: Float[Tensor, "T h"], settings: FormSettings
) -> Compensation:
    outputs = (_expert_output(layer, seen, expert) for expert in range(layer.num_experts))
    tiny = settings.ridge * seen.hidden.square().mean()
    return Compensation(e=torch.stack([(x * y).sum(0) / (x.square().sum(0) + tiny) for x, y in outputs]).float())


def _fit_constant(
    layer: SparseLayer, seen: Passing, missing: Float[Tensor, "T h"], settings: FormSettings
) -> Compensation:
    outputs = (_expert_output(layer, seen, expert)[1] for expert in range(layer.num_experts))
    return Compensation(b=torch.stack([y.sum(0) / max(len(y), 1) for y in outputs]).float())


def _fit_none(layer: SparseLayer, seen: Passing, missing: Float[Tensor, "T h"], settings: FormSettings) -> Compensation:
    return Compensation()


_FORMS = {
    "map": _fit_map,
    "stand_ins": _fit_stand_ins,
    "elementwise": _fit_elementwise,
    "constant": _fit_constant,
    "none": _fit_none,
}


def _channels(model: SparseModel, text: Text, slices: int) -> dict[str, Tensor]:
    """The channels of every expert that send most into its output, on the tokens that choose it: |w act_j| || W2_j ||."""
    model.set_compensation({})
    model.set_top_k(model.k_max)
    widths = [layer.shapes()["down"][1] for layer in model.layers]
    if odd := [width for width in widths if width % slices]:
        raise ValueError(f"slices must divide the experts' width {odd[0]}, got {slices}")
    importance = _at_every_layer(model, text, _importance)
    return {
        f"{PREFIX}{layer.index}.channels": channels_by_importance(own, slices)
        for layer, own in zip(model.layers, importance, strict=True)
    }


def _importance(layer: SparseLayer, seen: Passing) -> Float[Tensor, "M f"]:
    base, rows = ExpertWeights.of(layer.experts), []
    for expert in range(layer.num_experts):
        own = seen.considered == expert
        weight, x = (seen.gates * own).sum(-1, keepdim=True)[own.any(-1)], seen.hidden[own.any(-1)]
        pre = x @ base.up[expert] + (0 if base.up_bias is None else base.up_bias[expert])
        sent = (weight * base.activation(pre)).float().square().sum(0).sqrt()
        sent = sent if len(x) else torch.ones_like(sent)  # no token chose it: by its weights alone
        rows.append(sent * base.down[expert].float().norm(dim=1))
    return torch.stack(rows)


class _Enough(Exception):
    """The last layer was reached; what comes after it need not run."""


def _at_every_layer(model: SparseModel, text: Text, look: Callable[[SparseLayer, Passing], Seen]) -> list[Seen]:
    """What `look` makes of what goes through each layer's experts, before they answer, in one forward pass."""
    found: list[Seen] = []

    def probe(layer: SparseLayer, passing: Passing) -> None:
        progress.at("fits the compensation, layer", layer.index, len(model.layers))
        found.append(look(layer, passing))
        if layer is model.layers[-1]:
            raise _Enough

    for layer in model.layers:
        layer.routing = replace(layer.routing, probe=partial(probe, layer))
    try:
        with suppress(_Enough):
            model.model(**{name: value.to(model.device) for name, value in text.items()}, use_cache=False)
    finally:
        for layer in model.layers:
            layer.routing = replace(layer.routing, probe=None)
    return found


def experts_sum(
    hidden: Float[Tensor, "T h"],
    index: Int[Tensor, "T K"],
    gates: Float[Tensor, "T K"],
    base: ExpertWeights,
    lora: Lora,
) -> Float[Tensor, "T h"]:
    """At each token, the sum of its `gates` times the outputs of its experts `index`."""
    token = torch.arange(len(hidden), device=hidden.device).repeat_interleave(index.shape[1])
    return run_assignments(hidden, token, index.reshape(-1), gates.reshape(-1), base, lora)


def _expert_output(layer: SparseLayer, seen: Passing, expert: int) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n h"]]:
    """x and E_i(x) of the tokens that have this expert in T(x)."""
    x = seen.hidden[(seen.considered == expert).any(-1)]
    index, gates = torch.full((len(x), 1), expert, device=x.device), torch.ones(len(x), 1, device=x.device)
    return x, experts_sum(x, index, gates, *layer.whole_weights(x))


def _covariance(x: Float[Tensor, "T h"], ridge: float) -> Float[Tensor, "h h"]:
    x = x.double()
    own = x.T @ x / len(x)
    return own + ridge * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
