"""Several methods on the same work: the same base, data, clients, rounds and seeds; what differs stands in a variant.

Every cell of the grid is an ordinary run folder, so an interrupted comparison goes on where it stopped.
"""

import csv
import io
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, cast

from ubsmoe import progress
from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.plan.tiers import run_costs
from ubsmoe.report.comparison import OWN, Balance, Row
from ubsmoe.report.plain import average, csv_row
from ubsmoe.report.tracking import Tracking, check_trackers
from ubsmoe.storage.checkpoints import newest_round
from ubsmoe.storage.layout import CHECKPOINTS, CONFIG, read_json
from ubsmoe.storage.record import RunRecord, Scores
from ubsmoe.storage.runfolder import atomic_write, read_run
from ubsmoe.storage.same_run import differing_settings, refuse_change
from ubsmoe.study.variants import Variant
from ubsmoe.training.federation import Federation


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: a point of the grid, a variant's label, a seed."""

    point: str
    label: str
    seed: int

    @property
    def name(self) -> str:
        """How it is called while it runs."""
        return "  ".join(filter(None, (self.point, self.label)))

    def folder(self, out: Path) -> Path:
        """Its run folder: a point's are those of an ordinary comparison."""
        return out / _file_name(self.point) / "runs" / f"{_file_name(self.label)}-seed{self.seed}"


def cells_of(
    points: Mapping[str, RunSettings], variants: Sequence[Variant], seeds: Sequence[int]
) -> dict[Cell, RunSettings]:
    """Every run of a comparison with its settings. Raises ConfigError for a change that makes no sense."""
    return {
        Cell(point, variant.label, seed): variant.settings_in(settings, seed)
        for point, settings in points.items()
        for seed in seeds
        for variant in variants
    }


