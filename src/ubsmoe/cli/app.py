"""What the verbs share: the application, the kinds of arguments, and how a run file is read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
import typer.core

from ubsmoe.errors import UserError
from ubsmoe.version import __version__

if TYPE_CHECKING:
    from ubsmoe.config import RunSettings

# plain help: rich would double the start-up time of every verb
typer.core.HAS_RICH = False

RENAMED_VERBS = {
    "costs": "plan",
    "figures": "study figures",
    "import": "run --set adapter.start=FOLDER",
    "lab": "study",
    "pretrain": "base pretrain",
    "probe": "study",
    "upcycle": "base upcycle",
    "watch": "report --watch",
}
"""Verbs before 0.2, and what they are called now."""


class Verbs(typer.core.TyperGroup):
    """The verbs of the command line. An old one is refused with its new name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, which looks a verb up. Raises UserError for one that has another name now."""
        if args[0] in RENAMED_VERBS and args[0] not in self.commands:
            raise UserError(f"ubsmoe {args[0]} is now ubsmoe {RENAMED_VERBS[args[0]]}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="ubsmoe",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ubsmoe {__version__}")
        raise typer.Exit


@app.callback()
def ubsmoe(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Federated fine-tuning of sparse mixture-of-experts language models on unequal machines."""


def group(name: str, help: str) -> typer.Typer:
    """A verb that has verbs of its own, as in `ubsmoe data commonsense`."""
    verbs = typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(verbs, name=name)
    return verbs


RunFile = Annotated[Path, typer.Argument(help="run file (TOML)", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="a run folder", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="run folder; out/<name of the run file> when left out")]
Set = Annotated[list[str] | None, typer.Option("--set", help="change one setting, as in train.rounds=3; repeatable")]
Runs = Annotated[list[Path], typer.Argument(help="run folders, or folders of ubsmoe compare", show_default=False)]
Track = Annotated[
    list[str] | None, typer.Option("--track", help="also log metrics to tensorboard, wandb or mlflow; repeatable")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def read_settings(run_file: Path, changes: dict[str, Any]) -> "RunSettings":
    """The run file with changes by dotted key, and its number of threads in force."""
    from ubsmoe.config import load_run
    from ubsmoe.methods.table import check_names

    settings = load_run(run_file, changes)
    check_names(settings.method.name, settings.method.settings)
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)
    return settings


def overrides(changes: list[str] | None) -> dict[str, Any]:
    """What --set asked for, as dotted keys. Raises ConfigError for one without a value."""
    from ubsmoe.config import ConfigError, parse_value

    found: dict[str, Any] = {}
    for change in changes or []:
        key, sign, value = change.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {change!r}: expected key=value, as in train.rounds=3")
        found[key] = parse_value(value)
    return found


def print_json(value: Any) -> None:
    """What --json prints."""
    import json

    typer.echo(json.dumps(value, indent=2))
