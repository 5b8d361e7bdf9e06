"""What a round's contributions come to: mean loss, and how evenly the experts were used. No contribution is kept."""

from collections.abc import Iterable, Iterator
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
        self._weight = 0.0
        self._heaviest, self._count = (0.0, ""), 0
        self._loss: float | None = 0.0

    def accumulate(self, contributions: Iterable[Contribution]) -> Iterator[Contribution]:
        """The same contributions, each counted as it passes."""
        for one in contributions:
            self._used += one.weight * one.utilization
            self._weight += one.weight
            self._heaviest, self._count = max(self._heaviest, (one.weight, one.client)), self._count + 1
            self._loss = None if one.loss is None or self._loss is None else self._loss + one.weight * one.loss
            yield one

    @property
    def utilization(self) -> Float[Tensor, "L M"]:
        """u_i = sum_c p_c a_{c,i} / tokens_c, per layer."""
        return self._used / max(self._weight, 1)

    def dominant(self) -> dict[str, Any] | None:
        """The client that has more than half of the weight of three or more, and its share; None where nobody has."""
        weight, client = self._heaviest
        if self._count < 3 or 2 * weight <= self._weight:
            return None
        return {"client": client, "reason": f"has {weight / self._weight:.0%} of the round's weight"}

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
