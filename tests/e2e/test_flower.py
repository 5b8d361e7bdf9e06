"""The same run file on Flower's own processes: simulated nodes, and a SuperLink with SuperNodes over TLS."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

UBSMOE = [sys.executable, "-c", "from ubsmoe.cli import main; main()"]


def ubsmoe(*words: object) -> str:
    """What the command printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*UBSMOE, *map(str, words)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def adapter(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["adapter_sha256"])


def processes_of(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and "flower" in line:
            found.append(line)
    return found


def test_one_run_file_gives_one_adapter_here_simulated_and_deployed(
    tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    table = tiny_run | {"threads": 1, "tiers": {"budgets": [0.5, 1.0], "ranks": [1, 2]}}
    run_file, app = write_toml(table), tmp_path / "app"
    ubsmoe("run", run_file, "--out", tmp_path / "here")

    ubsmoe("run", run_file, "--out", tmp_path / "simulated", "--engine", "simulation")
    assert adapter(tmp_path / "simulated") == adapter(tmp_path / "here")

    ubsmoe("flower", "init", app, "--run", run_file)
    log = ubsmoe("flower", "up", app, "--nodes", 2, "--run")
    assert adapter(app / "out") == adapter(tmp_path / "here")
    assert "client-3 is node" in log
    assert not processes_of(tmp_path)
    assert (app / ".flwr").stat().st_mode & 0o077 == 0
    assert (app / ".flwr" / "node-0").stat().st_mode & 0o077 == 0
