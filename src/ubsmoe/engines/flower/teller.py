"""What the server's log says of a run, which `flwr run --stream` shows: a line per round and per tier that was scored."""

import logging
import time
from collections.abc import Callable
from typing import Any

from ubsmoe.errors import UserError
from ubsmoe.storage.record import loss_text


class Teller:
    """Puts a run's events into lines.

    Args:
        rounds: how many the run has.
        clock: seconds, from which the time left is told.
    """

    def __init__(self, rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rounds, self._clock = rounds, clock
        self._began, self._first = clock(), 0
        self._counted = self._dropped = 0

    def on_event(self, event: str, round: int, fields: dict[str, Any]) -> None:
        """One event of the run, after it was written."""
        where = f"round {round}/{self._rounds}"
        if event == "started":
            self._began = self._clock()  # not before: nodes are waited for
            say(f"starts with {fields['clients']} clients")
        elif event == "resumed":
            self._first = round
            say(f"goes on after round {round} of {self._rounds}")
        elif event == "client":
            self._counted += 1
        elif event == "dropped":
            self._dropped += 1
            say(f"{where}: {fields['client']} dropped ({fields['stage']}): {fields['reason']}")
        elif event == "warning":
            say(f"{where}: {fields['client']} {fields['reason']}")
        elif event == "round":
            self._round(where, round, fields)
        elif event == "validated":
            say(f"{where}: validation loss {fields['loss']:.4f}, lowest after round {fields['best_round']}")
        elif event == "evaluated":
            macro = fields["scores"]["macro"]
            say(f"{where}: tier {fields['tier'] + 1} (K={fields['top_k']}) accuracy {macro['accuracy']:.1%}")

    def _round(self, where: str, round: int, fields: dict[str, Any]) -> None:
        each = (self._clock() - self._began) / max(round - self._first, 1)
        left = each * (self._rounds - round)
        lost = f", {self._dropped} dropped" if self._dropped else ""
        ahead = (
            f", about {left / 60:.0f} min left" if left >= 120 else f", about {left:.0f} s left" if left >= 1 else ""
        )
        say(
            f"{where}: loss {loss_text(fields['loss'])} in {fields['seconds']:.1f} s, {self._counted} updates{lost}{ahead}"
        )
        self._counted = self._dropped = 0


def say(text: str) -> None:
    """A line of the log, at once."""
    print(text, flush=True)


def without_traceback(record: logging.LogRecord) -> bool:
    """Filter of a logger: an error that its user can mend is its sentence alone."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError):
        record.msg, record.args, record.exc_info = "ubsmoe: %s", (str(error),), None
    return True
