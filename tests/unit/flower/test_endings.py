"""However a program that started a federation ends, its processes and its private keys do not stay behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ubsmoe.engines.flower.endings import UNTOUCHED, clear_leftovers, owned_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")

OWNER = """
import subprocess, sys, time
from ubsmoe.engines.flower.endings import FOLDER, HOME, ended_in_order, owned_folder
with ended_in_order(), owned_folder() as folder:
    (folder / "node-0").write_text("private key")
    keep = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"]
    for name, value in ((FOLDER, folder), (HOME, folder / "run" / ".flwr")):
        subprocess.Popen(keep, env={name: str(value)}, start_new_session=True)
    print(folder, flush=True)
    try:
        for _ in range(3000):  # a signal just before a sleep begins is handled when it ends
            time.sleep(0.1)
    finally:
        print("cleaning", flush=True)
        time.sleep(0.3)
"""


def processes_of(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"={folder}".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


class Owner:
    """A process that owns a folder with a key and two processes."""

    def __init__(self, temporary: Path, **how: object) -> None:
        environment = {**os.environ, "TMPDIR": str(temporary)}
        command = [sys.executable, "-c", OWNER]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload]
        self.folder = Path(self.process.stdout.readline().strip())
        end = time.monotonic() + 30
        while len(processes_of(self.folder)) < 2 and time.monotonic() < end:
            time.sleep(0.02)

    def end(self, *numbers: int) -> int:
        for number in numbers:
            self.process.send_signal(number)
            if len(numbers) > 1:
                self.process.stdout.readline()
        code = int(self.process.wait(60))
        self.process.stdout.close()
        return code


ENDING = [*sorted(one for one in signal.valid_signals() - UNTOUCHED if one < signal.SIGRTMIN), signal.SIGRTMIN + 5]


@pytest.mark.parametrize("number", ENDING, ids=str)
def test_no_signal_that_can_be_caught_leaves_a_process_or_a_key(number: int, tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    assert len(processes_of(owner.folder)) == 2 and (owner.folder / "node-0").exists()
    owner.end(number)
    assert not processes_of(owner.folder) and not list(tmp_path.iterdir())


def test_a_second_signal_does_not_interrupt_what_cleans_up(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.end(signal.SIGTERM, signal.SIGINT)
    assert not processes_of(owner.folder) and not list(tmp_path.iterdir())


def test_under_nohup_a_hangup_ends_nothing(tmp_path: Path) -> None:
    owner = Owner(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    owner.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert owner.process.poll() is None and len(processes_of(owner.folder)) == 2
    owner.end(signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_the_next_start_clears_what_a_killed_one_left_and_nothing_of_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, running = Owner(tmp_path), Owner(tmp_path)
    killed.end(signal.SIGKILL)
    assert len(processes_of(killed.folder)) == 2 and killed.folder.exists()
    (tmp_path / "ubsmoe-somebody-elses").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    clear_leftovers()
    assert not processes_of(killed.folder) and not killed.folder.exists()
    assert len(processes_of(running.folder)) == 2 and (tmp_path / "ubsmoe-somebody-elses").exists()
    with owned_folder() as own:
        assert own.parent == tmp_path and own.stat().st_mode & 0o077 == 0
    assert running.end(signal.SIGINT) and not own.exists()
