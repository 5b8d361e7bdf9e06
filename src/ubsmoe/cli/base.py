"""`ubsmoe base`: make a base model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ubsmoe.cli.app import RunFile, Set, group, overrides

if TYPE_CHECKING:
    from ubsmoe.config import ModelSettings

base = group("base", "Make, prepare or identify a base model.")


@base.command("pretrain")
def pretrain_command(
    run_file: RunFile,
    out: Annotated[Path, typer.Option(help="where the model goes", show_default=False)],
    corpus: Annotated[
        Path | None, typer.Option(help="folder of .txt or .txt.gz files; needed unless book_share is 0")
    ] = None,
) -> None:
    """Pretrain a small base model, as ubsmoe-tiny was."""
    from ubsmoe.bases.pretrain import load_pretrain, pretrain
    from ubsmoe.client.allocator import keep_freed_memory

    keep_freed_memory()
    pretrain(load_pretrain(run_file), corpus, out)


@base.command("upcycle")
def upcycle_command(
    dense: Annotated[
        str, typer.Argument(help="a Llama-shaped model: folder, hub id or .gguf file", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="where the mixture of experts goes", show_default=False)],
    experts: Annotated[int, typer.Option(help="experts per layer")] = 8,
    top_k: Annotated[int, typer.Option(help="K_max, experts per token at budget 1")] = 4,
    slices: Annotated[int, typer.Option(help="experts that one copy of the feed-forward is cut into")] = 1,
    shared: Annotated[float, typer.Option(help="share of the feed-forward that runs for every token")] = 0.0,
    drop: Annotated[float, typer.Option(help="share of each expert that becomes random; 0 keeps the outputs")] = 0.0,
    warm_up: Annotated[
        Path | None, typer.Option(help="records that warm up the routers and choose the shared part")
    ] = None,
    warm_up_steps: Annotated[int, typer.Option(min=1, help="batches of 8 records")] = 40,
    seed: Annotated[int, typer.Option(help="seed of every random draw")] = 0,
) -> None:
    """Turn a dense Llama-shaped model into a mixture of experts."""
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


@base.command("prepare")
def prepare_command(
    model: Annotated[str, typer.Argument(help="a folder, a hub id or ubsmoe-tiny", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="a folder to take elsewhere; the cache beside the hub's when left out")
    ] = None,
    set_: Set = None,
) -> None:
    """Store a base so that runs map it instead of loading it.

    --set model.experts=nf4 or int8 also quantises its experts; --set model.dtype=bfloat16 sets the precision of runs.
    """
    from ubsmoe.bases.prepared import prepare

    folder, facts = prepare(_model_settings(model, set_), out)
    typer.echo(
        f"{folder}: {facts['bytes'] / 1e9:.2f} GB, {facts['experts'] or facts['dtype']} experts, sha256 {facts['sha256']}"
    )


@base.command("hash")
def hash_command(
    model: Annotated[str, typer.Argument(help="a folder, a hub id or ubsmoe-tiny", show_default=False)],
    set_: Set = None,
    check: Annotated[
        bool, typer.Option("--check", help="read every weight again, even if files of this size and time are known")
    ] = False,
) -> None:
    """Print the SHA-256 of a base's weights, for model.sha256.

    It depends on model.dtype: where a run file sets one, give it here too, as in --set model.dtype=float32.
    """
    from ubsmoe.bases.identity import base_sha256

    typer.echo(base_sha256(_model_settings(model, set_), check))


def _model_settings(model: str, changes: list[str] | None) -> "ModelSettings":
    from ubsmoe.config import parse_run, with_overrides

    return parse_run(with_overrides({}, {"model.base": model, **overrides(changes)})).model
