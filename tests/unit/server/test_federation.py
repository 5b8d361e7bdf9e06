"""What a run is built from: clients and tiers, and the refusals that come before anything is written."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.config import ConfigError, parse_run, with_overrides
from ubsmoe.errors import UserError
from ubsmoe.messages import Task
from ubsmoe.plan.tiers import run_costs
from ubsmoe.server.federation import build_federation, build_server
from ubsmoe.server.start import start_state


def test_client_i_belongs_to_tier_i_modulo_the_tiers(tiny_run: dict[str, Any]) -> None:
    settings = parse_run(with_overrides(tiny_run, {"clients.count": 6}))
    federation = build_federation(settings)
    assert [profile.tier for profile in federation.clients] == [0, 1, 2, 3, 0, 1]
    assert [profile.top_k for profile in federation.clients] == [1, 2, 3, 4, 1, 2]
    assert {profile.rank for profile in federation.clients} == {3}
    sizes = {profile.client: profile.num_examples for profile in federation.clients}
    assert sizes == {name: len(tokens) for name, tokens in federation.examples.items()}
    assert sum(sizes.values()) == 40
    assert [profile.client for profile in federation.tiers] == ["tier-0", "tier-1", "tier-2", "tier-3"]


def test_a_quantised_base_is_refused_before_it_is_loaded(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads((Path(tiny_run["model"]["base"]) / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config | quantised))
    settings = parse_run(with_overrides(tiny_run, {"model.base": str(tmp_path)}))
    with pytest.raises(UserError, match=r"model\.base: .* holds quantised weights \(bitsandbytes\).* dequantised copy"):
        build_federation(settings)


def test_the_data_card_counts_what_was_read(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    def row(question: str, task: str) -> str:
        return json.dumps({"prompt": question, "completion": " yes", "task": task}) + "\n"

    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(row("a?", "one") + row("a?", "one") + row("b? " * 40, "two") + row("c?", "two"))
    test.write_text(row("c?", "two") + row("d?", "three"))
    changes = {"data": {"train": str(train), "test": str(test), "max_length": 30}, "clients.count": 4}
    federation = build_federation(parse_run(with_overrides(tiny_run, changes)))
    card = federation.data_card
    assert card
    lengths = [len(one.input_ids) for group in federation.examples.values() for one in group]
    assert card["train"]["tasks"] == {"one": 2, "two": 2} and card["test"]["tasks"] == {"two": 1, "three": 1}
    assert card["train"]["sha256"] == {"train.jsonl": hashlib.sha256(train.read_bytes()).hexdigest()}
    assert (card["train"]["repeat"], card["train"]["at_max_length"], card["asked_in_both"]) == (1, 1, 1)
    assert card["train"]["tokens"] == {"sum": sum(lengths), "mean": round(sum(lengths) / 4, 1), "longest": 30}
    world = build_federation(parse_run(tiny_run)).data_card
    assert world and (world["test"]["source"], world["test"]["sha256"]) == ("synthetic", {})


def test_a_method_that_varies_the_rank_gives_every_tier_its_own(tiny_run: dict[str, Any]) -> None:
    settings = parse_run(with_overrides(tiny_run, {"method.name": "hetlora"}))
    tiers = build_federation(settings).tiers
    assert [(profile.rank, profile.top_k) for profile in tiers] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(cost.rank, cost.top_k) for cost in run_costs(settings)] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_more_tiers_than_clients_are_all_judged(tiny_run: dict[str, Any]) -> None:
    federation = build_federation(parse_run(with_overrides(tiny_run, {"clients.count": 1})))
    assert len(federation.clients) == 1 and len(federation.tiers) == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tiers.k_max": 5}, r"tiers.k_max is 5, but .* was trained with 4 experts per token; expected 1..4"),
        ({"method.name": "hetlora", "tiers.ranks": [1, 2]}, "tiers.ranks has 2 entries and tiers.budgets 4"),
        ({"method.name": "fedavgg"}, "no method 'fedavgg'; did you mean 'fedavg'"),
        ({"method.dmr.momentum": float("nan")}, "method.dmr.momentum: Input should be a finite number"),
        (
            {"adapter.shared_a": False},
            r"method\.pg\.mode 'client_mean' averages .* set adapter\.shared_a = true or another pg\.mode",
        ),
        ({"method.dmr.epsilon": 0.0}, "method.dmr.epsilon: Input should be greater than 0"),
        ({"method.dmr.phi_penalty": -1}, "method.dmr.phi_penalty: Input should be greater than or equal to 0"),
        ({"method.averaging.exponent": -1}, "method.averaging.exponent: Input should be greater than or equal to 0"),
        (
            {"method.epsilon": 0.1},
            r"unknown setting 'method\.epsilon' for ubsmoe; it is now called 'method\.dmr\.epsilon'",
        ),
        ({"method.pg": "off"}, r"method\.pg: expected true, false or a section \[method\.pg\], got 'off'"),
        (
            {"method.name": "hfedmoe", "method.pg": True},
            r"\[method\.pg\] cannot be combined with method hfedmoe: it chooses",
        ),
    ],
)
def test_a_run_and_its_costs_refuse_the_same_settings(
    tiny_run: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    settings = parse_run(with_overrides(tiny_run, change))
    for build in (build_federation, run_costs):
        with pytest.raises(UserError, match=sentence):
            build(settings)  # type: ignore[operator]


def test_a_partition_without_the_field_has_no_report_unless_it_needs_one(tiny_run: dict[str, Any]) -> None:
    absent = {"data.partition.field": "colour"}
    assert build_federation(parse_run(with_overrides(tiny_run, absent))).partition is None
    with pytest.raises(ConfigError, match=r"data.partition.field: .*'colour'"):
        build_federation(parse_run(with_overrides(tiny_run, {**absent, "data.partition.kind": "natural"})))


def test_a_server_that_never_evaluates_loads_no_weights_and_aggregates_the_same(tiny_run: dict[str, Any]) -> None:
    run = parse_run(tiny_run)
    whole = build_server(run)
    never = {"before": False, "after": False, "every": 0}
    silent = {**tiny_run, "evaluate": {**tiny_run.get("evaluate", {}), **never}}
    with pytest.raises(ConfigError, match=r"model\.sha256: .* `ubsmoe base hash BASE --set model.dtype=auto`"):
        build_server(parse_run(silent))
    fits = build_server(parse_run({**silent, "method": {"name": "fedavg", "compensation": True}}))
    assert fits.model.device.type == "cpu" and fits.tokenizer is not None  # the fit needs the base's own text
    named = {**silent, "model": {**tiny_run.get("model", {}), "sha256": whole.base_sha256}}
    bare = build_server(parse_run(named))
    assert bare.model.device.type == "meta" and bare.base_sha256 == whole.base_sha256 and not bare.questions
    states = [start_state(server) for server in (whole, bare)]
    assert all(torch.equal(value, states[1].adapters[name]) for name, value in states[0].adapters.items())
    for tier in whole.tiers:
        task = Task(1, tier, whole.method.dispatch(states[0], tier))
        assert whole.specs(task) == bare.specs(task)


def test_another_base_than_the_run_file_says_is_refused(tiny_run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.sha256 is abc, but the weights of .* have"):
        build_server(parse_run({**tiny_run, "model": {**tiny_run["model"], "sha256": "abc"}}))
