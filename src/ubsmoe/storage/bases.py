"""Bases as runs map them, in a cache beside the hub's: written once, whole or not at all, and found again by their files.

    bases/SHA256-DTYPE[-FORMAT]/   a base with fused experts: config, tokenizer, model.safetensors, and last ubsmoe-base.json
    hashes/FINGERPRINT.json        the SHA-256 of the weights that files of such paths, sizes and times hold

A file of weights is written tensor by tensor, so that none of it needs to be in memory.
"""

import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ubsmoe import progress
from ubsmoe.errors import UserError
from ubsmoe.storage import disk
from ubsmoe.storage.json_text import encode_json

WEIGHTS, FACTS = "model.safetensors", "ubsmoe-base.json"
ALIGNED = 64
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "I64": 8, "F64": 8, "I32": 4, "BOOL": 1}


class BaseFolderError(UserError):
    """A base that cannot be written or is not whole; the message says why."""


class Stored(NamedTuple):
    """A tensor in a file: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * _BYTES[self.dtype]


class WeightsFile:
    """A safetensors file in the making. Every tensor's bytes come in order; the tensors may take turns."""

    def __init__(self, path: Path, tensors: Mapping[str, Stored]) -> None:
        # wide numbers first, as safetensors does; whatever can begin at a multiple of ALIGNED does, as torch's own memory:
        # some products of float32 round differently elsewhere
        order = sorted(
            tensors, key=lambda name: (-_BYTES[tensors[name].dtype], tensors[name].num_bytes % ALIGNED > 0, name)
        )
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._next, self._digests, end = dict[str, int](), {name: hashlib.sha256() for name in tensors}, 0
        for name in order:
            self._next[name], end = end, end + tensors[name].num_bytes
            header[name] = {**tensors[name]._asdict(), "data_offsets": [self._next[name], end]}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNED)
        self._begin = 8 + len(text)
        self._file = disk.PlacedFile(path, self._begin + end)
        self._file.write(0, len(text).to_bytes(8, "little") + text)

    def append(self, name: str, data: memoryview) -> None:
        """The next bytes of a tensor."""
        self._file.write(self._begin + self._next[name], data)
        self._next[name] += len(data)
        self._digests[name].update(data)

    def close(self) -> str:
        """End the file; gives `stored_sha256` of it."""
        self._file.close()
        return _joint({name: digest.hexdigest() for name, digest in self._digests.items()})


def stored_sha256(folder: Path) -> str:
    """A hash over the tensors of a folder's weights, whatever their order in the file."""
    with open(folder / WEIGHTS, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin, digests = file.tell(), {}
        for name in progress.through(sorted(header.keys() - {"__metadata__"}), "hashes the stored base"):
            start, end = header[name]["data_offsets"]
            file.seek(begin + start)
            digest = hashlib.sha256()
            while start < end and (part := file.read(min(end - start, 1 << 24))):
                digest.update(part)
                start += len(part)
            digests[name] = digest.hexdigest()
    return _joint(digests)


def write_base(
    folder: Path, size: int, fill: Callable[[Path], Mapping[str, Any]], name: Callable[[], Path] | None = None
) -> None:
    """Let `fill` write a base into a draft beside `folder`; it takes that name once it is whole, in place of what was there.

    Args:
        folder: where it goes.
        size: bytes that it will take.
        fill: writes the files and gives the facts for ubsmoe-base.json.
        name: where it goes after all, asked when it is whole: it may be named by what was written.

    Raises:
        BaseFolderError: if the disk refuses; then nothing of it is left.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # what a killed preparation left
        disk.make_folder(draft)
        if size > (free := shutil.disk_usage(draft).free):
            raise OSError(errno.ENOSPC, f"it needs {_said(size)} and the disk has {_said(free)}", str(folder))
        facts = {**fill(draft), "bytes": (draft / WEIGHTS).stat().st_size}
        disk.atomic_write(draft / FACTS, encode_json(facts, indent=2))
        place = name() if name else folder
        shutil.rmtree(place, ignore_errors=True)
        disk.rename(draft, place)
        disk.sync_folder(folder.parent)
    except OSError as error:
        raise BaseFolderError(
            f"cannot prepare a base in {folder.parent}: {error}; set HF_HOME (or --out) to a disk with {_said(size)} "
            "free that can be written"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What a prepared base says of itself; None if it is not one, or not whole."""
    try:
        facts = json.loads(disk.read_file(folder / FACTS))
        whole = (folder / WEIGHTS).stat().st_size == facts["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(facts) if whole else None


def fingerprint(files: Sequence[Path], *more: str) -> str:
    """What stands for files without reading them: their paths, sizes and times of change."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([stats, more]).encode()).hexdigest()


def known_sha256(cache: Path, key: str) -> str | None:
    """The SHA-256 of the weights in files of this fingerprint, if it was ever computed."""
    try:
        return str(json.loads(disk.read_file(cache / "hashes" / f"{key}.json"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_sha256(cache: Path, key: str, sha256: str) -> None:
    """Keep a hash for the next start; a cache that cannot be written costs time and nothing else."""
    try:
        disk.make_folder(cache / "hashes")
        disk.atomic_write(cache / "hashes" / f"{key}.json", encode_json({"sha256": sha256}))
    except OSError:
        return


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Inside, no other process prepares a base in this cache; waits for one that does. Raises as `write_base` does."""
    try:
        disk.make_folder(cache)
        lock = _waited_for(cache / ".lock")
    except OSError as error:
        raise BaseFolderError(
            f"cannot prepare a base in {cache}: {error}; set HF_HOME to a disk that can be written"
        ) from error
    try:
        yield
    finally:
        lock.close()


def _waited_for(path: Path) -> disk.Lock:
    while True:
        try:
            return disk.Lock(path)
        except BlockingIOError:
            time.sleep(0.5)


def _joint(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _said(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
