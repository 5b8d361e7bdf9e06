"""Every call that a save makes to the disk fails in turn, in each way it can, and the checkpoint before survives.

`FaultyDisk` stands in for the modules `os` and `shutil` inside storage/disk.py and counts the calls that change the
disk.
"""

import errno
import os
import shutil

import pytest
import torch

from ubsmoe.storage import disk
from ubsmoe.storage.checkpoints import CheckpointError, load_newest, save_checkpoint
from ubsmoe.storage.events import EventLog, read_events
from ubsmoe.storage.runfolder import RunFolder, RunFolderError, atomic_write, read_run

CHANGING = {"open", "write", "fsync", "replace", "mkdir", "ftruncate", "unlink", "rmtree"}
OLD, NEW = {"w": torch.arange(7.0)}, {"w": torch.arange(7.0) + 1, "touched": torch.tensor([True, False])}


class Killed(BaseException):
    """The process is gone: no handler of ours may run as if it were not."""


class FaultyDisk:
    """The real disk until call number `fail_at`, which fails in the given way; a dead process makes no later call."""

    def __init__(self, fail_at=None, how="EIO"):
        self.fail_at, self.how = fail_at, how
        self.calls = []
        self.open_files = set()
        self.unsynced = {}
        self.dead = False

    def __getattr__(self, name):
        real = getattr(shutil if name == "rmtree" else os, name)
        return (lambda *args: self._call(name, real, args)) if name in CHANGING else real

    def close(self, descriptor):
        if not self.dead:
            os.close(descriptor)
            self.open_files.discard(descriptor)

    def _call(self, name, real, args):
        if self.dead:
            raise Killed
        self.calls.append(name)
        if len(self.calls) == self.fail_at:
            self._fail(name, real, args)
        result = real(*args)
        if name == "open":
            self.open_files.add(result)
        if name == "open" and args[1] & os.O_CREAT:
            self.unsynced[result] = args[0]
        if name == "fsync":
            self.unsynced.pop(args[0], None)
        return result

    def _fail(self, name, real, args):
        if name == "write":  # a failing write has often written something
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        if self.how in ("killed", "power cut"):
            self._die()
            raise Killed
        raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)))

    def _die(self):
        """The system closes what the process had open; without power, what was not synced is lost too."""
        self.dead = True
        for descriptor in self.open_files:
            os.close(descriptor)
        if self.how == "power cut":
            for path in self.unsynced.values():
                os.truncate(path, 0)


def on(monkeypatch, faulty):
    monkeypatch.setattr(disk, "os", faulty)
    monkeypatch.setattr(disk, "shutil", faulty)


def count_calls(action, monkeypatch):
    """How many calls that change the disk an action makes when nothing fails."""
    counting = FaultyDisk()
    with monkeypatch.context() as patch:
        on(patch, counting)
        action()
    return counting.calls


def attempt(action, monkeypatch, faulty, expected):
    """Run an action on a faulty disk; True if it ended well."""
    with monkeypatch.context() as patch:
        on(patch, faulty)
        try:
            action()
        except (expected, Killed):
            return False
    return True


def with_two_checkpoints(folder):
    for round in (1, 2):
        save_checkpoint(folder, round, OLD, {"round": round})
    return folder


HOW = ["ENOSPC", "EIO", "EROFS", "killed", "power cut"]


@pytest.mark.parametrize("how", HOW)
def test_a_fault_at_every_call_of_a_save_leaves_a_checkpoint_that_loads(tmp_path, monkeypatch, how):
    def save(folder):
        save_checkpoint(folder, 3, NEW, {"round": 3})

    before = with_two_checkpoints(tmp_path / "before")
    for call in range(1, 100):
        folder = shutil.copytree(before, tmp_path / f"{how} {call}")
        faulty = FaultyDisk(call, how)
        if attempt(lambda folder=folder: save(folder), monkeypatch, faulty, CheckpointError):
            break
        found = load_newest(folder)
        renamed = "replace" in faulty.calls[: call - 1]
        assert (found.round, found.skipped) == (3 if renamed else 2, ())
        assert torch.equal(found.tensors["w"], (NEW if renamed else OLD)["w"])
        if not renamed:  # the same round can be saved once the disk is well
            save(folder)
        assert load_newest(folder).round == 3
    assert {"write", "fsync", "replace", "mkdir", "rmtree"} <= set(faulty.calls)
    assert faulty.calls.count("write") == 6  # the state: its header and two tensors
    assert faulty.calls.count("fsync") == 6 + 1  # four files, the draft's names and its making, the new name


