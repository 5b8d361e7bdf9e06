"""The resident process: bit-identical answers, one base for many messages, and no other user can ask it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.client.node import Machine
from ubsmoe.config import RunSettings, parse_run, to_json
from ubsmoe.engines.flower import resident
from ubsmoe.messages import Task
from ubsmoe.server.federation import build_server
from ubsmoe.server.start import start_state
from ubsmoe.wire.codec import decode_announcements, decode_update, encode_task
from ubsmoe.wire.packed import MAX_HEADER_BYTES, Packed

IDENTITY = {"partition-id": 1, "num-partitions": 4}
NOTHING = Packed(b"", b"")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short name, as sockets need; every resident in it ends with the test."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="u-") as name:
        monkeypatch.setenv(resident.FOLDER, name)
        yield Path(name)
        resident.stop_residents(Path(name))


@pytest.fixture
def settings(tiny_run: dict[str, Any]) -> RunSettings:
    return parse_run(tiny_run | {"threads": 1})


def process_of(place: Path) -> int:
    """The resident's process id, as the system tells who listens."""
    import struct

    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(place))
        return int(struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def started(folder: Path, settings: RunSettings, idle_seconds: float = 60) -> Path:
    """A resident that was reached and asked nothing, so that it has not imported torch."""
    place = folder / "some.sock"
    with resident.connected(place, settings, idle_seconds):
        return place


def test_a_resident_answers_as_the_node_itself_and_stays(folder: Path, settings: RunSettings) -> None:
    server, node = build_server(settings), Machine(settings).node(IDENTITY)
    announced = decode_announcements(resident.ask("announce", settings, IDENTITY, NOTHING, 60))
    assert announced == node.announce()
    (place,) = folder.glob("*.sock")
    first = process_of(place)

    from ubsmoe.server.federation import assign_tier

    profile = assign_tier(server, announced[0])
    payload = server.method.dispatch(start_state(server), profile)
    task = encode_task(Task(1, profile, payload, "run", server.base_sha256))
    there = decode_update(resident.ask("train", settings, IDENTITY, task, 60), 1 << 20, payload)
    here = decode_update(node.answer("train", task), 1 << 20, payload)
    assert (there.loss, there.tokens, there.assignments, there.base) == (
        here.loss,
        here.tokens,
        here.assignments,
        here.base,
    )
    assert there.adapters.keys() == here.adapters.keys() and torch.equal(there.expert_tokens, here.expert_tokens)
    assert all(torch.equal(value, here.adapters[name]) for name, value in there.adapters.items())

    other = {"partition-id": 0, "num-partitions": 4}
    with pytest.raises(resident.Refused, match="'client-1' is not on this machine, which has client-0"):
        resident.ask("train", settings, other, task, 60)
    assert process_of(place) == first, "one resident serves all nodes of a run file"
    assert {path.stat().st_mode & 0o777 for path in (place, place.with_suffix(".key"))} == {0o600}


def test_an_idle_resident_ends_and_leaves_nothing(folder: Path, settings: RunSettings) -> None:
    place = started(folder, settings, 0.2)
    for _ in range(600):
        if not place.exists():
            break
        time.sleep(0.1)
    assert not place.exists()


def test_what_a_killed_resident_left_is_replaced(folder: Path, settings: RunSettings) -> None:
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
    monkeypatch.setattr(resident, "HELLO_SECONDS", 0.1)
    place = folder / "mute.sock"
    place.with_suffix(".key").write_bytes(b"secret")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(place))
        mute.listen()
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
            resident.connected(place, settings, 60)


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o702])
def test_a_folder_that_others_can_enter_is_not_used(mode: int, folder: Path, settings: RunSettings) -> None:
    folder.chmod(mode)
    with pytest.raises(resident.Unavailable, match="only this user can enter"):
        resident.ask("announce", settings, IDENTITY, NOTHING, 60)
    folder.chmod(0o700)
    assert not list(folder.iterdir())


