"""Which of a user's machines can train which tier, and the settings of a node that make it fit.

Settings are tried from those that cost nothing to those that cost most, and the first that fit are told:

    the run file as it is; smaller micro-batches; gradient checkpointing       the same work, more time
    a base that is mapped from disk (on a CPU)                                 the same work, the disk's time
    experts in int8, then in nf4                                               another base: what it costs is measured elsewhere
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ubsmoe.config import RunSettings, train_of_tier
from ubsmoe.costs.flops import batch_flops
from ubsmoe.costs.memory import mapped_memory_bytes, own_memory_bytes, peak_memory_bytes
from ubsmoe.costs.shape import ModelShape
from ubsmoe.costs.tiers import TierCost
from ubsmoe.costs.weights import weight_bytes
from ubsmoe.costs.workload import Batch, ExpertFormat, Workload
from ubsmoe.plan.devices import RUNTIME_BYTES, Machine
from ubsmoe.plan.tiers import TierPlan


@dataclass(frozen=True)
class Way:
    """One set of settings of a node."""

    experts: ExpertFormat | None
    mapped: bool
    micro_batch: int
    checkpointing: bool

    def words(self, stock: "Way") -> list[str]:
        """The settings that differ from the run file's, as they are written there."""
        said = {
            f'model.experts = "{self.experts}"': self.experts != stock.experts,
            "a mapped base (ubsmoe base prepare)": self.mapped,
            f"train.micro_batch = {self.micro_batch}": self.micro_batch != stock.micro_batch,
            "train.gradient_checkpointing = true": self.checkpointing != stock.checkpointing,
        }
        return [words for words, chosen in said.items() if chosen]


def fits(machine: Machine, settings: RunSettings, plan: TierPlan) -> dict[str, Any]:
    """One machine: every tier that it can train, with what settings, in how much memory and time.

    Args:
        machine: of the inventory.
        settings: the run.
        plan: its tiers. Each batch is taken to be as long as data.max_length, with a label at every position.
    """
    tiers = [found for cost in plan.costs if (found := _tier(machine, settings, plan, cost))]
    return {**machine.model_dump(exclude={"memory"}), "memory_bytes": machine.memory_bytes, "tiers": tiers}


def _tier(machine: Machine, settings: RunSettings, plan: TierPlan, cost: TierCost) -> dict[str, Any] | None:
    train, whole = train_of_tier(settings.train, settings.tiers, cost.tier), plan.workload_of(settings, cost)
    stock = Way(whole.experts, False, train.micro_batch or train.batch_size, train.gradient_checkpointing)
    for way in _ways(settings, stock, machine.device == "cpu"):
        workload = _workload(settings, whole, way)
        memory = needed_bytes(plan.shape, cost.top_k, workload, way, machine.device) + RUNTIME_BYTES
        if memory <= machine.memory_bytes:
            pieces = settings.train.batch_size // way.micro_batch
            flops = pieces * batch_flops(plan.shape, cost.top_k, workload) * (settings.train.local_steps or 1)
            return {
                "tier": cost.tier,
                "budget": cost.budget,
                "top_k": cost.top_k,
                "with": way.words(stock),
                "memory_bytes": memory,
                "seconds": flops * settings.train.gradient_accumulation / machine.flops_per_second
                if machine.flops_per_second and settings.train.local_steps
                else None,
            }
    return None


def needed_bytes(shape: ModelShape, top_k: int, workload: Workload, way: Way, device: str) -> int:
    """Bytes that must be resident at the peak of a step, libraries apart.

    On a CPU what was freed counts too, as the C library keeps it. Beside quantised experts there is room for one dequantised.
    """
    if way.mapped:
        total = mapped_memory_bytes(shape, top_k, workload)
    elif device == "cpu":
        whole = weight_bytes(shape, workload.experts, workload.dtype_bytes)
        total = own_memory_bytes(shape, top_k, workload) + whole
    else:
        total = peak_memory_bytes(shape, top_k, workload).total
    return total + (workload.dtype_bytes * shape.expert_weights if way.experts else 0)


def _ways(settings: RunSettings, stock: Way, can_map: bool) -> Iterator[Way]:
    size = settings.train.batch_size
    pieces = [count for count in range(stock.micro_batch, 0, -1) if size % count == 0]
    lean = [replace(stock, micro_batch=count) for count in pieces]
    lean += [replace(stock, micro_batch=count, checkpointing=True) for count in pieces]
    formats: tuple[ExpertFormat | None, ...] = (None, "int8", "nf4")
    fewer = formats[formats.index(stock.experts) + 1 :]
    bases = [(stock.experts, False), (stock.experts, True), *((format, False) for format in fewer)]
    if fewer:
        bases.append((fewer[-1], True))
    for experts, mapped in bases:
        if can_map or not mapped:
            yield from (replace(way, experts=experts, mapped=mapped) for way in lean)


def _workload(settings: RunSettings, whole: Workload, way: Way) -> Workload:
    several = way.micro_batch < settings.train.batch_size or whole.accumulating
    batch = Batch.full(way.micro_batch, settings.data.max_length)
    return replace(whole, experts=way.experts, batch=batch, accumulating=several, recomputing=way.checkpointing)
