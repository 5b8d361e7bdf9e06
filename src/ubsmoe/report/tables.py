"""The report's tables: what was run, results, costs, clients. The page lays them out."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, cast

from ubsmoe.report.charts import last_scores, tier_costs
from ubsmoe.report.comparison import METRICS, Metric, interval
from ubsmoe.report.plain import average
from ubsmoe.report.series import Series, by_label
from ubsmoe.storage.record import TierCosts
from ubsmoe.storage.same_run import flatten

Cell = str | tuple[str, float]
"""Text, or text with the number to sort by."""


@dataclass(frozen=True)
class Table:
    """A table with its heading; without rows the note alone is shown."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


MOST_DROPS = 500
SOFTWARE = ("ubsmoe", "torch", "transformers", "python")


def runs_table(runs: Sequence[Series]) -> Table:
    """What was run, how long it took, with which versions."""
    rows: list[list[Cell]] = []
    for run in runs:
        summary, versions = run.record.summary, run.record.versions
        seconds = summary["seconds"] if summary else math.nan
        rows.append(
            [
                run.label,
                _number(run.seed, "d"),
                _number(len(run.rounds), "d"),
                _number(seconds, ".0f") if summary else "not finished",
                *(versions.get(name, "–") for name in SOFTWARE),
                short_commit(versions.get("commit", "–")),
                summary["adapter_sha256"][:12] if summary else "–",
            ]
        )
    head = ["method", "seed", "rounds", "seconds", *SOFTWARE, "commit", "adapter SHA-256"]
    return Table("Runs", head, rows)


def results(runs: Sequence[Series]) -> list[Table]:
    """Method by tier, before and after training: each metric, mean over tasks; then the accuracy of every task."""
    groups = by_label(runs)
    tiers = sorted({event["tier"] for run in runs for event in run.record.evaluated})
    head = [f"tier {tier + 1}" for tier in tiers]
    tables = []
    for metric in METRICS:
        rows: list[list[Cell]] = [
            [label, *(_change(seeds, tier, "macro", metric) for tier in tiers)] for label, seeds in groups.items()
        ]
        if any(cell != NOT_MEASURED for row in rows for cell in row[1:]):
            tables.append(Table(metric.heading, ["method", *head], rows))
    tasks = dict.fromkeys(task for run in runs for scores in last_scores(run).values() for task in scores)
    by_task: list[list[Cell]] = [
        [task, label, *(_change(seeds, tier, task, METRICS[0]) for tier in tiers)]
        for task in tasks
        if task != "macro"
        for label, seeds in groups.items()
    ]
    note = (
        "Before → after training, each tier at its own budget, mean over seeds. MC accuracy: multiple choice, by "
        "log-likelihood. Unparsed answers count as wrong."
    )
    return [Table("Metrics", [], [], note), *tables, Table("Accuracy per task, %", ["task", "method", *head], by_task)]


NOT_MEASURED = "–"


def _change(seeds: Sequence[Series], tier: int, task: str, metric: Metric) -> Cell:
    """A metric before and after training, mean over seeds; sorted by what it is after."""

    def mean(at: Callable[[int], bool]) -> float:
        found = [
            {event["tier"]: event["scores"] for event in run.record.evaluated if at(event["round"])} for run in seeds
        ]
        scores = [one[tier][task] for one in found if task in one.get(tier, {})]
        values = [cast(Mapping[str, float | None], score)[metric.name] for score in scores]
        return average(value * metric.scale for value in values if value is not None)

    start, end = mean(lambda round: not round), mean(lambda round: bool(round))
    if math.isnan(end):
        return NOT_MEASURED if math.isnan(start) else (f"{start:.{metric.decimals}f} → –", start)
    text = f"{end:.{metric.decimals}f}"
    return (text if math.isnan(start) else f"{start:.{metric.decimals}f} → {text}"), end


def settings_table(runs: Sequence[Series]) -> Table:
    """The settings in which methods differ; a dash where a run file does not have one."""
    configs = {label: flatten(seeds[0].record.config) for label, seeds in by_label(runs).items()}
    keys = sorted({key for config in configs.values() for key in config} - {"seed", "label"})
    rows: list[list[Cell]] = [
        [key, *cells]
        for key in keys
        if len(set(cells := [json.dumps(config[key]) if key in config else "–" for config in configs.values()])) > 1
    ]
    note = "" if rows else "All runs have the same settings, seeds apart." if len(configs) > 1 else ""
    return Table("Settings that differ", ["setting", *configs], rows, note)


def answer_table(runs: Sequence[Series]) -> Table:
    """The first answers to each task before and after training, of the largest tier of each method's first run."""
    rows: list[list[Cell]] = []
    for label, seeds in by_label(runs).items():
        events = seeds[0].record.named("answers")
        own = [event for event in events if event["tier"] == max(one["tier"] for one in events)]
        said = {(event["round"] > 0, one["task"], one["prompt"]): one for event in own for one in event["answers"]}
        for _, task, prompt in dict.fromkeys((True, task, prompt) for _, task, prompt in said):
            start, end = (said.get((trained, task, prompt), {}) for trained in (False, True))
            truth = (end or start)["truth"]
            rows.append([label, task, prompt, truth, _said(start), _said(end)])
    note = "The largest tier's, first run of each method; ✓ and ✗ as scored." if rows else ""
    return Table("Sample answers", ["method", "task", "prompt", "right answer", "before", "after"], rows, note)


