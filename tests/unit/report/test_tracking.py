"""Curves of a run: the numbers, and every tracker that is installed really writing them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.errors import UserError
from ubsmoe.report import tracking
from ubsmoe.report.tracking import Tracking

SETTINGS = {"seed": 3, "train": {"rounds": 2}}
SCORES = {"macro": {"accuracy": 0.5, "unparsed": 0.1, "mc_accuracy": None, "loss": 0.25, "examples": 8}}


STEPS = {"number": [1, 9], "loss": [3.0, 1.0], "learning_rate": [0.2, 0.1], "gradient_norm": [4.0, 2.0]}


def client(tier: int, loss: float, seconds: float) -> dict[str, Any]:
    return {"tier": tier, "loss": loss, "seconds": seconds, "upload_bytes": 10, "download_bytes": 7, "steps": STEPS}


ROUND = {"loss": 0.75, "seconds": 9.0, "entropy": [0.5, 1.0], "gini": [0.2, 0.4], "dead_experts": 3}


def tell(shown: Tracking, number: int = 1) -> None:
    """A round of three clients in two tiers, one lost, and a score."""
    for own in (client(0, 1.0, 2.0), client(0, 2.0, 5.0), client(2, 4.0, 3.0)):
        shown.on_event("client", number, own)
    shown.on_event("dropped", number, {"client": "client-9", "stage": "training", "reason": "no answer"})
    shown.on_event("round", number, ROUND)
    shown.on_event("evaluated", number, {"tier": 2, "scores": SCORES})


EXPECTED = {
    "round/loss": 0.75, "round/seconds": 9.0, "round/clients": 3, "round/dropped": 1, "round/upload_bytes": 30,
    "round/download_bytes": 21, "experts/entropy": 0.75, "experts/gini": 0.3, "experts/dead": 3,
    "tier 1/training_loss": 1.5, "tier 1/slowest_seconds": 5.0, "tier 3/training_loss": 4.0, "tier 3/slowest_seconds": 3.0,
    "tier 1/learning_rate": 0.15, "tier 1/gradient_norm": 3.0, "tier 3/learning_rate": 0.15, "tier 3/gradient_norm": 3.0,
    "tier 3/accuracy": 0.5, "tier 3/unparsed": 0.1, "tier 3/loss": 0.25,
}  # fmt: skip


class Kept:
    """A tracker that remembers."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], after: int) -> None:
        self.points: list[tuple[str, int, float]] = []
        self.closed, self.after = False, after

    def log(self, values: Mapping[str, float], round: int) -> None:
        self.points += [(name, round, value) for name, value in values.items()]

    def close(self) -> None:
        self.closed = True


def test_a_round_becomes_the_numbers_worked_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Kept] = []
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", lambda *args: made.append(Kept(*args)) or made[-1])
    with Tracking(["tensorboard"], tmp_path, SETTINGS) as shown:
        shown.on_event("resumed", 4, {"round": 4})
        tell(shown, 5)
        shown.on_event("round", 6, ROUND)  # nobody answered
    points = {name: value for name, number, value in made[0].points if number == 5}
    assert points == pytest.approx(EXPECTED) and made[0].after == 4 and made[0].closed
    later = {name: value for name, number, value in made[0].points if number == 6}
    assert later["round/clients"] == later["round/dropped"] == 0


def test_a_run_that_fails_closes_its_trackers_and_one_without_any_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Kept] = []
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", lambda *args: made.append(Kept(*args)) or made[-1])
    with pytest.raises(RuntimeError), Tracking(["tensorboard"], tmp_path, SETTINGS) as shown:
        tell(shown)
        raise RuntimeError
    assert made[0].closed
    with Tracking([], tmp_path, SETTINGS) as shown:
        tell(shown)
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_missing_trackers_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--track 'tensorbord': expected one of tensorboard, wandb, mlflow"):
        Tracking(["tensorbord"], tmp_path, SETTINGS)
    monkeypatch.setattr("ubsmoe.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'this needs wandb: pip install "ubsmoe\[wandb\]"'):
        Tracking(["wandb"], tmp_path, SETTINGS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_written_and_forgets_rounds_run_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracking(["tensorboard"], tmp_path, SETTINGS) as shown:
        shown.on_event("started", 0, {})
        for number in (1, 2, 3):
            tell(shown, number)
    with Tracking(["tensorboard"], tmp_path, SETTINGS) as shown:
        shown.on_event("resumed", 1, {"round": 1})
        tell(shown, 2)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {name.replace("_", " ", 1) if name.startswith("tier") else name for name in read.Tags()["scalars"]} == set(
        EXPECTED
    )
    assert [point.step for point in read.Scalars("round/loss")] == [1, 2]
    assert [point.value for point in read.Scalars("tier_3/accuracy")] == [0.5, 0.5]


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Tracking(["wandb"], tmp_path, SETTINGS) as shown:
        tell(shown)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wandb.teardown()  # its own process writes the file, and is done when it has gone
    data = file.read_bytes()
    assert b"tier 3/accuracy" in data and b"round/dropped" in data


@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_what_was_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the plainest store: no database, no server
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with Tracking(["mlflow"], tmp_path / "run", SETTINGS) as shown:
        tell(shown, 2)
    reader = mlflow.MlflowClient()
    (run,) = reader.search_runs([reader.get_experiment_by_name("ubsmoe").experiment_id])
    assert run.data.metrics == pytest.approx(EXPECTED) and run.data.params == {"seed": "3", "train.rounds": "2"}
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert reader.get_metric_history(run.info.run_id, "round/loss")[0].step == 2
