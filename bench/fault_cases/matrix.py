"""What a row of the matrix is, and which faults there are: the 92 of A to H, and M, what one client can do to everybody."""

from dataclasses import dataclass

REFUSED, DROPPED = "refuse with a reason", "drop that client, go on"
STOPPED, BOUNDED = "stop, checkpoint intact", "counts, within the honest range under [robust]"
RESUMED, PREVIOUS = "resume to the same hash", "refuse it, the one before loads"

FAMILIES = {
    "A": ("a client's life", 10),
    "B": ("content of an update", 22),
    "C": ("what is said beside it", 12),
    "D": ("transport", 10),
    "E": ("server and disk", 15),
    "F": ("malice", 9),
    "G": ("deployment", 8),
    "H": ("environment", 6),
    "M": ("what one client can do to everybody", 99),
}


@dataclass(frozen=True)
class Row:
    """One fault: the outcome that is declared for it, the one that was observed, and what was said."""

    family: str
    fault: str
    declared: str
    observed: str
    reason: str = ""
    beyond: bool = False  # not among the 92

    @property
    def holds(self) -> bool:
        """Whether what was declared is what happened."""
        return self.declared == self.observed


def judge(family: str, fault: str, declared: str, holds: bool, reason: str = "", beyond: bool = False) -> Row:
    """A row whose outcome is either the declared one or none that was."""
    return Row(family, fault, declared, declared if holds else "UNDECLARED", reason, beyond)
