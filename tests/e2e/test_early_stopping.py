"""Early stopping: where it stops, which adapter it keeps, the same on every way to the end; and that it sees no test question."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from e2e.test_cli import ubsmoe as command
from e2e.test_federation import QUICK, sha256
from e2e.test_same_bits import Stopped, carry_out
from ubsmoe import Federation
from ubsmoe.config import parse_run, with_overrides
from ubsmoe.data.sources import load_examples
from ubsmoe.errors import UserError
from ubsmoe.report.headline import headline
from ubsmoe.report.series import read_series
from ubsmoe.server.federation import build_federation
from ubsmoe.storage.runfolder import read_run

STOPS = {
    # so large a step that the loss soon rises; one checkpoint, so that the best round's goes unless it is spared
    **{"train.learning_rate": 0.05, "train.rounds": 9, "train.patience": 2, "keep_checkpoints": 1},
    **{"data.validation_fraction": 0.3, "evaluate.mc_accuracy": False},
}


@pytest.fixture
def stops(tiny_run: dict[str, Any]) -> dict[str, Any]:
    return with_overrides(tiny_run, {**QUICK, **STOPS})


def test_the_adapter_is_that_of_a_run_that_ended_after_its_best_round(stops: dict, tmp_path: Path) -> None:
    fed = Federation(stops, out=tmp_path / "run")
    events = [event for event in fed.run() if event["event"] == "validated"]
    summary = fed.summary
    assert summary is not None
    losses, best = summary["validation"]["losses"], summary["validation"]["best_round"]
    assert losses == [event["loss"] for event in events] and losses[best - 1] == min(losses)
    assert summary["rounds"] == best + 2 < 9
    short = Federation(with_overrides(stops, {"train.rounds": best})).train()
    assert short["adapter_sha256"] == summary["adapter_sha256"] == fed.record.summary["adapter_sha256"]
    assert short["after"] == summary["after"] and short["validation"]["losses"] == losses[:best]
    assert fed.evaluate()[1] == summary["after"][0]
    with pytest.raises(UserError, match=rf"stopped after round {best + 2} \(train\.patience\)"):
        fed.round()
    assert json.loads((tmp_path / "run/data.json").read_text())["validation"]["examples"] == 12


def test_stopped_resumed_and_in_two_processes_it_keeps_the_same_adapter(stops: dict, tmp_path: Path) -> None:
    """The run is stopped in the round after its best one, whose checkpoint is then all that holds the adapter."""
    federation = build_federation(parse_run(with_overrides(stops, {"evaluate.after": False})))
    whole = carry_out(federation, tmp_path / "whole")
    best = read_run(tmp_path / "whole").summary["validation"]["best_round"]
    assert [path.name for path in sorted((tmp_path / "whole/checkpoints").iterdir())] == [
        f"round-{best:05d}",
        f"round-{best + 2:05d}",
    ]
    for name, workers in (("one", 1), ("two", 2)):
        with suppress(Stopped):
            carry_out(federation, tmp_path / name, workers, stop_in=best + 2)
        assert carry_out(federation, tmp_path / name, workers) == whole


def test_more_patience_goes_on_and_more_rounds_alone_are_refused(
    stops: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, write_toml: Callable[..., Path]
) -> None:
    file, out = write_toml(stops), tmp_path / "run"
    assert command(monkeypatch, "run", file, "--out", out) == 0
    printed = capsys.readouterr().out
    best, rounds = read_run(out).summary["validation"]["best_round"], read_run(out).summary["rounds"]
    assert f"the adapter is that of round {best}, whose validation loss was the lowest (" in printed
    assert f"training stopped after round {rounds} of 9" in printed and "round 1  validation loss" in printed
    (remark,) = [one for one in headline(read_series([out]), [[]]).remarks if "stopped after" in one]
    assert f"that of round {best}" in remark

    assert command(monkeypatch, "run", out) == 0  # it has ended: its table at once
    assert f"stopped after round {rounds} of 9" in capsys.readouterr().out
    assert command(monkeypatch, "run", out, "--more-rounds", "2") == 2
    assert f"stopped early, after {rounds} rounds" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"set train\.patience higher"):
        Federation.resume(out).train(more_rounds=2)

    assert command(monkeypatch, "run", out, "--more-rounds", "1", "--set", "train.patience=7") == 0
    whole = Federation(with_overrides(stops, {"train.patience": 7, "train.rounds": rounds + 1})).train()
    assert sha256(out) == whole["adapter_sha256"] and whole["rounds"] == rounds + 1
    assert read_run(out).named("resumed")[-1]["settings_changed"]["train.patience"] == [2, 7]


def test_validation_asks_what_neither_clients_nor_the_test_have(tiny_run: dict[str, Any]) -> None:
    for changes in ({}, {"data.test_fraction": 0.5}):
        settings = parse_run(with_overrides(tiny_run, {**STOPS, **changes})).data
        without = settings.model_copy(update={"validation_fraction": None})
        splits, plain = (load_examples(one, None, seed=3) for one in (settings, without))
        tested = {example.prompt for group in splits.test.values() for example in group}
        trained, held = ({example.prompt for example in part} for part in (splits.train, splits.validation))
        assert held and not held & trained and not held & tested and splits.test == plain.test
        assert {example.prompt for example in plain.train} - tested == (trained | held) - tested


@pytest.mark.parametrize("missing", ["train.patience", "data.validation_fraction"])
def test_early_stopping_takes_patience_and_a_held_out_part(missing: str, tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"early stopping takes both, such as 3 and 0\.1"):
        parse_run(with_overrides(tiny_run, {**STOPS, missing: None}))
