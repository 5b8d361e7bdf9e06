"""The disk as the rest of storage/ sees it: a file is written whole or not at all, and is durable on return.

Every call that changes the disk goes through this module's names `os` and `shutil`: the tests put failing ones in their
place and so reach each write, fsync and rename. Errors are OSErrors that name the file.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
"""How a file is opened that nobody can have put there."""

Data = bytes | Sequence[bytes | memoryview]
"""What is written: bytes, or pieces that follow one another."""


def atomic_write(path: str | Path, data: Data) -> None:
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


def pieces(data: Data) -> Sequence[bytes | memoryview]:
    """The pieces of what is written."""
    return [data] if isinstance(data, bytes) else data


def write_new_file(path: Path, data: Data, mode: int = 0o666) -> None:
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
            for piece in pieces(data):
                _write_all(descriptor, piece)
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


class PlacedFile:
    """A new file of known size whose parts are written in any order."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        with _naming(path):
            self._descriptor = os.open(path, os.O_WRONLY | NEW, 0o666)
            os.ftruncate(self._descriptor, size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at an offset."""
        with _naming(self.path):
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            _write_all(self._descriptor, data)

    def close(self) -> None:
        """Make what was written durable and give the file back; closing twice is fine."""
        with _naming(self.path):
            if self._descriptor >= 0:
                os.fsync(self._descriptor)
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


def is_locked(path: Path) -> bool | None:
    """Whether a process holds a Lock on this file; None where this user may not look. Changes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


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


def read_file(path: str | Path) -> bytes:
    """The content of a file in a folder that somebody else may have filled. Raises OSError for what is none, such as a pipe."""
    check_plain(path)
    return Path(path).read_bytes()


def check_plain(path: str | Path) -> None:
    """Raise OSError unless a path is a file's or leads to one: to read a pipe or a terminal may never end."""
    if not stat.S_ISREG(mode := Path(path).stat().st_mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "is no plain file; remove it", str(path))


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    check_plain(path)
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


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: os.write may take fewer than it is given, and says so only by its result."""
    rest = memoryview(data)
    while rest:
        written = os.write(descriptor, rest)
        if not written:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        rest = rest[written:]


def _close_once(file: AppendFile | PlacedFile | Lock) -> None:
    descriptor, file._descriptor = file._descriptor, -1
    if descriptor >= 0:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors name the file: os.write and os.fsync know only a number."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
