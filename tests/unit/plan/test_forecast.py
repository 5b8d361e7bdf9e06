"""What `ubsmoe plan` estimates, against what then happens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ubsmoe.client.train import train
from ubsmoe.config import ConfigError, RunSettings, parse_run, to_json, with_overrides
from ubsmoe.costs.workload import Batch
from ubsmoe.data.tokens import IGNORED, Tokens, collate
from ubsmoe.engines.local import LocalEngine
from ubsmoe.messages import Task
from ubsmoe.model.presets import model_shape
from ubsmoe.plan.devices import GIB, RUNTIME_BYTES, Machine, fitting, read_inventory, smallest_device
from ubsmoe.plan.evaluation import evaluations
from ubsmoe.plan.forecast import forecast
from ubsmoe.plan.inventory import fits
from ubsmoe.plan.tiers import plan_tiers
from ubsmoe.plan.work import assumed_work, batch_shape
from ubsmoe.report.plan import plan_lines
from ubsmoe.server.federation import build_federation
from ubsmoe.server.rounds import evaluate_tier, one_round
from ubsmoe.server.run import run
from ubsmoe.server.start import start_state
from ubsmoe.storage.events import read_events
from ubsmoe.storage.runfolder import RunFolder

ATEN = torch.ops.aten
COUNTED: dict[Any, Any] = {
    ATEN.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    # fused attention computes its scores once more; costs count eager attention
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        2 * sdpa_flop_count(q, k, v)
    ),
}


def settings_of(table: dict[str, Any], **changes: Any) -> RunSettings:
    return parse_run(with_overrides(table, changes))


@pytest.mark.parametrize("whole", [False, True])
def test_a_batch_has_the_shape_and_labels_of_the_real_one(whole: bool) -> None:
    examples = [Tokens((5, 6, 7, 8, 9), 3), Tokens((4, 5, 6), 1), Tokens((7, 8), 1)]
    real = collate(examples, pad_id=0, loss_on_prompt=whole)
    labelled = int((real["labels"][:, 1:] != IGNORED).sum())
    assert batch_shape(examples, whole) == Batch(*real["input_ids"].shape, int(real["attention_mask"].sum()), labelled)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tiers.elastic_share": 0.5, "train.group_by_length": True},
        {"adapter.attention": "trained", "adapter.router": "trained"},
        {"train.gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_flops_of_a_round_are_those_torch_counts(tiny_run: dict[str, Any], changes: dict[str, Any]) -> None:
    settings = settings_of(tiny_run, **{"method.name": "fedavg", **changes})
    federation, tiers = build_federation(settings), forecast(settings, flops_per_second=1e9)["tiers"]
    for tier in (0, 3):
        profile = federation.clients[tier]
        task = Task(1, profile, federation.method.dispatch(start_state(federation), profile))
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            train(federation.trainer, task, federation.examples[profile.client])
        assert tiers[tier]["flops"] == counter.get_total_flops()
        assert tiers[tier]["seconds"] == pytest.approx(tiers[tier]["flops"] / 1e9)


@pytest.mark.parametrize(
    "changes",
    [
        {"method.name": "ubsmoe", "wire.dtype": "int8", "adapter.attention": "trained", "adapter.router": "trained"},
        {"method.name": "hetlora"},
    ],
)
def test_bytes_are_those_of_the_events(tiny_run: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = settings_of(tiny_run, **changes, **{"evaluate.before": False, "evaluate.after": False})
    federation, plan = build_federation(settings), forecast(settings, flops_per_second=1e9)
    with RunFolder.open_or_create(tmp_path / "run", to_json(settings)) as folder:
        run(
            federation,
            folder,
            LocalEngine(federation.trainer, federation.examples, federation.clients),
            lambda *_: None,
        )
    clients = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "client"]
    assert len(clients) == 8
    for event in clients:
        tier = plan["tiers"][event["tier"]]
        assert event["download_bytes"] == tier["download_bytes"]
        if settings.method.name == "ubsmoe":  # its pseudo-gradient moves every expert
            assert event["upload_bytes"] == tier["upload_bytes"]
        else:  # what no token went to stays at home
            assert tier["upload_bytes"] / 3 < event["upload_bytes"] <= tier["upload_bytes"]
    assert plan["run"]["download_bytes"] == sum(event["download_bytes"] for event in clients)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.attention": "trained", "adapter.router": "trained", "method.dmr.phi": "trained"},
        {"method.name": "flame"},
        {"method.name": "fed_sb", "secure_aggregation.bits": 30},
    ],
    ids=str,
)
def test_a_masked_vector_is_as_long_as_planned_and_hardly_shorter(
    tiny_run: dict[str, Any], changes: dict[str, Any]
) -> None:
    settings = settings_of(tiny_run, **{"secure_aggregation": {}, **changes})
    federation, plan = build_federation(settings), forecast(settings, flops_per_second=1e9)
    engine = LocalEngine(federation.trainer, federation.examples, federation.clients)
    sizes = list[int]()

    def log(event: str, number: int, **fields: Any) -> None:
        sizes.extend([fields["upload_bytes"]] if event == "client" else [])

    one_round(federation, engine, start_state(federation), 1, log)
    planned = plan["secure_aggregation"]
    slack = 8 * 2 * (6 * 6 + 4 + 16 + 18)  # bytes of the weights' bound
    assert len(sizes) == 4 and len(set(sizes)) == 1 and sizes[0] <= planned["vector_bytes"] <= sizes[0] + slack
    assert all(tier["upload_bytes"] == planned["vector_bytes"] for tier in plan["tiers"])
    assert planned["masks"] == 4 and planned["mask_seconds"] > 0


def test_without_data_every_example_is_as_long_as_may_be() -> None:
    settings = parse_run({"data": {"max_length": 50}, "train": {"batch_size": 8, "gradient_accumulation": 2}})
    works = assumed_work(settings, 8 * 100 + 3)
    assert {work.examples for work in works} == {100} and [work.tier for work in works] == [0, 1, 2, 3] * 2
    assert works[0].batches == [Batch(8, 50, 400, 400)] * 12  # one pass: 13 batches, 6 steps of two
    with pytest.raises(ConfigError, match="--examples 7 leaves some of the 8 clients without any"):
        assumed_work(settings, 7)


def test_a_whole_run_worked_by_hand() -> None:
    table = {
        "clients": {"count": 8, "per_round": 4},
        "rounds": {"extra_clients": 2},
        "simulation": {"dropout": 0.5, "flops_per_second": 1e6},
        "train": {"rounds": 10, "local_steps": 1},
    }
    plan = forecast(parse_run(table), examples=80, flops_per_second=1e9)
    per_tier, whole = plan["tiers"], plan["run"]
    assert (whole["clients_asked"], whole["clients_trained"]) == (6, 3)  # half of six answer, four would count
    mean = sum(tier["flops"] for tier in per_tier) / 4
    assert whole["flops"] == pytest.approx(10 * 3 * mean)
    assert whole["download_bytes"] == pytest.approx(2 * whole["upload_bytes"], rel=0.01)
    assert whole["seconds_side_by_side"] == pytest.approx(10 * per_tier[3]["flops"] / 1e9)
    assert per_tier[0]["virtual_seconds"] == pytest.approx(per_tier[0]["flops"] / (1e6 * 0.25))


def test_a_device_holds_the_tiers_that_fit_beside_the_libraries() -> None:
    whole, mapped = (GIB, GIB + 1), (GIB >> 2, GIB)
    tiers = [{"tier": tier, "peak_memory_bytes": whole[tier], "mapped_memory_bytes": mapped[tier]} for tier in range(2)]
    just = f"{(GIB + RUNTIME_BYTES) / GIB:.9f}GiB"
    assert fitting(tiers, just) == {"memory_bytes": GIB + RUNTIME_BYTES, "tiers": [0], "mapped_tiers": [0, 1]}
    assert fitting(tiers, "80GB")["tiers"] == [0, 1] and fitting(tiers, "1 GiB")["tiers"] == []
    with pytest.raises(ConfigError, match="expected a size in GiB or GB"):
        fitting(tiers, "lots")
    assert [smallest_device(gib * GIB - RUNTIME_BYTES) for gib in (4, 16, 80)] == [4, 16, 80]
    assert (smallest_device(4 * GIB - RUNTIME_BYTES + 1), smallest_device(80 * GIB)) == (8, None)


def test_a_run_for_a_device_that_is_not_here_is_planned_on_the_cpu() -> None:
    plan = forecast(parse_run({"model": {"device": "cuda:7"}, "train": {"local_steps": 1}}), examples=80)
    assert plan["speed"] == "measured on this machine's CPU, since model.device 'cuda:7' is not here"
    assert plan["flops_per_second"] > 1e8 and 0 <= plan["speed_spread"] < 1


def test_without_a_tokenizer_lengths_are_assumed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    table = {
        "model": {"base": "olmoe-1b-7b"},
        "data": {"max_length": 50, "synthetic": {"train_examples": 80, "test_examples": 24}},
        "evaluate": {"max_examples": 2, "max_new_tokens": 5},
        "train": {"local_epochs": 1.0},
    }
    plan = forecast(parse_run(table), flops_per_second=1e12)
    assert plan["lengths"] == (
        "data.max_length = 50 tokens, every position labelled: an upper bound, since the tokenizer of olmoe-1b-7b is not here"
    )
    assert plan["tiers"][0]["tokens"] == 16 * 50  # ten examples each, taken as one full batch
    assert plan["evaluation"]["times"] == 2 and plan["evaluation"]["questions"] <= 2 * 8
    assert plan["exports"]["merged"]["file_bytes"] == 2 * plan["parameters"]


@pytest.mark.parametrize(
    ("evaluate", "times"),
    [
        ({}, 2),
        ({"every": 3}, 5),  # before; 3, 6, 9; after 10
        ({"every": 5}, 3),  # before; 5 and 10, which is the last
        ({"every": 5, "before": False, "after": False}, 2),
        ({"before": False, "after": False}, 0),
    ],
)
def test_evaluations_are_counted(evaluate: dict[str, Any], times: int) -> None:
    assert evaluations(parse_run({"train": {"rounds": 10}, "evaluate": evaluate})) == times


def test_the_flops_of_an_evaluation_are_at_least_those_torch_counts(tiny_run: dict[str, Any]) -> None:
    """Answers that stop early are taken to go on; nothing else is above."""
    settings = settings_of(tiny_run, **{"method.name": "fedavg", "evaluate.max_examples": 4, "evaluate.before": False})
    federation, state = (found := build_federation(settings)), start_state(found)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        for profile in federation.tiers:
            evaluate_tier(federation, state, profile)
    planned = forecast(settings, flops_per_second=1e9)["evaluation"]
    assert planned["times"] == 1 and 0.9 < planned["flops"] / counter.get_total_flops() < 2


def test_a_side_factor_counts_as_far_as_the_rounds_make_it_grow() -> None:
    """8 clients of rank at most 6: 48 directions a round, until min(out, in) = 64 of ubsmoe-tiny's matrices or more."""
    shape = model_shape("ubsmoe-tiny")

    def side(rounds: int, method: str) -> int:
        table = {
            "method": {"name": method},
            "train": {"rounds": rounds},
            "adapter": {"rank": 6},
            "tiers": {"ranks": [1, 2, 4, 6]},
        }
        plan = plan_tiers(parse_run(table))
        plain = plan_tiers(parse_run(table | {"method": {"name": "fedavg"}}))
        bytes_down = plan.costs[0].download_bytes - (method == "fedex_lora") * plain.costs[0].download_bytes
        assert bytes_down == 4 * plan.workload.side_elements
        return plan.workload.side_elements

    wide, width, hidden = shape.up_matrices * shape.expert_width, shape.expert_width, shape.hidden
    experts = shape.num_moe_layers * shape.num_experts
    for rounds in (1, 2, 9):
        most = min(48 * rounds, wide, hidden), min(48 * rounds, width, hidden)
        want = experts * (most[0] * (wide + hidden) + most[1] * (width + hidden))
        assert side(rounds, "flora") == side(rounds, "florist") == side(rounds, "fedex_lora") == want


