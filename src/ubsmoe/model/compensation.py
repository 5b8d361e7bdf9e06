r"""What stands for the experts that a small budget skips: y(x) = sum_{i in A(x)} w_i E_i(x) + C(x).

    T(x)   the K_max experts that the base runs for token x     A(x)   the K of them with the largest gate weight
    w_i    the gate weights that the base uses at K_max          s_i    w_i for i in T(x) \\ A(x), else 0

    map          C = V U [x ; s] + c                             one map per layer and K, rank r
    stand_ins    C = sum_i s_i (Q_i P x + b_i)                   per expert, P shared by the layer
    elementwise  C = sum_i s_i (e_i * x)                         per expert, a vector
    constant     C = sum_i s_i b_i                               per expert, its mean output
    none         C = 0                                           the gate weights of K_max alone

At K = K_max nothing is skipped and nothing is added. C is a function of x and s, so that gradients reach the hidden state and
the router through it. With slices, A(x) is n K experts of which each runs the f / n intermediate channels that matter most.

Source: ours, but for `constant` (MoNE, arXiv 2507.00390) and `elementwise`, our closed form of Compressed Experts (arXiv
2503.00634), whose vectors are trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

PREFIX = "compensation."


@dataclass(frozen=True)
class Compensation:
    """C of one layer: a form is told by which tensors it has.

    `u` [r, h + M], `v` [h, r] and `c` [h] are the map's; `p` [r, h], `q` [M, h, r] and `b` [M, h] the stand-ins'; `e` [M, h] is
    elementwise; `b` alone is the constant.
    """

    u: Float[Tensor, "r d"] | None = None
    v: Float[Tensor, "h r"] | None = None
    c: Float[Tensor, " h"] | None = None
    p: Float[Tensor, "r h"] | None = None
    q: Float[Tensor, "M h r"] | None = None
    b: Float[Tensor, "M h"] | None = None
    e: Float[Tensor, "M h"] | None = None

    def __call__(self, hidden: Float[Tensor, "T h"], skipped: Float[Tensor, "T M"]) -> Float[Tensor, "T h"]:
        """C(x) of each token, from its hidden state and the gate weights of its skipped experts."""
        out, width = hidden.new_zeros(hidden.shape), hidden.shape[1]
        skipped = skipped.to(hidden.dtype)
        if self.u is not None and self.v is not None and self.c is not None:
            thin = hidden @ self.u[:, :width].T + skipped @ self.u[:, width:].T
            out = thin @ self.v.T + self.c
        if self.q is not None and self.p is not None:
            # sum_i s_i Q_i p as one product: [T, M r] [M r, h]
            thin = (skipped.unsqueeze(2) * (hidden @ self.p.T).unsqueeze(1)).flatten(1)
            out = out + thin @ self.q.transpose(1, 2).flatten(0, 1)
        if self.b is not None:
            out = out + skipped @ self.b
        if self.e is not None:
            out = out + hidden * (skipped @ self.e)
        return out

    def to(self, dtype: torch.dtype) -> "Compensation":
        """The same, in another dtype."""
        return Compensation(**{name: part if part is None else part.to(dtype) for name, part in vars(self).items()})


@dataclass(frozen=True)
class LayerCompensation:
    """What a client has of one layer: C for each K it may run, and the channels of each expert when it runs slices.

    `by_top_k` holds one C per K; a fit adds to it while the layer runs. `channels` [M, f / n] are each expert's channels, n
    slices to an expert.
    """

    by_top_k: dict[int, Compensation]
    channels: Int[Tensor, "M kept"] | None = None
    slices: int = 1

    def __post_init__(self) -> None:
        if (self.channels is None) != (self.slices == 1):
            raise ValueError(
                f"{self.slices} slices per expert and channels {self.channels is not None} do not go together"
            )

    def at(self, top_k: int) -> Compensation | None:
        """C at this K: its own, or that of the next larger K, which leaves less out."""
        larger = min((key for key in self.by_top_k if key >= top_k), default=None)
        return None if larger is None else self.by_top_k[larger]


def compensation_tensors(layers: Sequence[LayerCompensation | None]) -> dict[str, Tensor]:
    """The tensors of every layer by name, as `layer_compensations` reads them."""
    found: dict[str, Tensor] = {}
    for index, own in enumerate(layers):
        if own is None:
            continue
        for top_k, form in own.by_top_k.items():
            found |= {f"{PREFIX}{index}.{top_k}.{name}": part for name, part in vars(form).items() if part is not None}
        if own.channels is not None:
            found[f"{PREFIX}{index}.channels"] = own.channels
    return found


def layer_compensations(tensors: Mapping[str, Tensor], widths: Sequence[int]) -> list[LayerCompensation]:
    """Read `compensation.{layer}.{K}.{u|v|...}` and `compensation.{layer}.channels`; `widths` is f of every layer."""
    forms: list[dict[int, dict[str, Tensor]]] = [{} for _ in widths]
    channels: list[Int[Tensor, "M kept"] | None] = [None] * len(widths)
    for name, value in tensors.items():
        layer, *rest = name.removeprefix(PREFIX).split(".")
        if rest == ["channels"]:
            channels[int(layer)] = value
        else:
            forms[int(layer)].setdefault(int(rest[0]), {})[rest[1]] = value
    return [
        LayerCompensation(
            {key: Compensation(**parts) for key, parts in own.items()},
            kept,
            1 if kept is None else width // kept.shape[1],
        )
        for own, kept, width in zip(forms, channels, widths, strict=True)
    ]
