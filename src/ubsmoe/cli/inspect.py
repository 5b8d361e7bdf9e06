"""Verbs that show: what a run did, what it would cost, which methods there are."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ubsmoe.cli.app import AsJson, RunFile, Runs, Set, app, needs, overrides, print_json, read_settings


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


@app.command("costs")
def costs_command(
    run_file: Annotated[Path | None, typer.Argument(help="run file (TOML)", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="instead of a run file: olmoe-1b-7b, a folder or a hub id")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="tokens per example")] = None,
    set_: Set = None,
    json_: AsJson = False,
) -> None:
    """FLOPs, memory and bytes per tier, counted without weights."""
    from ubsmoe.config import ConfigError, parse_run, with_overrides

    if (run_file is None) == (model is None):
        raise ConfigError("give either a run file or --model NAME")
    settings = (
        read_settings(run_file, set_)
        if run_file
        else parse_run(with_overrides({}, {"model.base": model, **overrides(set_)}))
    )
    from ubsmoe.plan.tiers import run_costs

    tiers = [cost.as_dict() for cost in run_costs(settings, sequence_length)]
    if json_:
        return print_json({"model": settings.model.base, "method": settings.method.name, "tiers": tiers})
    from rich.console import Console

    from ubsmoe.report.console import cost_table, show

    show(Console(), cost_table(settings.model.base, tiers))


@app.command("plan")
def plan_command(
    run_file: RunFile,
    examples: Annotated[
        int | None, typer.Option(min=1, help="training examples in all: plan by data.max_length, without reading data")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="of your device, as in 16GiB: which tiers it can train")] = None,
    flops_per_second: Annotated[
        float | None, typer.Option(min=1, help="of the clients' machines; measured here when left out")
    ] = None,
    set_: Set = None,
    json_: AsJson = False,
) -> None:
    """Say before a run what it will take: memory, FLOPs, bytes and seconds per tier and in all. Loads no weights."""
    settings = read_settings(run_file, set_)
    from ubsmoe.plan.forecast import fitting, forecast

    plan = forecast(settings, examples, flops_per_second)
    if memory is not None:
        plan["fits"] = fitting(plan, memory)
    if json_:
        return print_json(plan)
    from rich.console import Console

    from ubsmoe.report.console import plan_lines, plan_table, show

    console = Console()
    show(console, plan_table(plan))
    for line in plan_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)


def _figure_costs() -> dict[str, list[dict[str, Any]]]:
    """Figure 3's bars: OLMoE-1B-7B with heterogeneous rank and with heterogeneous sparsity, in the run file's defaults."""
    from ubsmoe.config import parse_run
    from ubsmoe.plan.tiers import run_costs

    def tiers(method: str) -> list[dict[str, Any]]:
        settings = parse_run({"model": {"base": "olmoe-1b-7b"}, "method": {"name": method}})
        return [cost.as_dict() for cost in run_costs(settings)]

    return {"rank": tiers("hetlora"), "sparsity": tiers("fedavg")}
