"""`ubsmoe study`: figures from runs, and experiments on kept states and on a small problem."""

from pathlib import Path
from typing import Annotated

import typer

from ubsmoe.cli.app import AsJson, Runs, group, print_json
from ubsmoe.errors import require

study = group("study", "Figures, and experiments on pseudo-gradients.")


@study.command("figures")
def figures_command(
    runs: Runs, out: Annotated[Path, typer.Option(help="where the files go")] = Path("out/figures")
) -> None:
    """Draw the paper's Figures 2-7 from runs, as SVG, PNG and CSV."""
    require("matplotlib", "report")
    from ubsmoe.report.figures import write_figures
    from ubsmoe.report.series import read_series
    from ubsmoe.study.figures import olmoe_costs

    for path in write_figures(read_series(runs), olmoe_costs(), out):
        typer.echo(str(path))


@study.command("bias-floor")
def bias_floor_command(
    seeds: Annotated[int, typer.Option(min=1, help="problems to average over")] = 3,
    out: Annotated[Path, typer.Option(help="where figure and table go")] = Path("out/bias-floor"),
) -> None:
    """Measure where top-K SGD stalls on a small convex mixture.

    For every K and pseudo-gradient, beside the bound.
    """
    require("matplotlib", "report")
    from ubsmoe.study.figures import write_bias_floor
    from ubsmoe.study.lab import bias_floor, floor_markdown, floor_rows

    rows = floor_rows(list(bias_floor(range(seeds))))
    write_bias_floor(rows, out)
    typer.echo(floor_markdown(rows))


@study.command("alignment")
def alignment_command(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="where figure and table go")] = Path("out/alignment"),
    json_: AsJson = False,
) -> None:
    """Compare pseudo-gradients with the gradient that top-K omits.

    Every kept state of the runs is measured, per tier and round; the table shows means over the runs.
    """
    require("matplotlib", "report")
    from ubsmoe.report.console import alignment_table, show
    from ubsmoe.report.series import run_folders
    from ubsmoe.study.alignment import probe_run
    from ubsmoe.study.figures import write_alignment

    folders = [folder for path in runs for folder in run_folders(path)]
    rows = [{"run": str(folder), **row} for folder in folders for part in probe_run(folder) for row in part]
    paths = write_alignment(rows, out)
    if json_:
        return print_json({"alignment": rows})
    from rich.console import Console

    show(Console(), alignment_table(rows))
    for path in paths:
        typer.echo(str(path))
