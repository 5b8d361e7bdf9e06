"""Verbs that show: what a run costs, what runs did, which methods there are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ubsmoe.cli.app import AsJson, Runs, Set, app, overrides, print_json, read_settings
from ubsmoe.errors import UserError

if TYPE_CHECKING:
    from ubsmoe.plan.devices import Machine
    from ubsmoe.storage.record import RunRecord, TierCosts


@app.command("report")
def report_command(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("out/report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file if it is there")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="follow one run in the terminal until it ends instead")
    ] = False,
) -> None:
    """Write one HTML file about runs; it opens without a network."""
    if watch:
        return _watch(runs)
    from ubsmoe.report.page import write_report
    from ubsmoe.report.series import read_series

    found = read_series(runs)
    write_report(found, [costs_of(run.record) for run in found], out, overwrite)
    typer.echo(str(out))


def _watch(runs: list[Path]) -> None:
    """Show a run's rounds, balance and scores as another process writes them."""
    import time

    from ubsmoe.report.console import RunConsole, watch

    if len(runs) != 1:
        raise UserError(f"--watch follows one run, got {len(runs)} folders; give one run folder")
    with RunConsole() as shown:
        watch(runs[0], shown, lambda: time.sleep(1))


def costs_of(record: "RunRecord") -> "list[TierCosts]":
    """What the run noted, which needs no torch; else, as for a run of a Flower app, counted now.

    Nothing for a run folder with plug-ins that nobody here has named: to look at it runs no code of theirs.
    """
    if record.costs is not None:
        return record.costs
    from ubsmoe.config import parse_run
    from ubsmoe.config.plug_ins import require_trusted
    from ubsmoe.training.opening import known_costs

    try:
        require_trusted(record.config, record.path)
    except UserError:
        return []
    return known_costs(parse_run(record.config)) or []


@app.command("methods")
def methods_command(json_: AsJson = False) -> None:
    """List the federated methods, their settings and their parts.

    Also the properties of the test battery that a method does not satisfy.
    """
    from dataclasses import asdict

    from ubsmoe.methods.table import METHODS, PARTS, describe, part_settings

    methods = [describe(name) for name in METHODS]
    parts = {part: dict(part_settings(part)) for part in PARTS}
    if json_:
        return print_json({"methods": [asdict(method) for method in methods], "parts": parts})
    for method in methods:
        typer.echo(f"{method.name:<14}{method.summary}")
        for key, value in method.settings.items():
            typer.echo(f"{'':<14}  {key} = {value!r}")
        for part in method.parts:
            typer.echo(f"{'':<14}  has [method.{part}]; {part} = false switches it off")
        for name, reason in method.exempt.items():
            typer.echo(f"{'':<14}  does not satisfy {name}: {reason}")
    for part, settings in parts.items():
        typer.echo(f"[method.{part}]")
        for key, value in settings.items():
            typer.echo(f"  {key} = {value!r}")


@app.command("plan")
def plan_command(
    run_file: Annotated[Path | None, typer.Argument(help="run file (TOML)", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="instead of a run file: olmoe-1b-7b, a folder or a hub id, under plain federated averaging; what a method "
            "adds needs a run file or --set method.name=..."
        ),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="training examples in all: plan by data.max_length, without reading data")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="of your device, as in 16GiB: marks the tiers it can train")
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="TOML file of [[machines]]: lists the tiers that each can train")
    ] = None,
    flops_per_second: Annotated[
        float | None, typer.Option(min=1, help="speed of the clients' machines; measured here when left out")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="tokens per example, with --examples or --model; else data.max_length")
    ] = None,
    set_: Set = None,
    json_: AsJson = False,
) -> None:
    """Estimate memory, FLOPs, bytes and seconds per tier.

    Reads a run file, or a base alone (--model), and no weights. A method's
    own traffic needs a run file, or --set method.name=...
    """
    from ubsmoe.config import ConfigError
    from ubsmoe.plan.devices import fitting, read_inventory

    machines = read_inventory(inventory) if inventory else []

    if (run_file is None) == (model is None):
        raise ConfigError("expected either a run file or --model NAME; give one of them")
    if sequence_length:
        if not (examples or model):
            raise ConfigError("--sequence-length needs --examples or --model: lengths are read from the run's data")
        set_ = [*(set_ or []), f"data.max_length={sequence_length}"]
    if run_file:
        settings = read_settings(run_file, overrides(set_))  # refused, if it is, before torch is imported
        from ubsmoe.plan.forecast import forecast

        plan = forecast(settings, examples, flops_per_second, machines)
    else:
        if examples or flops_per_second:
            raise ConfigError("--examples and --flops-per-second need a run file; leave them out with --model")
        plan = _plan_of_base({"model.base": model, **overrides(set_)}, machines)
    if memory is not None:
        plan["fits"] = fitting(plan["tiers"], memory)
    if json_:
        return print_json(plan)
    from rich.console import Console

    from ubsmoe.report.console import cost_table, show
    from ubsmoe.report.plan import inventory_table, plan_lines, plan_table

    console = Console()
    show(console, plan_table(plan) if run_file else cost_table(plan["model"], plan["tiers"]))
    if inventory:
        show(console, inventory_table(plan))
    for line in plan_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)


def _plan_of_base(changes: dict[str, Any], machines: "list[Machine]") -> dict[str, Any]:
    """The costs of a base's tiers; where no method is set, those of plain federated averaging, which need no torch."""
    from ubsmoe.config import parse_run, with_overrides
    from ubsmoe.plan.inventory import fits
    from ubsmoe.plan.tiers import check_base, plan_base, plan_tiers

    settings = parse_run(with_overrides({}, changes))
    check_base(settings)
    chosen = any(key.split(".")[0] == "method" for key in changes)
    plan = plan_tiers(settings) if chosen else plan_base(settings)
    return {
        "model": settings.model.base,
        "method": settings.method.name if chosen else "fedavg",
        "parameters": plan.shape.parameters,
        "tiers": [cost.as_dict() for cost in plan.costs],
        "machines": [fits(machine, settings, plan) for machine in machines],
    }