def compare(
    points: Mapping[str, RunSettings],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    report: Callable[[str, int, int], None] | None = None,
    track: Sequence[str] = (),
) -> list[Row]:
    """Run the grid, or what is left of it, and write comparison.csv.

    Args:
        points: the run file at each point of the grid, by name; a single one without a name has its runs in `out` itself. [method]
            and seed are replaced, and what a variant changes.
        variants: what to compare at each point.
        seeds: one run per variant and seed; a seed draws adapter, data, partition and sampling alike for all variants.
        out: the comparison's folder.
        jobs: runs at a time, each in a process of its own with its share of the threads.
        report: called with (name, seed, runs done) after each run; point and label make its name.
        track: where each run logs its metrics too (`report/tracking.py`); its name there is its folder's.

    Returns:
        Tidy rows: method, seed, tier, task, metrics, costs.

    Raises:
        UserError: for a method, setting or tracker that does not exist, before anything runs.
        RunFolderError: if a folder of the grid holds a run of other settings, before anything runs.
    """
    if not all(settings.evaluate.after for settings in points.values()):
        raise ConfigError("a comparison is one of scores after training; set evaluate.after = true")
    cells = cells_of(points, variants, seeds)
    check_trackers(track)
    for cell, settings in cells.items():
        if cell.seed == seeds[0]:
            run_costs(settings)  # builds the method: a misspelt setting fails here, not in an hour
    folders = {cell: cell.folder(out) for cell in cells}
    if twice := [str(folder) for folder, count in Counter(folders.values()).items() if count > 1]:
        raise ConfigError(
            f"two runs of the comparison would have the folder {twice[0]}; give them labels or other values"
        )
    for cell, folder in folders.items():
        if newest_round(folder / CHECKPOINTS) is not None:
            refuse_change(folder, read_json(folder / CONFIG), cells[cell].model_dump(mode="json"))
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=end_with_parent) as pool:
        futures = {pool.submit(run_cell, settings, folders[cell], track): cell for cell, settings in cells.items()}
        progress.at("trains; runs that have ended:", 0, len(cells))
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress.at("trains; runs that have ended:", done, len(cells))
                if report:
                    report(futures[future].name, futures[future].seed, done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    records = {cell: read_run(folder) for cell, folder in folders.items()}
    varied = {key for variant in variants for key in variant.changes} | {"label"}
    for point in points:
        check_same_work([record for cell, record in records.items() if cell.point == point], varied)
    rows = [_at(cell.point, row) for cell, record in records.items() for row in tidy_rows(cell, record)]
    atomic_write(out / "comparison.csv", to_csv(rows).encode())
    return rows


def estimate(
    points: Mapping[str, RunSettings], variants: Sequence[Variant], seed: int
) -> Iterator[tuple[str, float, float]]:
    """What one run of each variant will take at each point: its name, training FLOPs of all clients, and seconds on one core.

    Evaluation is not counted. Raises ConfigError for a method or setting that does not exist.
    """
    from ubsmoe.plan.forecast import forecast

    speeds: dict[str, float] = {}  # measured once a point: bases differ
    for cell, settings in cells_of(points, variants, [seed]).items():
        found = forecast(settings, flops_per_second=speeds.get(cell.point))
        speeds[cell.point] = found["flops_per_second"]
        yield cell.name, found["run"]["flops"], found["run"]["seconds_one_after_another"]


def run_cell(settings: RunSettings, folder: Path, track: Sequence[str] = ()) -> None:
    """One run of the grid, quietly; a run that has ended is left alone."""
    import torch

    # bitwise equal whatever runs beside it, and two processes do not fight for the cores
    torch.set_num_threads(settings.threads or 1)
    tracking = Tracking(track, folder, settings.model_dump(mode="json"))
    federation = Federation(settings, out=folder, on_event=tracking.on_event)
    if federation.summary is None:
        with federation, tracking:
            federation.train()


def end_with_parent() -> None:
    """Let a process of the pool end when the comparison does, however that ends.

    The pool itself tells its processes only between two runs, which may be an hour, and nothing at all after SIGTERM or SIGKILL.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, rather than with a traceback

    def wait() -> None:
        parent = parent_process()
        assert parent is not None, "only a process of the pool has a parent to wait for"
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def check_same_work(records: Iterable[RunRecord], varied: Collection[str] = ()) -> None:
    """Refuse to compare runs that did not do the same work.

    Args:
        records: finished runs.
        varied: dotted settings that may differ, beside [method] and seed.

    Raises:
        ConfigError: naming the first other setting that differs, or a run on another base.
    """
    first, *others = records
    for record in others:
        differing = differing_settings(_work(first.config), _work(record.config))
        for key in sorted(differing.keys() - varied):
            here, there = differing[key]
            raise ConfigError(
                f"{first.path} and {record.path} are not the same work: {key} is {here!r} in one and {there!r} in the other"
            )
        hashes = [one.summary and one.summary["base_sha256"] for one in (first, record)]
        if hashes[0] != hashes[1]:
            raise ConfigError(f"{first.path} and {record.path} were trained on different bases")


def tidy_rows(cell: Cell, record: RunRecord) -> list[Row]:
    """One row per tier and task of a finished run, costs beside the scores."""
    assert record.summary is not None and record.costs is not None
    seconds, balance = _client_seconds(record), _balance(record)
    tiers, after_training = record.summary["tiers"], record.summary["after"]
    assert after_training
    before_training: Sequence[Scores | None] = record.summary["before"] or [None] * len(tiers)
    rows: list[Row] = []
    for profile, cost, before, after in zip(tiers, record.costs, before_training, after_training, strict=True):
        for task, score in after.items():
            start = before[task] if before else None
            rows.append(
                {
                    "method": cell.label,
                    "seed": cell.seed,
                    "tier": profile["tier"] + 1,
                    "top_k": profile["top_k"],
                    "rank": profile["rank"],
                    "task": task,
                    "accuracy": score["accuracy"],
                    "unparsed": score["unparsed"],
                    "mc_accuracy": score["mc_accuracy"],
                    "loss": score["loss"],
                    "accuracy_before": start and start["accuracy"],
                    "unparsed_before": start and start["unparsed"],
                    "mc_accuracy_before": start and start["mc_accuracy"],
                    "loss_before": start and start["loss"],
                    "chance": score["chance"],
                    "examples": score["examples"],
                    "train_flops_per_token": cost["train_flops_per_token"],
                    "upload_bytes": cost["upload_bytes"],
                    "download_bytes": cost["download_bytes"],
                    "client_seconds": seconds.get(profile["tier"]),
                    "entropy": balance["entropy"],
                    "gini": balance["gini"],
                    "dead_experts": balance["dead_experts"],
                }
            )
            own = {f"{OWN}{name}": value for name, value in score.get("metrics", {}).items()}
            cast(dict[str, Any], rows[-1]).update(own)
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV text; a column that a row lacks, as a plug-in's metric of another task, is empty there."""
    text, columns = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(csv_row, rows))
    return text.getvalue()


def _at(point: str, row: Row) -> Row:
    named: dict[str, Any] = {"point": point} if point else {}
    return cast(Row, named | dict(row))


def _client_seconds(record: RunRecord) -> dict[int, float]:
    """Mean training seconds per client and round, by tier."""
    seconds: dict[int, list[float]] = {}
    for event in record.clients:
        seconds.setdefault(event["tier"], []).append(event["seconds"])
    return {tier: average(values) for tier, values in seconds.items()}


def _balance(record: RunRecord) -> Balance:
    """How the last round used the experts, mean over layers: entropy over its maximum, Gini; dead experts in all layers."""
    if not record.rounds:
        return {"entropy": None, "gini": None, "dead_experts": None}
    last = record.rounds[-1]
    entropy, gini = average(last["entropy"]), average(last["gini"])
    return {"entropy": entropy, "gini": gini, "dead_experts": last["dead_experts"]}


def _work(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("method", "seed")}


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", label).strip("_")
