"""Verbs for runs on Flower: flower init, up, status, restart, keys."""

from pathlib import Path
from typing import Annotated

import typer

from ubsmoe import progress
from ubsmoe.cli.app import Set, Track, group, overrides
from ubsmoe.errors import UserError
from ubsmoe.report.plain import finite_json

verbs = group("flower", "Runs on many machines, with Flower.")
App = Annotated[Path, typer.Argument(help="folder of a Flower app", show_default=False)]


@verbs.command("init")
def init_command(
    app: App,
    run: Annotated[Path, typer.Option("--run", help="run file (TOML)", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="run folder on the server; DIR/out when left out")] = None,
    set_: Set = None,
    track: Track = None,
) -> None:
    """Write a Flower app that carries out a run file."""
    from ubsmoe.engines.flower.app import write_app
    from ubsmoe.report.tracking import check_names

    check_names(track or [])  # the server, which needs the package, may be another machine
    write_app(run, app, overrides(set_), out, track=track or [])
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
    import time

    from ubsmoe.engines.flower.localhost import local_federation
    from ubsmoe.engines.flower.programs import LOOK_SECONDS

    try:
        with local_federation(app, nodes, simulate, typer.echo) as found:
            if run:
                return found.run()
            progress.at("")
            typer.echo(f"set -a; . {app}/flower.env; FLWR_HOME={found.home}; flwr run {app} {found.name} --stream")
            while True:
                found.programs.look_after()
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        typer.echo("stopped")


@verbs.command("restart")
def restart_command(app: App, node: Annotated[str, typer.Argument(help="as in node-1", show_default=False)]) -> None:
    """Start a node of `flower up` again, whether it has ended or runs."""
    from ubsmoe.engines.flower.programs import request_restart

    request_restart(app, node)
    typer.echo(f"{node} is started again")


@verbs.command("status")
def status_command(
    place: Annotated[Path, typer.Argument(help="folder of a Flower app, or a run folder", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="again whenever it changes, until the run has ended")] = False,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object per line instead of a table")] = False,
    prometheus: Annotated[
        Path | None, typer.Option(help="also write a file for the textfile collector of Prometheus' node exporter")
    ] = None,
) -> None:
    """Show the nodes, their last round and the progress.

    Reads the run folder that the server writes, so it needs no connection.
    Exit code 2 if there is no run, or it was stopped without a result.
    """
    import json
    import time

    from rich.console import Console

    from ubsmoe.cli.inspect import costs_of
    from ubsmoe.engines.flower.app import run_folder_of
    from ubsmoe.engines.flower.programs import LOOK_SECONDS
    from ubsmoe.report.federation import Status, as_json, follow, status_of, status_table, write_prometheus
    from ubsmoe.storage.ending import is_running
    from ubsmoe.storage.runfolder import is_run, read_run

    folder, console = run_folder_of(place), Console()
    if not is_run(folder):
        missing = (
            f"{folder} holds no run yet; `flwr run {place}` starts it (a run folder that -c named is given instead)"
        )
        if not watch:
            raise UserError(missing)
        typer.echo(f"{missing}; waits for it", err=True)
        while not is_run(folder):
            time.sleep(LOOK_SECONDS)
    costs = costs_of(read_run(folder))

    def show(status: Status) -> None:
        if prometheus:
            write_prometheus(status, prometheus)
        if json_:
            return typer.echo(json.dumps(finite_json(as_json(status))))
        if watch and console.is_terminal:
            console.clear()
        console.print(status_table(status, console.width))

    def look() -> Status:
        running = is_running(folder)
        return status_of(read_run(folder), costs, running)

    if watch:
        progress.at("")
        last = follow(look, show)
    else:
        show(last := look())
    if not last.ended and not last.running:
        raise UserError(
            f"the run in {folder} was stopped without a result; the server's log says why, and the same run started again goes on"
        )


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
