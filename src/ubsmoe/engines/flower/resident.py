"""A resident process: it outlives Flower's processes and keeps base and data in memory between messages.

Flower starts a new process for every message, which would load the base every round. Instead that process passes the bytes
to the resident, over a Unix socket in a folder that only this user can enter. Each end proves that it can read a key which
lies there; Python's multiprocessing.connection frames and authenticates, and nothing is ever unpickled. The first message
starts the resident, and it ends when it has been idle for a while. One resident serves one run file on one device, whichever
nodes of this machine ask, one message at a time.

Whatever goes wrong here is `Unavailable`, and the process that asked does the work itself.
"""

import contextlib
import hashlib
import json
import os
import queue
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from multiprocessing import ProcessError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import IO, cast

from ubsmoe.client.node_config import NodeConfig
from ubsmoe.config import RunSettings, parse_run, to_json
from ubsmoe.engines.flower.endings import FOLDER
from ubsmoe.errors import UserError
from ubsmoe.storage import disk
from ubsmoe.version import __version__
from ubsmoe.wire.packed import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, Packed, WireError

HELLO_SECONDS = 10.0  # the longest silence of a peer that is not training
START_SECONDS = 30.0
DONE, REFUSED, QUIT = b"done", b"refused", b"quit"

BROKEN = (
    OSError,
    EOFError,
    ProcessError,
    AssertionError,
)  # what a line raises; Python 3.11 asserts that a peer challenges


class Unavailable(Exception):
    """There is no resident process to be had; the text says why."""


class Refused(UserError):
    """What the resident's node made of the message: a user's mistake or a failed training."""


def ask(kind: str, settings: RunSettings, identity: NodeConfig, packed: Packed, idle_seconds: float) -> Packed:
    """Let the resident of this run file answer; start it if there is none.

    Args:
        kind: as for `Node.answer`.
        settings: the run file as this machine carries it out.
        identity: which node asks.
        packed: the message.
        idle_seconds: how long a resident that this call starts stays without work.

    Raises:
        Unavailable: if no resident answers: none could be reached or started, or it died of the message.
        Refused: if the work itself failed, with the resident's words; or if it said nothing for rounds.give_up_seconds, and
            was ended, so that the next message finds another.
    """
    key = json.dumps([__version__, sys.executable, to_json(settings)])
    place = own_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.sock"
    try:
        with connected(place, settings, idle_seconds) as line:
            _send(line, kind.encode(), json.dumps(identity).encode(), packed.header, packed.tensors)
            _limit(line, settings.rounds.give_up_seconds)  # a resident that dies closes the line
            answer, header, tensors = _answer_of(line, settings.rounds.give_up_seconds)
    except BROKEN as error:
        raise Unavailable(str(error) or type(error).__name__) from None
    if answer == REFUSED:
        raise Refused(header.decode(errors="replace"))
    return Packed(header, tensors)


def _answer_of(line: Connection, seconds: float) -> list[bytes]:
    try:
        return _receive(line, 3)
    except BlockingIOError:  # what a read says that was limited
        _end_peer(line)
        raise Refused(f"the resident process said nothing for {seconds:g} s (rounds.give_up_seconds)") from None


def _end_peer(line: Connection) -> None:
    """Kill the process at the other end, which is this user's own; where the system does not tell which, it stays."""
    with contextlib.suppress(OSError, AttributeError), socket.socket(fileno=os.dup(line.fileno())) as same:
        credentials = same.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        os.kill(struct.unpack("3i", credentials)[0], signal.SIGKILL)


