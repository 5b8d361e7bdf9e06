"""The report's tables: what was run, results, costs, clients. Columns sort when their heading is pressed."""

import html
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scipy import stats

from ubsmoe.report.charts import last_scores, run_name, tier_costs
from ubsmoe.report.comparison import interval
from ubsmoe.report.series import Series, by_label

Cell = str | tuple[str, float]
"""Text, or text with the number to sort by."""

MOST_DROPS = 500


def runs_table(runs: Sequence[Series]) -> str:
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
                versions.get("ubsmoe", "–"),
                versions.get("torch", "–"),
                versions.get("transformers", "–"),
                versions.get("python", "–"),
                short_commit(versions.get("commit", "–")),
                summary["adapter_sha256"][:12] if summary else "–",
            ]
        )
    head = [
        "method",
        "seed",
        "rounds",
        "seconds",
        "ubsmoe",
        "torch",
        "transformers",
        "python",
        "commit",
        "adapter SHA-256",
    ]
    return _table("Runs", head, rows)


def results(runs: Sequence[Series]) -> str:
    """Per method and tier, mean over tasks; then every task."""
    tiers: list[list[Cell]] = []
    tasks: list[list[Cell]] = []
    for label, seeds in by_label(runs).items():
        scores = [last_scores(run) for run in seeds]
        for event in {e["tier"]: e for e in seeds[0].events("evaluated")}.values():
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
                    *(_score(same, key) for key in ("unparsed", "mc_accuracy")),
                    _number(sum(one["loss"] for one in same) / len(same), ".4f"),
                    _number(100 * score["chance"], ".1f") if score["chance"] is not None else "–",
                    _number(event["round"], "d"),
                ]
                (tiers if task == "macro" else tasks).append(row)
    head = ["method", "tier", "K", "rank"]
    tail = ["accuracy %", "95 % interval", "unparsed %", "MC acc. %", "loss", "chance %", "after round"]
    note = (
        '<p class="note">Last evaluation, each tier at its own budget. Interval: Student, over seeds, where there are two or '
        "more; else Wilson, over questions, as if tasks were alike. Ranked: accuracy when answers are ranked by likelihood.</p>"
    )
    return (
        f"{note}{_table('Mean over tasks', [*head, *tail], tiers)}{_table('Per task', [*head, 'task', *tail], tasks)}"
    )


def accuracy_interval(values: Sequence[float], questions: int) -> tuple[float, float, float]:
    """Mean and 95 % interval of an accuracy: Student's over seeds, or Wilson's over the questions of a single run.

    >>> [round(x, 3) for x in accuracy_interval([0.5], questions=100)]
    [0.5, 0.404, 0.596]
    """
    mean, half = interval(values)
    if len(values) > 1:
        return mean, max(mean - half, 0.0), min(mean + half, 1.0)
    wilson = stats.binomtest(round(mean * questions), questions).proportion_ci(method="wilson")
    return mean, float(wilson.low), float(wilson.high)


def cost_table(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]]) -> str:
    """What a client of each tier pays; bytes as they were, where the run noted them, else as planned."""
    rows: list[list[Cell]] = []
    for run, tiers in zip(runs, costs, strict=True):
        for tier in tiers:
            paid = tier_costs(run, tier)
            rows.append(
                [
                    run_name(run),
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
    note = f'<p class="note">Bytes of the tensors of one client in one round, mean over rounds; memory is an estimate.{clock}</p>'
    return note + _table("Cost per tier", head, rows)


def client_table(runs: Sequence[Series]) -> str:
    """What each client could do and did, and the updates that did not count."""
    rows: list[list[Cell]] = []
    for run in runs:
        events, budgets = run.events("client"), run.record.config["tiers"]["budgets"]
        drops = Counter(event["client"] for event in run.events("dropped"))
        for name in dict.fromkeys([*(event["client"] for event in events), *drops]):
            own = [event for event in events if event["client"] == name]
            first = own[0] if own else None
            rows.append(
                [
                    name,
                    run_name(run),
                    *(
                        (
                            _number(first["tier"] + 1, "d"),
                            _number(budgets[first["tier"]], "g"),
                            _number(first["top_k"], "d"),
                            _number(first["rank"], "d"),
                            _number(first["examples"], "d"),
                        )
                        if first
                        else ("–",) * 5
                    ),
                    (f"{len(own)} of {len(run.rounds)}", len(own)),
                    _number(drops[name], "d"),
                    _number(sum(event["tokens"] for event in own), ",d") if own and "tokens" in own[0] else "–",
                    _number(sum(event["seconds"] for event in own), ".1f"),
                    _number(own[-1]["loss"], ".4f") if own and "loss" in own[-1] else "–",
                ]
            )
    head = ["client", "run", "tier", "β", "K", "rank", "examples", "rounds that counted", "dropped"]
    return _table("Clients", [*head, "tokens", "seconds", "last loss"], rows) + _drop_table(runs)


def _drop_table(runs: Sequence[Series]) -> str:
    """Who did not count, when and why; nothing if everybody always did."""
    rows: list[list[Cell]] = [
        [run_name(run), _number(event["round"], "d"), event["client"], event["stage"], event["reason"]]
        for run in runs
        for event in run.events("dropped")
    ]
    if not rows:
        return '<p class="note">No client was dropped in any round.</p>'
    more = f'<p class="note">The first {MOST_DROPS} of {len(rows)}.</p>' if len(rows) > MOST_DROPS else ""
    return _table("Dropped", ["run", "round", "client", "stage", "reason"], rows[:MOST_DROPS]) + more


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table whose columns sort when their heading is pressed."""
    heads = "".join(f'<th scope="col"><button type="button">{html.escape(text)}</button></th>' for text in head)
    body = "".join(f"<tr>{''.join(_td(cell) for cell in row)}</tr>" for row in rows)
    return (
        f'<h3>{html.escape(name)}</h3><div class="scroll" role="region" tabindex="0" aria-label="{html.escape(name)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _td(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    return f'<td data-value="{cell[1]}">{html.escape(cell[0])}</td>'


def _number(value: float, form: str) -> Cell:
    return format(value, form), float(value)


def _score(scores: Sequence[dict[str, Any]], key: str) -> Cell:
    values = [score[key] for score in scores]
    return "–" if None in values else _number(100 * sum(values) / len(values), ".1f")


def short_commit(commit: str) -> str:
    """Twelve digits, and the mark of a checkout that was changed."""
    return commit[:12] + ("+" if commit.endswith("+") else "")
