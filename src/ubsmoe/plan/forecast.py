"""What a run costs, before it starts and without weights: steps, tokens, FLOPs, bytes, memory, seconds, per tier and in all.

With the data at hand the clients' own batches of round 1 are counted, padding included, and stand for every round. Without them
every example is taken to be data.max_length tokens long with a label on each, which is an upper bound.

Not counted: what an engine adds around the tensors of a message. Clients are taken to be drawn evenly and to
drop out as [simulation] says; deadlines are left out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ubsmoe.client.schedule import elastic_top_ks
from ubsmoe.config import RunSettings
from ubsmoe.costs.flops import batch_flops
from ubsmoe.costs.memory import Memory, mapped_memory_bytes, own_memory_bytes, peak_memory_bytes
from ubsmoe.costs.tiers import TierCost
from ubsmoe.costs.workload import Batch
from ubsmoe.data.tokens import Tokens
from ubsmoe.plan.devices import RUNTIME_BYTES, Machine, smallest_device
from ubsmoe.plan.evaluation import evaluation_costs
from ubsmoe.plan.inventory import fits
from ubsmoe.plan.secure import secure_costs
from ubsmoe.plan.speed import measured_speed
from ubsmoe.plan.tiers import TierPlan, check_base, export_costs, plan_tiers
from ubsmoe.plan.work import Work, client_work, found_work
from ubsmoe.seeds import generator_for


@dataclass(frozen=True)
class TierForecast:
    """One tier. Per client and round: steps, tokens (padding included), FLOPs, seconds. `memory` is a client's peak.

    `cost` has its bytes, the upload for an update that touched every expert; `own_memory_bytes` is the part of its
    `mapped_memory_bytes` that is not in files; `device_gib` is the smallest device that holds the peak.
    """

    cost: TierCost
    clients: int
    steps: float
    tokens: float
    flops: float
    seconds: float
    virtual_seconds: float | None
    memory: Memory
    own_memory_bytes: int
    device_gib: int | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        own = asdict(self)
        return own.pop("cost") | own


def forecast(
    settings: RunSettings,
    examples: int | None = None,
    flops_per_second: float | None = None,
    machines: Sequence[Machine] = (),
) -> dict[str, Any]:
    """Estimate a run.

    Args:
        settings: the run.
        examples: training examples in all, to plan without reading any data.
        flops_per_second: what the clients' machines reach; measured here, on products of this base's size, when left out.
        machines: of an inventory: which tiers each of them can train.

    Returns:
        What `ubsmoe plan --json` prints: the assumptions, "tiers" and "run".

    Raises:
        UserError: as `plan_tiers`; if the run would refuse its base; or if data are to be read and cannot be.
    """
    check_base(settings)
    plan = plan_tiers(settings)
    found = found_work(settings, examples)
    speed, spread, whose = (
        (flops_per_second, 0.0, "given") if flops_per_second else measured_speed(plan.shape, settings)
    )
    questions = found.questions
    by_tier = [[work for work in found.clients if work.tier == cost.tier] for cost in plan.costs]
    tiers = [_tier(settings, plan, cost, own, speed) for cost, own in zip(plan.costs, by_tier, strict=True) if own]
    return {
        "model": settings.model.base,
        "method": settings.method.name,
        "parameters": plan.shape.parameters,
        "runtime_bytes": RUNTIME_BYTES,
        "lengths": found.lengths,
        "flops_per_second": speed,
        "speed": whose,
        "speed_spread": spread,
        "tiers": [tier.as_dict() for tier in tiers],
        "run": _run(settings, tiers),
        **secure_costs(plan),
        "evaluation": questions and evaluation_costs(settings, plan, questions, speed),
        "exports": export_costs(plan),
        "machines": [fits(machine, settings, plan) for machine in machines],
    }


def flops_by_client(settings: RunSettings) -> Callable[[str, int, Sequence[Tokens]], float]:
    """FLOPs of a client's first round, from its name, its tier and its examples. Raises UserError as `plan_tiers`."""
    plan = plan_tiers(settings)

    def flops(client: str, tier: int, examples: Sequence[Tokens]) -> float:
        return client_flops(settings, plan, client_work(settings, client, tier, examples))

    return flops


def client_flops(settings: RunSettings, plan: TierPlan, work: Work) -> float:
    """FLOPs of a client's round, each step at the K that elastic budgets give it."""
    cost, draws = plan.costs[work.tier], generator_for(settings.seed, work.client, 1, "elastic")
    top_ks = elastic_top_ks(settings.tiers, cost.top_k, 0, len(work.steps), draws)
    workload = plan.workload_of(settings, cost)
    return sum(
        batch_flops(plan.shape, top_k, replace(workload, batch=batch))
        for top_k, step in zip(top_ks, work.steps, strict=True)
        for batch in step
    )


def _tier(settings: RunSettings, plan: TierPlan, cost: TierCost, works: list[Work], speed: float) -> TierForecast:
    """The means over a tier's clients, and the peak of the one with the largest batch."""
    simulation, count = settings.simulation, len(works)
    flops = sum(client_flops(settings, plan, work) for work in works) / count
    workload = replace(plan.workload_of(settings, cost), batch=_largest(works))
    memory = peak_memory_bytes(plan.shape, cost.top_k, workload)
    return TierForecast(
        cost=replace(
            cost,
            peak_memory_bytes=memory.total,
            mapped_memory_bytes=mapped_memory_bytes(plan.shape, cost.top_k, workload),
        ),
        clients=count,
        steps=sum(len(work.steps) for work in works) / count,
        tokens=sum(batch.tokens for work in works for batch in work.batches) / count,
        flops=flops,
        seconds=flops / speed,
        virtual_seconds=flops / (simulation.flops_per_second * cost.budget) if simulation else None,
        memory=memory,
        own_memory_bytes=own_memory_bytes(plan.shape, cost.top_k, workload),
        device_gib=smallest_device(memory.total),
    )


def _largest(works: Sequence[Work]) -> Batch:
    """The largest batch that any of these clients may meet, with the most labels that any of their batches may have."""
    largest = max((work.largest for work in works), key=lambda batch: batch.tokens)
    return replace(largest, labelled=max(work.largest.labelled for work in works))


def _run(settings: RunSettings, tiers: Sequence[TierForecast]) -> dict[str, Any]:
    """The run: clients asked and expected to train in a round, and the sums over its rounds."""
    asked = min(settings.clients_per_round + settings.rounds.extra_clients, settings.clients.count)
    answering = 1 - settings.simulation.dropout if settings.simulation else 1.0
    trained = min(asked * answering, settings.clients_per_round)
    rounds, count = settings.train.rounds, settings.clients.count

    def over(clients: float, amounts: Iterable[float]) -> float:
        of_all = sum(tier.clients * amount for tier, amount in zip(tiers, amounts, strict=True))
        return rounds * clients / count * of_all

    return {
        "rounds": rounds,
        "clients_asked": asked,
        "clients_trained": trained,
        "flops": over(trained, (tier.flops for tier in tiers)),
        "upload_bytes": over(trained, (tier.cost.upload_bytes for tier in tiers)),
        "download_bytes": over(asked, (tier.cost.download_bytes for tier in tiers)),
        "seconds_one_after_another": over(trained, (tier.seconds for tier in tiers)),
        "seconds_side_by_side": rounds * max(tier.seconds for tier in tiers),
        "largest_memory_bytes": max(tier.memory.total for tier in tiers),
    }
