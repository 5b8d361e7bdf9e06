"""Several methods on the same work: the same base, data, clients, rounds and seeds; what differs stands in a method's name.

Every cell of the grid is an ordinary run folder, so an interrupted comparison goes on where it stopped.
"""

import csv
import io
import re
import signal
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError, RunSettings, parse_run, to_json, with_overrides
from ubsmoe.plan.tiers import run_costs
from ubsmoe.report.tracking import Tracking, check_trackers
from ubsmoe.storage.runfolder import RunFolder, RunRecord, atomic_write, differing_settings, read_run

METRICS = ("accuracy", "unparsed", "mc_accuracy", "loss")
TUNABLE = ("adapter", "tiers", "train", "wire", "robust")
"""Sections of the run file that a variant may change for itself."""
WORK = (
    *("train.rounds", "train.local_steps", "train.local_epochs", "train.batch_size", "train.gradient_accumulation"),
    *("tiers.budgets", "tiers.k_max"),
)
"""Settings within them that it may not: they are how much work is done, and by whom."""


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: a method with settings of its own, and what it changes in the rest of the run file."""

    label: str
    name: str
    settings: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

    def settings_in(self, settings: RunSettings, seed: int) -> RunSettings:
        """The run file of one cell. Raises ConfigError for a change that makes no sense."""
        # a label of the run file's own would be that of every method
        label = self.label if self.changes else None
        own = {"method": {"name": self.name, **self.settings}, "seed": seed, "label": label, **self.changes}
        return parse_run(with_overrides(settings.model_dump(mode="json"), own))


def parse_variants(text: str) -> list[Variant]:
    """Read "ubsmoe, fedavg, ubsmoe(pg_mode=off; train.learning_rate=1e-3)"; names may also stand on lines of their own.

    A key without a dot is a setting of the method; one with a dot changes the rest of the run file for this variant alone.

    Raises:
        ConfigError: for text that is not a list of names, each with optional settings in parentheses; for a repeated one;
            for a change that would give a variant other work than the rest has.

    >>> [variant.settings for variant in parse_variants("fedavg, ubsmoe(pg_mode=off; momentum=0.5)")]
    [{}, {'pg_mode': 'off', 'momentum': 0.5}]
    """
    variants = []
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    for part in re.findall(r"[^,(]+(?:\([^)]*\))?", ", ".join(line for line in lines if line)):
        found = re.fullmatch(r"\s*(\w+)\s*(?:\(([^)]*)\))?\s*", part)
        if not found:
            raise ConfigError(f'--methods: cannot read {part!r}; expected names like "fedavg, ubsmoe(pg_mode=off)"')
        settings = dict(_setting(item) for item in (found[2] or "").split(";") if item.strip())
        changes = {key: value for key, value in settings.items() if "." in key}
        for key in changes:
            if key.partition(".")[0] not in TUNABLE or key in WORK:
                raise ConfigError(
                    f"--methods: {part.strip()} changes {key}, so it would not do the work of the others; set it for all with --set"
                )
        own = {key: value for key, value in settings.items() if key not in changes}
        variants.append(Variant("".join(part.split()), found[1], own, changes))
    if len({variant.label for variant in variants}) < len(variants) or not variants:
        raise ConfigError(f"--methods: expected a list of different methods, got {text!r}")
    return variants


def compare(
    settings: RunSettings,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    report: Callable[[str, int, int], None] | None = None,
    track: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run the grid, or what is left of it, and write comparison.csv.

    Args:
        settings: the run file; its [method] and seed are replaced, and what a variant changes.
        variants: what to compare.
        seeds: one run per variant and seed; a seed draws adapter, data, partition and sampling alike for all variants.
        out: the comparison's folder.
        jobs: runs at a time, each in a process of its own with its share of the threads.
        report: called with (label, seed, runs done) after each run.
        track: where each run draws its curves too (`report/tracking.py`); its name there is its folder's.

    Returns:
        Tidy rows: method, seed, tier, task, metrics, costs.

    Raises:
        UserError: for a method, setting or tracker that does not exist, before anything runs.
        RunFolderError: if a folder of the grid holds a run of other settings.
    """
    grid = {(variant.label, seed): variant.settings_in(settings, seed) for seed in seeds for variant in variants}
    check_trackers(track)
    for variant in variants:
        run_costs(grid[variant.label, seeds[0]])  # builds the method: a misspelt setting fails here, not in an hour
    folders = {key: out / "runs" / f"{_file_name(key[0])}-seed{key[1]}" for key in grid}
    # Ctrl-C reaches the workers too: they end at once, as if killed, rather than each with a traceback
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    ) as pool:
        futures = {pool.submit(run_cell, cell, folders[key], track): key for key, cell in grid.items()}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
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

    from ubsmoe.client.allocator import keep_freed_memory
    from ubsmoe.engines.local import LocalEngine
    from ubsmoe.engines.simulated import as_simulated
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.rounds import run

    # bitwise equal whatever runs beside it, and two processes do not fight for the cores
    torch.set_num_threads(settings.threads or 1)
    keep_freed_memory()
    if (folder / "summary.json").exists() and not differing_settings(
        read_run(folder).config, settings.model_dump(mode="json")
    ):
        return
    federation = build_federation(settings)
    tracking = Tracking(track, folder, settings.model_dump(mode="json"))
    with RunFolder.open_or_create(folder, to_json(settings)) as opened, tracking:
        engine = as_simulated(LocalEngine(federation.trainer, federation.examples, federation.clients), federation)
        run(federation, opened, engine, tracking.on_event)


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
        hashes = [(one.summary or {}).get("base_sha256") for one in (first, record)]
        if hashes[0] != hashes[1]:
            raise ConfigError(f"{first.path} and {record.path} were trained on different bases")


