"""The report's tables: what was run, results, costs, clients. The page lays them out."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ubsmoe.report.charts import last_scores, tier_costs
from ubsmoe.report.comparison import interval
from ubsmoe.report.plain import average
from ubsmoe.report.series import Series, by_label
from ubsmoe.storage.record import TierCosts

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
    """Per method and tier, mean over tasks; then every task."""
    tiers: list[list[Cell]] = []
    tasks: list[list[Cell]] = []
    for label, seeds in by_label(runs).items():
        scores = [last_scores(run) for run in seeds]
        for event in {e["tier"]: e for e in seeds[0].record.evaluated}.values():
            for task, score in event["scores"].items():
                same = [one[event["tier"]][task] for one in scores if event["tier"] in one]
                accuracy, low, high = accuracy_interval([one["accuracy"] for one in same], score["examples"])
                row: list[Cell] = [
                    label,
                    _number(event["tier"] + 1, "d"),
                    _number(event["top_k"], "d"),
                    _number(event["rank"], "d"),
                    *([] if task == "macro" else [task]),
                    _number(100 * accuracy, ".1f"),
                    (f"{100 * low:.1f} – {100 * high:.1f}", low),
                    _percent([one["unparsed"] for one in same]),
                    _percent([one["mc_accuracy"] for one in same]),
                    _number(average(one["loss"] for one in same), ".4f"),
                    _percent([score["chance"]]),
                    _number(event["round"], "d"),
                ]
                (tiers if task == "macro" else tasks).append(row)
    head = ["method", "tier", "K", "rank"]
    tail = ["accuracy %", "95 % interval", "unparsed %", "MC acc. %", "loss", "chance %", "after round"]
    note = (
        "Last evaluation, each tier at its own budget. Interval: Student's, over seeds, where there are two or more; else "
        "Wilson's, over questions, as if tasks were alike. MC acc.: multiple choice, by log-likelihood."
    )
    return [Table("Mean over tasks", [*head, *tail], tiers, note), Table("Per task", [*head, "task", *tail], tasks)]


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


def client_table(runs: Sequence[Series]) -> Table:
    """What each client could do and did."""
    rows: list[list[Cell]] = []
    for run in runs:
        events, budgets = run.record.clients, run.record.config["tiers"]["budgets"]
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
                    _number(own[-1]["loss"], ".4f") if own and "loss" in own[-1] else "–",
                ]
            )
    head = ["client", "run", "tier", "β", "K", "rank", "experts", "examples", "rounds that counted", "dropped"]
    return Table("Clients", [*head, "tokens", "seconds", "last loss"], rows)


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


def _percent(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    return _number(100 * average(known), ".1f") if len(known) == len(values) else "–"


def short_commit(commit: str) -> str:
    """Twelve digits, and the mark of a checkout that was changed."""
    return commit[:12] + ("+" if commit.endswith("+") else "")
