"""One HTML file that says what runs did: no network, opens from disk, readable without a mouse, by ear, in the dark and on a phone.

The first screen is the result. The script is plotly's bundle for charts with axes, a third of the whole, inlined; what the charts
show stands in the tables as well.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ubsmoe.errors import UserError
from ubsmoe.report import charts, tables
from ubsmoe.report.charts import Chart, informs
from ubsmoe.report.headline import headline
from ubsmoe.report.plain import finite_json
from ubsmoe.report.series import Series, alone, by_label
from ubsmoe.report.steps import steps_within_rounds
from ubsmoe.storage.disk import atomic_write
from ubsmoe.storage.record import TierCosts

PLOTLY = "assets/plotly/plotly-cartesian.min.js.gz"
"""plotly.js-cartesian-dist-min 4.1.1 from npm, MIT: scatter, bar and heatmap, which are all that the charts use."""


def write_report(runs: Sequence[Series], costs: Sequence[list[TierCosts]], out: Path, overwrite: bool = False) -> None:
    """Write the report.

    Args:
        runs: at least one.
        costs: per run, what its tiers cost; empty where that is not known.
        out: the file to write.
        overwrite: replace a file that is there.

    Raises:
        UserError: if there is one and it is not to be replaced.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; choose another --out, or --overwrite it")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, report_html(runs, costs).encode())


def report_html(runs: Sequence[Series], costs: Sequence[list[TierCosts]]) -> str:
    """The report as text."""
    runs = alone(runs)
    drawn = _charts(runs, costs)
    methods = list(by_label(runs))
    script = gzip.decompress(resources.files("ubsmoe").joinpath(PLOTLY).read_bytes()).decode()
    pages = Environment(loader=PackageLoader("ubsmoe", "report"), autoescape=True, undefined=StrictUndefined)
    return pages.get_template("page.html").render(
        title=f"ubsmoe: {', '.join(methods[:3])}{' and more' if len(methods) > 3 else ''}",
        runs=runs,
        most_to_see=next((i for i, run in enumerate(runs) if run.phi is not None), 0),
        last=max(len(run.rounds) for run in runs) - 1,
        charts=drawn,
        cost_charts=[f"cost-{unit}" for unit in charts.COSTS],
        steps=[name for name in drawn if name.startswith("steps")],
        partitions=[name for name in drawn if name.startswith("partition")],
        runs_table=tables.runs_table(runs),
        results=tables.results(runs),
        cost_table=tables.cost_table(runs, costs),
        clients=[tables.client_table(runs, costs), tables.drop_table(runs)],
        data=_json({"charts": [asdict(chart) for chart in drawn.values()], "experts": charts.heat_maps(runs)}),
        plotly=Markup(script),
        first=headline(runs, costs),
        answers=tables.answer_table(runs),
        differing=tables.settings_table(runs),
    )


def _charts(runs: Sequence[Series], costs: Sequence[list[TierCosts]]) -> dict[str, Chart]:
    every: Iterable[Chart | None] = (
        charts.loss_over_rounds(runs),
        charts.accuracy_over_rounds(runs),
        *steps_within_rounds(runs),
        *(charts.cost_against_accuracy(runs, costs, unit) for unit in charts.COSTS),
        *charts.expert_use(runs),
        *charts.partitions(runs),
    )
    return {chart.id: chart for chart in every if chart and informs(chart)}


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    return Markup(json.dumps(finite_json(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
