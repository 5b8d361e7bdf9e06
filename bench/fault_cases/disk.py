"""E: the server is killed, the disk fails, what lies on it is damaged or of another version."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from fault_cases.matrix import PREVIOUS, REFUSED, RESUMED, Row, judge
from ubsmoe.config import to_json
from ubsmoe.engines.local import LocalEngine
from ubsmoe.messages import Reply, Task
from ubsmoe.server.federation import Federation
from ubsmoe.server.run import run
from ubsmoe.storage import disk
from ubsmoe.storage.checkpoints import CheckpointError, load_newest, save_checkpoint
from ubsmoe.storage.events import EventLog, read_events
from ubsmoe.storage.runfolder import RunFolder, RunFolderError

CHANGING = ("write", "fsync", "replace", "open", "mkdir", "ftruncate")
Broken = Callable[[str, int, Callable[..., Any], tuple[Any, ...]], Any]
"""What to do in the place of a call: its name, its number, the real one, its arguments."""


class BreakingDisk:
    """Stands in for `os` and `shutil` inside storage/disk.py."""

    def __init__(self, broken: Broken) -> None:
        self._broken, self.calls = broken, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(shutil if name == "rmtree" else os, name)
        return (lambda *args: self._call(name, real, args)) if name in CHANGING else real

    def _call(self, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.calls += 1
        return self._broken(name, self.calls, real, args)


@contextlib.contextmanager
def on(broken: Broken) -> Iterator[BreakingDisk]:
    faulty = BreakingDisk(broken)
    disk.os = disk.shutil = faulty  # type: ignore[assignment]
    try:
        yield faulty
    finally:
        disk.os, disk.shutil = os, shutil


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class DyingEngine(LocalEngine):
    """The server's process is killed in round 2, before a reply number; number 4 is after the last."""

    reply = -1

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Honest replies, until it dies."""
        number = -1
        for number, reply in enumerate(super().exchange(tasks)):
            if reply.round == 2 and number == self.reply:
                die()
            yield reply
        if self.reply == 4 and reply.round == 2:
            die()


def carry_out(federation: Federation, folder: Path, reply: int = -1) -> None:
    engine = DyingEngine(federation.trainer, federation.examples, federation.clients)
    engine.reply = reply
    with RunFolder.open_or_create(folder, to_json(federation.settings)) as opened:
        run(federation, opened, engine, lambda *_: None)


def in_child(work: Callable[[], Any]) -> int:
    """The status of a process of its own that does this: 0 if it got to the end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitpid(pid, 0)[1]


def died_of_kill(work: Callable[[], Any]) -> bool:
    """Whether such a process was killed."""
    status = in_child(work)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def hash_of(folder: Path) -> str | None:
    summary = folder / "summary.json"
    return json.loads(summary.read_text())["adapter_sha256"] if summary.exists() else None


