"""Run folders as series over rounds, and the quantities that figures and the report draw from them. Reads, never writes.

S  seeds      R  rounds seen      L  SMoE layers      M  experts
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ubsmoe.storage.layout import CONFIG
from ubsmoe.storage.record import RunRecord
from ubsmoe.storage.runfolder import RunFolderError, read_run
from ubsmoe.storage.same_run import flatten

Array = NDArray[np.float64]

# after Okabe and Ito, told apart by colour-blind readers; readable on white and on black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07D00", "#56B4E9", "#808080")


@dataclass(frozen=True)
class Series:
    """One run: its label (method and settings), seed, and use of the experts [R, L, M]; `phi` alike if it was modulated."""

    label: str
    seed: int
    record: RunRecord
    rounds: list[int]
    utilization: Array
    phi: Array | None

    @property
    def name(self) -> str:
        """Label and seed."""
        return f"{self.label}, seed {self.seed}"

    @property
    def base(self) -> str:
        """The base, as the run file says it."""
        return str(self.record.config["model"]["base"])

    @property
    def settings(self) -> str:
        """The resolved run file, as JSON."""
        return json.dumps(self.record.config, indent=2)


@dataclass(frozen=True)
class Quantity:
    """What is drawn over rounds: its name, its unit, what its extremes mean, and its values [R, L] of a run."""

    title: str
    unit: str
    meaning: str
    of: Callable[[Series], Array]


def read_series(paths: Iterable[Path]) -> list[Series]:
    """The runs in these folders; a folder of `ubsmoe compare` stands for all its runs. Labels say the base where there are several.

    Raises:
        RunFolderError: if a folder holds neither, or a run has no round yet.
    """
    runs = [series(read_run(folder)) for path in paths for folder in run_folders(path)]
    bases = {run.base for run in runs}
    return runs if len(bases) == 1 else [replace(run, label=f"{run.label}, {_name(run.base, bases)}") for run in runs]


def _name(base: str, bases: Iterable[str]) -> str:
    """The last part of a base's name, if no other base has the same."""
    last = Path(base).name
    return last if [Path(other).name for other in bases].count(last) == 1 else base


def run_folders(path: Path) -> list[Path]:
    """The run folder itself, or the runs of a comparison. Raises RunFolderError if there is none."""
    if (path / CONFIG).exists():
        return [path]
    if found := sorted(config.parent for config in path.glob(f"runs/*/{CONFIG}")):
        return found
    if points := sorted({config.parents[2].name for config in path.glob(f"*/runs/*/{CONFIG}")}):
        raise RunFolderError(f"{path} holds a grid; name one of its points, such as {path / points[0]}")
    raise RunFolderError(f"{path} is neither a run folder nor a comparison's; expected what `ubsmoe run --out` wrote")


def series(record: RunRecord) -> Series:
    """What a run's events say. Raises RunFolderError if it has no round yet."""
    rounds = record.rounds
    if not rounds:
        raise RunFolderError(f"{record.path} has no finished round yet; let it run on")
    return Series(
        record.config.get("label") or label_of(record.config["method"]),
        record.config["seed"],
        record,
        [event["round"] for event in rounds],
        np.array([event["utilization"] for event in rounds]),
        np.array([event["phi"] for event in rounds]) if "phi" in rounds[0] else None,
    )


def label_of(method: Mapping[str, Any]) -> str:
    """A method with its settings, as tables name it.

    >>> label_of({"name": "ubsmoe", "pg": {"mode": "oracle"}, "dmr": False})
    'ubsmoe(pg.mode=oracle;dmr=false)'
    """
    settings = [f"{key}={_plain(value)}" for key, value in flatten(method).items() if key != "name"]
    return _plain(method["name"]).rpartition(":")[2] + (f"({';'.join(settings)})" if settings else "")


def alone(runs: Sequence[Series]) -> list[Series]:
    """The same; a method alone goes by its name, since the settings in its label only tell it from others."""
    if len({run.label for run in runs}) > 1:
        return list(runs)
    return [run if run.record.config.get("label") else replace(run, label=run.label.partition("(")[0]) for run in runs]


def by_label(runs: Sequence[Series]) -> dict[str, list[Series]]:
    """The seeds of each method together, in the order they came."""
    groups: dict[str, list[Series]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def over_rounds(runs: Sequence[Series], quantity: Quantity) -> Iterator[tuple[list[Series], list[int], Array]]:
    """Per label its seeds, the rounds that all of them have (one may still be running), and the values [S, R, L]."""
    for seeds in by_label(runs).values():
        rounds = min((run.rounds for run in seeds), key=len)
        yield seeds, rounds, np.stack([quantity.of(run)[: len(rounds)] for run in seeds])


def mean(values: Array, axis: int | tuple[int, ...]) -> Array:
    """The mean of what is defined; NaN where nothing is."""
    return np.ma.masked_invalid(values).mean(axis).filled(np.nan)


def correlation(x: Array, y: Array, ranks: bool = False) -> Array:
    """Pearson's correlation over the last dimension, or Spearman's, of ranks; NaN where one of the two does not vary."""
    if ranks:
        from scipy.stats import rankdata  # here, because it takes a second to import

        x, y = rankdata(x, axis=-1), rankdata(y, axis=-1)
    pairs = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True)
    found = [np.corrcoef(a, b)[0, 1] if np.ptp(a) and np.ptp(b) else np.nan for a, b in pairs]
    return np.array(found).reshape(x.shape[:-1])


def _of_events(name: str) -> Callable[[Series], Array]:
    return lambda run: np.array([event[name] for event in run.record.named("round")])


def _phi_against_use(ranks: bool) -> Callable[[Series], Array]:
    def values(run: Series) -> Array:
        assert run.phi is not None, "only runs with phi have this quantity"
        return correlation(run.phi, run.utilization, ranks)

    return values


ALIKE = "when all experts of a layer work alike"
ENTROPY = Quantity("Entropy of expert use", "H / ln M", f"1 {ALIKE}", _of_events("entropy"))
GINI = Quantity("Gini coefficient of expert use", "Gini", f"0 {ALIKE}", _of_events("gini"))
PHI, PHI_RANKS = (
    Quantity("φ against utilization", unit, "negative where the modulation works", _phi_against_use(ranks))
    for unit, ranks in (("Pearson r", False), ("Spearman ρ", True))
)


def _plain(value: Any) -> str:
    """A setting as a label shows it: TOML without spaces, text without quotes, a plug-in without its file."""
    if isinstance(value, str):
        return value.rpartition(".py:")[2]
    return json.dumps(value, separators=(",", ":"))
