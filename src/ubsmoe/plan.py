"""What a run will cost, from its settings alone: no weights are loaded."""

from dataclasses import replace

from ubsmoe.config import RunSettings
from ubsmoe.maths.costs import TierCost, count_bytes, tier_costs
from ubsmoe.methods import build
from ubsmoe.methods.base import Base
from ubsmoe.model.presets import load_config, shape_from_config


def run_costs(settings: RunSettings, sequence_length: int | None = None) -> list[TierCost]:
    """FLOPs, memory and bytes per tier for a run file.

    Args:
        settings: the run.
        sequence_length: tokens per example for attention and memory; data.max_length when left out.

    Raises:
        ConfigError: if the base's config cannot be found or is dense.
    """
    shape = shape_from_config(load_config(settings.model.base))
    k_max = settings.tiers.k_max or shape.k_max
    base = Base(shape.num_moe_layers, shape.num_experts, k_max, settings.adapter.rank, settings.adapter.alpha)
    method = build(settings.method.name, base, settings.method.settings)
    bills = tier_costs(
        shape,
        settings.tiers.budgets,
        rank=settings.adapter.rank,
        batch_size=settings.train.batch_size,
        sequence_length=sequence_length or settings.data.max_length,
        ranks=settings.tiers.ranks if method.varies == "rank" else None,
        k_max=settings.tiers.k_max,
        dtype_bytes=2 if settings.model.dtype == "bfloat16" else 4,
        router_trained=settings.adapter.router == "trained",
        pseudo_gradient_fraction=method.pair_fraction,
        extra_upload_bytes=count_bytes(shape),
    )
    return [_with_extras(bill, *method.extra_elements(shape, bill.rank)) for bill in bills]


def _with_extras(bill: TierCost, down: int, up: int) -> TierCost:
    """The bill with what the method sends beside the adapter, in float32 elements."""
    return replace(bill, download_bytes=bill.download_bytes + 4 * down, upload_bytes=bill.upload_bytes + 4 * up)
