"""`ubsmoe probe`: questions to the states that a run has kept."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ubsmoe.cli.app import AsJson, Runs, group, needs, print_json

probe = group("probe", "Ask the states that a run has kept.")


@probe.command("alignment")
def alignment_command(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="where figure and table go")] = Path("out/alignment"),
    json_: AsJson = False,
) -> None:
    """Compare every pseudo-gradient with the gradient that top-K leaves out, per tier and round; mean over the runs."""
    needs("matplotlib")
    from ubsmoe.report.console import alignment_table, show
    from ubsmoe.report.series import run_folders
    from ubsmoe.study.alignment import probe_run
    from ubsmoe.study.figures import write_alignment

    rows: list[dict[str, Any]] = [
        {"run": str(folder), **row}
        for path in runs
        for folder in run_folders(path)
        for part in probe_run(folder)
        for row in part
    ]
    paths = write_alignment(rows, out)
    if json_:
        return print_json({"alignment": rows})
    from rich.console import Console

    show(Console(), alignment_table(rows))
    for path in paths:
        typer.echo(str(path))
