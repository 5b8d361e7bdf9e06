"""One HTML file that says what runs did: no network, opens from disk, readable without a mouse, by ear, in the dark and on a phone.

The script is plotly's, inlined from its package; what the charts show stands in the tables as well.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from ubsmoe.report import charts
from ubsmoe.report.charts import Chart, run_name
from ubsmoe.report.series import Series, by_label
from ubsmoe.report.tables import client_table, cost_table, results, runs_table
from ubsmoe.storage.disk import atomic_write

SECTIONS = ("Runs", "Results", "Learning", "Cost", "Experts", "Clients", "Settings")


def write_report(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]], out: Path) -> None:
    """Write the report.

    Args:
        runs: at least one.
        costs: per run, its tiers as `ubsmoe plan` counts them.
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
        *(charts.cost_against_accuracy(runs, costs, unit) for unit in charts.COSTS),
        charts.balance_over_rounds(runs, "entropy"),
        charts.balance_over_rounds(runs, "gini"),
        charts.phi_correlation(runs),
        *charts.partitions(runs),
    ]
    return {chart.id: chart for chart in every if chart}


def _body(runs: Sequence[Series], costs: Sequence[list[dict[str, Any]]], drawn: dict[str, Chart]) -> str:
    def figures(*names: str) -> str:
        return f'<div class="pair">{"".join(_figure(drawn[name]) for name in names if name in drawn)}</div>'

    contents = {
        "Runs": runs_table(runs),
        "Results": results(runs),
        "Learning": figures("loss", "accuracy"),
        "Cost": figures(*(f"cost-{unit}" for unit in charts.COSTS)) + cost_table(runs, costs),
        "Experts": _slider(runs) + figures("entropy", "gini", "phi"),
        "Clients": figures(*(name for name in drawn if name.startswith("partition"))) + client_table(runs),
        "Settings": "".join(_settings(run) for run in runs),
    }
    return "".join(
        f'<section id="{name.lower()}" aria-labelledby="{name.lower()}-h"><h2 id="{name.lower()}-h">{name}</h2>{text}</section>'
        for name, text in contents.items()
    )


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


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
