"""One HTML file that says what runs did: no network, opens from disk, readable without a mouse, by ear, in the dark and on a phone.

The script is plotly's, inlined from its package; what the charts show stands in the tables as well.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ubsmoe.report import charts, tables
from ubsmoe.report.charts import Chart
from ubsmoe.report.plain import finite_json
from ubsmoe.report.series import Series, by_label
from ubsmoe.storage.disk import atomic_write
from ubsmoe.storage.record import TierCosts


def write_report(runs: Sequence[Series], costs: Sequence[list[TierCosts]], out: Path) -> None:
    """Write the report.

    Args:
        runs: at least one.
        costs: per run, what its tiers cost; empty where that is not known.
        out: the file to write.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, report_html(runs, costs).encode())


def report_html(runs: Sequence[Series], costs: Sequence[list[TierCosts]]) -> str:
    """The report as text."""
    drawn = _charts(runs, costs)
    methods = list(by_label(runs))
    pages = Environment(loader=PackageLoader("ubsmoe", "report"), autoescape=True, undefined=StrictUndefined)
    return pages.get_template("page.html").render(
        title=f"ubsmoe: {', '.join(methods[:3])}{' and more' if len(methods) > 3 else ''}",
        runs=runs,
        most_to_see=next((i for i, run in enumerate(runs) if run.phi is not None), 0),
        last=max(len(run.rounds) for run in runs) - 1,
        charts=drawn,
        cost_charts=[f"cost-{unit}" for unit in charts.COSTS],
        partitions=[name for name in drawn if name.startswith("partition")],
        runs_table=tables.runs_table(runs),
        results=tables.results(runs),
        cost_table=tables.cost_table(runs, costs),
        clients=[tables.client_table(runs), tables.drop_table(runs)],
        data=_json({"charts": [asdict(chart) for chart in drawn.values()], "experts": charts.heat_maps(runs)}),
        plotly=Markup(get_plotlyjs()),
    )


def _charts(runs: Sequence[Series], costs: Sequence[list[TierCosts]]) -> dict[str, Chart]:
    every: Iterable[Chart | None] = (
        charts.loss_over_rounds(runs),
        charts.accuracy_over_rounds(runs),
        *(charts.cost_against_accuracy(runs, costs, unit) for unit in charts.COSTS),
        *charts.expert_use(runs),
        *charts.partitions(runs),
    )
    return {chart.id: chart for chart in every if chart}


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    return Markup(json.dumps(finite_json(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
