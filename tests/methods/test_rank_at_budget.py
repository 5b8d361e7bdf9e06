"""Methods of unequal rank at the K of the tier: what a tier runs, what it is sent for what it skips, what it pays."""

from dataclasses import replace

import pytest
import torch

from methods.laboratory import BUDGETS, RANKS, Lab, aggregated
from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings, parse_run
from ubsmoe.data.tokens import Tokens
from ubsmoe.messages import Task
from ubsmoe.methods import build
from ubsmoe.methods.state import pack
from ubsmoe.model.compensation import PREFIX
from ubsmoe.plan.tiers import run_costs

RANK_BASED = ("hetlora", "flexlora", "fedit", "flora", "florist")
EXAMPLES = [Tokens(tuple(2 + (7 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(6)]


def at_budget(lab: Lab) -> Lab:
    return replace(lab, shape=replace(lab.shape, rank_at_budget=True))


@pytest.mark.parametrize("name", RANK_BASED)
def test_a_tier_varies_rank_and_k_alike(lab: Lab, name: str) -> None:
    profiles = [at_budget(lab).profile(build(name, lab.shape), tier) for tier in range(len(BUDGETS))]
    assert [(one.top_k, one.rank) for one in profiles] == [(1, 2), (1, 3), (2, 5), (3, 7)]
    assert [lab.profile(build(name, lab.shape), tier).top_k for tier in range(len(BUDGETS))] == [3] * len(RANKS)


@pytest.mark.parametrize("name", RANK_BASED)
def test_small_tiers_train_with_a_map_for_what_they_skip(lab: Lab, name: str) -> None:
    lab, own = at_budget(lab), {"compensation": {"rank": 4, "slices": 2}}
    states = []
    for method in (build(name, lab.shape), build(name, lab.shape, own)):
        trainer = Trainer(
            lab.model, method, TrainSettings(local_steps=2, batch_size=2), TierSettings(), seed=0, pad_id=0
        )
        state = lab.start(method)
        for number in (1, 2):
            profiles = [lab.profile(method, tier, f"client-{tier}") for tier in (0, 3)]
            tasks = [Task(number, profile, method.dispatch(state, profile)) for profile in profiles]
            sent = [any(key.startswith(PREFIX) for key in task.payload) for task in tasks]
            assert sent == [method.calibration is not None, False]
            state = aggregated(method, state, [train(trainer, task, EXAMPLES) for task in tasks])
        states.append({key: value for key, value in pack(state).items() if PREFIX not in f"{key}."})
    assert any(not torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_what_a_tier_pays_follows_its_k() -> None:
    def costs(**tiers: object) -> list[int]:
        table = {"model": {"base": "olmoe-1b-7b"}, "method": {"name": "flexlora"}, "data": {"train": "synthetic"}}
        return [one.train_flops_per_token for one in run_costs(parse_run({**table, "tiers": tiers}))]

    whole, own = costs(), costs(rank_top_k="budget")
    assert own[-1] == whole[-1] and own[0] < 0.6 * whole[0] and own == sorted(own)
