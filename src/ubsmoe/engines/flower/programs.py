"""Flower's programs on this machine: each with a log of its own, looked after, started again, and stopped with all it started."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ubsmoe.engines.flower.app import QUIET
from ubsmoe.engines.flower.endings import FOLDER, descendants, kill
from ubsmoe.errors import UserError, printable, require
from ubsmoe.storage import disk

SUPERLINK = "superlink"
OWNER = ".up"  # in Flower's home: locked by the `flower up` that looks after it
LOOK_SECONDS = 0.5
RESTART_SECONDS = 30.0
STOP_SECONDS = 10.0
TOO_EARLY = b"[code: 2004] Failed to activate SuperNode"
"""What a node prints that comes back while its SuperLink, which heard its last heartbeat, takes the killed one for alive."""
TAIL = 2000  # bytes of a log that hold why a node has just ended
RETURN_SECONDS = 120.0  # twice the minute after which Flower 1.41 takes a silent node for away


class FlowerFailure(UserError):
    """A process of Flower failed; the message names its log."""


class Programs:
    """The programs of one federation, by name.

    Args:
        home: Flower's home, where NAME.log is what NAME prints.
        app: the app's folder, in which they run.
        environment: theirs.
        log: called with a line when one ends or is started again.

    Attributes:
        running: their processes, ended or not.
    """

    def __init__(self, home: Path, app: Path, environment: Mapping[str, str], log: Callable[[str], None]) -> None:
        self.home, self._app, self._environment, self._log = home, app, environment, log
        self._starts: dict[str, Callable[[], subprocess.Popen[bytes]]] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: set[str] = set()
        self._return_until: dict[str, float] = {}
        self._refused: set[str] = set()

    def start(self, name: str, program: str, options: Sequence[str]) -> None:
        """Start a program, and remember how."""
        command, log_file = flower_command(program, *options), self.home / f"{name}.log"
        self._starts[name] = lambda: started(command, self._environment, self._app, log_file)
        self.running[name] = self._starts[name]()

    def look_after(self) -> None:
        """Say which program has ended since the last look, and start those again that `request_restart` names.

        Raises:
            FlowerFailure: if the SuperLink has ended, without which no node can do anything.
        """
        for name, process in list(self.running.items()):  # more may be started meanwhile
            code = process.poll()  # once: it may end at any time
            if (request := _request(self.home, name)).exists():
                stop(process)
                self.running[name] = self._starts[name]()
                self._ended.discard(name)
                self._refused.discard(name)
                self._return_until[name] = time.monotonic() + RETURN_SECONDS
                request.unlink()
                self._log(f"{name} is started again")
            elif self._came_too_early(name, code):
                self.running[name] = self._starts[name]()
            elif code is not None and name not in self._ended:
                self._ended.add(name)
                said = f"{name} {_ending(code)}; its log: {self.home}/{name}.log"
                if name == SUPERLINK:
                    raise FlowerFailure(f"{said}. `ubsmoe flower up {self._app}` starts a new one")
                self._log(f"{said}. `ubsmoe flower restart {self._app} {name}` starts it again")

    def _came_too_early(self, name: str, code: int | None) -> bool:
        """Whether a node that was asked back has ended because its server still takes it for online."""
        log = self.home / f"{name}.log"
        if time.monotonic() > self._return_until.get(name, 0) or code in (None, 0):
            return False
        if TOO_EARLY not in log.read_bytes()[-TAIL:]:
            return False
        if name not in self._refused:
            self._refused.add(name)
            self._log(
                f"{name} is refused until the server notices that it was away, up to a minute; it is tried until then"
            )
        return True

    def check(self) -> None:
        """Raise FlowerFailure if one of them has ended."""
        for name, process in self.running.items():
            if process.poll() is not None:
                last = printable(_last_line(self.home / f"{name}.log"))
                raise FlowerFailure(f"{name} {_ending(process.returncode)}: {last} (all of it: {self.home}/{name}.log)")

    def stop(self) -> None:
        """Stop all of them, the last one first."""
        for process in reversed(self.running.values()):
            stop(process)


def request_restart(app: Path, node: str, seconds: float = RESTART_SECONDS) -> None:
    """Let the `flower up` of an app start one of its nodes again, and wait until it has.

    Raises:
        FlowerFailure: if it has no such node, or if no `flower up` is there that could.
    """
    home = (app / ".flwr").absolute()
    if not (home / f"{node}.pub").is_file():
        known = ", ".join(sorted(path.stem for path in home.glob("node-*.pub"))) or "none"
        raise FlowerFailure(
            f"{node!r} is no node of {app}; its nodes are: {known}. `ubsmoe flower up {app}` starts them"
        )
    if not _is_up(home):
        raise FlowerFailure(f"no `ubsmoe flower up {app}` is running, so nobody can start {node}; start that first")
    request, end = _request(home, node), time.monotonic() + seconds
    disk.atomic_write(request, b"")
    while request.exists():
        if time.monotonic() > end or not _is_up(home):
            request.unlink(missing_ok=True)
            raise FlowerFailure(
                f"`ubsmoe flower up {app}` did not start {node} within {seconds:g} s; look at its terminal"
            )
        time.sleep(LOOK_SECONDS / 5)


def owned(home: Path) -> disk.Lock:
    """The lock of the one `flower up` of a home; requests that an earlier one left are forgotten.

    Raises:
        FlowerFailure: if another has it.
    """
    try:
        lock = disk.Lock(home / OWNER)
    except BlockingIOError:
        raise FlowerFailure(
            f"`ubsmoe flower up {home.parent}` is running already; stop that one first, or copy the app"
        ) from None
    for request in home.glob("*.restart"):
        request.unlink()
    return lock


def _is_up(home: Path) -> bool:
    try:
        disk.Lock(home / OWNER).close()
    except BlockingIOError:
        return True
    return False


def _request(home: Path, node: str) -> Path:
    return home / f"{node}.restart"


def _ending(code: int) -> str:
    """How a process has ended.

    >>> _ending(-9), _ending(1)
    ('was killed (SIGKILL)', 'has ended with exit code 1')
    """
    if code >= 0:
        return f"has ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed ({signal.Signals(-code).name})"
    return f"was killed (signal {-code})"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def flower_command(program: str, *words: str) -> list[str]:
    """Flower's programs stand beside the Python that runs this."""
    require("flwr", "flower")
    path = shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise FlowerFailure(f"{program} is neither beside {sys.executable} nor on the PATH; reinstall Flower")
    return [path, *words]


def flower_environment(home: Path, residents: Path | None = None) -> dict[str, str]:
    """Flower starts more programs by name, so they must be on the path."""
    own = {
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    return {**os.environ, **QUIET, **own, **({FOLDER: str(residents)} if residents else {})}


def started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log_file: Path
) -> subprocess.Popen[bytes]:
    """A process whose output goes to the end of a file."""
    with open(log_file, "ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must not reach it: it is stopped in order
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and kill it if it does not, with every process that it left behind."""
    family = descendants(process.pid)  # a SuperLink that ends leaves the app of a run that goes on
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    kill([process.pid, *family] if process.poll() is None else family)
    process.wait()
