"""What a federation on loopback has started ends with it."""

import os
import sys
import time
from pathlib import Path

import pytest

from ubsmoe.engines.flower.endings import descendants, kill
from ubsmoe.engines.flower.localhost import _process


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_process_is_ended_with_what_it_left_running_in_sessions_of_their_own(tmp_path: Path) -> None:
    script = "trap 'exit 0' TERM; setsid sh -c 'sleep 300 & sleep 300' & wait"
    with _process("sh", ["-c", script], os.environ, tmp_path, tmp_path / "log") as process:
        end = time.monotonic() + 20
        while len(family := descendants(process.pid)) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        assert len(family) == 3 and all(map(is_there, family))
    while any(map(is_there, family)) and time.monotonic() < end:
        time.sleep(0.02)
    assert process.returncode == 0 and not any(map(is_there, family))


def test_who_is_gone_already_is_no_error() -> None:
    kill([2**22 + 1])
    assert descendants(2**22 + 1) == []
