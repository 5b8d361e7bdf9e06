"""Several methods on the same work: the same base, data, clients, rounds and seeds; what differs stands in a variant.

Every cell of the grid is an ordinary run folder, so an interrupted comparison goes on where it stopped.
"""

import csv
import io
import os
import re
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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


def compare(
    settings: RunSettings,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    report: Callable[[str, int, int], None] | None = None,
    track: Sequence[str] = (),
) -> list[Row]:
    """Run the grid, or what is left of it, and write comparison.csv.

    Args:
        settings: the run file; its [method] and seed are replaced, and what a variant changes.
        variants: what to compare.
        seeds: one run per variant and seed; a seed draws adapter, data, partition and sampling alike for all variants.
        out: the comparison's folder.
        jobs: runs at a time, each in a process of its own with its share of the threads.
        report: called with (label, seed, runs done) after each run.
        track: where each run logs its metrics too (`report/tracking.py`); its name there is its folder's.

    Returns:
        Tidy rows: method, seed, tier, task, metrics, costs.

    Raises:
        UserError: for a method, setting or tracker that does not exist, before anything runs.
        RunFolderError: if a folder of the grid holds a run of other settings, before anything runs.
    """
    if not settings.evaluate.after:
        raise ConfigError("a comparison is one of scores after training; set evaluate.after = true")
    grid = {(variant.label, seed): variant.settings_in(settings, seed) for seed in seeds for variant in variants}
    check_trackers(track)
    for variant in variants:
        run_costs(grid[variant.label, seeds[0]])  # builds the method: a misspelt setting fails here, not in an hour
    folders = {key: out / "runs" / f"{_file_name(key[0])}-seed{key[1]}" for key in grid}
    for key, folder in folders.items():
        if newest_round(folder / CHECKPOINTS) is not None:
            refuse_change(folder, read_json(folder / CONFIG), grid[key].model_dump(mode="json"))
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=end_with_parent) as pool:
        futures = {pool.submit(run_cell, cell, folders[key], track): key for key, cell in grid.items()}
        progress.at("trains; runs that have ended:", 0, len(grid))
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress.at("trains; runs that have ended:", done, len(grid))
                if report:
                    report(*futures[future], done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    records = {key: read_run(folder) for key, folder in folders.items()}
    check_same_work(records.values(), {key for variant in variants for key in variant.changes} | {"label"})
    rows = [row for (label, seed), record in records.items() for row in tidy_rows(label, seed, record)]
    atomic_write(out / "comparison.csv", to_csv(rows).encode())
    return rows


def estimate(settings: RunSettings, variants: Sequence[Variant], seed: int) -> Iterator[tuple[str, float, float]]:
    """What one run of each variant will take: its label, training FLOPs of all clients, and seconds on one core of this machine.

    Evaluation is not counted. Raises ConfigError for a method or setting that does not exist.
    """
    from ubsmoe.plan.forecast import forecast

    speed = None
    for variant in variants:
        found = forecast(variant.settings_in(settings, seed), flops_per_second=speed)
        speed = found["flops_per_second"]  # measured once
        yield variant.label, found["run"]["flops"], found["run"]["seconds_one_after_another"]


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


def tidy_rows(label: str, seed: int, record: RunRecord) -> list[Row]:
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
                    "method": label,
                    "seed": seed,
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
                    **balance,
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
