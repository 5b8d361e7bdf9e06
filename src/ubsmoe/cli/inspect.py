"""Verbs that show: what a run did, what it costs, which methods there are."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ubsmoe.cli.app import AsJson, Runs, Set, app, needs, overrides, print_json, read_settings
from ubsmoe.errors import UserError


@app.command("watch")
def watch_command(run_folder: Annotated[Path, typer.Argument(help="a run folder", show_default=False)]) -> None:
    """Follow a run that another process carries out: rounds, balance, scores; ends when it does."""
    import time

    from ubsmoe.report.console import RunConsole, watch

    with RunConsole() as shown:
        watch(run_folder, shown, lambda: time.sleep(1))


@app.command("figures")
def figures_command(
    runs: Runs, out: Annotated[Path, typer.Option(help="where the files go")] = Path("out/figures")
) -> None:
    """Draw the paper's Figures 2-7 from these runs, as SVG, PNG and CSV."""
    needs("matplotlib")
    from ubsmoe.report.figures import write_figures
    from ubsmoe.report.series import read_series

    for path in write_figures(read_series(runs), _figure_costs(), out):
        typer.echo(str(path))


@app.command("report")
def report_command(
    runs: Runs, out: Annotated[Path, typer.Option(help="the file to write")] = Path("out/report.html")
) -> None:
    """Say what these runs did in one HTML file that opens without a network."""
    needs("plotly")
    from ubsmoe.config import parse_run
    from ubsmoe.plan.tiers import run_costs
    from ubsmoe.report.page import write_report
    from ubsmoe.report.series import read_series

    found = read_series(runs)
    costs = [[cost.as_dict() for cost in run_costs(parse_run(run.record.config))] for run in found]
    write_report(found, costs, out)
    typer.echo(str(out))


@app.command("methods")
def methods_command(json_: AsJson = False) -> None:
    """List the federated methods with their settings, the parts that any method can have, and what a method is exempt from."""
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


@app.command("costs", hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def costs_command() -> None:
    """Refuse the old name of a verb."""
    raise UserError("ubsmoe costs is now ubsmoe plan")


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
    memory: Annotated[str | None, typer.Option(help="of your device, as in 16GiB: which tiers it can train")] = None,
    flops_per_second: Annotated[
        float | None, typer.Option(min=1, help="of the clients' machines; measured here when left out")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="tokens per example, with --examples or --model; else data.max_length")
    ] = None,
    set_: Set = None,
    json_: AsJson = False,
) -> None:
    """Estimate memory, FLOPs, bytes and seconds per tier, of a run or of a base alone. Loads no weights."""
    from ubsmoe.config import ConfigError
    from ubsmoe.plan.devices import fitting

    if (run_file is None) == (model is None):
        raise ConfigError("expected either a run file or --model NAME; give one of them")
    if sequence_length:
        if not (examples or model):
            raise ConfigError("--sequence-length needs --examples or --model: lengths are read from the run's data")
        set_ = [*(set_ or []), f"data.max_length={sequence_length}"]
    if run_file:
        from ubsmoe.plan.forecast import forecast

        plan = forecast(read_settings(run_file, set_), examples, flops_per_second)
    else:
        if examples or flops_per_second:
            raise ConfigError("--examples and --flops-per-second need a run file; leave them out with --model")
        plan = _plan_of_base({"model.base": model, **overrides(set_)})
    if memory is not None:
        plan["fits"] = fitting(plan["tiers"], memory)
    if json_:
        return print_json(plan)
    from rich.console import Console

    from ubsmoe.report.console import cost_table, plan_lines, plan_table, show

    console = Console()
    show(console, plan_table(plan) if run_file else cost_table(plan["model"], plan["tiers"]))
    for line in plan_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)


def _plan_of_base(changes: dict[str, Any]) -> dict[str, Any]:
    """The costs of a base's tiers; where no method is set, those of plain federated averaging, which need no torch."""
    from ubsmoe.config import parse_run, with_overrides
    from ubsmoe.plan.tiers import plan_base, plan_tiers

    settings = parse_run(with_overrides({}, changes))
    chosen = any(key.split(".")[0] == "method" for key in changes)
    plan = plan_tiers(settings) if chosen else plan_base(settings)
    return {
        "model": settings.model.base,
        "method": settings.method.name if chosen else "fedavg",
        "parameters": plan.shape.parameters,
        "tiers": [cost.as_dict() for cost in plan.costs],
    }


def _figure_costs() -> dict[str, list[dict[str, Any]]]:
    """Figure 3's bars: OLMoE-1B-7B with heterogeneous rank and with heterogeneous sparsity, in the run file's defaults."""
    from ubsmoe.config import parse_run
    from ubsmoe.plan.tiers import run_costs

    def tiers(method: str) -> list[dict[str, Any]]:
        settings = parse_run({"model": {"base": "olmoe-1b-7b"}, "method": {"name": method}})
        return [cost.as_dict() for cost in run_costs(settings)]

    return {"rank": tiers("hetlora"), "sparsity": tiers("fedavg")}
