"""The disk as the rest of storage/ sees it: a file is written whole or not at all, and is durable on return.

Every call that changes the disk goes through this module's names `os` and `shutil`: the tests put failing ones in their
place and so reach each write, fsync and rename. Errors are OSErrors that name the file.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
"""How a file is opened that nobody can have put there."""


def atomic_write(path: str | Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, finds the old file or the new one and nothing between.

    Args:
        path: the file; its folder must exist.
        data: the whole content.

    Raises:
        OSError: if the disk refuses; what was at `path` is untouched.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    try:
        write_new_file(draft, data)
        rename(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    sync_folder(path.parent)


def write_new_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write and fsync a file; after a crash it may be there in part, so callers rename it into place afterwards.

    What is at `path` is taken away rather than written through: it may be a link, or readable by more than `mode` says.
    """
    with _naming(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | NEW, mode)
        except FileExistsError:
            os.unlink(path)
            descriptor = os.open(path, os.O_WRONLY | NEW, mode)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def create_file(path: Path, data: bytes) -> None:
    """Write a file where there is none, whole or not at all. Raises FileExistsError if there is one."""
    with _naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, data)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)


class AppendFile:
    """A file that only grows at its end, or is cut back there; created when missing.

    Args:
        path: the file; a link is refused.
        mode: who may read a file that is created, less what the umask takes.

    Raises:
        OSError: if it cannot be opened, or is no plain file of this name alone.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self.path = path
        with _naming(path):
            self._descriptor = _open_own(path, os.O_APPEND, mode)

    def append(self, data: bytes) -> None:
        """Hand bytes to the system, all or none: what a failing write left behind is cut off again."""
        with _naming(self.path):
            end = os.fstat(self._descriptor).st_size
            try:
                _write_all(self._descriptor, data)
            except OSError:
                os.ftruncate(self._descriptor, end)
                raise

    def cut(self, size: int) -> None:
        """Drop what is beyond `size` bytes, durably."""
        with _naming(self.path):
            if os.fstat(self._descriptor).st_size > size:
                os.ftruncate(self._descriptor, size)
                os.fsync(self._descriptor)

    def sync(self) -> None:
        """Make what was appended durable."""
        with _naming(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Give the file back; closing twice is fine."""
        _close_once(self)


class Lock:
    """A file locked against every other process until `close`.

    The lock is the system's (flock): it goes with the process, however that ends. A forked child shares it until it closes
    the file, which is the first thing a worker process does.

    Raises:
        BlockingIOError: if another process holds it; the text says which.
        OSError: if it cannot be opened, or is a link.
    """

    def __init__(self, path: Path) -> None:
        with _naming(path):
            self._descriptor = _open_own(path)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self._descriptor, 0)
                _write_all(self._descriptor, f"{os.getpid()}\n".encode())
            except BlockingIOError as error:
                holder = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
                self.close()
                raise BlockingIOError(error.errno, f"in use by another process (pid {holder})") from None
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        """Let others have it; closing twice is fine."""
        _close_once(self)


def rename(source: Path, target: Path) -> None:
    """Move within one folder, replacing a file at `target`."""
    with _naming(target):
        os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without it a rename may be lost in a power cut."""
    with _naming(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it; one that exists is fine."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with _naming(folder):
        os.mkdir(folder)
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder and what is in it; of a link only the link."""
    with _naming(folder):
        if folder.is_symlink():
            os.unlink(folder)
        else:
            shutil.rmtree(folder)


def encode_json(value: Any, indent: int | None = None, sort_keys: bool = True) -> bytes:
    """One JSON text; the numbers JSON lacks become the texts "NaN", "Infinity" and "-Infinity".

    >>> encode_json({"loss": float("nan"), "bytes": 3})
    b'{"bytes": 3, "loss": "NaN"}'
    """
    return json.dumps(_finite(value), sort_keys=sort_keys, allow_nan=False, indent=indent).encode()


def decode_json(data: bytes) -> Any:
    """What `encode_json` was given: its texts for the numbers that JSON lacks are numbers again, except where texts stand.

    A whole number that no float holds exactly, which nothing here writes, becomes a float.

    >>> decode_json(b'{"loss": "NaN", "client": "NaN", "bytes": 3}')
    {'loss': nan, 'client': 'NaN', 'bytes': 3}
    """
    return _numbers(json.loads(data))


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_own(path: Path, flags: int = 0, mode: int = 0o666) -> int:
    """Open a file to change it in place, created when missing.

    In a folder that somebody else has filled, a link of either kind would let the change reach a file elsewhere; a pipe would hang.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"is a link, which is not followed; remove {path.name}") from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise OSError(errno.ELOOP, f"is a link or no plain file; remove {path.name}")
    return descriptor


def _write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: os.write may take fewer than it is given, and says so only by its result."""
    rest = memoryview(data)
    while rest:
        written = os.write(descriptor, rest)
        if not written:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        rest = rest[written:]


def _close_once(file: AppendFile | Lock) -> None:
    descriptor, file._descriptor = file._descriptor, -1
    if descriptor >= 0:
        os.close(descriptor)


_TEXTS = {"event", "time", "client", "stage", "reason", "field", "label", "method", "name"}  # never numbers
_NUMBERS = {json.dumps(value): value for value in (math.nan, math.inf, -math.inf)}


def _numbers(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _numbers(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part, key) for part in value]
    if isinstance(value, str):
        return value if key in _TEXTS else _NUMBERS.get(value, value)
    if type(value) is int and abs(value) >= 2**63:
        return math.copysign(math.inf, value) if abs(value) >= 2**1023 else float(value)
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors name the file: os.write and os.fsync know only a number."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
