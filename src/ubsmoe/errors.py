"""The one error class a user can mend: its message says what came, what was expected, and what to change."""


class UserError(ValueError):
    """Something to change in the input. The command line prints the message alone and ends with exit code 2."""


class RoundError(UserError):
    """Too few clients are left for a round to count."""
