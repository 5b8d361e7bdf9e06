"""The one error class a user can mend: its message says what came, what was expected, and what to change."""

from importlib.util import find_spec


class UserError(ValueError):
    """Something to change in the input. The command line prints the message alone and ends with exit code 2."""


class RoundError(UserError):
    """Too few clients are left for a round to count."""


def require(module: str, extra: str, instead: str = "") -> None:
    """Check that an optional dependency is installed; nothing is imported.

    Args:
        module: the dependency's top-level module.
        extra: the extra of ubsmoe that installs it.
        instead: what else the user can do, if anything.

    Raises:
        UserError: if it is not installed; the message says how to install it.
    """
    if find_spec(module) is None:
        raise UserError(f'this needs {module}: pip install "ubsmoe[{extra}]"' + (f"; or {instead}" if instead else ""))
