"""Log a run's metrics to an experiment tracker: TensorBoard, Weights & Biases or MLflow, behind two functions.

Every tracker gets the same names and the round as its step. Where it writes is the tracker's own business, by its own environment
variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, ...); TensorBoard writes beside the run's other files.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from ubsmoe.errors import UserError, require
from ubsmoe.report.plain import average
from ubsmoe.storage.same_run import flatten

Scalars = dict[str, float]


class Tracker(Protocol):
    """Where metrics are logged."""

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Log the values of a round."""
        ...

    def close(self) -> None:
        """Write what is still in memory; the run may have failed."""
        ...


Open = Callable[[Path, Mapping[str, Any], int], Tracker]
"""(run folder, the run's settings, the round it goes on after: 0 for a fresh run) -> a tracker."""


class Tracking:
    """Turns a run's events into metrics, for any number of trackers, opened at the first event: it says where the run stands.

    Raises:
        UserError: for a tracker that does not exist or is not installed, before anything is written.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        check_trackers(names)
        self._names, self._folder, self._settings = names, folder, settings
        self._trackers: list[Tracker] | None = None
        self._clients: list[dict[str, Any]] = []
        self._dropped = 0

    def on_event(self, event: str, round: int, fields: dict[str, Any]) -> None:
        """One event of the run, after it was written."""
        if self._trackers is None:
            self._trackers = [TRACKERS[name](self._folder, self._settings, round) for name in self._names]
        if event == "client":
            self._clients.append(fields)
        elif event == "dropped":
            self._dropped += 1
        elif event == "round":
            self._log(round_scalars(fields, self._clients, self._dropped), round)
            self._clients, self._dropped = [], 0
        elif event == "evaluated":
            self._log(score_scalars(fields), round)

    def _log(self, values: Scalars, round: int) -> None:
        for tracker in self._trackers or []:
            tracker.log(values, round)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self._trackers or []:
            tracker.close()


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that does not exist or is not installed."""
    check_names(names)
    for name in names:
        require(name, name)


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that does not exist."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name!r}: expected one of {', '.join(TRACKERS)}")


def round_scalars(fields: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], dropped: int) -> Scalars:
    """A round as numbers: of the whole, and per tier.

    A tier has the means over its clients of loss, learning rate and gradient norm, and the seconds of the slowest.
    """
    layers = len(fields["entropy"])
    values: Scalars = {
        "round/seconds": fields["seconds"],
        "round/clients": len(clients),
        "round/dropped": dropped,
        "round/upload_bytes": sum(client.get("upload_bytes", 0) for client in clients),
        "round/download_bytes": sum(client["download_bytes"] for client in clients),
        "experts/entropy": sum(fields["entropy"]) / layers,
        "experts/gini": sum(fields["gini"]) / layers,
        "experts/dead": fields["dead_experts"],
    }
    if fields["loss"] is not None:  # a private run tells none
        values["round/loss"] = fields["loss"]
    for tier in sorted({client["tier"] for client in clients}):
        own = [client for client in clients if client["tier"] == tier]
        if losses := [client["loss"] for client in own if "loss" in client]:
            values[f"tier {tier + 1}/training_loss"] = sum(losses) / len(losses)
        for name in ("learning_rate", "gradient_norm"):
            told = [client["steps"][name] for client in own if client.get("steps", {}).get(name)]
            if told:
                values[f"tier {tier + 1}/{name}"] = average(average(one) for one in told)
        values[f"tier {tier + 1}/slowest_seconds"] = max(client["seconds"] for client in own)
    return values


def score_scalars(fields: Mapping[str, Any]) -> Scalars:
    """A tier's scores, mean over tasks; what was not measured is left out."""
    macro = fields["scores"]["macro"]
    names = ("accuracy", "unparsed", "mc_accuracy", "loss")
    return {f"tier {fields['tier'] + 1}/{name}": macro[name] for name in names if macro[name] is not None}


class TensorBoard:
    """Event files in `tensorboard/` of the run folder; points after the round that a run goes on from are taken back."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Log the values of a round, and let a reader see them at once."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace(" ", "_"), value, round)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; one that goes on is a new run in the group of the folder's name."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], after: int) -> None:
        import wandb

        self._run = wandb.init(dir=str(folder), name=folder.name, group=folder.name, config=dict(settings))

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Log the values of a round; the tiers' scores come after their round, so the round is a value, not W&B's own step."""
        self._run.log({"round": round, **values})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Mlflow:
    """A run of MLflow; one that goes on is a new run of the same name."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], after: int) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name("ubsmoe")
        place = experiment.experiment_id if experiment else self._client.create_experiment("ubsmoe")
        self._run = self._client.create_run(place, run_name=folder.name).info.run_id
        for key, value in flatten(settings).items():
            self._client.log_param(self._run, key, value)

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Log the values of a round."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=round)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)


TRACKERS: dict[str, Open] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