def _said(answer: Mapping[str, Any]) -> str:
    return f"{'✓' if answer['right'] else '✗'} {answer['said']}" if answer else NOT_MEASURED


def accuracy_interval(values: Sequence[float], questions: int) -> tuple[float, float, float]:
    """Mean and 95 % interval of an accuracy: Student's over seeds, or Wilson's over the questions of a single run.

    >>> [round(x, 3) for x in accuracy_interval([0.5], questions=100)]
    [0.5, 0.404, 0.596]
    """
    mean, half = interval(values)
    if len(values) > 1:
        return mean, max(mean - half, 0.0), min(mean + half, 1.0)
    if not 0 <= mean <= 1:  # no accuracy: shown as it is
        return mean, mean, mean
    z = NormalDist().inv_cdf(0.975)  # by hand: scipy.stats, which has it, takes a second to import
    right = round(mean * questions) / questions
    middle = right + z * z / (2 * questions)
    half = z * math.sqrt(right * (1 - right) / questions + (z / (2 * questions)) ** 2)
    return mean, (middle - half) / (1 + z * z / questions), (middle + half) / (1 + z * z / questions)


def cost_table(runs: Sequence[Series], costs: Sequence[list[TierCosts]]) -> Table:
    """What a client of each tier costs; bytes as they were, where the run noted them, else as planned."""
    rows: list[list[Cell]] = []
    for run, tiers in zip(runs, costs, strict=True):
        for tier in tiers:
            paid = tier_costs(run, tier)
            rows.append(
                [
                    run.name,
                    _number(tier["tier"] + 1, "d"),
                    _number(paid["MFLOPs"], ".2f"),
                    _number(100 * tier["relative_to_top"], ".1f"),
                    _number(paid["seconds"], ".2f") if "seconds" in paid else "–",
                    _number(paid["MB up"], ".2f"),
                    _number(paid["MB down"], ".2f"),
                    _number(tier["peak_memory_bytes"] / 1e6, ",.0f"),
                ]
            )
    head = ["run", "tier", "training MFLOPs/token", "% of top", "s per client, round", "MB up", "MB down", "MB memory"]
    virtual = any(run.record.config.get("simulation") for run in runs)
    clock = " Seconds are virtual where a run simulates its clients." if virtual else ""
    note = f"Bytes of the tensors of one client in one round, mean over rounds; memory is an estimate.{clock}"
    return Table("Cost per tier", head, rows, note)


def client_table(runs: Sequence[Series], costs: Sequence[list[TierCosts]]) -> Table:
    """What each client could do and did; memory as planned for its tier."""
    rows: list[list[Cell]] = []
    for run, tiers in zip(runs, costs, strict=True):
        events, budgets = run.record.clients, run.record.config["tiers"]["budgets"]
        memory = {tier["tier"]: tier["peak_memory_bytes"] / 1e6 for tier in tiers}
        drops = Counter(event["client"] for event in run.record.dropped)
        for name in dict.fromkeys([*(event["client"] for event in events), *drops]):
            own = [event for event in events if event["client"] == name]
            first = own[0] if own else None
            rows.append(
                [
                    name,
                    run.name,
                    *(
                        (
                            _number(first["tier"] + 1, "d"),
                            _number(budgets[first["tier"]], "g"),
                            _number(first["top_k"], "d"),
                            _number(first["rank"], "d"),
                            (first["experts"] or "plain") if "experts" in first else "–",
                            _number(first["examples"], "d"),
                        )
                        if first
                        else ("–",) * 6
                    ),
                    (f"{len(own)} of {len(run.rounds)}", len(own)),
                    _number(drops[name], "d"),
                    _number(sum(event.get("tokens", 0) for event in own), ",d") if own and "tokens" in own[0] else "–",
                    _number(sum(event["seconds"] for event in own), ".1f"),
                    _number(memory[first["tier"]], ",.0f") if first and first["tier"] in memory else "–",
                    _number(own[-1]["loss"], ".4f") if own and "loss" in own[-1] else "–",
                ]
            )
    head = ["client", "run", "tier", "β", "K", "rank", "experts", "examples", "rounds that counted", "dropped"]
    return Table("Clients", [*head, "tokens", "seconds", "MB planned", "last loss"], rows)


def drop_table(runs: Sequence[Series]) -> Table:
    """Who did not count, when and why."""
    rows: list[list[Cell]] = [
        [run.name, _number(event["round"], "d"), event["client"], event["stage"], event["reason"]]
        for run in runs
        for event in run.record.dropped
    ]
    note = f"The first {MOST_DROPS} of {len(rows)}." if len(rows) > MOST_DROPS else ""
    head = ["run", "round", "client", "stage", "reason"]
    return Table("Dropped", head, rows[:MOST_DROPS], note if rows else "No client was dropped in any round.")


def _number(value: float, form: str) -> Cell:
    try:
        return format(value, form), float(value)
    except ValueError:  # a count that is no whole number
        return format(value, "g"), float(value)


def short_commit(commit: str) -> str:
    """Twelve digits, and the mark of a checkout that was changed."""
    return commit[:12] + ("+" if commit.endswith("+") else "")
