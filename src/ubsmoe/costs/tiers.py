"""What each tier costs: FLOPs per token, bytes per round, bytes of memory. The legend of letters is in `ubsmoe.costs.flops`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from ubsmoe.costs.flops import backward_flops_per_token, forward_flops_per_token, pseudo_gradient_flops_per_token
from ubsmoe.costs.memory import mapped_memory_bytes, peak_memory_bytes
from ubsmoe.costs.shape import ModelShape
from ubsmoe.costs.traffic import Traffic, adapter_traffic, count_bytes
from ubsmoe.costs.workload import ExpertFormat, Workload


class Tier(NamedTuple):
    """A class of client: its budget beta, the K and the LoRA rank that a method gives it for that, and what its experts are."""

    budget: float
    top_k: int
    rank: int
    experts: ExpertFormat | None = None


@dataclass(frozen=True)
class TierCost:
    """What one tier costs.

    `train_flops_per_token` is forward, backward and pseudo-gradients; `relative_to_top` is its ratio to the top tier's, which
    is the one with the largest budget. `mapped_memory_bytes` is what must be in memory where the base is mapped from disk.
    """

    tier: int
    budget: float
    top_k: int
    rank: int
    experts: ExpertFormat | None
    forward_flops_per_token: int
    backward_flops_per_token: int
    train_flops_per_token: int
    relative_to_top: float
    upload_bytes: int
    download_bytes: int
    peak_memory_bytes: int
    mapped_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def tier_costs(
    shape: ModelShape,
    tiers: Sequence[Tier],
    workload: Workload,
    traffic: Callable[[ModelShape, int], Traffic] | None = None,
) -> list[TierCost]:
    """The costs of every tier.

    On OLMoE-1B-7B, r = 8, logits counted, K = 6, 4, 2 instead of 8 save 16.9, 33.8, 50.7 % of a forward pass at S = 256
    (55.4 % for K = 2 without the head). Longer sequences dilute it: K = 2 saves 46.2 % at S = 2048 and 41.9 % at
    S = 4096 (45.1 % without the head). The paper's 45 % lies in this range, near S = 2560; what it counted we do not
    know. Forward and backward together save about the same, 50.4 % at S = 256. Ranks 4 instead of 32 at K = 8 save
    2.1 % at S = 512, 4 instead of 64 4.3 %; the paper says 5 %.

    Args:
        shape: the model.
        tiers: at least one.
        workload: of every tier, but for the rank and the experts' format.
        traffic: bytes of a client's tensors, from the shape and the client's rank; those of the adapter, both ways, when left
            out. Counts are added to the upload.

    Source: UB-SMoE (arXiv 2605.16690), setting and Figure 3.
    """
    traffic = traffic or partial(adapter_traffic, trained=workload.trained, wire_dtype=workload.wire_dtype)
    costs = [
        _tier_cost(
            shape, number, tier, replace(workload, rank=tier.rank, experts=tier.experts), traffic(shape, tier.rank)
        )
        for number, tier in enumerate(tiers)
    ]
    top = max(costs, key=lambda cost: cost.budget).train_flops_per_token
    return [replace(cost, relative_to_top=cost.train_flops_per_token / top) for cost in costs]


def _tier_cost(shape: ModelShape, number: int, tier: Tier, workload: Workload, traffic: Traffic) -> TierCost:
    forward = forward_flops_per_token(shape, tier.top_k, workload)
    backward = backward_flops_per_token(shape, tier.top_k, workload).total
    backward += workload.recomputing * (forward.total - forward.head)
    extra = pseudo_gradient_flops_per_token(shape, tier.top_k, workload)
    return TierCost(
        tier=number,
        **tier._asdict(),
        forward_flops_per_token=forward.total,
        backward_flops_per_token=backward,
        train_flops_per_token=forward.total + backward + round(extra),
        relative_to_top=1.0,
        upload_bytes=traffic.upload_bytes + count_bytes(shape),
        download_bytes=traffic.download_bytes,
        peak_memory_bytes=peak_memory_bytes(shape, tier.top_k, workload).total,
        mapped_memory_bytes=mapped_memory_bytes(shape, tier.top_k, workload),
    )
