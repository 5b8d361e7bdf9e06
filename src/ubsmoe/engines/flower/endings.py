"""What a local federation starts and writes ends with it: in order at any signal that can be caught, else at the next start.

Its folders, with private keys in them, are temporary ones that hold a locked file. The system gives the lock back however the owner
ends. Its processes have such a folder in their environment, so a folder whose lock is free tells which processes to end with it.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from ubsmoe.storage import disk

KILL_SECONDS = 10.0  # after that a process hangs in the system, and nobody can end it
PREFIX, OWNED = "ubsmoe-", ".owned"
FOLDER, HOME = (
    "UBSMOE_RESIDENTS",
    "FLWR_HOME",
)  # environment: where residents have their sockets, and Flower its own files
UNTOUCHED = {  # cannot be caught, end nobody, are Python's own, or mean that this process is broken
    *(signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT),
    *(
        getattr(signal, "SIGINFO", signal.SIGCHLD),
        signal.SIGCHLD,
        signal.SIGURG,
        signal.SIGWINCH,
        signal.SIGPIPE,
        signal.SIGXFSZ,
    ),
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS),
}


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.number = number


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Inside, any signal that would end this process raises Stopped, once: what then cleans up is not interrupted again.

    A signal that is ignored, as SIGHUP is under nohup, or handled by others, stays so.
    """
    ending = [one for one in signal.valid_signals() - UNTOUCHED if signal.getsignal(one) in _DEFAULT]

    def stop(number: int, frame: FrameType | None) -> None:
        for one in ending:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    before = {one: signal.signal(one, stop) for one in ending}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def owned_folder() -> Iterator[Path]:
    """A temporary folder for its owner alone, deleted on leaving. Its name is short, as a socket's must be.

    What earlier owners left, who could not clean up, is cleared first; on leaving, whatever still belongs to the folder is ended.
    """
    clear_leftovers()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(OSError):  # another start took it for a leftover before it was locked
            lock = disk.Lock(folder / OWNED)
            break
    with closing(lock):
        try:
            yield folder
        finally:
            clear(folder)


def clear_leftovers() -> None:
    """End the processes and delete the folders of owners that were killed."""
    for mark in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNED}"):
        with suppress(OSError):  # in use, or another user's
            if mark.lstat().st_uid == os.getuid():
                with closing(disk.Lock(mark)):
                    clear(mark.parent)


def clear(folder: Path) -> None:
    """End every process that belongs to the folder, and delete it."""
    end = time.monotonic() + KILL_SECONDS
    while (
        processes := _belonging_to(folder)
    ) and time.monotonic() < end:  # again, for what one of them had just started
        kill(processes)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _belonging_to(folder: Path) -> list[int]:
    """The processes of this user whose environment names the folder, where Linux tells."""
    words = [f"\0{name}={folder}{end}".encode() for name in (FOLDER, HOME) for end in ("\0", "/")]
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or gone
            given = b"\0" + entry.read_bytes() + b"\0"
            if int(entry.parent.name) != os.getpid() and any(word in given for word in words):
                found.append(int(entry.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have, where Linux tells."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in descendants(child)]


def kill(pids: Iterable[int]) -> None:
    """End these processes, as far as they are there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
