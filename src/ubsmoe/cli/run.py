"""Verbs that train and score: new, run, compare, eval."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ubsmoe.cli.app import AsJson, Folder, Out, RunFile, Set, app, overrides, print_json, read_settings
from ubsmoe.errors import UserError

if TYPE_CHECKING:
    from ubsmoe.config import RunSettings
    from ubsmoe.storage.record import Summary, TierCosts
    from ubsmoe.study.variants import Variant

WorkerCount = Annotated[int, typer.Option("--workers", min=1, help="processes that train clients, one thread each")]

Track = Annotated[
    list[str] | None, typer.Option("--track", help="also log metrics to tensorboard, wandb or mlflow; repeatable")
]


class EngineName(StrEnum):
    """Where clients run."""

    local = "local"
    simulation = "simulation"
    superlink = "superlink"


@app.command("new")
def new_command(run_file: RunFile) -> None:
    """Write a run file with every key, its default and what it does."""
    from ubsmoe.config.template import run_file_template
    from ubsmoe.storage.disk import create_file

    try:
        create_file(run_file, run_file_template().encode())
    except FileExistsError:
        raise UserError(f"{run_file} exists already; choose another name or remove it") from None
    typer.echo(f"{run_file}: change what you need, then `ubsmoe run {run_file}`")


@app.command("run")
def run_command(
    run_file: RunFile,
    out: Out = None,
    set_: Set = None,
    workers: WorkerCount = 1,
    engine: Annotated[
        EngineName,
        typer.Option(help="this process; Flower's simulation; or a SuperLink with SuperNodes, all on this machine"),
    ] = EngineName.local,
    track: Track = None,
) -> None:
    """Fine-tune across clients; resume where an existing run stopped."""
    if engine is not EngineName.local:
        if workers != 1:
            raise UserError(
                f"--workers is {workers}, but with --engine {engine.value} nodes train, each its own; leave it out"
            )
        if track:
            raise UserError(f"--track {track[0]}: only runs in this process log metrics; leave out --engine or --track")
        return _run_on_flower(run_file, out, set_, engine is EngineName.simulation)
    settings = read_settings(run_file, set_)
    from functools import partial

    from rich.console import Console

    from ubsmoe.client.allocator import keep_freed_memory
    from ubsmoe.config import to_json
    from ubsmoe.engines.local import LocalEngine, check_workers, process_pool, score_in
    from ubsmoe.engines.simulated import as_simulated
    from ubsmoe.report.console import RunConsole, result_table, show
    from ubsmoe.report.tracking import Tracking
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.run import run
    from ubsmoe.storage.runfolder import RunFolder

    check_workers(workers, settings)
    unknown: list[str] = []
    console, costs = Console(), known_costs(settings, unknown.append)
    shown = RunConsole(console)
    place = out or Path("out") / run_file.stem
    tracking = Tracking(track or [], place, settings.model_dump(mode="json"))
    federation = build_federation(settings)
    for reason in unknown:  # the sentence of `ubsmoe plan`
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    keep_freed_memory()  # not before: what loading frees goes back to the system

    def on_event(event: str, round: int, fields: dict[str, Any]) -> None:
        shown.on_event(event, round, fields)
        tracking.on_event(event, round, fields)

    with (
        _resumable(place, settings.train.rounds),
        process_pool(federation, workers) as pool,
        RunFolder.open_or_create(place, to_json(settings)) as folder,
        shown,
        tracking,
    ):
        if costs:
            folder.write_costs(costs)
        shown.plan(settings.train.rounds, settings.clients_per_round)
        patience = settings.rounds.give_up_seconds
        if pool:
            console.print(f"a worker process that says nothing for {patience:g} s is given up (rounds.give_up_seconds)")
        clients = LocalEngine(
            federation.trainer, federation.examples, federation.clients, shown.on_step, pool, patience
        )
        score_all = partial(score_in, pool) if pool else None
        summary = run(federation, folder, as_simulated(clients, federation), on_event, score_all)
    if summary["after"]:
        show(console, result_table(cast("Summary", summary), costs))
    console.print(
        f"adapter {place / 'adapter.safetensors'}  sha256 {summary['adapter_sha256']}", soft_wrap=True, markup=False
    )


def known_costs(settings: "RunSettings", say: Callable[[str], object] = lambda _: None) -> "list[TierCosts] | None":
    """What each tier costs; None for a base whose sizes are not known, which can be trained all the same.

    `say` gets the reason.
    """
    from ubsmoe.plan.tiers import run_costs

    try:
        return cast("list[TierCosts]", [cost.as_dict() for cost in run_costs(settings)])
    except UserError as error:
        say(str(error))
        return None


@contextmanager
def _resumable(place: Path, rounds: int) -> Iterator[None]:
    """Let Ctrl-C end in a sentence that says what is saved; exit code 130, or whatever a program has that the signal ends."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        from ubsmoe.storage.runfolder import saved_round

        done = saved_round(place)
        where = "before anything was saved" if done is None else f"after round {done} of {rounds}, saved in {place}"
        typer.echo(f"ubsmoe: stopped {where}; the same command goes on from there", err=True)
        raise typer.Exit(128 + getattr(stopped, "number", 2)) from None


