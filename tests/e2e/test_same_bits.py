"""The same run gives the same bits: twice, after a kill, and whatever the data order of the file system."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from ubsmoe.cli import main; main()", "run"]


def start(run_file: Path, out: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, str(run_file), "--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE)


def finish(run_file: Path, out: Path, workers: int = 1) -> str:
    process = start(run_file, out, workers)
    process.communicate(timeout=300)
    assert process.returncode == 0
    return str(json.loads((out / "summary.json").read_text())["adapter_sha256"])


@pytest.mark.parametrize(
    ("method", "workers"),
    [({"name": "ubsmoe", "pg": {"mode": "sampled"}}, 1), ({"name": "fedavg"}, 2)],
    ids=["ubsmoe", "fedavg, 2 workers"],
)
def test_twice_and_after_kill_9_the_adapter_has_the_same_hash(
    method: dict, workers: int, tiny_run: dict, write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    run_file = write_toml(
        {**tiny_run, "threads": 1, "method": method, "train": {"rounds": 4, "local_steps": 3, "batch_size": 4}}
    )
    reference = finish(run_file, tmp_path / "whole")
    assert finish(run_file, tmp_path / "again") == reference

    out = tmp_path / "killed"
    process = start(run_file, out, workers)
    while not (out / "checkpoints" / "round-00002").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # its workers hold the same pipe: they end with it
    assert not (out / "summary.json").exists(), "the run ended before it could be killed"
    assert finish(run_file, out, workers) == reference
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2, 3, 4]
    assert any(event["event"] == "resumed" for event in events)
