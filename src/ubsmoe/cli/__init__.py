"""The command line. Each verb calls one function; whatever is slow to import is imported inside the verb.

Exit codes: 0 done; 1 internal error; 2 invalid input or environment (the message says what to fix).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ubsmoe.cli.app import app
from ubsmoe.cli.terminal import status_line
from ubsmoe.errors import UserError, harmless

# importing a module adds its verbs, here in the order of the help page
# isort: off
from ubsmoe.cli import run, compare, inspect, models, data, base, study, flower
# isort: on

__all__ = ["app", "base", "compare", "data", "flower", "inspect", "main", "models", "run", "study"]


def main() -> None:
    """Entry point: user errors become one line on stderr and exit code 2."""
    with _exit_codes(), status_line():
        app()


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Print a user's mistake, or a file that the system refuses, as a sentence and exit with 2; a bug keeps its traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        typer.echo(f"ubsmoe: {harmless(str(error))}", err=True)
        sys.exit(2)
