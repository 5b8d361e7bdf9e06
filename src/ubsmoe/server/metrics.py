"""What the updates of a round add up to, taken down as they pass: none is kept."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ubsmoe.maths import balance, routing
from ubsmoe.messages import Update


@dataclass
class Tally:
    """A round so far: mean loss, and how evenly the experts were used. `report` hears of every update."""

    report: Callable[[Update], None]
    used: Tensor
    examples: int = 0
    loss: float = 0.0

    def heard(self, updates: Iterable[Update]) -> Iterator[Update]:
        """The same updates, each told of."""
        for update in updates:
            self.report(update)
            yield update

    def over(self, updates: Iterable[Update]) -> Iterator[Update]:
        """The same updates, looked at."""
        for update in updates:
            self.used += update.num_examples * routing.utilization(update.expert_tokens, update.tokens)
            self.loss += update.num_examples * update.loss
            self.examples += update.num_examples
            yield update

    def figures(self) -> dict[str, Any]:
        """Mean loss; utilization entropy (over ln M) and Gini per layer; how many experts nobody used."""
        used = self.used / max(self.examples, 1)
        return {
            "loss": self.loss / max(self.examples, 1),
            "entropy": balance.normalised_entropy(used).tolist(),
            "gini": balance.gini(used).tolist(),
            "dead_experts": int(balance.dead_experts(used).sum()),
        }