def tidy_rows(label: str, seed: int, record: RunRecord) -> list[dict[str, Any]]:
    """One row per tier and task of a finished run, costs beside the scores."""
    assert record.summary is not None
    settings = parse_run(record.config)
    costs = run_costs(settings)
    seconds = _client_seconds(record)
    balance = _balance(record)
    tiers, after_training = record.summary["tiers"], record.summary["after"]
    before_training = record.summary["before"] or [None] * len(tiers)
    rows = []
    for profile, cost, before, after in zip(tiers, costs, before_training, after_training, strict=True):
        for task, score in after.items():
            rows.append(
                {
                    "method": label,
                    "seed": seed,
                    "tier": profile["tier"] + 1,
                    "top_k": profile["top_k"],
                    "rank": profile["rank"],
                    "task": task,
                    **{metric: score[metric] for metric in METRICS},
                    **{f"{metric}_before": before and before[task][metric] for metric in METRICS},
                    "chance": score["chance"],
                    "examples": score["examples"],
                    "train_flops_per_token": cost.train_flops_per_token,
                    "upload_bytes": cost.upload_bytes,
                    "download_bytes": cost.download_bytes,
                    "client_seconds": seconds.get(profile["tier"]),
                    **balance,
                }
            )
    return rows


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV text; every row has the same columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _client_seconds(record: RunRecord) -> dict[int, float]:
    """Mean training seconds per client and round, by tier."""
    seconds: dict[int, list[float]] = {}
    for event in record.events:
        if event["event"] == "client":
            seconds.setdefault(event["tier"], []).append(event["seconds"])
    return {tier: sum(values) / len(values) for tier, values in seconds.items()}


def _balance(record: RunRecord) -> dict[str, Any]:
    """How the last round used the experts, mean over layers: entropy over its maximum, Gini; dead experts in all layers."""
    last = next((event for event in reversed(record.events) if event["event"] == "round"), None)
    if last is None:
        return dict.fromkeys(("entropy", "gini", "dead_experts"))
    return {**{key: statistics.fmean(last[key]) for key in ("entropy", "gini")}, "dead_experts": last["dead_experts"]}


def _work(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("method", "seed")}


def _setting(item: str) -> tuple[str, Any]:
    from ubsmoe.config import parse_value

    key, _, value = item.partition("=")
    return key.strip(), parse_value(value.strip())


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", label).strip("_")
