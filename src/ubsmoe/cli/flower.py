"""Verbs for runs on Flower: flower init, flower up, flower keys."""

from pathlib import Path
from typing import Annotated

import typer

from ubsmoe.cli.app import Set, group, overrides

verbs = group("flower", "Runs on many machines, with Flower.")
App = Annotated[Path, typer.Argument(help="folder of a Flower app", show_default=False)]


@verbs.command("init")
def init_command(
    app: App,
    run: Annotated[Path, typer.Option("--run", help="run file (TOML)", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="run folder on the server; DIR/out when left out")] = None,
    set_: Set = None,
) -> None:
    """Write a Flower app that carries out a run file."""
    from ubsmoe.engines.flower.app import write_app

    write_app(run, app, overrides(set_), out)
    typer.echo(f"{app}: a Flower app; `ubsmoe flower up {app} --run` tries it on this machine, its README says more")


@verbs.command("up")
def up_command(
    app: App,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")] = 4,
    simulate: Annotated[bool, typer.Option(help="nodes simulated with Ray instead of SuperNodes")] = False,
    run: Annotated[bool, typer.Option("--run", help="run the app once, then stop")] = False,
) -> None:
    """Start a SuperLink and SuperNodes on this machine.

    Connections use TLS and node keys. Ctrl-C stops what was started.
    """
    import signal

    from ubsmoe.engines.flower.localhost import local_federation

    try:
        with local_federation(app, nodes, simulate, typer.echo) as found:
            if run:
                return found.run()
            typer.echo(f"set -a; . {app}/flower.env; FLWR_HOME={found.home}; flwr run {app} {found.name} --stream")
            signal.pause()
    except KeyboardInterrupt:
        typer.echo("stopped")


@verbs.command("keys")
def keys_command(
    folder: Annotated[Path, typer.Argument(help="where keys are kept", show_default=False)],
    host: Annotated[list[str], typer.Option(help="name or address of the server; repeatable", show_default=False)],
    node: Annotated[list[str] | None, typer.Option(help="name of a node; repeatable")] = None,
) -> None:
    """Make a certificate authority, certificates and node keys.

    Files that exist already are kept.
    """
    from ubsmoe.engines.flower.keys import make_keys

    for path in make_keys(folder, host, node or []):
        typer.echo(str(path))
