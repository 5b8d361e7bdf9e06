"""Verbs that train and score: new, run, eval."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ubsmoe.cli.app import AsJson, Folder, Out, RunFile, Set, Track, app, overrides, print_json, read_settings
from ubsmoe.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ubsmoe.config import RunSettings
    from ubsmoe.training.federation import Federation

WorkerCount = Annotated[int, typer.Option("--workers", min=1, help="processes that train clients, one thread each")]


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
    run_file: Annotated[Path, typer.Argument(help="run file (TOML), or a run folder", show_default=False)],
    out: Out = None,
    set_: Set = None,
    workers: WorkerCount = 1,
    engine: Annotated[
        EngineName,
        typer.Option(help="this process; Flower's simulation; or a SuperLink with SuperNodes, all on this machine"),
    ] = EngineName.local,
    track: Track = None,
    more_rounds: Annotated[int, typer.Option("--more-rounds", min=0, help="so many rounds beyond those it had")] = 0,
    from_: Annotated[
        Path | None, typer.Option("--from", help="begin where this finished run ended, server state and all")
    ] = None,
) -> None:
    """Fine-tune across clients, or resume a run."""
    from ubsmoe.storage.ending import check_ended
    from ubsmoe.storage.runfolder import is_run

    place, changes = out or _place_of(run_file), overrides(set_)
    if from_:
        if is_run(from_):
            check_ended(from_)
        changes["adapter.start"] = str(from_.absolute())
    if more_rounds:
        changes["train.rounds"] = _more_rounds(place, more_rounds, changes.get("train.patience"))
    if engine is not EngineName.local:
        if workers != 1:
            raise UserError(
                f"--workers is {workers}, but with --engine {engine.value} nodes train, each its own; leave it out"
            )
        return _run_on_flower(run_file, place, changes, engine is EngineName.simulation, track or [])
    from rich.console import Console

    from ubsmoe.report.console import RunConsole
    from ubsmoe.report.tracking import Tracking
    from ubsmoe.training.federation import Federation

    console = Console()
    shown = RunConsole(console)

    def on_event(event: str, round: int, fields: dict[str, Any]) -> None:
        shown.on_event(event, round, fields)
        tracking.on_event(event, round, fields)

    federation = Federation(
        run_file, out=place, workers=workers, on_event=on_event, on_step=shown.on_step, **cast(Any, changes)
    )
    settings = federation.settings
    tracking = Tracking(track or [], place, settings.model_dump(mode="json"))
    if federation.summary is None:
        with _resumable(place, settings.train.rounds), federation, shown, tracking:
            shown.plan(settings.train.rounds, settings.clients_per_round)
            if workers > 1:
                patience = settings.rounds.give_up_seconds
                console.print(
                    f"a worker process that says nothing for {patience:g} s is given up (rounds.give_up_seconds)"
                )
            federation.train()
    _show_result(federation, console)


def _show_result(federation: "Federation", console: "Console") -> None:
    """The table of a run that has ended, and where its adapter is."""
    from ubsmoe.report.console import result_table, show
    from ubsmoe.storage.record import kept_said

    record = federation.record
    assert record.summary is not None
    if record.summary["after"]:
        show(console, result_table(record.summary, record.costs))
    if said := kept_said(record.summary, federation.settings.train.rounds):
        console.print(said, soft_wrap=True, highlight=False)
    adapter = federation.place / "adapter.safetensors"
    console.print(f"adapter {adapter}  sha256 {record.summary['adapter_sha256']}", soft_wrap=True, markup=False)


def _place_of(run_file: Path) -> Path:
    """Where a run goes that is given no --out: a run folder goes on where it is."""
    from ubsmoe.storage.runfolder import is_run

    return run_file if is_run(run_file) else Path("out") / run_file.stem


def _more_rounds(place: Path, count: int, patience: Any) -> int:
    """train.rounds of a run that is to have so many more."""
    from ubsmoe.storage.ending import refuse_more, rounds_so_far
    from ubsmoe.storage.runfolder import is_run

    if not is_run(place):
        raise UserError(f"--more-rounds {count}: {place} is no run folder yet; name it with --out, or start without")
    refuse_more(place, patience if isinstance(patience, int) else None)
    return rounds_so_far(place) + count


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


def _run_on_flower(run_file: Path, place: Path, changes: dict[str, Any], simulated: bool, track: list[str]) -> None:
    """The same on a federation that lives as long as the run."""
    from ubsmoe.engines.flower.app import write_app
    from ubsmoe.engines.flower.endings import ended_in_order, owned_folder
    from ubsmoe.engines.flower.localhost import local_federation
    from ubsmoe.report.tracking import check_trackers
    from ubsmoe.storage.runfolder import read_adapter

    if run_file.is_dir():
        raise UserError(f"{run_file} is a folder; with --engine give the run file, and the folder as --out")
    settings = read_settings(run_file, changes)
    _check_stateless(settings)
    check_trackers(track)
    nodes = min(settings.clients.count, len(settings.tiers.budgets))
    with _resumable(place, settings.train.rounds), ended_in_order(), owned_folder() as folder:
        # nodes that are started here come, however long a busy machine takes
        write_app(run_file, folder / "run", changes, place, join_seconds=1800, track=track)
        with local_federation(folder / "run", nodes, simulated, typer.echo) as federation:
            federation.run()
    read_adapter(place)  # flwr run tells nobody that the server failed


def _check_stateless(settings: "RunSettings") -> None:
    """Refuse a method that nodes of Flower cannot carry out before a federation is started for it."""
    from ubsmoe.methods import METHODS, build
    from ubsmoe.methods.method import RunShape

    if settings.method.name in METHODS:  # whether it keeps anything with clients depends on no size
        build(settings.method.name, RunShape(1, 2, 1, rank=1, alpha=1.0)).check_stateless()


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
    from ubsmoe.storage.ending import check_ended

    if harness is not None:
        from ubsmoe.finished.harness import harness_scores

        if set_ or top_k is not None:
            option = "--set" if set_ else "--top-k"
            raise UserError(
                f"{option} changes ubsmoe's own evaluation, and --harness replaces it; leave one of them out"
            )
        results = harness_scores(run_folder, harness.split(","), tier, include, limit)
    else:
        check_ended(run_folder)  # torch and the base take long to load
        from ubsmoe.finished.run import evaluate_run

        results = evaluate_run(run_folder, overrides(set_), tier, top_k)
    if json_:
        return print_json({"tiers": results})
    labels = [f"tier {result['tier'] + 1} K={result['top_k']}" for result in results]
    table = task_table if harness is None else harness_table
    show(Console(), table([result["scores"] for result in results], labels))