@pytest.mark.parametrize("how", HOW)
def test_a_fault_at_every_call_of_the_first_save_leaves_no_checkpoint_or_a_whole_one(tmp_path, monkeypatch, how):
    for call in range(1, 100):
        folder = tmp_path / f"{call}" / "checkpoints"
        faulty = FaultyDisk(call, how)
        if attempt(lambda folder=folder: save_checkpoint(folder, 0, NEW, {}), monkeypatch, faulty, CheckpointError):
            break
        found = load_newest(folder)
        assert found is None or torch.equal(found.tensors["w"], NEW["w"])
    assert call > 10


def test_short_writes_are_carried_on(tmp_path, monkeypatch):
    slow = FaultyDisk()
    slow.write = lambda descriptor, data: os.write(descriptor, data[:3])
    with monkeypatch.context() as patch:
        on(patch, slow)
        save_checkpoint(tmp_path, 1, NEW, {"round": 1})
    assert load_newest(tmp_path).facts == {"round": 1}


def test_a_disk_that_takes_no_byte_and_reports_no_error_is_not_waited_for(tmp_path, monkeypatch):
    stuck = FaultyDisk()
    stuck.write = lambda descriptor, data: 0
    on(monkeypatch, stuck)
    with pytest.raises(CheckpointError, match="takes no more bytes"):
        save_checkpoint(tmp_path, 1, NEW, {})


def test_a_full_disk_is_told_in_a_sentence_and_gets_its_space_back(tmp_path, monkeypatch):
    with_two_checkpoints(tmp_path)
    writes = count_calls(lambda: with_two_checkpoints(tmp_path / "x"), monkeypatch).index("write")
    shutil.rmtree(tmp_path / "x")
    on(monkeypatch, FaultyDisk(writes, "ENOSPC"))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, 3, NEW, {})
    for part in (
        f"cannot save round 3 in {tmp_path}",
        "No space left on device",
        "already there are intact",
        "free some",
    ):
        assert part in str(caught.value)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00001", "round-00002"]


@pytest.mark.parametrize("how", HOW)
def test_a_fault_at_every_call_of_an_atomic_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch, how):
    path = tmp_path / "summary.json"
    for call in range(1, 100):
        path.write_bytes(b"old, and longer")
        faulty = FaultyDisk(call, how)
        if attempt(lambda: atomic_write(path, b"new"), monkeypatch, faulty, OSError):
            break
        assert path.read_bytes() == (b"new" if "replace" in faulty.calls[: call - 1] else b"old, and longer")
        assert how in ("killed", "power cut") or [part.name for part in tmp_path.iterdir()] == ["summary.json"]
    assert faulty.calls == ["open", "write", "fsync", "replace", "open", "fsync"]


@pytest.mark.parametrize("how", ["ENOSPC", "EIO", "killed"])
def test_a_fault_in_an_event_leaves_the_events_before_and_the_next_one_whole(tmp_path, monkeypatch, how):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("one", 1)
        attempt(lambda: log.append("two", 2), monkeypatch, FaultyDisk(1, how), OSError)
        if how != "killed":
            assert [event["event"] for event in read_events(path)] == ["one"]
            log.append("three", 3)
    with EventLog(path) as log:
        log.append("four", 4)
    survivors = ["one", "four"] if how == "killed" else ["one", "three", "four"]
    assert [event["event"] for event in read_events(path)] == survivors


def test_an_error_in_an_event_names_the_file(tmp_path, monkeypatch):
    with EventLog(tmp_path / "events.jsonl") as log:
        on(monkeypatch, FaultyDisk(1, "ENOSPC"))
        with pytest.raises(OSError, match=r"No space left on device: .*events\.jsonl"):
            log.append("one")


@pytest.mark.parametrize("how", HOW)
def test_a_fault_at_every_call_of_a_start_can_be_started_again(tmp_path, monkeypatch, how):
    def start(path):
        RunFolder.open_or_create(path, '{"seed": 5}', {"torch": "2.13.0"}).close()

    for call in range(1, 100):
        path = tmp_path / f"{call}"
        if attempt(lambda path=path: start(path), monkeypatch, FaultyDisk(call, how), RunFolderError):
            break
        start(path)
        assert read_run(path).config == {"seed": 5}
    assert call > 15


def test_a_read_only_place_is_told_in_a_sentence(tmp_path, monkeypatch):
    on(monkeypatch, FaultyDisk(1, "EROFS"))
    with pytest.raises(RunFolderError, match=r"cannot write in .*Read-only file system.*choose another --out"):
        RunFolder.open_or_create(tmp_path / "out", "{}", {})


def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_reported(tmp_path):
    with_two_checkpoints(tmp_path)
    (tmp_path / "round-00002/facts.json").unlink()
    (tmp_path / "round-00002/facts.json").mkdir()
    found = load_newest(tmp_path)
    assert found.round == 1
    assert "cannot be read" in found.skipped[0] or "damaged" in found.skipped[0]