INVENTORY = """
[[machines]]
name = "phone"
memory = "{phone}"
flops_per_second = 1e10

[[machines]]
name = "card"
memory = "24GiB"
device = "cuda"
"""


def test_an_inventory_says_which_machine_can_train_what_and_how(tmp_path: Path) -> None:
    file = tmp_path / "machines.toml"
    base = {"base": "olmoe-1b-7b"}
    settings = parse_run({"model": base, "train": {"batch_size": 4, "local_steps": 3}, "data": {"max_length": 64}})

    def phone(memory: str) -> dict[str, Any]:
        file.write_text(INVENTORY.format(phone=memory))
        return forecast(settings, 100, 1e12, read_inventory(file))["machines"][0]

    file.write_text(INVENTORY.format(phone="24GiB"))
    plan = forecast(settings, 100, 1e12, read_inventory(file))
    rich, card = plan["machines"]
    assert [tier["with"] for tier in rich["tiers"]] == [[]] * 4 and card["tiers"][0]["seconds"] is None
    top = plan["tiers"][3]
    kept = top["own_memory_bytes"] + top["memory"]["weights"]  # the phone is a CPU, which keeps what it frees
    assert rich["tiers"][3]["memory_bytes"] == kept + RUNTIME_BYTES
    assert card["tiers"][3]["memory_bytes"] == top["peak_memory_bytes"] + RUNTIME_BYTES
    assert rich["tiers"][3]["seconds"] == pytest.approx(plan["tiers"][3]["flops"] / 1e10)
    just = [phone(f"{size}GB") for size in (16, 8, 4.2)]
    assert [bool(one["tiers"]) for one in just] == [True, True, True]
    assert all(tier["memory_bytes"] <= one["memory_bytes"] for one in just for tier in one["tiers"])
    assert any("a mapped base" in way for way in just[1]["tiers"][0]["with"])  # 8 GB do not hold 13.8 GB of weights
    assert phone("1GB")["tiers"] == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "machines: Field required"),
        ('[[machines]]\nname = "a"\nmemory = "much"', r"machines\.a\.memory: 'much': expected a size in GiB or GB"),
        ('[[machines]]\nname = "a"\nmemory = "8GB"\nspeed = 3', r"machines\.0\.speed"),
        ('[[machines]]\nname = "a"\nmemory = "8GB"\n' * 2, "two machines are called 'a'"),
        ("machines = [", "is not valid TOML"),
    ],
)
def test_an_inventory_that_makes_no_sense_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "machines.toml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_inventory(tmp_path / "machines.toml")


