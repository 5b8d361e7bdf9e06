"""What each tier of a run costs, from its settings alone: no weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ubsmoe.config import RunSettings
from ubsmoe.costs.shape import ModelShape, Trained, budget_top_k
from ubsmoe.costs.tiers import Tier, TierCost, tier_costs
from ubsmoe.costs.traffic import Traffic
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.model.presets import PRESETS, check_length, checked_k_max, model_shape


@dataclass(frozen=True)
class TierPlan:
    """The base's sizes, what a client does in a step (at the rank of its tier), and what that costs each tier."""

    shape: ModelShape
    workload: Workload
    costs: list[TierCost]


def check_base(settings: RunSettings) -> None:
    """Raise the UserError that a run would end in because of its base; of a preset nothing needs to be looked at."""
    if settings.model.base not in PRESETS:
        from ubsmoe.model.load import load_skeleton  # imports torch

        skeleton = load_skeleton(settings.model, settings.tiers.rescale, settings.tiers.k_max)
        check_length(skeleton.model.config, settings.data.max_length, settings.model.base)


def plan_tiers(settings: RunSettings) -> TierPlan:
    """FLOPs, memory and bytes per tier for a run file; each example is taken to be data.max_length tokens long.

    Raises:
        UserError: if the base's config cannot be found or is dense, or the method or the tiers do not fit.
    """
    # methods import torch, which a base's costs alone need not
    from ubsmoe.methods.chosen import chosen_method, shape_of_sizes, tier_ranks

    shape = model_shape(settings.model.base)
    method = chosen_method(settings, shape_of_sizes(settings, shape))
    workload = replace(
        run_workload(settings),
        pair_fraction=method.pair_fraction,
        pairs_reach_input=method.pairs_reach_input,
        skipped=method.skipped,
    )

    def traffic(shape: ModelShape, rank: int) -> Traffic:
        return method.traffic(shape, rank, workload.trained, workload.wire_dtype)

    tiers = _tiers(settings, shape, tier_ranks(settings, method) if method.varies == "rank" else None)
    return TierPlan(shape, workload, tier_costs(shape, tiers, workload, traffic))


def plan_base(settings: RunSettings) -> TierPlan:
    """The same for plain federated averaging at the K of each budget, whatever the method: counted from the sizes alone."""
    shape, workload = model_shape(settings.model.base), run_workload(settings)
    return TierPlan(shape, workload, tier_costs(shape, _tiers(settings, shape), workload))


def run_costs(settings: RunSettings) -> list[TierCost]:
    """The costs of `plan_tiers`."""
    return plan_tiers(settings).costs


def run_workload(settings: RunSettings) -> Workload:
    """One step of a client, as far as the run file says: a method may add pseudo-gradients and set the rank of a tier."""
    train, adapter = settings.train, settings.adapter
    return Workload(
        rank=adapter.rank,
        batch=Batch.full(train.batch_size, settings.data.max_length),
        trained=Trained(router=adapter.router == "trained", attention=adapter.attention == "trained"),
        dtype_bytes=2 if settings.model.dtype == "bfloat16" else 4,
        optimizer_moments=2 if train.optimizer == "adamw" else 1,
        accumulating=train.gradient_accumulation > 1,
        recomputing=train.gradient_checkpointing,
        wire_dtype=settings.wire.dtype,
    )


def _tiers(settings: RunSettings, shape: ModelShape, ranks: Sequence[int] | None = None) -> list[Tier]:
    """Every tier at the K that its budget affords and the run's rank; or at K_max and its own of these ranks."""
    k_max = checked_k_max(settings.tiers.k_max, shape.k_max, settings.model.base)
    budgets = settings.tiers.budgets
    if ranks is None:
        return [Tier(budget, budget_top_k(k_max, budget), settings.adapter.rank) for budget in budgets]
    return [Tier(budget, k_max, rank) for budget, rank in zip(budgets, ranks, strict=True)]
