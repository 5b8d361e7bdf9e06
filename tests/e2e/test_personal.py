"""A client that goes on alone: it is what one more round of that client would be, and the run stays as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from e2e.test_cli import ubsmoe as command
from ubsmoe import Federation
from ubsmoe.config import with_overrides
from ubsmoe.errors import UserError
from ubsmoe.finished.run import evaluate_run, export_run
from ubsmoe.training.personal import personalise

SMALL = {"method.name": "fedavg", "evaluate.before": False, "evaluate.max_new_tokens": 2}


@pytest.fixture
def finished(tiny_run: dict[str, Any], tmp_path: Path) -> Path:
    Federation(with_overrides(tiny_run, {**SMALL, "train.rounds": 1}), out=tmp_path / "run").train()
    return tmp_path / "run"


def test_of_one_client_it_is_one_more_round(tiny_run: dict, tmp_path: Path) -> None:
    alone = {
        **SMALL,
        "clients.count": 1,
        "tiers.budgets": [0.5],
        "tiers.ranks": [3],
        "train.rounds": 1,
        "train.clip_norm": 0.01,
    }
    Federation(with_overrides(tiny_run, alone), out=tmp_path / "run").train()
    (own,) = personalise(tmp_path / "run", 2, tmp_path / "own")
    longer = Federation.resume(tmp_path / "run")
    longer.train(more_rounds=1)
    longer.close()
    export_run(tmp_path / "run", tmp_path / "longer", "peft")
    found = load_file(tmp_path / "own" / own.client / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "longer" / "adapter_model.safetensors")
    torch.testing.assert_close(found, wanted)


def test_accuracies_are_weighed_by_the_clients_own_tasks(finished: Path, tmp_path: Path) -> None:
    before = (finished / "adapter.safetensors").read_bytes()
    found = list(personalise(finished, 1))
    assert [(one.client, one.tier) for one in found] == [(f"client-{i}", i) for i in range(4)]
    shares = Federation.resume(finished).record.events[1]["report"]["clients"]
    for tier, own, share in zip(evaluate_run(finished, {}), found, shares, strict=True):
        asked = {task: count for task, count in share["counts"].items() if task in tier["scores"]}
        by_hand = sum(tier["scores"][task]["accuracy"] * count for task, count in asked.items()) / sum(asked.values())
        assert own.before == pytest.approx(by_hand) and own.examples == share["size"]
    (again,) = personalise(finished, 1, clients=["client-2"])
    assert again == found[2]
    assert (finished / "adapter.safetensors").read_bytes() == before


def test_bad_names_and_a_folder_that_is_taken_are_refused_before_any_training(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no client 'nobody'; it has client-0, client-1"):
        list(personalise(finished, 1, clients=["nobody"]))
    with pytest.raises(UserError, match="exists already"):
        next(personalise(finished, 1, out=finished))


def test_the_verb_prints_what_each_client_gained(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--steps", "1", "--client", "client-1", "--out", tmp_path / "own")
    assert command(monkeypatch, "personalise", finished, *asked) == 0
    text = capsys.readouterr().out
    assert "client-1" in text and "mean gain" in text
    assert [folder.name for folder in (tmp_path / "own").iterdir()] == ["client-1"]
