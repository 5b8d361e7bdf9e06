"""`ubsmoe lab`: small experiments where everything is known."""

from pathlib import Path
from typing import Annotated

import typer

from ubsmoe.cli.app import group, needs

lab = group("lab", "Small experiments where everything is known.")


@lab.command("bias-floor")
def bias_floor_command(
    seeds: Annotated[int, typer.Option(min=1, help="problems to average over")] = 3,
    out: Annotated[Path, typer.Option(help="where figure and table go")] = Path("out/bias-floor"),
) -> None:
    """Measure where top-K SGD stalls on a small convex mixture, for every K and pseudo-gradient, against the bound."""
    needs("matplotlib")
    from ubsmoe.study.figures import write_bias_floor
    from ubsmoe.study.lab import bias_floor, floor_markdown, floor_rows

    rows = floor_rows(list(bias_floor(range(seeds))))
    write_bias_floor(rows, out)
    typer.echo(floor_markdown(rows))
