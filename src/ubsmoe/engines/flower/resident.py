"""A process that outlives Flower's: it keeps base and data in memory between messages.

Flower starts a new process for every message, which would load the base every round. Instead that process passes the bytes
to this one, over a Unix socket that only the same user can reach: the folder is the user's alone, and each end asks the
system who the other is. The first message starts it, and it ends when nobody has asked for a while. One worker serves one run
file on one device, whichever nodes of this machine ask, one after another.

Whatever goes wrong here is `Unavailable`, and who asked does the work itself.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ubsmoe.config import RunSettings, parse_run, to_json
from ubsmoe.errors import UserError
from ubsmoe.wire.packed import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, Packed, WireError

FOLDER = "UBSMOE_RESIDENTS"  # environment: where the sockets are, if not in the user's runtime folder
HELLO_SECONDS = 10.0  # a worker greets before it works, so who does not greet is none
START_SECONDS = 30.0
FRAME = struct.Struct("!16sQQQ")  # kind, bytes of the node configuration, of the header, of the tensors
GREETING = b"ubsmoe-worker-1\n"
DONE, REFUSED, QUIT = b"done", b"refused", b"quit"

NodeConfig = Mapping[str, str | int | float | bool]


class Unavailable(Exception):
    """There is no worker to be had; the text says why."""


class Refused(UserError):
    """What the worker's node made of the message: a user's mistake or a failed training."""


def ask(kind: str, settings: RunSettings, config: NodeConfig, packed: Packed, idle_seconds: float) -> Packed:
    """Let the worker for this run file answer; start it if there is none.

    Args:
        kind: as for `Node.answer`.
        settings: the run file.
        config: who asks: the node configuration.
        packed: the message.
        idle_seconds: how long a worker that this call starts stays without work.

    Raises:
        Unavailable: if no worker answers; nothing has happened then, or it died at it.
        Refused: if the work itself failed, with the worker's words.
    """
    where = {key: value for key, value in config.items() if "." in key or key == "threads"}
    key = json.dumps([metadata.version("ubsmoe"), sys.executable, to_json(settings), where], sort_keys=True)
    place = own_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.sock"
    try:
        with connected(place, settings, idle_seconds) as line:
            _send(line, kind.encode(), json.dumps(config).encode(), packed)
            line.settimeout(None)  # training takes as long as it takes; a worker that dies closes the line
            answer, _, result = _receive(line)
    except (OSError, WireError) as error:
        raise Unavailable(str(error)) from None
    if answer == REFUSED:
        raise Refused(result.header.decode(errors="replace"))
    return result


def own_folder() -> Path:
    """Where sockets are, made if missing. Raises Unavailable unless it is this user's alone."""
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
    """Ask every worker in a folder to end."""
    for place in folder.glob("*.sock"):
        with contextlib.suppress(OSError, WireError), _connect(place) as line:
            _send(line, QUIT, b"", Packed(b"", b""))
            line.recv(1)  # closed when it is gone


@contextlib.contextmanager
def connected(place: Path, settings: RunSettings, idle_seconds: float) -> Iterator[socket.socket]:
    """A line to the worker that listens there, started if there is none. Raises OSError or WireError if it is not to be had."""
    try:
        line = _connect(place)
    except (FileNotFoundError, ConnectionRefusedError):
        line = _start(place, settings, idle_seconds)
    with line:
        yield line


def _connect(place: Path) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    try:
        line.settimeout(HELLO_SECONDS)
        line.connect(str(place))
        if not _is_own(line) or _exactly(line, len(GREETING)) != GREETING:
            raise WireError(f"{place}: whoever listens there is no worker of this user")
        return line
    except BaseException:
        line.close()
        raise


def _start(place: Path, settings: RunSettings, idle_seconds: float) -> socket.socket:
    """Start a worker, or find that another process has just done so."""
    end = time.monotonic() + START_SECONDS
    with open(place.with_suffix(".lock"), "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise WireError("another process has been starting the worker for too long") from None
                time.sleep(0.1)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return _connect(place)
        place.unlink(missing_ok=True)  # a stale one: nobody listens, and nobody else may start one now
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
        with open(place.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ubsmoe.engines.flower.resident", str(place), str(idle_seconds)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(to_json(settings).encode())
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                line = _connect(place)
                process.returncode = 0  # it outlives us, so nobody here waits for it
                return line
            time.sleep(0.05)
    raise WireError(f"the worker did not start; see {place.with_suffix('.log')}")


@dataclass
class _Call:
    kind: bytes
    config: bytes
    packed: Packed
    answer: tuple[bytes, Packed] | None = None
    answered: threading.Event = field(default_factory=threading.Event)


def serve(place: Path, settings: RunSettings, idle_seconds: float) -> None:
    """Be the worker, until nobody has asked for so long. Threads listen, this one works: one message at a time."""
    calls: queue.Queue[_Call] = queue.Queue()
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(place))
    finally:
        os.umask(before)
    ours = os.stat(place).st_ino
    listener.listen(64)
    threading.Thread(target=_listen, args=(listener, calls), daemon=True).start()
    try:
        while True:
            try:
                call = calls.get(timeout=idle_seconds)
            except queue.Empty:
                return
            if call.kind == QUIT:
                return
            call.answer = _work(settings, call)
            call.answered.set()
    finally:
        with contextlib.suppress(OSError):
            if os.stat(place).st_ino == ours:
                os.unlink(place)
        listener.close()


def _work(settings: RunSettings, call: _Call) -> tuple[bytes, Packed]:
    from ubsmoe.client.node import node_of

    try:
        return DONE, node_of(settings, json.loads(call.config)).answer(call.kind.decode(), call.packed)
    except (UserError, WireError) as error:
        return REFUSED, Packed(str(error).encode()[:MAX_HEADER_BYTES], b"")


def _listen(listener: socket.socket, calls: "queue.Queue[_Call]") -> None:
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_hear, args=(line, calls), daemon=True).start()


def _hear(line: socket.socket, calls: "queue.Queue[_Call]") -> None:
    """One caller. Whoever is another user, or goes away, is nobody."""
    with line, contextlib.suppress(OSError, WireError):
        if not _is_own(line):
            return
        line.sendall(GREETING)
        call = _Call(*_receive(line))
        calls.put(call)
        call.answered.wait()
        assert call.answer is not None
        _send(line, call.answer[0], b"", call.answer[1])


def _is_own(line: socket.socket) -> bool:
    """Whether the other end is this user; where the system cannot say, the folder's permissions stand for it."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(user == os.getuid())


def _send(line: socket.socket, kind: bytes, config: bytes, packed: Packed) -> None:
    line.sendall(FRAME.pack(kind, len(config), len(packed.header), len(packed.tensors)))
    for part in (config, packed.header, packed.tensors):
        line.sendall(part)


def _receive(line: socket.socket) -> tuple[bytes, bytes, Packed]:
    kind, *sizes = FRAME.unpack(_exactly(line, FRAME.size))
    if max(sizes[:2]) > MAX_HEADER_BYTES or sizes[2] > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {sizes} bytes")
    config, header, tensors = (_exactly(line, size) for size in sizes)
    return kind.rstrip(b"\0"), config, Packed(header, tensors)


def _exactly(line: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = line.recv_into(view)
        if not count:
            raise WireError("the line was closed")
        view = view[count:]
    return bytes(data)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), parse_run(json.loads(sys.stdin.read())), float(sys.argv[2]))
