"""A client's numbers as one vector of integers modulo 2^k, and the sums of many such vectors as numbers again.

    q = floor(x / step + U),   step = limit / (2^(bits-1) - 1),   U uniform on [0, 1), drawn with a given generator
    w = round(weight 2^fraction),   the vector holds   w   and   w q,   the mean is   step sum_c w_c q_c / sum_c w_c

A mean is therefore exact up to the step, for the weights as they were rounded: whole numbers are not rounded at all. Counts
travel as they are. Nothing wraps around if for every entry   clients * max_weight * 2^fraction * 2^(bits-1) < 2^(k-1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ubsmoe.errors import UserError
from ubsmoe.maths.means import Weight
from ubsmoe.secagg.messages import Terms

WORDS: Mapping[Literal[32, 64], torch.dtype] = {32: torch.int32, 64: torch.int64}


@dataclass(frozen=True)
class Summand:
    """One tensor as a client adds it to a sum: values within +-limit, and its weight, a number or one per row."""

    value: Tensor
    weight: Weight
    limit: float


@dataclass(frozen=True)
class Sums:
    """What came out of a round: sum w x and sum w [rows] of every tensor, float64, and the exact sums of counts."""

    values: dict[str, Tensor]
    weights: dict[str, Tensor]
    counts: dict[str, Tensor]

    def mean(self, name: str) -> Tensor:
        """sum w x / sum w, and 0 where nobody has weight."""
        value = self.values[name]
        weight = self.weights[name].reshape(-1, *[1] * (value.dim() - 1)) if value.dim() else self.weights[name][0]
        return torch.where(weight > 0, value / weight, 0.0)


def step_of(limit: float, bits: int) -> float:
    """The distance of two neighbouring numbers."""
    return float(limit / ((1 << (bits - 1)) - 1))


def size_of(layout: Mapping[str, list[int]], counts: Mapping[str, list[int]]) -> int:
    """How many words a vector of this layout has."""
    real = sum(_rows(shape) + _elements(shape) for shape in layout.values())
    return real + sum(_elements(shape) for shape in counts.values())


def encode(
    summands: Mapping[str, Summand],
    counts: Mapping[str, Tensor],
    layout: Mapping[str, list[int]],
    terms: Terms,
    generator: torch.Generator,
) -> Int[Tensor, " d"]:
    """A client's vector.

    Args:
        summands: its tensors; what the layout has and the client has not counts with weight 0.
        counts: whole numbers.
        layout: the shape of every tensor that anybody sums.
        terms: of the round.
        generator: of the rounding.

    Raises:
        UserError: if a tensor is not in the layout, is not finite, or a weight or a count is larger than a sum can bear.
    """
    if unknown := [name for name, one in summands.items() if layout.get(name) != [*one.value.shape]]:
        raise UserError(f"the server's layout has no {unknown[0]!r} of this client's shape")
    dtype, parts = WORDS[terms.word], list[Tensor]()
    for name in sorted(layout):
        one, shape = summands.get(name), layout[name]
        if one is None:
            parts.append(torch.zeros(_rows(shape) + _elements(shape), dtype=dtype))
            continue
        weight = _whole(name, one.weight, _rows(shape), terms)
        steps = _steps(name, one, terms.bits, generator)
        weighed = (weight[:, None] * steps.reshape(len(weight), -1)).flatten()
        parts += [weight.to(dtype), weighed.to(dtype)]
    for name in sorted(counts):
        parts.append(_count(name, counts[name], terms).flatten().to(dtype))
    return torch.cat(parts)


def decode(
    total: Int[Tensor, " d"],
    layout: Mapping[str, list[int]],
    counts: Mapping[str, list[int]],
    limits: Mapping[str, float],
    terms: Terms,
) -> Sums:
    """The sums in an unmasked vector."""
    place, values, weights, exact = 0, dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()

    def take(size: int) -> Tensor:
        nonlocal place
        place += size
        return total[place - size : place]

    scale = float(1 << terms.fraction)
    for name in sorted(layout):
        shape = layout[name]
        weights[name] = take(_rows(shape)).double() / scale
        values[name] = take(_elements(shape)).double().reshape(shape) * (step_of(limits[name], terms.bits) / scale)
    for name in sorted(counts):
        exact[name] = take(_elements(counts[name])).to(torch.int64).reshape(counts[name])
    return Sums(values, weights, exact)


def _steps(name: str, one: Summand, bits: int, generator: torch.Generator) -> Int[Tensor, "*x"]:
    """x in steps, rounded at random to one of its two neighbours so that the mean is x; cut at the limit."""
    value = one.value.double()
    if not bool(value.isfinite().all()):
        raise UserError(f"{name} holds NaN or infinity")
    most = (1 << (bits - 1)) - 1
    exact = value / step_of(one.limit, bits)
    drawn = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
    return (exact + drawn).floor().clamp(-most, most).to(torch.int64)


def _whole(name: str, weight: Weight, rows: int, terms: Terms) -> Int[Tensor, " rows"]:
    whole = (torch.as_tensor(weight, dtype=torch.float64) * (1 << terms.fraction)).round().expand(rows)
    if not bool(((whole >= 0) & (whole <= terms.max_weight << terms.fraction)).all()):
        raise UserError(
            f"{name}: a weight of {float(torch.as_tensor(weight).max()):g}, at most {terms.max_weight} can be summed; raise "
            "secure_aggregation.max_examples"
        )
    return whole.to(torch.int64)


def _count(name: str, count: Tensor, terms: Terms) -> Int[Tensor, "*x"]:
    most = ((1 << (terms.word - 1)) - 1) // terms.clients
    if bool((count < 0).any()) or bool((count > most).any()):
        raise UserError(
            f"{name} reaches {int(count.max())}, at most {most} can be summed; raise secure_aggregation.bits"
        )
    return count.to(torch.int64)


def _rows(shape: list[int]) -> int:
    """A weight for each row along the first axis, or one."""
    return shape[0] if shape else 1


def _elements(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
