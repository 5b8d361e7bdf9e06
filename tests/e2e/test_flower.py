"""The same run file on Flower's own processes: simulated nodes, and a SuperLink with SuperNodes over TLS."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.engines.flower.app import write_app
from ubsmoe.engines.flower.localhost import local_federation
from ubsmoe.engines.flower.programs import flower_command, flower_environment

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


def processes(*words: str) -> list[int]:
    """The numbers of the processes in whose command line all these words stand."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(entry.parent.name))
    return found


def test_one_run_file_gives_one_adapter_here_simulated_and_deployed(
    acting_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    table = acting_run | {"tiers": {"budgets": [0.5, 1.0], "ranks": [1, 2]}}
    table["train"] = table["train"] | {"patience": 1}  # the server holds out what it stops by, and nodes the same
    table["data"] = table["data"] | {"validation_fraction": 0.2}
    run_file, app = write_toml(table), tmp_path / "app"
    ubsmoe("run", run_file, "--out", tmp_path / "here")

    ubsmoe("run", run_file, "--out", tmp_path / "simulated", "--engine", "simulation")
    assert adapter(tmp_path / "simulated") == adapter(tmp_path / "here")

    ubsmoe("flower", "init", app, "--run", run_file)
    log = ubsmoe("flower", "up", app, "--nodes", 2, "--run")
    assert adapter(app / "out") == adapter(tmp_path / "here")
    assert "client-3 is node" in log
    assert not processes(str(tmp_path), "flower")
    assert (app / ".flwr").stat().st_mode & 0o077 == 0
    assert (app / ".flwr" / "node-0").stat().st_mode & 0o077 == 0


@pytest.mark.thorough
def test_secure_aggregation_gives_one_adapter_here_simulated_and_deployed_with_signed_keys(
    tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    """Residents remember nothing of a round: what a client needs between two messages lies in Flower's own state."""
    budgets = {"budgets": [0.5, 1.0], "ranks": [1, 2]}
    train = {**tiny_run["train"], "rounds": 1}  # two signed rounds: tests/unit/flower/test_secure.py
    table = tiny_run | {"threads": 1, "tiers": budgets, "train": train, "secure_aggregation": {"bits": 20}}
    run_file, app = write_toml(table), tmp_path / "app"
    ubsmoe("run", run_file, "--out", tmp_path / "here")
    ubsmoe("run", run_file, "--out", tmp_path / "simulated", "--engine", "simulation")
    ubsmoe("flower", "init", app, "--run", run_file)
    ubsmoe("flower", "up", app, "--nodes", 2, "--run")
    folders = [tmp_path / "simulated", app / "out"]
    assert [adapter(folder) for folder in folders] == [adapter(tmp_path / "here")] * 2
    for folder in folders:
        assert '"dropped"' not in (folder / "events.jsonl").read_text()


OWN = """
from ubsmoe.methods.fedavg import fedavg


def method(shape):
    return fedavg(shape)


def halves(examples, num_clients, seed):
    return [list(range(i, len(examples), num_clients)) for i in range(num_clients)]


def length(text, example):
    return float(len(text))
"""


@pytest.mark.thorough
def test_plug_ins_act_on_a_federation_and_it_goes_on_for_more_rounds(
    tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    """Method, partition and metric of one's own; one round, then another, as two at once in this process."""
    (tmp_path / "mine.py").write_text(OWN)
    data = {**tiny_run["data"], "partition": {"kind": "mine:halves"}}
    table = tiny_run | {"threads": 1, "tiers": {"budgets": [0.5, 1.0], "ranks": [1, 2]}, "data": data}
    run_file = write_toml(table | {"method": {"name": "mine:method"}})
    common = ["--set", 'evaluate.metrics=["mine:length"]', "--set", "evaluate.before=false"]
    there = ["run", run_file, "--out", tmp_path / "there", "--engine", "superlink", *common]
    ubsmoe("run", run_file, "--out", tmp_path / "here", *common)
    ubsmoe(*there, "--set", "train.rounds=1")
    ubsmoe(*there, "--more-rounds", 1)
    assert adapter(tmp_path / "there") == adapter(tmp_path / "here")
    summary = json.loads((tmp_path / "there" / "summary.json").read_text())
    assert summary["rounds"] == 2 and "length" in summary["after"][0]["macro"]["metrics"]
    assert '"dropped"' not in (tmp_path / "there" / "events.jsonl").read_text()


def rounds(folder: Path) -> int:
    """How many a run has done."""
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(json.loads(line)["event"] == "round" for line in lines)


@pytest.mark.thorough
def test_a_server_app_that_was_killed_goes_on_to_the_same_adapter(
    acting_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    """One more federation of servers; the same resume in this process: test_same_bits.py."""
    table = acting_run | {"tiers": {"budgets": [0.5, 1.0], "ranks": [1, 2]}}
    run_file, app = write_toml(table), tmp_path / "app"
    changes = {"train.rounds": 3, "evaluate.max_examples": 1, "model.dtype": "bfloat16"}
    ubsmoe("run", run_file, "--out", tmp_path / "here", *(f"--set={key}={value}" for key, value in changes.items()))
    write_app(run_file, app, changes)
    with local_federation(app, 2, simulated=False) as federation:
        command = flower_command("flwr", "run", str(app), federation.name, "--stream")
        with subprocess.Popen(command, env=flower_environment(federation.home)) as first:
            end = time.monotonic() + 300
            while rounds(app / "out") < 1 and time.monotonic() < end:
                time.sleep(0.1)
            port = (federation.home / "config.toml").read_text().split("127.0.0.1:")[1].split('"')[0]
            (server,) = processes("flwr-serverapp", f"127.0.0.1:{port}")
            os.kill(server, signal.SIGKILL)
            first.kill()
        assert not (app / "out" / "summary.json").exists()
        federation.run()
    assert adapter(app / "out") == adapter(tmp_path / "here")


def left_behind(temporary: Path) -> tuple[list[int], list[Path]]:
    """Processes that have a folder of this place in their environment, and our folders in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"={temporary}/ubsmoe-".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found, list(temporary.glob("ubsmoe-*"))


def started(run_file: Path, out: Path, temporary: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    command = [*UBSMOE, "run", str(run_file), "--out", str(out), "--engine", "superlink"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not ready() and time.monotonic() < end:
        time.sleep(0.1)
    assert ready()


@pytest.mark.thorough
def test_nothing_of_a_superlink_stays_after_a_signal_or_after_the_start_that_follows_kill_9(
    acting_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    table = acting_run | {"tiers": {"budgets": [0.5, 1.0], "ranks": [1, 2]}}
    run_file, out, temporary = write_toml(table), tmp_path / "out", tmp_path / "t"
    temporary.mkdir()

    first = started(run_file, out, temporary)
    until(lambda: rounds(out) >= 1)
    assert len(left_behind(temporary)[0]) > 4  # SuperLink, SuperNodes, the app, a resident
    first.send_signal(signal.SIGHUP)
    said, _ = first.communicate(timeout=100)
    assert first.returncode == 128 + signal.SIGHUP and "the same command goes on from there" in said
    assert left_behind(temporary) == ([], [])

    killed = started(run_file, out, temporary)
    until(lambda: len(left_behind(temporary)[0]) > 4)
    killed.kill()
    killed.communicate(timeout=100)
    processes_left, folders_left = left_behind(temporary)
    assert processes_left and folders_left

    last = started(run_file, out, temporary)
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said
    assert left_behind(temporary) == ([], [])
    ubsmoe("run", run_file, "--out", tmp_path / "here")
    assert adapter(out) == adapter(tmp_path / "here")
