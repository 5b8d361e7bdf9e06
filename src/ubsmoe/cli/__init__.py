"""The command line. Each verb calls one function; whatever is slow to import is imported inside the verb.

Exit codes: 0 done; 1 a failure of ours; 2 something to change, in the input or on the machine (the message says what).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ubsmoe.cli.app import app
from ubsmoe.errors import UserError

# importing a module adds its verbs, here in the order of the help page
# isort: off
from ubsmoe.cli import run, inspect, probe, models, data, lab, flower
# isort: on

__all__ = ["app", "data", "flower", "inspect", "lab", "main", "models", "probe", "run"]


def main() -> None:
    """Entry point: user errors become one line on stderr and exit code 2."""
    with _exit_codes():
        app()


@contextmanager
def _exit_codes() -> Iterator[None]:
    """A user's mistake, or a file that the system refuses, ends in a sentence and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        typer.echo(f"ubsmoe: {error}", err=True)
        sys.exit(2)
