"""What the verbs share: the application, the kinds of arguments, and how a run file is read."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ubsmoe.errors import UserError

# plain help: rich would double the start-up time of every verb
typer.core.HAS_RICH = False

app = typer.Typer(
    name="ubsmoe",
    help="Federated fine-tuning of sparse mixture-of-experts language models on unequal machines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def group(name: str, help: str) -> typer.Typer:
    """A verb that has verbs of its own, as in `ubsmoe data commonsense`."""
    verbs = typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(verbs, name=name)
    return verbs


RunFile = Annotated[Path, typer.Argument(help="run file (TOML)", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="run folder; out/<name of the run file> when left out")]
Set = Annotated[list[str] | None, typer.Option("--set", help="change one setting, as in train.rounds=3; repeatable")]
Runs = Annotated[list[Path], typer.Argument(help="run folders, or folders of ubsmoe compare", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def read_settings(run_file: Path, changes: list[str] | None) -> Any:
    """The run file with --set applied, and its number of threads in force."""
    from ubsmoe.config import load_run

    settings = load_run(run_file, overrides(changes))
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


def needs(package: str) -> None:
    """Refuse in one sentence what an extra that is not installed would draw."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UserError(f"this needs {package}: pip install 'ubsmoe[report]'")


def print_json(value: Any) -> None:
    """What --json prints."""
    import json

    typer.echo(json.dumps(value, indent=2))