def test_qwen3_30b_takes_part_by_quantised_experts_or_a_mapped_base() -> None:
    settings = parse_run({"model": {"base": "qwen3-30b-a3b"}, "train": {"batch_size": 4}, "data": {"max_length": 128}})
    plan = plan_tiers(settings)
    assert plan.shape.parameters == pytest.approx(30.5e9, rel=0.005)
    desktop, card = (
        fits(Machine(name=device, memory="32GB", device=device), settings, plan) for device in ("cpu", "cuda")
    )
    assert any("mapped" in way for way in desktop["tiers"][3]["with"])
    assert 'model.experts = "nf4"' in card["tiers"][3]["with"]


def test_a_quantised_run_is_told_formats_of_fewer_bits_alone() -> None:
    for experts, others in ((None, {"int8", "nf4"}), ("int8", {"nf4"}), ("nf4", set[str]())):
        base = {"base": "olmoe-1b-7b", "experts": experts}
        settings = parse_run({"model": base, "train": {"batch_size": 1}, "data": {"max_length": 16}})
        plan, told = plan_tiers(settings), set()
        for megabytes in range(2000, 20000, 500):
            tiers = fits(Machine(name="m", memory=f"{megabytes / 1000}GB", device="cuda"), settings, plan)["tiers"]
            told |= {way for tier in tiers for way in tier["with"] if way.startswith("model.experts")}
        assert told == {f'model.experts = "{format}"' for format in others}


