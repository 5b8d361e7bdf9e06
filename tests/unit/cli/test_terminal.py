"""The status line on a real pseudo-terminal: there when a verb computes, gone before anything else is printed."""

import io
import os
import pty
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ubsmoe import progress
from ubsmoe.cli import terminal as module
from ubsmoe.cli.terminal import status_line

CLEARED = "\r\x1b[K"


class Terminal:
    """The two ends of a pseudo-terminal."""

    def __init__(self) -> None:
        self._end, own = pty.openpty()
        self.stream = os.fdopen(own, "w", buffering=1)
        os.set_blocking(self._end, False)
        self.shown = ""

    def until(self, text: str) -> None:
        """Read until this is shown."""
        end = time.monotonic() + 20
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            try:
                self.shown += os.read(self._end, 4096).decode()
            except BlockingIOError:
                time.sleep(0.005)


@contextmanager
def screen_of() -> Iterator[Terminal]:
    """A terminal in the place of both streams; not a fixture, since pytest sets the streams anew for each phase."""
    screen = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, screen.stream)
        patch.setattr(module, "PAUSE_SECONDS", 0.01)
        yield screen
    screen.stream.close()


def test_what_takes_long_is_said_and_erased_before_anything_is_printed() -> None:
    with screen_of() as screen, status_line():
        progress.at("loads a base")
        screen.until("loads a base, 0 s")
        for item in progress.through("abc", "scores boolq"):
            if item == "b":
                screen.until("scores boolq 1/3, 0 s")
                progress.at("")  # nothing is drawn after this
                print("half", end="", flush=True)
                screen.until("half")
                break
        print(" a line")
        screen.until(" a line\r\n")
    before, _, after = screen.shown.partition("half")
    assert before.endswith(CLEARED) and after == " a line\r\n"


def test_nothing_is_drawn_over_a_line_of_others_or_while_somebody_else_shows_progress() -> None:
    told: list[str] = []
    with screen_of() as screen, status_line():
        print("a bar of others\r", end="", flush=True)
        time.sleep(0.1)
        print("", flush=True)
        with progress.watched(told.append):
            progress.at("is told to somebody else")
            time.sleep(0.1)
        screen.until("starts, 0 s")
    assert told == ["is told to somebody else"] and "somebody" not in screen.shown
    assert "a bar of others\r\r\n" in screen.shown


def test_without_a_terminal_nothing_is_drawn(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with status_line():
        progress.at("loads a base")
        assert progress.is_watching(progress.at) is False
        assert sys.stderr.getvalue() == ""
