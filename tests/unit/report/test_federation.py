"""What `ubsmoe flower status` tells from a run's events."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drawn_runs import write_run
from e2e.test_cli import ubsmoe as command
from ubsmoe.report.federation import follow, in_a_line, seconds_left, status_of, status_table, write_prometheus
from ubsmoe.storage.ending import is_running
from ubsmoe.storage.events import EventLog
from ubsmoe.storage.runfolder import EVENTS, RunFolder, read_run


def deployed(folder: Path, finished: bool = False) -> Path:
    write_run(folder, finished=finished)
    places = [
        {"client": f"client-{i}", "node": 70 + i, "online": i != 2, "tier": i, "examples": 40 + i} for i in range(5)
    ]
    with EventLog(folder / EVENTS) as log:
        log.append("nodes", None, nodes=places)
    return folder


def test_a_status_tells_nodes_work_and_drops(tmp_path: Path) -> None:
    status = status_of(read_run(deployed(tmp_path / "run")), [])
    first, _, away, _, never = status.clients
    assert (first.client, first.node, first.online, first.tier, first.last_round) == ("client-0", "70", True, 1, 3)
    assert (first.counted, first.dropped, first.seconds, away.online) == (3, 0, 0.2, False)
    assert (never.counted, never.dropped, never.why) == (0, 3, "round 3, deadline: answered < too late")
    assert in_a_line(status).startswith("round 3 of 3, 4 of 5 clients online, loss 0.3333, accuracy 77.5%, about ")
    console = Console(width=100, record=True)
    console.print(status_table(status, 100))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100 and any("client-2" in line and "away" in line for line in lines)
    odd = replace(
        status, clients=[replace(never, why="[/tmp/x] is [bold]full[/bold]")]
    )  # markup to rich, a reason to us
    wide = Console(width=120, record=True)
    wide.print(status_table(odd, 120))
    assert "[/tmp/x] is [bold]full[/bold]" in wide.export_text()


def test_time_left_is_the_mean_of_the_last_five_rounds() -> None:
    ends = [0, 100, 110, 120, 130, 140, 150]
    events = [
        {"event": "round", "round": i + 1, "time": f"2026-01-01T00:{s // 60:02}:{s % 60:02}+00:00"}
        for i, s in enumerate(ends)
    ]
    assert seconds_left(events, 9) == 2 * 10
    assert seconds_left(events[:1], 9) == 0


def test_following_shows_every_change_until_the_end(tmp_path: Path) -> None:
    running = status_of(read_run(deployed(tmp_path / "a")), [])
    ended = status_of(read_run(deployed(tmp_path / "b", finished=True)), [])
    looks, shown = iter([running, running, ended]), []
    assert follow(lambda: next(looks), shown.append, lambda: None) == ended
    assert shown == [running, ended]


def test_following_waits_for_a_server_and_ends_when_it_is_gone(tmp_path: Path) -> None:
    record = read_run(deployed(tmp_path / "run"))
    idle, running = status_of(record, [], running=False), status_of(record, [])
    looks, shown = iter([idle, idle, running, idle, running]), []
    assert follow(lambda: next(looks), shown.append, lambda: None) == idle
    assert shown == [idle, running, idle]
    assert in_a_line(idle).endswith(", stopped") and "left" in in_a_line(running)


def test_a_run_is_running_while_a_process_holds_its_folder(tmp_path: Path) -> None:
    run = deployed(tmp_path / "run")
    assert not is_running(run)
    with RunFolder.open_or_create(run, (run / "config.json").read_text()):
        assert is_running(run) and is_running(run)
    assert not is_running(run) and not is_running(tmp_path / "nowhere")


def test_the_verb_finds_the_run_of_an_app_and_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    app, run = tmp_path / "app", tmp_path / "out"
    app.mkdir()
    assert command(monkeypatch, "flower", "status", app) == 2
    (app / "pyproject.toml").write_text(f'[tool.flwr.app.config]\nout = "{run}"\n')
    assert command(monkeypatch, "flower", "status", app) == 2
    assert f"{run} holds no run yet" in capsys.readouterr().err
    with RunFolder.open_or_create(deployed(run), (run / "config.json").read_text()):
        assert command(monkeypatch, "flower", "status", app, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["round"] == 3 and json.loads(line)["clients"][0]["planned_bytes"] > 0


def test_a_script_learns_that_a_run_failed_from_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command(monkeypatch, "flower", "status", deployed(tmp_path / "run")) == 2
    said = capsys.readouterr()
    assert ", stopped" in said.out and "was stopped without a result" in said.err
    assert command(monkeypatch, "flower", "status", deployed(tmp_path / "ended", finished=True), "--watch") == 0


def test_watching_before_there_is_a_run_says_so_and_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "out"
    (tmp_path / "pyproject.toml").write_text(f'[tool.flwr.app.config]\nout = "{run}"\n')
    monkeypatch.setattr(time, "sleep", lambda _: deployed(run, finished=True))
    assert command(monkeypatch, "flower", "status", tmp_path, "--watch") == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"{run} holds no run yet;") and "waits for it" in said.err
    assert "round 3 of 3" in said.out


def test_prometheus_gets_gauges_of_run_and_clients(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="needs the extra prometheus")
    write_prometheus(status_of(read_run(deployed(tmp_path / "run")), []), tmp_path / "ubsmoe.prom")
    said = (tmp_path / "ubsmoe.prom").read_text()
    assert "ubsmoe_round 3.0" in said and 'ubsmoe_client_online{client="client-2"} 0.0' in said
