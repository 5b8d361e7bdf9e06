"""What a round's contributions come to: mean loss, and how evenly the experts were used. No contribution is kept."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ubsmoe.maths import balance
from ubsmoe.methods.method import Contribution, RunShape


class RoundMetrics:
    """The metrics of one round, accumulated while the contributions pass."""

    def __init__(self, shape: RunShape) -> None:
        self._used = torch.zeros(shape.num_layers, shape.num_experts, dtype=torch.float64)
        self._weights: dict[str, float] = {}
        self._loss: float | None = 0.0

    def accumulate(self, contributions: Iterable[Contribution]) -> Iterator[Contribution]:
        """The same contributions, each counted as it passes."""
        for one in contributions:
            self._used += one.weight * one.utilization
            self._weights[one.client] = one.weight
            self._loss = None if one.loss is None or self._loss is None else self._loss + one.weight * one.loss
            yield one

    @property
    def utilization(self) -> Float[Tensor, "L M"]:
        """u_i = sum_c p_c a_{c,i} / tokens_c, per layer."""
        return self._used / max(self._weight, 1)

    @property
    def _weight(self) -> float:
        return sum(self._weights.values())

    def dominant(self) -> dict[str, str] | None:
        """As the function `dominant` says of the round's clients."""
        return dominant(self._weights)

    def summary(self) -> dict[str, Any]:
        """Mean loss; utilization entropy (over ln M) and Gini per layer; how many experts nobody used; the utilization."""
        used = self.utilization
        return {
            "loss": None if self._loss is None else self._loss / max(self._weight, 1),
            "entropy": balance.normalised_entropy(used).tolist(),
            "gini": balance.gini(used).tolist(),
            "dead_experts": int(balance.dead_experts(used).sum()),
            "utilization": used.tolist(),
        }


def dominant(weights: Mapping[str, float]) -> dict[str, str] | None:
    """The client that has more than half of the weight of three or more, and its share; None where nobody has.

    >>> dominant({"a": 1, "b": 6, "c": 1})
    {'client': 'b', 'reason': "has 75% of the round's weight"}
    """
    client, total = max(weights, key=weights.__getitem__, default=""), sum(weights.values())
    if len(weights) < 3 or 2 * weights[client] <= total:
        return None
    return {"client": client, "reason": f"has {weights[client] / total:.0%} of the round's weight"}
