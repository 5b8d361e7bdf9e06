"""One HTML file that says what runs did: no network, opens from disk, readable without a mouse, by ear, in the dark and on a phone.

The script is plotly's, inlined from its package; what the charts show stands in the tables as well.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from scipy import stats

from ubsmoe.report import charts
from ubsmoe.report.charts import Chart, last_scores, run_name
from ubsmoe.report.comparison import interval
from ubsmoe.report.series import Series, by_label
from ubsmoe.storage.disk import atomic_write

Cell = str | tuple[str, float]
"""Text, or text with the number to sort by."""

SECTIONS = ("Runs", "Results", "Learning", "Cost", "Experts", "Clients", "Settings")


def write_report(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]], out: Path) -> None:
    """Write the report.

    Args:
        runs: at least one.
        costs: per run, its tiers as `ubsmoe costs` counts them.
        out: the file to write.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, report_html(runs, costs).encode())


def report_html(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]]) -> str:
    """The report as text."""
    drawn = _charts(runs, costs)
    methods = list(by_label(runs))
    parts = {
        "title": html.escape(f"ubsmoe: {', '.join(methods[:3])}{' and more' if len(methods) > 3 else ''}"),
        "sections": "".join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in SECTIONS),
        "body": _body(runs, costs, drawn),
        "charts": _json({"charts": [asdict(chart) for chart in drawn.values()], "experts": charts.heat_maps(runs)}),
        "plotly": get_plotlyjs(),
    }
    page = resources.files("ubsmoe.report").joinpath("page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"@@{name}@@", part)
    return page


def _charts(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]]) -> dict[str, Chart]:
    every = [
        charts.loss_over_rounds(runs),
        charts.accuracy_over_rounds(runs),
        charts.cost_against_accuracy(runs, costs),
        charts.balance_over_rounds(runs, "entropy"),
        charts.balance_over_rounds(runs, "gini"),
        charts.phi_correlation(runs),
        charts.partition(runs[0]),
    ]
    return {chart.id: chart for chart in every if chart}


def _body(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]], drawn: dict[str, Chart]) -> str:
    def figures(*names: str) -> str:
        return f'<div class="pair">{"".join(_figure(drawn[name]) for name in names if name in drawn)}</div>'

    contents = {
        "Runs": _runs_table(runs),
        "Results": _results(runs),
        "Learning": figures("loss", "accuracy"),
        "Cost": figures("cost-accuracy") + _cost_table(runs, costs),
        "Experts": _slider(runs) + figures("entropy", "gini", "phi"),
        "Clients": figures("partition") + _client_table(runs),
        "Settings": "".join(_settings(run) for run in runs),
    }
    return "".join(
        f'<section id="{name.lower()}" aria-labelledby="{name.lower()}-h"><h2 id="{name.lower()}-h">{name}</h2>{text}</section>'
        for name, text in contents.items()
    )


def _runs_table(runs: Sequence[Series]) -> str:
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
                summary["adapter_sha256"][:12] if summary else "–",
            ]
        )
    head = ["method", "seed", "rounds", "seconds", "ubsmoe", "torch", "transformers", "python", "adapter SHA-256"]
    return _table("Runs", head, rows)


def _results(runs: Sequence[Series]) -> str:
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
                    *(_score(same, key) for key in ("unparsed", "likelihood")),
                    _number(sum(one["loss"] for one in same) / len(same), ".4f"),
                    _number(100 * score["chance"], ".1f") if score["chance"] is not None else "–",
                    _number(event["round"], "d"),
                ]
                (tiers if task == "macro" else tasks).append(row)
    head = ["method", "tier", "K", "rank"]
    tail = ["accuracy %", "95 % interval", "unparsed %", "ranked %", "loss", "chance %", "after round"]
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


def _cost_table(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]]) -> str:
    rows: list[list[Cell]] = []
    for run, tiers in zip(runs, costs, strict=True):
        for tier in tiers:
            seconds = [event["seconds"] for event in run.events("client") if event["tier"] == tier["tier"]]
            rows.append(
                [
                    run_name(run),
                    _number(tier["tier"] + 1, "d"),
                    _number(tier["train_flops_per_token"] / 1e6, ".2f"),
                    _number(100 * tier["relative_to_top"], ".1f"),
                    _number(sum(seconds) / len(seconds), ".2f") if seconds else "–",
                    _number(tier["upload_bytes"] / 1e6, ".2f"),
                    _number(tier["download_bytes"] / 1e6, ".2f"),
                    _number(tier["peak_memory_bytes"] / 1e6, ",.0f"),
                ]
            )
    head = ["run", "tier", "training MFLOPs/token", "% of top", "s per client, round", "MB up", "MB down", "MB memory"]
    return _table("Cost per tier", head, rows)


def _client_table(runs: Sequence[Series]) -> str:
    rows: list[list[Cell]] = []
    for run in runs:
        events = run.events("client")
        for name in dict.fromkeys(event["client"] for event in events):
            own = [event for event in events if event["client"] == name]
            rows.append(
                [
                    name,
                    run_name(run),
                    _number(own[0]["tier"] + 1, "d"),
                    _number(own[0]["top_k"], "d"),
                    _number(own[0]["rank"], "d"),
                    _number(own[0]["examples"], "d"),
                    (f"{len(own)} of {len(run.rounds)}", len(own)),
                    _number(sum(event["tokens"] for event in own), ",d") if "tokens" in own[0] else "–",
                    _number(sum(event["seconds"] for event in own), ".1f"),
                    _number(own[-1]["loss"], ".4f") if "loss" in own[-1] else "–",
                ]
            )
    head = ["client", "run", "tier", "K", "rank", "examples", "rounds taken part", "tokens", "seconds", "last loss"]
    return _table("Clients", head, rows)


def _slider(runs: Sequence[Series]) -> str:
    first = next((i for i, run in enumerate(runs) if run.phi is not None), 0)  # the run with most to see
    options = "".join(
        f'<option value="{i}"{" selected" if i == first else ""}>{html.escape(run_name(run))}</option>'
        for i, run in enumerate(runs)
    )
    last = max(len(run.rounds) for run in runs) - 1
    return f"""<div class="controls"><label>run <select id="run">{options}</select></label>
<label>round <input id="round" type="range" min="0" max="{last}" value="{last}" step="1"></label>
<output id="round-text" for="round" aria-live="polite"></output></div>
<div class="pair"><figure><h3>Use of the experts</h3><div class="chart" id="experts-use" role="img"
aria-label="Heat map of each expert's share of a layer's work, layer by expert, at the chosen round"></div>
<figcaption>Share of each layer's work that an expert did, weighted over clients.</figcaption></figure>
<figure id="phi-figure"><h3>Modulation φ</h3><div class="chart" id="experts-phi" role="img"
aria-label="Heat map of the modulation phi, layer by expert, after the chosen round"></div>
<figcaption>What the server added to each expert's score: positive for those used too little.</figcaption></figure></div>"""


def _settings(run: Series) -> str:
    text = html.escape(json.dumps(run.record.config, indent=2))
    return f"<details><summary>{html.escape(run_name(run))}</summary><pre tabindex='0'>{text}</pre></details>"


def _figure(chart: Chart) -> str:
    caption = html.escape(chart.caption)
    wide = ' class="wide"' if len(chart.data) > 6 else ""  # room for the legend
    return (
        f'<figure{wide}><h3>{html.escape(chart.title)}</h3><div class="chart" id="{chart.id}" role="img" '
        f'aria-label="{caption}"></div><figcaption>{caption}</figcaption></figure>'
    )


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


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
