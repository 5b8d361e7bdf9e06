"""Run folders as series over rounds: what figures and the report draw. Reads, never writes.

R  rounds seen      L  SMoE layers      M  experts
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ubsmoe.maths import balance
from ubsmoe.storage.runfolder import CONFIG, RunFolderError, RunRecord, read_run


@dataclass(frozen=True)
class Series:
    """One run: its label (method and settings), seed, and use of the experts, round by round; `phi` if it was modulated."""

    label: str
    seed: int
    record: RunRecord
    rounds: list[int]
    utilization: Float[Tensor, "R L M"]
    phi: Float[Tensor, "R L M"] | None

    @property
    def entropy(self) -> Float[Tensor, "R L"]:
        """Entropy of use over ln M."""
        return balance.normalised_entropy(self.utilization)

    @property
    def gini(self) -> Float[Tensor, "R L"]:
        """Inequality of use."""
        return balance.gini(self.utilization)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The run's events of one kind, in order."""
        return [event for event in self.record.events if event["event"] == name]


def read_series(paths: Iterable[Path]) -> list[Series]:
    """The runs in these folders; a folder of `ubsmoe compare` stands for all its runs.

    Raises:
        RunFolderError: if a folder holds neither, or a run has no round yet.
    """
    return [series(read_run(folder)) for path in paths for folder in run_folders(path)]


def run_folders(path: Path) -> list[Path]:
    """The run folder itself, or the runs of a comparison. Raises RunFolderError if there is none."""
    if (path / CONFIG).exists():
        return [path]
    if found := sorted(config.parent for config in path.glob(f"runs/*/{CONFIG}")):
        return found
    raise RunFolderError(f"{path} is neither a run folder nor a comparison's; expected what `ubsmoe run --out` wrote")


def series(record: RunRecord) -> Series:
    """What a run's events say. Raises RunFolderError if it has no round yet."""
    rounds = [event for event in record.events if event["event"] == "round"]
    if not rounds:
        raise RunFolderError(f"{record.path} has no finished round yet; let it run on")
    phi = torch.tensor([event["phi"] for event in rounds]) if "phi" in rounds[0] else None
    return Series(
        record.config.get("label") or label_of(record.config["method"]),
        record.config["seed"],
        record,
        [event["round"] for event in rounds],
        torch.tensor([event["utilization"] for event in rounds], dtype=torch.float64),
        phi,
    )


def label_of(method: dict[str, Any]) -> str:
    """A method as `compare` labels it.

    >>> label_of({"name": "ubsmoe", "pg_mode": "off", "dmr": False})
    'ubsmoe(pg_mode=off;dmr=false)'
    """
    settings = [f"{key}={str(value).lower()}" for key, value in method.items() if key != "name"]
    return method["name"] + (f"({';'.join(settings)})" if settings else "")


def by_label(runs: Sequence[Series]) -> dict[str, list[Series]]:
    """The seeds of each method together, in the order they came."""
    groups: dict[str, list[Series]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups
