"""What each tier of a run costs, from its settings alone: no weights are loaded."""

import math
from dataclasses import dataclass, replace

from ubsmoe.config import RunSettings, train_of_tier
from ubsmoe.costs.memory import export_memory_bytes
from ubsmoe.costs.secure import SecureCost, secure_cost
from ubsmoe.costs.shape import FLOAT32, ModelShape, Trained, budget_top_k
from ubsmoe.costs.tiers import Tier, TierCost, tier_costs
from ubsmoe.costs.traffic import Traffic
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.model.presets import check_length, checked_k_max, dtype_of, is_preset, model_shape, tier_formats


@dataclass(frozen=True)
class TierPlan:
    """The base's sizes, what a client does in a step (but for what is its tier's own), what that costs, and secure rounds."""

    shape: ModelShape
    workload: Workload
    costs: list[TierCost]
    secure: SecureCost | None = None

    def workload_of(self, settings: RunSettings, cost: TierCost) -> Workload:
        """What a client of one tier does in a step."""
        train = train_of_tier(settings.train, settings.tiers, cost.tier)
        several = (train.micro_batch or train.batch_size) < train.batch_size or train.gradient_accumulation > 1
        return replace(self.of(cost), accumulating=several, recomputing=train.gradient_checkpointing)

    def of(self, cost: TierCost) -> Workload:
        """The workload at the rank of a tier, on its experts."""
        return replace(self.workload, rank=cost.rank, experts=cost.experts)


def check_base(settings: RunSettings) -> None:
    """Raise the UserError that a run would end in because of its base; of a preset nothing needs to be looked at."""
    if not is_preset(settings.model.base):
        from ubsmoe.model.load import load_skeleton  # imports torch

        skeleton = load_skeleton(settings.model, settings.tiers.rescale, settings.tiers.k_max)
        check_length(skeleton.model.config, settings.data.max_length, settings.model.base)


def plan_tiers(settings: RunSettings) -> TierPlan:
    """FLOPs, memory and bytes per tier for a run file; each example is taken to be data.max_length tokens long.

    Raises:
        UserError: if the base's config cannot be found or is dense, or the method or the tiers do not fit.
    """
    # methods import torch, which a base's costs alone need not
    from ubsmoe.methods.chosen import (
        chosen_method,
        most_clients,
        secure_word,
        shape_of_sizes,
        tier_profiles,
        weight_bits,
    )

    shape = model_shape(settings.model.base)
    run = shape_of_sizes(settings, shape)
    method = chosen_method(settings, run)
    workload = replace(
        run_workload(settings),
        pair_fraction=method.pair_fraction,
        pairs_reach_input=method.pairs_reach_input,
        skipped=method.skipped,
    )
    workload = replace(workload, side_elements=method.side_elements(shape, workload.trained))

    def traffic(shape: ModelShape, rank: int) -> Traffic:
        return method.traffic(shape, rank, workload.trained, workload.wire_dtype)

    own = zip(tier_profiles(settings, method, run), tier_formats(settings), strict=True)
    tiers = [Tier(one.budget, one.top_k, one.rank, experts) for one, experts in own]
    costs = tier_costs(shape, tiers, workload, traffic)
    if settings.secure_aggregation is None:
        return TierPlan(shape, workload, costs)
    elements = traffic(shape, settings.adapter.rank).upload_bytes // FLOAT32
    fraction, clients = weight_bits(settings, method), most_clients(settings)
    neighbours = settings.secure_aggregation.neighbours or clients
    holders = min(clients, 2 * math.ceil(neighbours / 2) + 1)
    secure = secure_cost(shape, elements, secure_word(settings, fraction), clients, holders)
    return TierPlan(shape, workload, [replace(cost, upload_bytes=secure.vector_bytes) for cost in costs], secure)


def plan_base(settings: RunSettings) -> TierPlan:
    """The same for plain federated averaging at the K of each budget, whatever the method: counted from the sizes alone."""
    shape, workload = model_shape(settings.model.base), run_workload(settings)
    k_max = checked_k_max(settings.tiers.k_max, shape.k_max, settings.model.base)
    own = zip(settings.tiers.budgets, tier_formats(settings), strict=True)
    tiers = [Tier(budget, budget_top_k(k_max, budget), settings.adapter.rank, experts) for budget, experts in own]
    return TierPlan(shape, workload, tier_costs(shape, tiers, workload))


def run_costs(settings: RunSettings) -> list[TierCost]:
    """The costs of `plan_tiers`."""
    return plan_tiers(settings).costs


def export_costs(plan: TierPlan) -> dict[str, dict[str, int]]:
    """Bytes of an export of the largest tier, on disk and in memory while it is written."""
    workload = replace(plan.workload, rank=max(cost.rank for cost in plan.costs))
    sizes = {
        "peft": FLOAT32 * plan.shape.trained_elements(workload.rank, workload.trained),
        "merged": plan.shape.parameters * workload.dtype_bytes,
    }
    memory = export_memory_bytes(plan.shape, workload)
    return {format: {"file_bytes": sizes[format], "memory_bytes": memory[format]} for format in sizes}


def run_workload(settings: RunSettings) -> Workload:
    """One step of a client, as far as the run file says: a method may add pseudo-gradients and set the rank of a tier."""
    train, adapter = settings.train, settings.adapter
    return Workload(
        rank=adapter.rank,
        batch=Batch.full(train.batch_size, settings.data.max_length),
        trained=Trained(router=adapter.router == "trained", attention=adapter.attention == "trained"),
        dtype_bytes=2 if dtype_of(settings.model) == "bfloat16" else 4,
        optimizer_moments=2 if train.optimizer == "adamw" else 1,
        accumulating=train.gradient_accumulation > 1,
        recomputing=train.gradient_checkpointing,
        wire_dtype=settings.wire.dtype,
    )