def killed_at(name: str, after: str) -> Broken:
    """Dies in the place of the first call of this name after something called `after` was made or renamed into place."""
    reached = False

    def broken(called: str, _: int, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        nonlocal reached
        if reached and called == name:
            die()
        result = real(*args)
        reached = reached or (called in ("mkdir", "replace") and Path(args[-1]).name == after)
        return result

    return broken


def server_kills(federation: Federation, root: Path) -> Iterator[Row]:
    """A process with real training is killed at a point of its run; another goes on in its folder."""

    def on_disk(folder: Path, name: str, after: str) -> None:
        with on(killed_at(name, after)):
            carry_out(federation, folder)

    in_child(lambda: carry_out(federation, root / "whole"))
    expected = hash_of(root / "whole")
    points: dict[str, Callable[[Path], None]] = {
        "killed before dispatch": lambda folder: carry_out(federation, folder, reply=0),
        "killed in mid-collect": lambda folder: carry_out(federation, folder, reply=2),
        "killed in mid-aggregate": lambda folder: carry_out(federation, folder, reply=4),
        "killed before fsync": lambda folder: on_disk(folder, "fsync", after=".draft-00002"),
        "killed between renames": lambda folder: on_disk(folder, "replace", after="adapter.safetensors"),
        "killed after": lambda folder: on_disk(folder, "fsync", after="summary.json"),
    }
    for name, work in points.items():
        folder = root / name.replace(" ", "-")
        killed = died_of_kill(lambda work=work, folder=folder: work(folder))
        there = sorted(path.name for path in (folder / "checkpoints").iterdir())[-1]
        in_child(lambda folder=folder: carry_out(federation, folder))
        resumed = expected is not None and hash_of(folder) == expected
        yield judge("E", name, RESUMED, killed and resumed, f"newest then: {there}; sha256 {str(hash_of(folder))[:12]}")


def failing(code: int, at: int, short: bool = False) -> Broken:
    """Call number `at` fails with this error; a write has written half of its bytes by then. Short: it just says so."""

    def broken(name: str, number: int, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if number != at:
            return real(*args)
        if name == "write":
            half = real(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])
            if short:
                return half
        elif short:
            return real(*args)
        raise OSError(code, os.strerror(code))

    return broken


def failing_disk(root: Path) -> Iterator[Row]:
    """Every call of a save that changes the disk fails once, in each way."""
    tensors = {"w": torch.arange(50.0)}
    for name, code, short in (("ENOSPC", errno.ENOSPC, False), ("EIO", errno.EIO, False), ("short writes", 0, True)):
        good = tried = 0
        for at in itertools.count(1):
            folder = root / f"{name}-{at}"
            save_checkpoint(folder, 1, tensors, {"round": 1})
            with on(failing(code, at, short)) as faulty:
                try:
                    save_checkpoint(folder, 2, tensors, {"round": 2})
                    saved = True
                except CheckpointError:
                    saved = False
            if faulty.calls < at:
                break
            tried += 1
            found = load_newest(folder)
            # a save that failed after its rename is there, whole
            whole = found is not None and found.facts == {"round": found.round} and not found.skipped
            good += whole and (found.round == 2 if saved or short else found.round in (1, 2))
        declared = "every save whole" if short else "the checkpoint before loads, at every call"
        yield judge("E", name, declared, good == tried, f"{good}/{tried} calls", beyond=short)


def read_only(root: Path) -> Iterator[Row]:
    def broken(name: str, number: int, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with on(broken):
        yield refused(
            "read-only folder", lambda: RunFolder.open_or_create(root / "read-only", "{}", {}), RunFolderError
        )


def refused(name: str, work: Callable[[], Any], expected: type[Exception]) -> Row:
    try:
        work()
        return judge("E", name, REFUSED, False)
    except expected as error:
        return judge("E", name, REFUSED, True, str(error))


def versions_and_halves(root: Path) -> Iterator[Row]:
    """Half a checkpoint, other formats, two servers, and a clock that goes backwards."""

    def two(name: str) -> Path:
        for number in (1, 2):
            save_checkpoint(root / name, number, {"w": torch.arange(5.0)}, {"round": number})
        return root / name

    folder = two("half")
    (folder / "round-00002" / "state.safetensors").unlink()
    found = load_newest(folder)
    yield judge(
        "E", "half a checkpoint", PREVIOUS, found is not None and found.round == 1, str(found and found.skipped)
    )
    for name, number in (("older format", 0), ("newer format", 99)):
        folder = two(name)
        manifest = folder / "round-00002" / "manifest.json"
        data = json.dumps(json.loads(manifest.read_bytes()) | {"format": number}).encode()
        manifest.write_bytes(data)
        (folder / "round-00002" / "manifest.sha256").write_text(f"{sha256(data).hexdigest()}  manifest.json\n")
        if number:
            yield refused(name, lambda folder=folder: load_newest(folder), CheckpointError)
        else:
            found = load_newest(folder)
            yield judge("E", name, PREVIOUS, found is not None and found.round == 1, str(found and found.skipped))
    with RunFolder.open_or_create(root / "two", "{}", {}):
        yield refused(
            "two servers on one run folder", lambda: RunFolder.open_or_create(root / "two", "{}", {}), RunFolderError
        )
    folder, hours = two("clock"), iter((9, 8, 7))
    os.utime(folder / "round-00002", (0, 0))
    with EventLog(folder / "events.jsonl", lambda: datetime(2026, 1, 1, next(hours), tzinfo=UTC)) as log:
        for number in (1, 2, 3):
            log.append("round", number)
        log.truncate_after(2)
    kept, found = [event["round"] for event in read_events(folder / "events.jsonl")], load_newest(folder)
    held = kept == [1, 2] and found is not None and found.round == 2
    yield judge("E", "clock moved back", "rounds order what there is, not clocks", held)


def damage(root: Path, flips: int, cuts: int) -> Iterator[Row]:
    """A damaged newest checkpoint is passed over for the one before, always."""
    draw, counts = random.Random(1), {"flipped": 0, "cut": 0}
    folder = root / "damage"
    for number in (1, 2):
        save_checkpoint(folder, number, {"w": torch.arange(50.0) + number}, {"round": number})
    files = {path: path.read_bytes() for path in (folder / "round-00002").iterdir()}
    for attempt in range(flips + cuts):
        path = draw.choice(sorted(files))
        data, place = bytearray(files[path]), draw.randrange(len(files[path]))
        if attempt < flips:
            data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data if attempt < flips else data[:place]))
        with contextlib.suppress(CheckpointError):
            found = load_newest(folder)
            counts["flipped" if attempt < flips else "cut"] += bool(
                found and found.round == 1 and len(found.skipped) == 1
            )
        path.write_bytes(files[path])
    yield judge("E", "a flipped bit", PREVIOUS, counts["flipped"] == flips, f"{counts['flipped']}/{flips} refused")
    yield judge("E", "truncations", PREVIOUS, counts["cut"] == cuts, f"{counts['cut']}/{cuts} refused", beyond=True)


def server_and_disk(federation: Federation, root: Path, flips: int, cuts: int) -> Iterator[Row]:
    """All of E."""
    yield from server_kills(federation, root)
    yield from failing_disk(root)
    yield from read_only(root)
    yield from versions_and_halves(root)
    yield from damage(root, flips, cuts)
