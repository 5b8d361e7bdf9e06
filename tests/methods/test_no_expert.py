"""A budget below one expert: K = 0, where a compensation alone answers and attention or the router learns."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from methods.laboratory import Lab, aggregated
from ubsmoe.client.schedule import elastic_top_ks
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import ConfigError, TierSettings, TrainSettings, parse_run
from ubsmoe.costs.compensation import Skipped
from ubsmoe.costs.flops import batch_flops, forward_flops_per_token
from ubsmoe.costs.memory import mapped_memory_bytes
from ubsmoe.costs.shape import Trained
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.data.tokens import Tokens
from ubsmoe.messages import Task
from ubsmoe.methods import METHODS, build
from ubsmoe.model.presets import model_shape
from ubsmoe.plan.tiers import run_costs

EXAMPLES = [Tokens(tuple(2 + (7 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(6)]
OWN = {"compensation": {"rank": 4, "slices": 2}}


def below_one(lab: Lab) -> Lab:
    return replace(lab, shape=replace(lab.shape, top_ks=(0, 1, 3), rank_at_budget=True))


@pytest.mark.parametrize("name", METHODS)
def test_under_every_method_a_client_without_an_expert_teaches_attention_and_routers_alone(lab: Lab, name: str) -> None:
    lab = below_one(lab)
    method = build(name, lab.shape, OWN)
    settings = TrainSettings(local_steps=2, batch_size=2, learning_rate=1e-2)
    trainer, state = Trainer(lab.model, method, settings, TierSettings(), seed=0, pad_id=0), lab.start(method)
    profile = method.profile(lab.shape, "client-0", 0, budget=0.2, tier_rank=2, num_examples=6)
    assert profile.top_k == 0
    task = Task(1, profile, method.dispatch(state, profile))
    update = train(trainer, task, EXAMPLES)
    assert update.assignments == 0 and not update.expert_tokens.any()
    start = {**method.dispatch(state, profile)}
    moved = {key for key, value in update.adapters.items() if key in start and not torch.equal(value, start[key])}
    assert not any(".up." in key or ".down." in key for key in moved) or name == "hetlora"  # its penalty acts on all
    assert any("attention" in key or "router" in key for key in moved) or name in ("flora", "florist")  # fresh there
    after = aggregated(method, state, [update])
    assert all(value.isfinite().all() for value in after.adapters.values())


def test_without_a_compensation_the_smallest_budget_runs_one_expert(lab: Lab) -> None:
    for settings in ({}, {"compensation": {"form": "none"}}):
        method = build("fedavg", below_one(lab).shape, settings)
        assert method.profile(lab.shape, "client-0", 0, budget=0.2, tier_rank=2).top_k == 1
    with pytest.raises(ValueError, match=r"top_k must lie in 1..3 for this base, got 0"):
        lab.model.set_top_k(0)


def run_file(budget: float, **more: Any) -> dict[str, Any]:
    own = {"name": "fedavg", "compensation": {"rank": 64}}
    tiers = {"budgets": [budget, 1.0]}
    return {"model": {"base": "olmoe-1b-7b"}, "data": {"train": "synthetic"}, "method": own, "tiers": tiers, **more}


def test_a_tier_with_nothing_to_train_is_refused_with_what_to_set() -> None:
    with pytest.raises(
        ConfigError, match=r'0\.1 of K_max = 8 runs no expert.*set adapter.attention = "trained", or budgets of 0\.125'
    ):
        run_costs(parse_run(run_file(0.1)))
    lowest, _ = run_costs(parse_run(run_file(0.1, adapter={"attention": "trained"})))
    one, _ = run_costs(parse_run(run_file(0.125, adapter={"attention": "trained"})))
    assert (lowest.top_k, one.top_k) == (0, 1) and lowest.train_flops_per_token < one.train_flops_per_token


def test_no_expert_costs_its_map_alone() -> None:
    """By hand: of OLMoE's 16 layers 2 r (2 h + M) FLOPs a token for the map, nothing for experts, none of which is in memory."""
    shape, skipped = model_shape("olmoe-1b-7b"), Skipped("map", 64, 2, 8)
    work = Workload(8, Batch.full(2, 64), Trained(attention=True), skipped=skipped)
    found = forward_flops_per_token(shape, 0, work)
    assert found.experts == found.expert_lora == 0
    assert found.compensation == 16 * 2 * 64 * (2 * 2048 + 64)
    assert batch_flops(shape, 0, work) < batch_flops(shape, 1, work)
    layer = 64 * 3 * 1024 * 2048 * 4
    assert mapped_memory_bytes(shape, 1, work) - mapped_memory_bytes(shape, 0, work) >= layer


@pytest.mark.parametrize("draw", ["one", "uniform"])
def test_elastic_budgets_never_exceed_a_clients_own(draw: str) -> None:
    tiers = TierSettings(elastic_share=0.5, elastic_draw=draw)
    assert elastic_top_ks(tiers, 0, 0, 6, torch.Generator().manual_seed(0)) == [0] * 6