def own_folder() -> Path:
    """Where sockets and their key are, made if missing. Raises Unavailable unless only this user can enter it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    default = Path(runtime) / "ubsmoe" if runtime else Path(tempfile.gettempdir()) / f"ubsmoe-{os.getuid()}"
    folder = Path(os.environ.get(FOLDER) or default)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError as error:
        raise Unavailable(str(error)) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Unavailable(f"{folder} is not a folder that only this user can enter")
    return folder


def stop_residents(folder: Path) -> None:
    """Ask every resident of a folder to end, and wait until it has."""
    for place in folder.glob("*.sock"):
        with contextlib.suppress(*BROKEN), _connect(place) as line:
            _send(line, QUIT, b"", b"", b"")
            line.recv_bytes(0)  # the line is closed when it is gone


def connected(place: Path, settings: RunSettings, idle_seconds: float) -> Connection:
    """A line to the resident at that socket, which is started if there is none. Raises one of BROKEN if that fails."""
    end, lock, process = time.monotonic() + START_SECONDS, None, None
    with contextlib.ExitStack() as stack:
        while time.monotonic() < end and (process is None or process.poll() is None):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                line = _connect(place)
                if process:
                    process.returncode = 0  # it outlives this process, so nobody here waits for it
                return line
            if lock is None:
                with contextlib.suppress(BlockingIOError):  # another process is starting it
                    lock = stack.enter_context(contextlib.closing(disk.Lock(place.with_suffix(".lock"))))
            elif process is None:  # under the lock, and still nobody listens
                process = _start(place, settings, idle_seconds)
            time.sleep(0.05)
    raise TimeoutError(f"the resident process did not start; see {place.with_suffix('.log')}")


def _connect(place: Path) -> Connection:
    line = Client(str(place), "AF_UNIX")
    try:
        key = _key(place).read_bytes()
        _limit(line, HELLO_SECONDS)
        answer_challenge(line, key)
        deliver_challenge(line, key)
        return line
    except BaseException as error:
        line.close()
        if isinstance(error, BlockingIOError):
            raise TimeoutError(f"{place}: no answer within {HELLO_SECONDS:g} s") from None
        raise


def _start(place: Path, settings: RunSettings, idle_seconds: float) -> "subprocess.Popen[bytes]":
    place.unlink(missing_ok=True)  # left behind by a resident that was killed
    disk.write_new_file(_key(place), secrets.token_bytes(32), mode=0o600)
    command = [sys.executable, "-m", "ubsmoe.engines.flower.resident", str(place), str(idle_seconds)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    with open(place.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    with cast(IO[bytes], process.stdin) as pipe:
        pipe.write(to_json(settings).encode())
    return process


def _key(place: Path) -> Path:
    """The secret of both ends, new for every resident."""
    return place.with_suffix(".key")


Call = tuple[bytes, NodeConfig, Packed, "Future[list[bytes]]"]


def serve(place: Path, settings: RunSettings, idle_seconds: float) -> None:
    """Be the resident until it has been idle for so long. Threads listen, this one works: one message at a time."""
    calls: queue.Queue[Call] = queue.Queue()
    before = os.umask(0o177)
    try:
        # not given the key: `accept` would then wait for each peer's answer to its challenge
        listener = Listener(str(place), "AF_UNIX", backlog=64)
    finally:
        os.umask(before)
    threading.Thread(target=_listen, args=(listener, _key(place).read_bytes(), calls), daemon=True).start()
    try:
        _work(settings, calls, idle_seconds)
    finally:
        listener.close()


def _work(settings: RunSettings, calls: "queue.Queue[Call]", idle_seconds: float) -> None:
    """Answer calls until there is none for so long, or one asks to end."""
    machine = None
    while True:
        try:
            kind, identity, packed, answer = calls.get(timeout=idle_seconds)
        except queue.Empty:
            return
        if kind == QUIT:
            return
        from ubsmoe.client.node import Machine  # imports torch, which takes longer than a starter waits for a greeting

        machine = machine or Machine(settings)
        try:
            result = machine.node(identity).answer(kind.decode(), packed)
            answer.set_result([DONE, result.header, result.tensors])
        except (UserError, WireError) as error:
            answer.set_result([REFUSED, str(error).encode()[:MAX_HEADER_BYTES], b""])


def _listen(listener: Listener, key: bytes, calls: "queue.Queue[Call]") -> None:
    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=_hear, args=(listener.accept(), key, calls), daemon=True).start()


def _hear(line: Connection, key: bytes, calls: "queue.Queue[Call]") -> None:
    """One peer. A peer without the key, or one that is silent or goes away, is dropped."""
    with line, contextlib.suppress(*BROKEN, ValueError):  # ValueError: an identity that is no JSON
        _limit(line, HELLO_SECONDS)
        deliver_challenge(line, key)
        answer_challenge(line, key)
        kind, identity, *packed = _receive(line, 4)
        answer: Future[list[bytes]] = Future()
        calls.put((kind, json.loads(identity or b"{}"), Packed(*packed), answer))
        _send(line, *answer.result())


def _limit(line: Connection, seconds: float) -> None:
    """Let a read or write of this line fail that stalls for so long; 0 lets it wait for ever."""
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))  # the system's struct timeval
    with socket.socket(fileno=os.dup(line.fileno())) as same:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, limit)


def _send(line: Connection, *parts: bytes) -> None:
    for part in parts:
        line.send_bytes(part)


def _receive(line: Connection, count: int) -> list[bytes]:
    """A message's parts, of which only the last, the tensors, may be large."""
    small = [line.recv_bytes(MAX_HEADER_BYTES) for _ in range(count - 1)]
    return [*small, line.recv_bytes(MAX_MESSAGE_BYTES)]


if __name__ == "__main__":
    serve(Path(sys.argv[1]), parse_run(json.loads(sys.stdin.read())), float(sys.argv[2]))
