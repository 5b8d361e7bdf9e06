"""What a federation on loopback has started ends with it."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.engines.flower.endings import descendants, kill
from ubsmoe.engines.flower.programs import SUPERLINK, FlowerFailure, Programs, owned, request_restart, started, stop


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_process_is_ended_with_what_it_left_running_in_sessions_of_their_own(tmp_path: Path) -> None:
    script = "trap 'exit 0' TERM; setsid sh -c 'sleep 300 & sleep 300' & wait"
    process = started(["sh", "-c", script], os.environ, tmp_path, tmp_path / "log")
    end = time.monotonic() + 20
    while len(family := descendants(process.pid)) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(family) == 3 and all(map(is_there, family))
    stop(process)
    while any(map(is_there, family)) and time.monotonic() < end:
        time.sleep(0.02)
    assert process.returncode == 0 and not any(map(is_there, family))


def test_who_is_gone_already_is_no_error() -> None:
    kill([2**22 + 1])
    assert descendants(2**22 + 1) == []


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[tuple[Programs, list[str], Path]]:
    """Two programs that do nothing, looked after, in the home of an app; and what is said of them."""
    said, home = list[str](), tmp_path / "app" / ".flwr"
    home.mkdir(parents=True)
    programs = Programs(home, tmp_path / "app", os.environ, said.append)
    for name in (SUPERLINK, "node-0"):
        (home / f"{name}.pub").touch()
        programs.start(name, "sh", ["-c", "echo begun; exec sleep 300"])
    yield programs, said, tmp_path / "app"
    programs.stop()


def killed(programs: Programs, name: str) -> None:
    programs.running[name].send_signal(signal.SIGKILL)
    programs.running[name].wait()


def test_the_death_of_a_node_is_said_once_and_a_restart_brings_it_back(sleepers: Any) -> None:
    programs, said, app = sleepers
    killed(programs, "node-0")
    for _ in range(2):
        programs.look_after()
    assert said == [
        f"node-0 was killed (SIGKILL); its log: {app}/.flwr/node-0.log. `ubsmoe flower restart {app} node-0` starts it again"
    ]
    with closing(owned(app / ".flwr")), ThreadPoolExecutor(1) as other:
        for _ in range(2):  # one that has ended, and one that runs
            before, asked = programs.running["node-0"], other.submit(request_restart, app, "node-0", 20)
            while not asked.done():
                programs.look_after()
            asked.result()
            assert before.poll() is not None and programs.running["node-0"].poll() is None
            assert said[-1] == "node-0 is started again"
    killed(programs, "node-0")
    programs.look_after()
    assert "was killed" in said[-1] and len(said) == 4


def test_a_node_that_comes_back_too_early_is_started_until_its_server_takes_it(sleepers: Any) -> None:
    """A stand-in that is refused at its first two starts."""
    programs, said, app = sleepers
    (app / ".flwr" / "node-1.pub").touch()
    starts = app / "starts"
    starts.touch()
    refused = 'echo refused >> "$0"; echo "[code: 2004] Failed to activate SuperNode."; exit 1'
    twice = f'if [ $(wc -l < "$0") -lt 2 ]; then {refused}; fi; exec sleep 300'
    programs.start("node-1", "sh", ["-c", twice, str(starts)])
    programs.running["node-1"].wait(10)
    programs.look_after()
    assert "has ended with exit code 1" in said[-1] and len(starts.read_text().split()) == 1  # nobody asked for more
    with closing(owned(app / ".flwr")), ThreadPoolExecutor(1) as other:
        asked = other.submit(request_restart, app, "node-1", 20)
        while not asked.done():
            programs.look_after()
    end = time.monotonic() + 20
    while time.monotonic() < end and (len(said) < 3 or programs.running["node-1"].poll() is not None):
        programs.look_after()
    assert said[-2] == "node-1 is started again" and "until the server notices that it was away" in said[-1]
    assert len(starts.read_text().split()) == 2 and programs.running["node-1"].poll() is None


def test_a_restart_that_nobody_can_carry_out_is_refused_and_leaves_nothing(sleepers: Any) -> None:
    _, _, app = sleepers
    with pytest.raises(FlowerFailure, match=r"no `ubsmoe flower up .*app` is running, so nobody can start node-0"):
        request_restart(app, "node-0")
    with pytest.raises(FlowerFailure, match=r"'node-7' is no node of .*; its nodes are: node-0"):
        request_restart(app, "node-7")
    with closing(owned(app / ".flwr")):
        with pytest.raises(FlowerFailure, match="is running already"):
            owned(app / ".flwr")
        with pytest.raises(FlowerFailure, match=r"did not start node-0 within 0.2 s"):
            request_restart(app, "node-0", 0.2)
    assert not list((app / ".flwr").glob("*.restart"))


def test_without_its_superlink_a_federation_ends(sleepers: Any) -> None:
    programs, _, _ = sleepers
    killed(programs, SUPERLINK)
    with pytest.raises(FlowerFailure, match=r"superlink was killed .SIGKILL.: begun"):
        programs.check()
    with pytest.raises(FlowerFailure, match=r"superlink was killed .* starts a new one"):
        programs.look_after()