def test_a_device_that_holds_more_is_never_told_less() -> None:
    settings = parse_run({"model": {"base": "olmoe-1b-7b"}, "train": {"batch_size": 4}})
    plan = plan_tiers(settings)
    ways = []
    for gigabytes in range(3, 30):
        tiers = fits(Machine(name="m", memory=f"{gigabytes}GB"), settings, plan)["tiers"]
        ways.append((len(tiers), -len(tiers[0]["with"]) if tiers else -9))
    assert ways == sorted(ways)


def test_olmoe_on_a_small_device_is_told_so() -> None:
    """Seven thousand million weights in bfloat16 alone are 13.8 GB."""
    train = {"local_steps": 1, "batch_size": 8}
    settings = parse_run({"model": {"base": "olmoe-1b-7b", "dtype": "bfloat16"}, "train": train})
    plan = forecast(settings, examples=100, flops_per_second=1e12)
    fits = fitting(plan["tiers"], "12GiB")
    assert fits["tiers"] == [] and fits["mapped_tiers"] == [0, 1, 2, 3]
    said = plan_lines(plan | {"fits": fits})[-1]
    assert said.endswith("holds tiers: none; with a base that is mapped from disk, which a CPU can: 1, 2, 3, 4")
    memories = [tier["peak_memory_bytes"] for tier in plan["tiers"]]
    assert memories == sorted(memories) and memories[0] > 2 * plan["parameters"]
