"""The last line of a terminal while a verb computes: what it is at, and for how long. It goes before anything else is printed."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from ubsmoe import progress

PAUSE_SECONDS = 0.5  # what is done sooner needs no line


class StatusLine:
    """Draws on a terminal what `progress` says, in a thread, since what computes has no time to.

    Args:
        terminal: where.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal, self._lock, self._ended = terminal, threading.RLock(), threading.Event()
        self._what, self._since = "starts", time.monotonic()
        self._drawn, self._free = False, True  # free: what others printed ended with its line

    def told(self, what: str) -> None:
        """Take up what is being done now."""
        if what.rstrip("0123456789/") != self._what.rstrip("0123456789/"):
            self._since = time.monotonic()
        self._what = what

    def tick(self) -> None:
        """Draw the line, as often as `end` is not called."""
        while not self._ended.wait(PAUSE_SECONDS):
            with self._lock:
                if self._what and self._free and progress.is_watching(self.told):
                    width = os.get_terminal_size(self._terminal.fileno()).columns or 80
                    line = f"{self._what}, {time.monotonic() - self._since:.0f} s"
                    self._terminal.write(f"\r{line[: width - 1]}\x1b[K")
                    self._terminal.flush()
                    self._drawn = True

    def end(self) -> None:
        """Draw no more."""
        self._ended.set()
        self.erase("\n")

    def erase(self, printed: str) -> None:
        """Make room for what is about to be printed."""
        with self._lock:
            if self._drawn:
                self._terminal.write("\r\x1b[K")
                self._terminal.flush()
            self._drawn, self._free = False, printed.endswith("\n") if printed else self._free


class _Above:
    """A stream of the same terminal: erases the line before it writes."""

    def __init__(self, stream: TextIO, line: StatusLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        self._line.erase(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def status_line() -> Iterator[None]:
    """Inside, a status line shows what is being done, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    line, before = StatusLine(sys.stderr), (sys.stdout, sys.stderr)
    ticking = threading.Thread(target=line.tick, daemon=True)
    sys.stdout, sys.stderr = (cast(TextIO, _Above(one, line)) if one.isatty() else one for one in before)
    with progress.watched(line.told):
        ticking.start()
        try:
            yield
        finally:
            line.end()
            sys.stdout, sys.stderr = before
