r"""The sums that a map for skipped experts is fitted from, on a client's own text, in one pass at K_max.

    z = [x ; s]    x the layer's input in the full model, s_i = w_i for i in T(x) \ A_K(x), else 0      y = sum_i s_i E_i(x)

A client of the largest tier runs all of T(x) anyway, so one pass serves every layer and every K in use. The server's own fit
goes layer by layer on the inputs that the reduced model itself makes; in a federation that would take a round per layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ubsmoe.maths.compensation import Sums
from ubsmoe.model.compensation_fit import experts_sum
from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.routing import Passing
from ubsmoe.model.surgery import SparseModel

Place = tuple[int, int]
"""A layer and a K."""


def no_sums(model: SparseModel, top_ks: Sequence[int]) -> dict[Place, Sums]:
    """The sums over no tokens."""
    hidden = model.layers[0].shapes()["up"][1]
    zero = Sums.zero(hidden + model.num_experts, hidden, model.device)
    return {(layer.index, top_k): zero for layer in model.layers for top_k in top_ks}


@torch.no_grad()
def passed_sums(
    model: SparseModel, batches: Iterable[Mapping[str, Tensor]], top_ks: Sequence[int], tokens: int
) -> dict[Place, Sums]:
    """The sums of every layer and K over at least `tokens` tokens of text, or all there is.

    Args:
        model: with an adapter in place, at K_max.
        batches: input_ids and attention_mask.
        top_ks: the K to fit, below K_max.
        tokens: how much of the text is looked at, in whole batches.
    """
    found, routings, seen = no_sums(model, top_ks), [layer.routing for layer in model.layers], 0

    def watch(layer: SparseLayer) -> None:
        def probe(passing: Passing) -> None:
            for top_k in top_ks:
                found[layer.index, top_k] += _sums(layer, passing, top_k)

        layer.routing = replace(layer.routing, probe=probe)

    try:
        for layer in model.layers:
            watch(layer)
        for batch in batches:
            if seen >= tokens:
                break
            placed = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            model.model(**placed, use_cache=False)
            seen += int(batch["attention_mask"].sum())
    finally:
        for layer, routing in zip(model.layers, routings, strict=True):
            layer.routing = routing
    return found


def _sums(layer: SparseLayer, seen: Passing, top_k: int) -> Sums:
    """What A(x) of this K leaves out of T(x): all but the K of largest gate weight, or of largest score plus bias."""
    by = seen.gates
    if layer.routing.selection_bias is not None:  # experts then stand in the order of that sum, and weights in another
        by = -torch.arange(by.shape[1], device=by.device).expand_as(by)
    left_out = by.topk(by.shape[1] - top_k, dim=-1, largest=False).indices
    index, gates = seen.considered.gather(-1, left_out), seen.gates.gather(-1, left_out)
    skipped = seen.hidden.new_zeros(seen.skipped.shape).scatter(-1, index, gates.to(seen.hidden.dtype))
    missing = experts_sum(seen.hidden, index, gates, *layer.whole_weights(seen.hidden))
    return Sums.of(torch.cat([seen.hidden, skipped], dim=1), missing)
