"""The resident worker: the same bits as in process, one base for many messages, and nobody else's to use."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.client.node import node_of
from ubsmoe.config import RunSettings, parse_run
from ubsmoe.engines.flower import resident as worker
from ubsmoe.messages import Task
from ubsmoe.server.federation import build_server
from ubsmoe.server.start import start_state
from ubsmoe.wire.codec import decode_announcements, decode_update, encode_task
from ubsmoe.wire.packed import Packed

IDENTITY_KEYS = {"partition-id": 1, "num-partitions": 4}
NOTHING = Packed(b"", b"")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short name, as sockets need; every worker in it ends with the test."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="u-") as name:
        monkeypatch.setenv(worker.FOLDER, name)
        yield Path(name)
        worker.stop_residents(Path(name))


@pytest.fixture
def settings(tiny_run: dict[str, Any]) -> RunSettings:
    return parse_run(tiny_run | {"threads": 1})


def process_of(place: Path) -> int:
    """The worker's process id, as the system tells who listens."""
    import struct

    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(place))
        return int(struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def started(folder: Path, settings: RunSettings, idle_seconds: float = 60) -> Path:
    """A worker that has greeted and been asked nothing, which costs no torch."""
    place = folder / "some.sock"
    with worker.connected(place, settings, idle_seconds):
        return place


def test_a_worker_answers_as_the_node_itself_and_stays(folder: Path, settings: RunSettings) -> None:
    server = build_server(settings)
    announced = decode_announcements(worker.ask("announce", settings, IDENTITY_KEYS, NOTHING, 60))
    assert announced == node_of(settings, IDENTITY_KEYS).announce()
    (place,) = folder.glob("*.sock")
    first = process_of(place)

    from ubsmoe.server.federation import assign_tier

    profile = assign_tier(server, announced[0])
    payload = server.method.dispatch(start_state(server), profile)
    task = encode_task(Task(1, profile, payload, "run", server.base_sha256))
    there = decode_update(worker.ask("train", settings, IDENTITY_KEYS, task, 60), 1 << 20, payload)
    here = decode_update(node_of(settings, IDENTITY_KEYS).answer("train", task), 1 << 20, payload)
    assert (there.loss, there.tokens, there.assignments, there.base) == (
        here.loss,
        here.tokens,
        here.assignments,
        here.base,
    )
    assert there.adapters.keys() == here.adapters.keys() and torch.equal(there.expert_tokens, here.expert_tokens)
    assert all(torch.equal(value, here.adapters[name]) for name, value in there.adapters.items())

    other = {"partition-id": 0, "num-partitions": 4}
    with pytest.raises(worker.Refused, match="'client-1' is not on this machine, which has client-0"):
        worker.ask("train", settings, other, task, 60)
    assert process_of(place) == first, "one worker serves all nodes of a run file"
    assert place.stat().st_mode & 0o777 == 0o600


def test_an_idle_worker_ends_and_leaves_nothing(folder: Path, settings: RunSettings) -> None:
    place = started(folder, settings, 0.2)
    for _ in range(600):
        if not place.exists():
            break
        time.sleep(0.1)
    assert not place.exists()


def test_what_a_killed_worker_left_is_replaced(folder: Path, settings: RunSettings) -> None:
    place = started(folder, settings)
    first = process_of(place)
    os.kill(first, signal.SIGKILL)
    while True:  # the socket goes with its process, the file stays
        try:
            process_of(place)
        except ConnectionRefusedError:
            break
    assert place.exists()
    started(folder, settings)
    assert process_of(place) != first


def test_one_that_listens_and_never_speaks_is_not_waited_for(
    folder: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "HELLO_SECONDS", 0.1)
    place = folder / "mute.sock"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(place))
        mute.listen()
        with pytest.raises(TimeoutError), worker.connected(place, settings, 60):
            pass


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o702])
def test_a_folder_that_others_can_enter_is_not_used(mode: int, folder: Path, settings: RunSettings) -> None:
    folder.chmod(mode)
    with pytest.raises(worker.Unavailable, match="only this user can enter"):
        worker.ask("announce", settings, IDENTITY_KEYS, NOTHING, 60)
    folder.chmod(0o700)
    assert not list(folder.iterdir())


def test_a_link_in_the_folders_place_is_not_used(
    folder: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    monkeypatch.setenv(worker.FOLDER, str(folder / "link"))
    with pytest.raises(worker.Unavailable):
        worker.own_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user to try")
def test_another_user_cannot_ask(folder: Path, settings: RunSettings) -> None:
    place = started(folder, settings)
    code = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.settimeout(5)\n"
        "try: s.connect(sys.argv[1]); print('in:', s.recv(16))\n"
        "except OSError as error: print(type(error).__name__)"
    )
    attempt = [sys.executable, "-c", code, str(place)]
    assert subprocess.run(attempt, capture_output=True, text=True).stdout == "PermissionError\n"
    folder.chmod(0o777)  # even with the door open the worker asks the system who is there
    place.chmod(0o777)
    assert subprocess.run(attempt, capture_output=True, text=True).stdout == "in: b''\n"


def test_whoever_passes_bytes_on_brings_no_torch() -> None:
    code = "import ubsmoe.engines.flower.client, sys; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", "import json;" + code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
