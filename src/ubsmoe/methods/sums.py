"""What a method needs of a round when it may see sums alone: what each client adds, and the contribution that stands for all.

    change of tensor x      sum_c w_c (x_c - x), sum_c w_c      w_c by `Method.weigh`, n_c for tensors of the method itself
    use of experts          sum_c n_c a_c / tokens_c,  sum_c n_c a_c / assignments_c,   and sum_c a_c in whole tokens
    loss                    sum_c n_c loss_c

A method that aggregates one such contribution as it would all of the round's takes [secure_aggregation]; any other one refuses it
(`Method.refuses`). Under [privacy] a client adds its clipped vector of maths/privacy.py instead, with weight 1, and no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ubsmoe.maths import privacy
from ubsmoe.maths.means import Weight
from ubsmoe.maths.robust import clip_factor, squared_norm
from ubsmoe.messages import Tensors, Update
from ubsmoe.methods.method import Contribution, Weigh, contribution

COUNTS = "expert_tokens"
UTILIZATION, SHARES, LOSS = "utilization", "shares", "loss"
LONGEST_LOSS = 64.0  # nats; a larger mean loss is summed as this


@dataclass(frozen=True)
class RoundSum(Contribution):
    """All clients of a round as one contribution. Its means of utilization and shares are not those of the summed tokens."""

    mean_utilization: Tensor = field(default_factory=lambda: torch.zeros(0))
    mean_shares: Tensor = field(default_factory=lambda: torch.zeros(0))

    @cached_property
    def utilization(self) -> Tensor:
        """sum_c p_c a_c / tokens_c, [L, M]."""
        return self.mean_utilization

    @cached_property
    def shares(self) -> Tensor:
        """sum_c p_c a_c / assignments_c, [L, M]."""
        return self.mean_shares


def delta_of(update: Update, sent: Tensors) -> dict[str, Tensor]:
    """What a client changed of what it was sent, float64, by name: its adapter, and the method's own tensors."""
    returned = {**update.extras, **update.adapters}
    return {name: value.double() - sent[name].double() for name, value in returned.items() if name in sent}


def with_delta(returned: Tensors, sent: Tensors, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they would be had the client changed what it was sent by `delta`."""
    return {
        name: (sent[name].double() + delta[name]).to(value.dtype) if name in delta else value
        for name, value in returned.items()
    }


def weighed(update: Update, sent: Tensors, weigh: Weigh) -> dict[str, tuple[Tensor, Weight]]:
    """What a client adds to each sum, with its weight."""
    one = contribution(update)
    own, weights = one.weight, weigh(one)
    by_name = weights if isinstance(weights, dict) else dict.fromkeys(update.adapters, weights)
    changes = {name: (change, by_name.get(name, own)) for name, change in delta_of(update, sent).items()}
    loss = torch.tensor(update.loss, dtype=torch.float64).clamp(-LONGEST_LOSS, LONGEST_LOSS)
    return {**changes, UTILIZATION: (one.utilization, own), SHARES: (one.shares, own), LOSS: (loss, own)}


def whole_counts(update: Update) -> dict[str, Tensor]:
    """What is summed exactly."""
    return {
        COUNTS: update.expert_tokens,
        "tokens": torch.tensor(update.tokens),
        "assignments": torch.tensor(update.assignments),
    }


def private_vector(update: Update, sent: Tensors, clip_norm: float, longest: float | None = None) -> dict[str, Tensor]:
    """A client's vector under [privacy], as maths/privacy.py defines it.

    Args:
        update: the client's.
        sent: what it was sent.
        clip_norm: S, which also scales its use of experts.
        longest: what the vector's norm is clipped to, if not S itself.
    """
    use = clip_norm * privacy.deviation(update.expert_tokens, update.assignments)
    vector = {**delta_of(update, sent), COUNTS: use}
    factor = clip_factor(squared_norm(vector) ** 0.5, clip_norm if longest is None else longest)
    return {name: factor * value for name, value in vector.items()}