def _run_on_flower(run_file: Path, out: Path | None, changes: list[str] | None, simulated: bool) -> None:
    """The same on a federation that lives as long as the run."""
    from ubsmoe.engines.flower.app import write_app
    from ubsmoe.engines.flower.endings import ended_in_order, owned_folder
    from ubsmoe.engines.flower.localhost import local_federation
    from ubsmoe.storage.runfolder import read_adapter

    place = out or Path("out") / run_file.stem
    settings = read_settings(run_file, changes)
    nodes = min(settings.clients.count, len(settings.tiers.budgets))
    with _resumable(place, settings.train.rounds), ended_in_order(), owned_folder() as folder:
        write_app(run_file, folder / "run", overrides(changes), place)
        with local_federation(folder / "run", nodes, simulated, typer.echo) as federation:
            federation.run()
    read_adapter(place)  # flwr run tells nobody that the server failed


@app.command("compare")
def compare_command(
    run_file: RunFile,
    methods: Annotated[str | None, typer.Option(help="names of methods, as in fedavg,ubsmoe")] = None,
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
    track: Track = None,
    plan: Annotated[bool, typer.Option("--plan", help="only estimate FLOPs and time")] = False,
) -> None:
    """Run several methods on the same work and compare their scores.

    Writes comparison.csv and comparison.md. The same command resumes a comparison that was stopped.
    """
    settings = read_settings(run_file, set_)
    from rich.console import Console

    from ubsmoe.study.variants import choose_variants

    console = Console()
    chosen = choose_variants(methods, variants)
    labels = [variant.label for variant in chosen]
    against = reference or labels[0]
    if against not in labels:
        raise UserError(f"--reference {against!r} is not among the compared: {', '.join(labels)}")
    place, total = out or Path("out") / f"{run_file.stem}-compare", len(chosen) * seeds
    if plan:
        return _estimate(settings, chosen, seeds, first_seed)
    from ubsmoe.report.comparison import comparison_markdown
    from ubsmoe.storage.runfolder import atomic_write
    from ubsmoe.study.compare import compare

    def done(label: str, seed: int, count: int) -> None:
        console.print(f"{count}/{total}  {label}  seed {seed}", highlight=False, markup=False)

    rows = compare(settings, chosen, range(first_seed, first_seed + seeds), place, jobs, done, track or [])
    text = comparison_markdown(rows, against)
    atomic_write(place / "comparison.md", text.encode())
    typer.echo(text)


def _estimate(settings: "RunSettings", variants: "list[Variant]", seeds: int, first_seed: int) -> None:
    """Print what each variant will take, and all together."""
    from ubsmoe.study.compare import estimate

    flops = seconds = 0.0
    for label, one_flops, one_seconds in estimate(settings, variants, first_seed):
        flops, seconds = flops + seeds * one_flops, seconds + seeds * one_seconds
        typer.echo(f"{label}: {seeds} x {one_flops / 1e12:.3g} TFLOP, {one_seconds:.0f} s")
    total = seeds * len(variants)
    typer.echo(f"in all {total} runs, {flops / 1e12:.3g} TFLOP, {seconds / 3600:.2g} h of training on one core")


@app.command("eval")
def eval_command(
    run_folder: Folder,
    tier: Annotated[int | None, typer.Option(help="one tier, counted from 1; all when left out")] = None,
    top_k: Annotated[int | None, typer.Option(help="experts per token; each tier's own when left out")] = None,
    set_: Set = None,
    json_: AsJson = False,
    harness: Annotated[
        str | None, typer.Option(help="tasks of lm-evaluation-harness instead, as in piqa,arc_easy")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="for --harness: folder of task files of your own")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="for --harness: examples per task")] = None,
) -> None:
    """Score a finished run's adapter, each tier at its own budget.

    --set changes how it is scored: evaluate.*, data.* and model.device.
    """
    from rich.console import Console

    from ubsmoe.report.console import harness_table, show, task_table

    if harness is not None:
        from ubsmoe.finished.harness import harness_scores

        if set_ or top_k is not None:
            option = "--set" if set_ else "--top-k"
            raise UserError(
                f"{option} changes ubsmoe's own evaluation, and --harness replaces it; leave one of them out"
            )
        results = harness_scores(run_folder, harness.split(","), tier, include, limit)
    else:
        from ubsmoe.finished.run import evaluate_run

        results = evaluate_run(run_folder, overrides(set_), tier, top_k)
    if json_:
        return print_json({"tiers": results})
    labels = [f"tier {result['tier'] + 1} K={result['top_k']}" for result in results]
    table = task_table if harness is None else harness_table
    show(Console(), table([result["scores"] for result in results], labels))
