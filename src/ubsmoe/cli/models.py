"""Verbs about models: export, generate, serve, pretrain, upcycle."""

import os
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ubsmoe.cli.app import RunFile, app


class ExportFormat(StrEnum):
    """What `ubsmoe export` can write."""

    peft = "peft"
    merged = "merged"
    native = "native"


@app.command("export")
def export_command(
    run_folder: Annotated[Path, typer.Argument(help="a finished run, or an export", show_default=False)],
    out: Annotated[Path, typer.Option(help="where the export goes", show_default=False)],
    format: Annotated[ExportFormat, typer.Option(help="what shall load it")] = ExportFormat.peft,
    tier: Annotated[int | None, typer.Option(help="counted from 1; the largest budget's when left out")] = None,
) -> None:
    """Write a tier's adapter for PEFT, merged into a whole model, or in our own format; its README says what is lost."""
    from ubsmoe.finished.run import export_run

    sidecar = export_run(run_folder, out, format.value, tier)
    typer.echo(f"{out}: {sidecar.format} export of tier {sidecar.tier}, K={sidecar.top_k}, rank {sidecar.rank}")


@app.command("generate")
def generate_command(
    place: Annotated[str, typer.Argument(help="a run folder, an export, or a base", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="text to continue, as the model is to see it", show_default=False)],
    budget: Annotated[float | None, typer.Option(help="in (0, 1]; the tier's own when left out")] = None,
    tier: Annotated[int | None, typer.Option(help="of a run, counted from 1; the largest budget's")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 64,
) -> None:
    """Continue a text at a budget."""
    from ubsmoe import FederatedMoE

    model = FederatedMoE.from_pretrained(place, tier=tier)
    if budget is not None:
        model.set_budget(budget)
    typer.echo(model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False))


@app.command("serve")
def serve_command(
    folder: Annotated[Path, typer.Argument(help="a merged export", show_default=False)],
    port: Annotated[int, typer.Option(help="on this machine alone: 127.0.0.1")] = 8000,
) -> None:
    """Answer OpenAI's requests through transformers' own server; says first what of the tier that leaves out."""
    from ubsmoe.config import ConfigError
    from ubsmoe.export import formats as exports
    from ubsmoe.export.sidecar import beyond_stock

    sidecar = exports.read(folder)
    if sidecar.format != "merged":
        raise ConfigError(
            f"{folder} is a {sidecar.format} export, and the server loads whole models; make one of the run with "
            "`ubsmoe export RUN --format merged`"
        )
    if missing := [name for name in ("fastapi", "uvicorn", "openai", "accelerate") if find_spec(name) is None]:
        raise ConfigError(f"this needs {missing[0]}: pip install 'ubsmoe[serve]'")
    typer.echo(f"{folder}: K={sidecar.top_k}; the model's name in requests is {folder}")
    for sentence in beyond_stock(sidecar, sidecar.top_k):
        typer.echo(f"left out: {sentence}")
    server = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    # a folder needs no hub, which the server would otherwise ask for updates
    os.execve(server[0], [*server, "--host", "127.0.0.1", "--port", str(port)], {**os.environ, "HF_HUB_OFFLINE": "1"})


@app.command("pretrain")
def pretrain_command(
    run_file: RunFile,
    out: Annotated[Path, typer.Option(help="where the model goes", show_default=False)],
    corpus: Annotated[
        Path | None, typer.Option(help="folder of .txt or .txt.gz files; needed unless book_share is 0")
    ] = None,
) -> None:
    """Pretrain a small base of your own, as ubsmoe-tiny was."""
    from ubsmoe.bases.pretrain import load_pretrain, pretrain
    from ubsmoe.client.allocator import keep_freed_memory

    keep_freed_memory()
    pretrain(load_pretrain(run_file), corpus, out)


@app.command("upcycle")
def upcycle_command(
    dense: Annotated[
        str, typer.Argument(help="a Llama-shaped model: folder, hub id or .gguf file", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="where the mixture of experts goes", show_default=False)],
    experts: Annotated[int, typer.Option(help="experts per layer")] = 8,
    top_k: Annotated[int, typer.Option(help="K_max, experts per token at budget 1")] = 4,
    slices: Annotated[int, typer.Option(help="experts that one copy of the feed-forward is cut into")] = 1,
    shared: Annotated[float, typer.Option(help="share of the feed-forward that runs for every token")] = 0.0,
    drop: Annotated[float, typer.Option(help="share of each expert that is drawn anew; 0 keeps the function")] = 0.0,
    warm_up: Annotated[
        Path | None, typer.Option(help="records to warm the routers up on, and to choose what is shared")
    ] = None,
    warm_up_steps: Annotated[int, typer.Option(min=1, help="batches of 8 records")] = 40,
    seed: Annotated[int, typer.Option(help="of every draw")] = 0,
) -> None:
    """Make a mixture of experts of a dense model: a base with real knowledge for whoever has no other."""
    from ubsmoe.bases.upcycle import upcycle_checkpoint

    losses = upcycle_checkpoint(
        dense,
        out,
        num_experts=experts,
        top_k=top_k,
        drop=drop,
        slices=slices,
        shared=shared,
        warm_up_data=warm_up,
        warm_up_steps=warm_up_steps,
        seed=seed,
    )
    balance = f"; balancing loss {losses[0]:.3f} -> {losses[-1]:.3f} (1 is even)" if losses else ""
    typer.echo(f"{out}: {experts} experts, K_max {top_k}{balance}")
