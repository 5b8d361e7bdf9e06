"""`ubsmoe.Federation`: the same bits as the command line, round by round, changed and gone on with."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import ubsmoe
from e2e.test_cli import ubsmoe as command
from ubsmoe import Federation
from ubsmoe.config import RunSettings, parse_run, with_overrides
from ubsmoe.errors import UserError
from ubsmoe.methods.state import pack
from ubsmoe.storage.runfolder import read_adapter, read_run
from ubsmoe.training.asked import Sections

QUICK = {
    "threads": 1,
    "clients.count": 2,
    "data.synthetic.test_examples": 24,
    "tiers": {"budgets": [0.25, 1.0], "ranks": [2, 3]},
    "train": {"rounds": 2, "local_steps": 1, "batch_size": 3},
    "evaluate": {"max_new_tokens": 1, "max_examples": 1, "before": False, "mc_accuracy": False},
}


@pytest.fixture
def quick(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """A run of less than a second: two clients in two tiers."""
    return with_overrides(tiny_run, {**QUICK})


def sha256(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["adapter_sha256"])


def test_python_and_the_command_line_give_one_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, quick: dict, write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_toml(quick)
    assert command(monkeypatch, "run", file, "--out", tmp_path / "line") == 0
    by_file, by_parts = Federation(file), Federation(**quick)
    kinds = [event["event"] for event in by_file.run()]
    assert kinds.count("client") == 4 and kinds.count("round") == 2 and kinds[0] == "started"
    first = by_parts.round()
    assert first["round"] == by_parts.done == 1
    assert torch.allclose(by_parts.utilization, torch.tensor(first["utilization"]))
    by_parts.round()
    assert by_file.summary and by_parts.summary
    hashes = {sha256(tmp_path / "line"), by_file.summary["adapter_sha256"], by_parts.summary["adapter_sha256"]}
    assert len(hashes) == 1
    assert by_parts.evaluate() == {n + 1: scores for n, scores in enumerate(by_parts.summary["after"] or [])}
    assert by_parts.evaluate(tier=2) == by_parts.evaluate()[2]
    assert read_run(tmp_path / "line").config == by_file.record.config

    # a run that has ended prints its table at once
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("ubsmoe.server.federation.Bases", None)  # whoever loads weights fails
        assert command(patch, "run", file, "--out", tmp_path / "line") == 0
        assert command(patch, "run", tmp_path / "line") == 0
    assert capsys.readouterr().out.count(sha256(tmp_path / "line")) == 2
    with pytest.raises(UserError, match=r"all 2 rounds are done .*more_rounds"):
        by_parts.round()


def test_one_round_then_two_more_are_three_at_once(
    quick: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting = with_overrides(quick, {"method.name": "ubsmoe", "adapter.router": "trained", "simulation.dropout": 0.2})
    whole = Federation(acting, train={"rounds": 3}).train()
    parts = Federation(acting, out=tmp_path / "run", train={"rounds": 1})
    assert parts.train()["rounds"] == 1
    parts.save(tmp_path / "copy")
    assert parts.train(more_rounds=2)["adapter_sha256"] == whole["adapter_sha256"]
    assert parts.record.named("resumed")[-1]["settings_changed"] == {"train.rounds": [1, 3]}

    going = ("run", tmp_path / "copy", "--more-rounds", "2")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("ubsmoe.server.run.Run.finish", lambda self: 1 / 0)
        command(patch, *going)
    assert not read_run(tmp_path / "copy").summary  # what it ended with before is no longer final, and still there
    assert json.loads((tmp_path / "copy/summary.json").read_text())["rounds"] == 1
    assert command(monkeypatch, *going) == 0  # asked again it adds nothing
    assert sha256(tmp_path / "copy") == whole["adapter_sha256"]
    with pytest.raises(UserError, match=r"has done 3 rounds, train\.rounds is 2; set 3 or more"):
        Federation.resume(tmp_path / "copy", train={"rounds": 2}).train()


def test_records_in_memory_are_a_file_with_the_same_lines(quick: dict, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}", "note": None} for i in range(12)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows))
    own = {name: part for name, part in quick.items() if name != "data"}
    from_file = Federation(own, data=str(file)).train()
    with pytest.raises(UserError, match=r"line 13: missing field 'completion'"):  # and may be mended in the same place
        Federation(own, data=[*rows, {"prompt": "1"}], out=tmp_path / "run").round()
    from_list = Federation(own, data=rows, out=tmp_path / "run")
    assert from_list.train()["adapter_sha256"] == from_file["adapter_sha256"]
    (tmp_path / "run").rename(tmp_path / "moved")
    more = Federation.resume(tmp_path / "moved")
    assert more.train(more_rounds=1)["rounds"] == 3
    with pytest.raises(UserError, match=r"train\.jsonl holds other records; choose another out"):
        Federation(own, data=rows[1:], out=tmp_path / "moved").round()
    rows[3]["note"] = object()
    with pytest.raises(UserError, match=r"data\.train: expected a path, a hub id or records of plain values, got list"):
        Federation(own, data=rows)


def test_a_dataset_is_taken_as_records(quick: dict) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": str(i), "completion": "x"} for i in range(6)])
    both = Federation(quick, data=datasets.DatasetDict({"train": rows, "test": rows}))
    one = Federation(quick, data=rows)
    assert [path.name for path in both._files] == ["train.jsonl", "test.jsonl"]
    assert list(one._files.values()) == list(both._files.values())[:1]
    same = [rows.with_format("numpy"), rows.to_iterable_dataset()]
    assert all(list(Federation(quick, data=other)._files.values()) == list(one._files.values()) for other in same)
    with pytest.raises(UserError, match="a DatasetDict may have train and test, and has validation too"):
        Federation(quick, data=datasets.DatasetDict({"train": rows, "validation": rows}))


def test_times_in_records_are_text(quick: dict) -> None:
    (file,) = Federation(
        quick, data=[{"prompt": "a", "completion": "b", "when": datetime(2020, 1, 2, 3)}]
    )._files.values()
    assert json.loads(file)["when"] == "2020-01-02T03:00:00"


def test_phi_that_is_set_goes_to_the_clients_and_is_saved(quick: dict, tmp_path: Path) -> None:
    one, other = (Federation(quick, method="ubsmoe", out=tmp_path / name) for name in ("one", "other"))
    for fed in (one, other):
        fed.round()
    other.phi = before = other.phi + torch.linspace(-3, 3, 6)
    assert torch.equal(other.phi, before)
    with pytest.raises(UserError, match=r"phi: expected \[2, 6\] finite numbers, got 'none'"):
        fed.phi = "none"  # type: ignore[assignment]
    other.close()  # it is set all the same, and told
    with pytest.raises(UserError, match=r"phi: expected \[2, 6\] finite numbers, got a tensor of \[6\]"):
        other.phi = torch.zeros(6)
    one.round()
    assert [event["round"] for event in other.run() if event["event"] == "round"] == [
        2
    ]  # what round() gave is not told twice
    assert not torch.equal(one.utilization, other.utilization)
    assert other.record.named("set")[0]["round"] == 2
    saved = Federation.resume(tmp_path / "other")
    assert torch.equal(saved.phi, other.phi) and saved.adapter.keys() == other.adapter.keys()
    with pytest.raises(UserError, match="method fedavg has no phi"):
        print(Federation(quick, method="fedavg").phi)


def test_a_round_that_failed_is_carried_out_again_and_told_once(quick: dict, tmp_path: Path) -> None:
    faults = [ZeroDivisionError]

    def hear(event: str, round: int, fields: dict[str, Any]) -> None:
        if event == "round" and faults:
            raise faults.pop()

    fed = Federation(quick, method="ubsmoe", out=tmp_path / "run", on_event=hear)
    fed.phi = fed.phi + 1
    with pytest.raises(ZeroDivisionError):
        fed.round()
    assert fed.round()["round"] == fed.done == 1
    assert [[event["round"] for event in fed.record.named(name)] for name in ("round", "set")] == [[1], [1]]


def test_a_run_begins_where_another_ended_with_its_server_state(
    quick: dict, write_toml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = {"method.name": "ubsmoe", "method.compensation": {"rank": 2, "tokens": 64}, "train.rounds": 1}
    first = Federation(with_overrides(quick, parts), out=tmp_path / "first")
    first.train()
    ended, _ = read_adapter(tmp_path / "first")
    assert {"server.phi", "server.explained"} <= ended.keys()
    file = write_toml(with_overrides(quick, {**parts, "seed": 9}))
    begun = pack(Federation(file, adapter={"start": str(tmp_path / "first")})._begun().state)
    assert begun.keys() == ended.keys() and all(torch.equal(begun[name], ended[name]) for name in ended)
    assert command(monkeypatch, "run", file, "--from", tmp_path / "first", "--out", tmp_path / "next") == 0
    assert read_run(tmp_path / "next").config["adapter"]["start"] == str(tmp_path / "first")
    # what was fitted for other tiers is fitted anew
    tiers = {"budgets": [0.25, 0.5, 1.0], "ranks": [2, 2, 3]}
    other = pack(Federation(file, adapter={"start": str(tmp_path / "first")}, tiers=tiers)._begun().state)
    assert {"server.compensation.0.1.u", "server.compensation.0.2.u"} <= other.keys()
    assert len(other["server.explained"]) == 2 and torch.equal(other["server.phi"], ended["server.phi"])
    # another method takes what it keeps too
    plain = pack(
        Federation(file, method={"name": "fedavg", "compensation": False}, adapter={"start": str(tmp_path / "first")})
        ._begun()
        .state
    )
    assert plain.keys() == {name for name in ended if name.startswith("layers.")}
    with pytest.raises(UserError, match=r"adapter\.start: .*first, a run of ubsmoe, has adapter\.alpha of 6\.0"):
        Federation(file, adapter={"start": str(tmp_path / "first"), "alpha": 3.0}).round()


def test_what_may_change_is_recorded_and_what_may_not_is_refused(quick: dict, tmp_path: Path) -> None:
    fed = Federation(quick, out=tmp_path / "run")
    fed.round()
    fed.close()
    grown = Federation.resume(
        tmp_path / "run", clients={"count": 4}, evaluate={"max_examples": 2}, label="grown", rounds={"quorum": 0.9}
    )
    assert len([event for event in grown.run() if event["event"] == "client"]) == 4
    changed = grown.record.named("resumed")[-1]["settings_changed"]
    assert changed == {
        "clients.count": [2, 4],
        "evaluate.max_examples": [1, 2],
        "label": [None, "grown"],
        "rounds.quorum": [0.5, 0.9],
    }
    scores = (grown.summary or {})["after"][0]
    assert scores["macro"]["examples"] == 2 * (len(scores) - 1)
    again = Federation.resume(tmp_path / "run", evaluate={"max_examples": 1})
    scores = (again.train()["after"] or [])[0]
    assert scores["macro"]["examples"] == len(scores) - 1
    for sections, sentence in [
        ({"clients": {"count": 3}}, r"clients\.count = 4, asked 3: it can only grow"),
        ({"train": {"learning_rate": 1.0}}, r"train\.learning_rate \(there 0\.002, asked 1\.0\)"),
    ]:
        with pytest.raises(UserError, match=sentence):
            Federation.resume(tmp_path / "run", **sections).train()


def test_the_package_says_what_it_has_and_stays_light() -> None:
    assert dir(ubsmoe) == ubsmoe.__all__ and all(hasattr(ubsmoe, name) for name in ubsmoe.__all__)
    assert Sections.__annotations__.keys() == RunSettings.model_fields.keys()
    code = (
        "import sys, ubsmoe\nubsmoe.Federation(method='fedavg', train={'rounds': 3})\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"method": "fedavgg"}, "no method 'fedavgg'; did you mean 'fedavg'"),
        ({"trian": {"rounds": 3}}, "unknown setting 'trian'; did you mean 'train'"),
        ({"train": 3}, "train"),
        ({"data": 3}, "data.train: expected a path, a hub id or records of plain values, got int"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(sections: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Federation(**sections)


def test_every_way_to_say_a_setting_is_the_same(quick: dict) -> None:
    settings = parse_run(with_overrides(quick, {"method": {"name": "hetlora", "decay": 0.5}}))
    assert Federation(settings).settings == Federation(quick, method={"name": "hetlora", "decay": 0.5}).settings
