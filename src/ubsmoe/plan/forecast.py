"""What a run will take, before it starts and without weights: steps, tokens, FLOPs, bytes, memory, seconds, per tier and in all.

With the data at hand the clients' own batches of round 1 are counted, padding included, and stand for every round. Without them
every example is taken to be data.max_length tokens long with a label on each, which is an upper bound.

Evaluation is not counted, nor what an engine adds around the tensors of a message. Clients are taken to be drawn evenly and to
drop out as [simulation] says; deadlines are not foreseen.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ubsmoe.client.schedule import elastic_top_ks
from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.costs.flops import (
    TierCost,
    backward_flops_per_token,
    forward_flops_per_token,
    pair_flops,
)
from ubsmoe.costs.memory import Memory, peak_memory_bytes, tokens_of_experts
from ubsmoe.costs.shape import ModelShape, Trained
from ubsmoe.data.tokens import Tokens
from ubsmoe.methods.chosen import chosen_method, shape_of_sizes
from ubsmoe.methods.method import Method
from ubsmoe.model.presets import load_config, shape_from_config
from ubsmoe.plan.tiers import optimizer_moments, run_costs, trained_beside
from ubsmoe.plan.work import Batch, Work, assumed_work, client_work, read_work
from ubsmoe.seeds import generator_for

GIB = 1 << 30
DEVICES = (4, 8, 12, 16, 24, 40, 80)
"""Memories of devices in GiB, from phones to accelerators, for the column that says which holds a tier."""

RUNTIME_BYTES = 420 << 20
"""What python, torch and transformers hold beside a base once they have trained a step, measured on Linux (`bench/plan.py`)."""


@dataclass(frozen=True)
class TierForecast:
    """One tier. Per client and round: steps, tokens (padding included), FLOPs, bytes, seconds. `memory` is a client's peak.

    `upload_bytes` is for an update that touched every expert, `device_gib` the smallest of `DEVICES` that holds the tier.
    """

    tier: int
    budget: float
    top_k: int
    rank: int
    clients: int
    steps: float
    tokens: float
    flops: float
    seconds: float
    virtual_seconds: float | None
    upload_bytes: int
    download_bytes: int
    memory: Memory
    device_gib: int | None


def forecast(
    settings: RunSettings, examples: int | None = None, flops_per_second: float | None = None
) -> dict[str, Any]:
    """Foresee a run.

    Args:
        settings: the run.
        examples: training examples in all, to plan without reading any data.
        flops_per_second: what the clients' machines reach; measured here, on products of this base's size, when left out.

    Returns:
        What `ubsmoe plan --json` prints: the assumptions, "tiers" and "run".

    Raises:
        UserError: as `run_costs`; or if data are to be read and cannot be.
    """
    shape = shape_from_config(load_config(settings.model.base))
    costs = run_costs(settings)
    works = assumed_work(settings, examples) if examples else read_work(settings)
    speed = flops_per_second or measured_speed(shape, settings)
    method = chosen_method(settings, shape_of_sizes(settings, shape))
    tiers = [
        _tier(settings, shape, cost, [work for work in works if work.tier == cost.tier], speed, method)
        for cost in costs
        if any(work.tier == cost.tier for work in works)
    ]
    return {
        "model": settings.model.base,
        "method": settings.method.name,
        "parameters": shape.parameters,
        "runtime_bytes": RUNTIME_BYTES,
        "lengths": "data.max_length, every position labelled: an upper bound" if examples else "read from the data",
        "flops_per_second": speed,
        "speed": "given" if flops_per_second else "measured on this machine",
        "tiers": [asdict(tier) | {"memory_bytes": tier.memory.total} for tier in tiers],
        "run": _whole(settings, tiers),
    }


def _tier(
    settings: RunSettings, shape: ModelShape, cost: TierCost, works: list[Work], speed: float, method: Method
) -> TierForecast:
    trained = trained_beside(settings.adapter)
    accumulation, recomputing = settings.train.gradient_accumulation, settings.train.gradient_checkpointing

    count, in_all = len(works), sum(client_flops(settings, shape, cost, work, method) for work in works)
    largest = max((work.largest for work in works), key=lambda batch: batch.rows * batch.length)
    labelled = max(work.largest.labelled for work in works)
    memory = peak_memory_bytes(
        shape,
        cost.top_k,
        cost.rank,
        largest.rows,
        largest.length,
        dtype_bytes=2 if settings.model.dtype == "bfloat16" else 4,
        trained=trained,
        optimizer_moments=optimizer_moments(settings),
        real=largest.real,
        labelled=labelled,
        accumulating=accumulation > 1,
        pair_fraction=method.pair_fraction,
        recomputing=recomputing,
    )
    simulation = settings.simulation
    return TierForecast(
        tier=cost.tier,
        budget=cost.budget,
        top_k=cost.top_k,
        rank=cost.rank,
        clients=count,
        steps=sum(len(work.batches) for work in works) / accumulation / count,
        tokens=sum(b.rows * b.length for work in works for b in work.batches) / count,
        flops=in_all / count,
        seconds=in_all / count / speed,
        virtual_seconds=in_all / count / (simulation.flops_per_second * cost.budget) if simulation else None,
        upload_bytes=cost.upload_bytes,
        download_bytes=cost.download_bytes,
        memory=memory,
        device_gib=next((gib for gib in DEVICES if memory.total + RUNTIME_BYTES <= gib * GIB), None),
    )


def client_flops(settings: RunSettings, shape: ModelShape, cost: TierCost, work: Work, method: Method) -> float:
    """FLOPs of a client's round, each step at the K that elastic budgets give it."""
    accumulation, recomputing = settings.train.gradient_accumulation, settings.train.gradient_checkpointing
    steps = len(work.batches) // accumulation
    top_ks = elastic_top_ks(
        settings.tiers, cost.top_k, 0, steps, generator_for(settings.seed, work.client, 1, "elastic")
    )
    return sum(
        batch_flops(
            shape, top_ks[i // accumulation], cost.rank, batch, trained_beside(settings.adapter),
            method.pair_fraction, method.pairs_reach_input, recomputing,
        )
        for i, batch in enumerate(work.batches)
    )  # fmt: skip


def flops_by_client(settings: RunSettings) -> Callable[[str, int, Sequence[Tokens]], float]:
    """FLOPs of a client's first round, from its name, its tier and its examples. Raises UserError as `run_costs`."""
    shape, costs = shape_from_config(load_config(settings.model.base)), run_costs(settings)
    method = chosen_method(settings, shape_of_sizes(settings, shape))

    def flops(client: str, tier: int, examples: Sequence[Tokens]) -> float:
        return client_flops(settings, shape, costs[tier], client_work(settings, client, tier, examples), method)

    return flops


def batch_flops(
    shape: ModelShape,
    top_k: int,
    rank: int,
    batch: Batch,
    trained: Trained,
    pair_fraction: float,
    pairs_reach_input: bool = False,
    recomputing: bool = False,
) -> float:
    """FLOPs of a batch, forward and backward: logits where there is a label, experts where there is a token that is read.

    Gradient checkpointing adds a forward pass without logits.
    """
    forward = forward_flops_per_token(shape, top_k, rank, batch.length, trained)
    backward = backward_flops_per_token(shape, top_k, rank, batch.length, trained)
    passes = [forward, forward, backward] if recomputing else [forward, backward]
    rest = sum(part.total - part.head - part.experts - part.expert_lora for part in passes)
    experts = 0.0
    for layer, tokens in enumerate(tokens_of_experts(shape, batch.real, batch.labelled)):
        reached = layer > 0 or trained.attention  # something below learns from this layer's input
        routed = pair_flops(shape, rank, reached, recomputing)
        missing = pair_flops(shape, rank, reached and pairs_reach_input, recomputing)
        experts += tokens * (top_k * routed + pair_fraction * (shape.num_experts - top_k) * missing)
    return batch.rows * batch.length * rest + experts + batch.labelled * (forward.head + backward.head)


def _whole(settings: RunSettings, tiers: Sequence[TierForecast]) -> dict[str, Any]:
    """The run: clients asked and expected to train in a round, and the sums over its rounds."""
    asked = min(settings.clients_per_round + settings.rounds.extra_clients, settings.clients.count)
    answering = 1 - settings.simulation.dropout if settings.simulation else 1.0
    trained = min(asked * answering, settings.clients_per_round)
    rounds, count = settings.train.rounds, settings.clients.count

    def over(clients: float, name: str) -> float:
        return rounds * clients / count * sum(tier.clients * getattr(tier, name) for tier in tiers)

    return {
        "rounds": rounds,
        "clients_asked": asked,
        "clients_trained": trained,
        "flops": over(trained, "flops"),
        "upload_bytes": over(trained, "upload_bytes"),
        "download_bytes": over(asked, "download_bytes"),
        "seconds_one_after_another": over(trained, "seconds"),
        "seconds_side_by_side": rounds * max(tier.seconds for tier in tiers),
        "largest_memory_bytes": max(tier.memory.total for tier in tiers),
    }


def fitting(plan: dict[str, Any], memory: str) -> dict[str, Any]:
    """Which tiers a device of this memory can train, such as "16GiB" or "8GB"; python and its libraries included.

    Raises:
        ConfigError: if that is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(GiB|GB)", memory.strip())
    if not match:
        raise ConfigError(f"--memory {memory!r}: expected a size in GiB or GB, as in 16GiB")
    size = round(float(match[1]) * (GIB if match[2] == "GiB" else 10**9))
    held = [tier["tier"] for tier in plan["tiers"] if tier["memory_bytes"] + RUNTIME_BYTES <= size]
    return {"memory_bytes": size, "tiers": held}


def measured_speed(shape: ModelShape, settings: RunSettings, seconds: float = 0.3) -> float:
    """FLOPs per second that this machine reaches on products as large as one expert's share of a batch."""
    device, dtype = settings.model.device, getattr(torch, settings.model.dtype)
    tokens = settings.train.batch_size * settings.data.max_length
    rows = max(1, tokens * shape.k_max // shape.num_experts)
    x = torch.ones(rows, shape.hidden, device=device, dtype=dtype)
    weight = torch.ones(shape.hidden, shape.up_matrices * shape.expert_width, device=device, dtype=dtype)
    torch.mm(x, weight)  # the first one sets the library up
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(x, weight)
        if weight.is_cuda:
            torch.cuda.synchronize()
        done += 1
    return 2 * done * rows * weight.numel() / (time.perf_counter() - began)
