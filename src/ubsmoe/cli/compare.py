"""The verb that compares methods."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ubsmoe.cli.app import RunFile, Set, Track, app, overrides, read_settings
from ubsmoe.errors import UserError

if TYPE_CHECKING:
    from ubsmoe.config import RunSettings
    from ubsmoe.study.variants import Variant


@app.command("compare")
def compare_command(
    run_file: RunFile,
    methods: Annotated[str | None, typer.Option(help="names of methods, as in fedavg,ubsmoe,mine:method")] = None,
    variants: Annotated[
        Path | None, typer.Option(help="TOML file of [[variants]]: methods with settings of their own")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs per method, with seeds 0, 1, ...")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="the first of these seeds")] = 0,
    reference: Annotated[
        str | None, typer.Option(help="method that the others are compared with; the first when left out")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder; out/<name of the run file>-compare when left out")] = None,
    set_: Set = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--grid", help="compare at each value of a setting, as in model.base=a,b; repeatable"),
    ] = None,
    track: Track = None,
    plan: Annotated[bool, typer.Option("--plan", help="only estimate FLOPs and time")] = False,
) -> None:
    """Run several methods on the same work and compare their scores.

    Writes comparison.csv, comparison.md, and for a paper table.md and table.tex.
    A seed draws data, partition and training; --set data.seed=0 fixes the first two.
    The same command resumes a comparison that was stopped.
    """
    from rich.console import Console

    from ubsmoe.study.grid import grid
    from ubsmoe.study.variants import choose_variants

    changes = grid(axes or [])
    points = {point: read_settings(run_file, {**overrides(set_), **own}) for point, own in changes.items()}

    console = Console()
    chosen = choose_variants(methods, variants, run_file.parent)
    labels = [variant.label for variant in chosen]
    if both := {key for variant in chosen for key in variant.changes} & changes[next(iter(changes))].keys():
        raise UserError(f"--grid and a variant both change {', '.join(sorted(both))}; leave one of them out")
    against = reference or labels[0]
    if against not in labels:
        raise UserError(f"--reference {against!r} is not among the compared: {', '.join(labels)}")
    place, total = out or Path("out") / f"{run_file.stem}-compare", len(chosen) * seeds * len(points)
    if plan:
        return _estimate(points, chosen, seeds, first_seed)
    from ubsmoe.report.comparison import accuracy_markdown
    from ubsmoe.report.paper import write_tables
    from ubsmoe.study.compare import compare

    def done(name: str, seed: int, count: int) -> None:
        console.print(f"{count}/{total}  {name}  seed {seed}", highlight=False, markup=False, soft_wrap=True)

    rows = compare(points, chosen, range(first_seed, first_seed + seeds), place, jobs, done, track or [])
    fixed = all(settings.data.seed is not None for settings in points.values())
    write_tables(place, rows, against, fixed)
    typer.echo(accuracy_markdown(rows, against, fixed))
    typer.echo(f"Losses, unparsed answers, use of experts and costs: {place / 'comparison.md'}")
    typer.echo(f"For a paper: {place / 'table.tex'} and {place / 'table.md'}")


def _estimate(points: "dict[str, RunSettings]", variants: "list[Variant]", seeds: int, first_seed: int) -> None:
    """Print what each variant will take at each point of the grid, and all together."""
    from ubsmoe.study.compare import estimate

    flops = seconds = 0.0
    for name, one_flops, one_seconds in estimate(points, variants, first_seed):
        flops, seconds = flops + seeds * one_flops, seconds + seeds * one_seconds
        typer.echo(f"{name}: {seeds} x {one_flops / 1e12:.3g} TFLOP, {one_seconds:.0f} s")
    total = seeds * len(variants) * len(points)
    typer.echo(f"in all {total} runs, {flops / 1e12:.3g} TFLOP, {seconds / 3600:.2g} h of training on one core")
