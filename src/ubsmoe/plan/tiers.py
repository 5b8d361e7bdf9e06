"""What a run will cost, from its settings alone: no weights are loaded."""

from dataclasses import replace

from ubsmoe.config import AdapterSettings, RunSettings
from ubsmoe.costs.flops import TierCost, tier_costs
from ubsmoe.costs.shape import Trained
from ubsmoe.costs.traffic import count_bytes
from ubsmoe.methods.chosen import chosen_method, shape_of_sizes, tier_ranks
from ubsmoe.model.load import checked_k_max
from ubsmoe.model.presets import load_config, shape_from_config


def run_costs(settings: RunSettings, sequence_length: int | None = None) -> list[TierCost]:
    """FLOPs, memory and bytes per tier for a run file.

    Args:
        settings: the run.
        sequence_length: tokens per example for attention and memory; data.max_length when left out.

    Raises:
        UserError: if the base's config cannot be found or is dense, or the method or the tiers do not fit.
    """
    shape = shape_from_config(load_config(settings.model.base))
    k_max = checked_k_max(settings.tiers.k_max, shape.k_max, settings.model.base)
    method = chosen_method(settings, shape_of_sizes(settings, shape))
    bills = tier_costs(
        shape,
        settings.tiers.budgets,
        rank=settings.adapter.rank,
        batch_size=settings.train.batch_size,
        sequence_length=sequence_length or settings.data.max_length,
        ranks=tier_ranks(settings, method) if method.varies == "rank" else None,
        k_max=k_max,
        dtype_bytes=2 if settings.model.dtype == "bfloat16" else 4,
        trained=trained_beside(settings.adapter),
        pseudo_gradient_fraction=method.pair_fraction,
        through_hidden=method.pairs_reach_input,
        optimizer_moments=optimizer_moments(settings),
        accumulating=settings.train.gradient_accumulation > 1,
        wire_dtype=settings.wire.dtype,
        factors_up=method.factors_up,
        extra_upload_bytes=count_bytes(shape),
        recomputing=settings.train.gradient_checkpointing,
    )
    return [_with_extras(bill, *method.extra_elements(shape, bill.rank)) for bill in bills]


def optimizer_moments(settings: RunSettings) -> int:
    """Numbers that the optimiser keeps per trained one: AdamW two, SGD with momentum one."""
    return 2 if settings.train.optimizer == "adamw" else 1


def trained_beside(adapter: AdapterSettings) -> Trained:
    """What a run trains beside the experts."""
    return Trained(router=adapter.router == "trained", attention=adapter.attention == "trained")


def _with_extras(bill: TierCost, down: int, up: int) -> TierCost:
    """The bill with what the method sends beside the adapter, in float32 elements."""
    return replace(bill, download_bytes=bill.download_bytes + 4 * down, upload_bytes=bill.upload_bytes + 4 * up)
