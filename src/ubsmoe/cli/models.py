"""Verbs that use a finished run: personalise, export, check, generate, serve."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ubsmoe import progress
from ubsmoe.cli.app import AsJson, app, print_json


class ExportFormat(StrEnum):
    """What `ubsmoe export` can write."""

    peft = "peft"
    merged = "merged"
    native = "native"


class Dtype(StrEnum):
    """Precisions that a base can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command("personalise")
def personalise_command(
    run_folder: Annotated[Path, typer.Argument(help="a finished run", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps of each client")] = 20,
    client: Annotated[list[str] | None, typer.Option(help="one client, by name; all when left out; repeatable")] = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder for an export of each client; none is kept when left out")
    ] = None,
    format: Annotated[ExportFormat, typer.Option(help="of these exports")] = ExportFormat.peft,
    json_: AsJson = False,
) -> None:
    """Train a run's adapter further for each client alone.

    Nothing is sent. Prints accuracy before and after on each client's own mix of tasks.
    """
    from dataclasses import asdict

    from rich.console import Console

    from ubsmoe.report.console import personal_table, show
    from ubsmoe.storage.ending import check_ended
    from ubsmoe.storage.exportfolder import check_free

    check_ended(run_folder)
    if out:
        check_free(out)
    from ubsmoe.training.personal import personalise

    found = [asdict(one) for one in personalise(run_folder, steps, out, client or [], format.value)]
    if json_:
        return print_json({"clients": found})
    show(Console(), personal_table(found))


@app.command("export")
def export_command(
    run_folder: Annotated[Path, typer.Argument(help="a finished run", show_default=False)],
    out: Annotated[Path, typer.Option(help="where the export goes", show_default=False)],
    format: Annotated[ExportFormat, typer.Option(help="for PEFT, transformers or ubsmoe alone")] = ExportFormat.peft,
    tier: Annotated[int | None, typer.Option(help="counted from 1; the largest budget's when left out")] = None,
    base: Annotated[
        str | None, typer.Option(help="the plain base to merge into, if the run was on a prepared one")
    ] = None,
) -> None:
    """Write a tier's adapter for PEFT, merged, or natively.

    The export's README says what the format cannot express.
    """
    from ubsmoe.storage.ending import check_ended
    from ubsmoe.storage.exportfolder import check_free

    check_ended(run_folder)  # torch and the base take long to load
    check_free(out)
    from ubsmoe.finished.run import export_run

    sidecar = export_run(run_folder, out, format.value, tier, base)
    typer.echo(f"{out}: {sidecar.format} export of tier {sidecar.tier}, K={sidecar.top_k}, rank {sidecar.rank}")
    if still := sum(map(len, (sidecar.untouched or {}).values())):
        typer.echo(f"untouched by training: {still} expert matrices, named in ubsmoe.json")


@app.command("check")
def check_command(
    adapter: Annotated[Path, typer.Argument(help="an export, or anybody's PEFT adapter", show_default=False)],
    base: Annotated[str, typer.Argument(help="the base it is for, as model.base takes it", show_default=False)],
    json_: AsJson = False,
) -> None:
    """Check that an adapter takes effect on its base.

    Prints what it found, then one sentence per failure; exit code 2 if there is one.
    """
    from dataclasses import asdict

    from ubsmoe.export.check import check

    found = check(adapter, base)
    if json_:
        print_json(asdict(found))
    else:
        for fact in found.facts:
            typer.echo(fact)
        for failure in found.failures:
            typer.echo(f"ubsmoe: {failure}", err=True)
        if not found.failures:
            typer.echo(f"{adapter}: sound")
    if found.failures:
        raise typer.Exit(2)


@app.command("generate")
def generate_command(
    place: Annotated[str, typer.Argument(help="a run folder, an export, or a base", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="text to continue, exactly as the model gets it", show_default=False)],
    budget: Annotated[
        float | None, typer.Option(help="fraction of K_max in (0, 1]; the tier's own when left out")
    ] = None,
    tier: Annotated[
        int | None, typer.Option(help="tier of a run, counted from 1; the largest budget's when left out")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of the answer")] = 64,
    dtype: Annotated[
        Dtype | None, typer.Option(help="precision of a bare base; the checkpoint's own when left out")
    ] = None,
) -> None:
    """Generate a continuation of a prompt at a budget."""
    from ubsmoe.storage.ending import check_ended
    from ubsmoe.storage.runfolder import is_run

    if is_run(place):
        check_ended(Path(place))
    from ubsmoe import FederatedMoE

    model = FederatedMoE.from_pretrained(place, tier=tier, dtype=dtype.value if dtype else None)
    if budget is not None:
        model.set_budget(budget)
    typer.echo(model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False))


@app.command("serve")
def serve_command(
    folder: Annotated[Path, typer.Argument(help="a merged export", show_default=False)],
    port: Annotated[int, typer.Option(help="port on 127.0.0.1, which only this machine reaches")] = 8000,
) -> None:
    """Serve a merged export through transformers' OpenAI-like server.

    Prints first which parts of the tier plain transformers leaves out.
    POST /reload takes another export in the same place without a restart.
    """
    # a folder needs no hub, which the server would otherwise ask for updates
    os.environ["HF_HUB_OFFLINE"] = "1"
    from ubsmoe.export.serving import serve

    progress.at("loads the model")
    serve(folder, port, typer.echo)
