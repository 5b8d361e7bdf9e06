"""Clients whose frozen experts have unequal formats: who trains on what, what it costs, and what an export says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.client.node_config import on_this_machine
from ubsmoe.config import ConfigError, parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine, process_pool
from ubsmoe.finished.federated_moe import FederatedMoE
from ubsmoe.finished.run import evaluate_run, export_run
from ubsmoe.messages import Announcement, Task, Update
from ubsmoe.model.load import Bases, prepare_base
from ubsmoe.model.quantised import format_of
from ubsmoe.plan.forecast import forecast
from ubsmoe.plan.tiers import run_costs
from ubsmoe.server.federation import Federation, assign_tier, build_federation
from ubsmoe.server.run import run
from ubsmoe.server.start import start_state
from ubsmoe.storage.runfolder import RunFolder, read_run

NAMES = ["nf4", "plain", "int8", "nf4"]
FORMATS = ["nf4", None, "int8", "nf4"]


@pytest.fixture
def unequal(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """Four tiers in three formats; the largest budget's is not the base's own."""
    return with_overrides(
        tiny_run,
        {"threads": 1, "tiers.experts": NAMES, "method.name": "fedavg", "train.rounds": 1, "evaluate.before": False},
    )


def updates(federation: Federation, workers: int = 1) -> list[Update]:
    payload = start_state(federation).adapters
    tasks = [Task(1, profile, payload) for profile in federation.clients]
    with process_pool(federation, workers) as pool:
        engine = LocalEngine(federation.trainer, federation.examples, federation.clients, pool=pool)
        return [reply for reply in engine.exchange(tasks) if isinstance(reply, Update)]


def same(one: Update, other: Update) -> bool:
    return all(torch.equal(value, other.adapters[name]) for name, value in one.adapters.items())


def test_each_client_does_what_it_would_do_if_all_had_its_format(unequal: dict[str, Any]) -> None:
    federation = build_federation(parse_run(unequal))
    assert [profile.experts for profile in federation.tiers] == [one.experts for one in federation.clients] == FORMATS
    mixed = updates(federation)
    for name in ("plain", "int8", "nf4"):
        alike = updates(build_federation(parse_run(with_overrides(unequal, {"tiers.experts": [name] * 4}))))
        assert [same(*pair) for pair in zip(mixed, alike, strict=True)] == [name == own for own in NAMES]
    assert all(same(*pair) for pair in zip(mixed, updates(federation, workers=2), strict=True))
    assert len({update.base for update in mixed}) == 1  # the plain weights' hash, whatever they are quantised to


def test_left_out_every_tier_has_the_bases_own_format(unequal: dict[str, Any]) -> None:
    of_model = parse_run(with_overrides(unequal, {"tiers.experts": None, "model.experts": "int8"}))
    assert {profile.experts for profile in build_federation(of_model).tiers} == {"int8"}


def test_a_finished_run_scores_answers_and_exports_in_its_tiers_format(unequal: dict[str, Any], tmp_path: Path) -> None:
    settings, place = parse_run(unequal), tmp_path / "run"
    federation = build_federation(settings)
    engine = LocalEngine(federation.trainer, federation.examples, federation.clients)
    with RunFolder.open_or_create(place, to_json(settings)) as folder:
        summary = run(federation, folder, engine, lambda *event: None)
    assert [tier["experts"] for tier in summary["tiers"]] == FORMATS
    assert [event["experts"] for event in read_run(place).clients] == FORMATS
    for tier, format in enumerate(FORMATS, start=1):
        model = FederatedMoE.from_pretrained(place, tier=tier)
        assert format_of(model._sparse.layers[0].experts) == format
        assert export_run(place, tmp_path / f"native-{tier}", "native", tier).experts == format
        ids, again = torch.arange(9).view(1, 9), FederatedMoE.from_pretrained(tmp_path / f"native-{tier}")
        assert torch.equal(again.model(ids).logits, model.model(ids).logits)
        if tier < 3:  # the plain base is what both go into, and only one says so
            assert export_run(place, tmp_path / f"merged-{tier}", "merged", tier).experts == format
            text = (tmp_path / f"merged-{tier}" / "README.md").read_text()
            assert ("trained on experts in nf4" in text) == (format == "nf4")
    # the scores that the run printed
    assert [row["scores"] for row in evaluate_run(place, {})] == summary["after"]


def test_costs_and_plan_count_each_tier_in_its_own_format(unequal: dict[str, Any]) -> None:
    """By hand: 2 layers of 6 experts with 3 x 24 x 20 numbers; int8 saves 3 bytes of each and pays 4 for 64 rows."""
    costs = {name: run_costs(parse_run(with_overrides(unequal, {"tiers.experts": [name] * 4}))) for name in NAMES}
    mixed, plan = run_costs(parse_run(unequal)), forecast(parse_run(unequal), flops_per_second=1e9)
    assert mixed == [costs[name][tier] for tier, name in enumerate(NAMES)]
    saved = costs["plain"][2].peak_memory_bytes - costs["int8"][2].peak_memory_bytes
    assert saved == 2 * 6 * (3 * 3 * 24 * 20 - 4 * (2 * 20 + 24))
    assert [tier["experts"] for tier in plan["tiers"]] == FORMATS
    weights = [tier["memory"]["weights"] for tier in plan["tiers"]]
    assert weights[0] == weights[3] < weights[2] < weights[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tiers.experts": ["nf4"]}, "experts has 1 entries and budgets 4; expected one per tier"),
        ({"tiers.experts": ["nf4", "nf4", "fp8", "plain"]}, r"tiers\.experts.*'plain', 'int8' or 'nf4'"),
        ({"tiers.experts": "nf4"}, "tiers.experts"),
    ],
)
def test_formats_that_make_no_sense_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_run(with_overrides({}, change))


def test_a_node_may_say_what_its_experts_are_and_the_server_is_told(unequal: dict[str, Any]) -> None:
    settings = parse_run(unequal)
    ours, identity = on_this_machine(settings, {"client": "me", "model.experts": "int8"})
    assert (ours, identity) == (settings, {"client": "me", "model.experts": "int8"})
    with pytest.raises(ConfigError, match=r"model\.experts is 'fp8', expected 'plain', 'int8', 'nf4'"):
        on_this_machine(settings, {"client": "me", "model.experts": "fp8"})
    federation = build_federation(settings)
    tiers = {
        name: assign_tier(federation, Announcement("me", 3, 0.25, name)).experts for name in (None, "int8", "plain")
    }
    assert tiers == {None: "nf4", "int8": "int8", "plain": None}


def test_a_prepared_base_is_not_trained_on_in_another_format_than_its_own(
    unequal: dict[str, Any], tmp_path: Path
) -> None:
    settings = parse_run(unequal)
    folder = prepare_base(settings.model.model_copy(update={"experts": "nf4"}), tmp_path / "nf4")
    bases = Bases(settings.model.model_copy(update={"base": str(folder)}))
    assert format_of(bases("nf4").layers[0].experts) == "nf4"
    for other, sentence in (
        (None, "was prepared as nf4, and plain experts are asked for"),
        ("int8", 'prepared as "nf4"'),
    ):
        with pytest.raises(ConfigError, match=sentence):
            bases(other)
