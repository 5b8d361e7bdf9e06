"""The same run gives the same bits: twice, after a stop or a kill, and in any number of processes, with all of ACTING acting."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.config import parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine, process_pool, score_in
from ubsmoe.engines.simulated import as_simulated
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.run import run
from ubsmoe.storage.client_memory import ClientMemory
from ubsmoe.storage.runfolder import RunFolder

COMMAND = [sys.executable, "-c", "from ubsmoe.cli import main; main()", "run"]


UNSCORED = {"evaluate.before": False, "evaluate.after": False}
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)]


class Stopped(Exception):
    """The run was stopped here."""


def carry_out(federation: Federation, folder: Path, workers: int = 1, stop_in: int | None = None) -> str:
    """The adapter's hash. `stop_in` stops the run in that round, when its first update has come."""
    settings = federation.settings
    federation = replace(federation, memory=ClientMemory(folder / "clients", settings.keep_checkpoints + 1))

    def report(event: str, round: int, fields: dict[str, Any]) -> None:
        if event == "client" and round == stop_in:
            raise Stopped

    with (
        process_pool(federation, workers) as pool,
        RunFolder.open_or_create(folder, to_json(settings)) as opened,
    ):
        engine = LocalEngine(federation.trainer, federation.examples, federation.clients, pool=pool)
        score_all = partial(score_in, pool) if pool else None
        return str(run(federation, opened, as_simulated(engine, federation), report, score_all)["adapter_sha256"])


def stopped_and_resumed(federation: Federation, folder: Path, workers: int) -> str:
    with suppress(Stopped):
        carry_out(federation, folder, workers, stop_in=3)
    return carry_out(federation, folder, workers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["fedavg", "ubsmoe"])
def test_whole_resumed_and_in_two_and_three_processes_a_run_gives_one_adapter(
    method: str, dtype: str, acting_run: dict[str, Any], tmp_path: Path
) -> None:
    """With clients that drop out, which leaves another sum in every round."""
    silent = {"simulation.dropout": 0.35, "model.dtype": dtype, "method.name": method, **UNSCORED}
    federation = build_federation(parse_run(with_overrides(acting_run, silent)))
    whole = carry_out(federation, tmp_path / "whole")
    events = (tmp_path / "whole" / "events.jsonl").read_text()
    assert '"stage": "training", "reason": "no answer"' in events, "nobody dropped out, so this test would see nothing"
    assert stopped_and_resumed(federation, tmp_path / "resumed", 1) == whole
    assert carry_out(federation, tmp_path / "two", workers=2) == whole
    assert stopped_and_resumed(federation, tmp_path / "three", 3) == whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fit", [{"slices": 2}, pytest.param({"fit": "clients"}, marks=pytest.mark.thorough)], ids=str)
def test_a_compensated_run_gives_one_adapter_too(
    fit: dict[str, Any], dtype: str, acting_run: dict[str, Any], tmp_path: Path
) -> None:
    """Fitted anew before every round, in slices or by the clients' sums, with elastic budgets and gradient checkpointing."""
    changes = {
        "model.dtype": dtype,
        "method.name": "ubsmoe",
        "method.compensation": {"rank": 4, "tokens": 64, "every": 1, **fit},
        "tiers.elastic_share": 0.5,
        "train.gradient_checkpointing": True,
        **UNSCORED,
    }
    federation = build_federation(parse_run(with_overrides(acting_run, changes)))
    whole = carry_out(federation, tmp_path / "whole")
    assert '"explained"' in (tmp_path / "whole" / "events.jsonl").read_text()
    assert stopped_and_resumed(federation, tmp_path / "resumed", 1) == whole
    assert carry_out(federation, tmp_path / "two", workers=2) == whole
    plain = build_federation(parse_run(with_overrides(acting_run, {**changes, "method.compensation": False})))
    assert carry_out(plain, tmp_path / "plain") != whole


def test_what_clients_keep_is_part_of_the_run(acting_run: dict[str, Any], tmp_path: Path) -> None:
    """SCAFFOLD: clients that sit rounds out, one stopped in the middle of a round that some of them have done already."""
    changes = {"method.name": "scaffold", "clients.per_round": 3, "simulation.dropout": 0.2, **UNSCORED}
    federation = build_federation(parse_run(with_overrides(acting_run, changes)))
    whole = carry_out(federation, tmp_path / "whole")
    assert stopped_and_resumed(federation, tmp_path / "resumed", 1) == whole
    assert stopped_and_resumed(federation, tmp_path / "two", 2) == whole
    assert any(len(list(client.iterdir())) > 1 for client in (tmp_path / "whole" / "clients").iterdir())
    with suppress(Stopped):
        carry_out(federation, tmp_path / "lost", stop_in=3)
    shutil.rmtree(tmp_path / "lost" / "clients")
    assert carry_out(federation, tmp_path / "lost") != whole


WITHOUT: list[dict[str, Any]] = [
    {"train.clip_norm": None},
    {"train.weight_decay": 0.0},
    {"train.gradient_accumulation": 1},
    {"simulation.dropout": 0.0},
    {"adapter.router": "frozen"},
    {"adapter.attention": "frozen"},
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_acts_in_the_runs_that_are_compared(
    dtype: str, acting_run: dict[str, Any], tmp_path: Path
) -> None:
    common = {"model.dtype": dtype, "simulation.dropout": 0.35, **UNSCORED}
    runs = [parse_run(with_overrides(acting_run, common | {"train.rounds": 2} | more)) for more in [{}, *WITHOUT]]
    hashes = {carry_out(build_federation(one), tmp_path / str(i)) for i, one in enumerate(runs)}
    assert len(hashes) == len(runs)


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
    method: dict, workers: int, acting_run: dict, write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    train = acting_run["train"] | {"rounds": 4, "local_steps": 3}
    run_file = write_toml(acting_run | {"method": method, "train": train})
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