def test_a_link_in_the_folders_place_is_not_used(
    folder: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    monkeypatch.setenv(resident.FOLDER, str(folder / "link"))
    with pytest.raises(resident.Unavailable):
        resident.own_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user to try")
def test_another_user_cannot_ask(folder: Path, settings: RunSettings) -> None:
    place = started(folder, settings)
    code = (
        "import hmac, os, sys; from multiprocessing.connection import Client\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: Client(sys.argv[1], 'AF_UNIX', b'a guess'); print('in')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "try: open(sys.argv[1].replace('sock', 'key'))\n"
        "except OSError as error: print(type(error).__name__)"
    )

    def attempt() -> list[str]:
        command = [sys.executable, "-c", code, str(place)]
        return subprocess.run(command, capture_output=True, text=True).stdout.split()

    assert attempt() == ["PermissionError", "PermissionError"]
    folder.chmod(0o777)  # even with the door open, nobody else can read the key
    place.chmod(0o777)
    assert attempt() == ["AuthenticationError", "PermissionError"]


def refused(impostor: Listener) -> None:
    with pytest.raises(AuthenticationError):
        impostor.accept()


def test_an_impostor_who_does_not_know_the_key_is_sent_nothing(folder: Path, settings: RunSettings) -> None:
    place = folder / "some.sock"
    place.with_suffix(".key").write_bytes(b"secret")
    with Listener(str(place), "AF_UNIX", authkey=b"a guess") as impostor:
        thread = threading.Thread(target=refused, args=(impostor,))
        thread.start()
        with pytest.raises(AuthenticationError):
            resident.connected(place, settings, 60)
        thread.join()


@pytest.fixture
def served(folder: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A resident in a thread of this process, whose patience is short."""
    monkeypatch.setattr(resident, "HELLO_SECONDS", 0.3)
    place = folder / "some.sock"
    place.with_suffix(".key").write_bytes(b"secret")
    thread = threading.Thread(target=resident.serve, args=(place, settings, 20))
    thread.start()
    while not place.exists():
        time.sleep(0.01)
    yield place
    resident.stop_residents(folder)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("said", [b"", b"\0\0", b"\0\0\0\x10", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff" + b"\x7f" * 8])
def test_peers_that_stall_or_lie_about_sizes_hold_nobody_up_and_are_dropped(
    said: bytes, served: Path, settings: RunSettings
) -> None:
    stalling = [socket.socket(socket.AF_UNIX) for _ in range(100)]  # more than the backlog holds
    for peer in stalling:
        peer.connect(str(served))
        peer.sendall(said)
    with resident.connected(served, settings, 60) as line:
        assert not line.closed
    for peer in stalling:
        peer.settimeout(10)
        while peer.recv(100):  # the challenge, then the end
            pass
        peer.close()


def test_a_message_larger_than_the_cap_is_not_read(served: Path, settings: RunSettings) -> None:
    with resident.connected(served, settings, 60) as line, pytest.raises((EOFError, ConnectionError)):
        line.send_bytes(b"x" * (MAX_HEADER_BYTES + 1))
        line.recv_bytes()


def test_two_that_start_it_at_once_find_the_same_one(folder: Path, settings: RunSettings) -> None:
    place = folder / "some.sock"
    code = (
        "import json, sys; from pathlib import Path\n"
        "from ubsmoe.config import parse_run; from ubsmoe.engines.flower import resident\n"
        "with resident.connected(Path(sys.argv[1]), parse_run(json.loads(sys.argv[2])), 60) as line: print('in')"
    )
    command = [sys.executable, "-c", code, str(place), to_json(settings)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate()[0] for one in both] == ["in\n", "in\n"]
    listening = [line for line in Path("/proc/net/unix").read_text().splitlines() if str(place) in line]
    assert sum(line.split()[3] == "00010000" for line in listening) == 1  # __SO_ACCEPTCON


def test_a_resident_that_dies_of_a_message_is_unavailable(
    folder: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decode_announcements(resident.ask("announce", settings, IDENTITY, NOTHING, 60))
    (place,) = folder.glob("*.sock")
    number = process_of(place)
    os.kill(number, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (number, signal.SIGKILL)).start()
    with pytest.raises(resident.Unavailable):
        resident.ask("announce", settings, IDENTITY, NOTHING, 60)
