"""The one error class a user can mend, and how the words of others are quoted in it."""

from importlib.util import find_spec


class UserError(ValueError):
    """Something to change in the input: what came, what was expected, what to change.

    The command line prints the message alone and ends with exit code 2.
    """


class RoundError(UserError):
    """Too few clients are left for a round to count."""


def printable(text: str, longest: int = 300) -> str:
    r"""What somebody else says, as one line that does nothing: no control character, line break or direction mark stays.

    >>> print(printable("out of\nmemory \x1b[2J"))
    out of memory \x1b[2J
    """
    line = " ".join(text[: 4 * longest].split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)[:longest]


def harmless(text: str, longest: int = 4000) -> str:
    r"""What is said of somebody's file or folder: its lines stay, no other character of it acts on a terminal.

    >>> print(harmless("field '\x1b[2J'\nexpected text"))
    field '\x1b[2J'
    expected text
    """
    shown = text if len(text) <= longest else f"{text[:longest]} ..."
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


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
