"""The verbs that show runs, as a user meets them."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from drawn_runs import ROUNDS, write_run
from e2e.test_cli import ubsmoe
from ubsmoe.study import lab


def test_figures_report_and_watch_read_a_run_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", "fedavg", phi=False)
    assert ubsmoe(monkeypatch, "figures", run, "--out", tmp_path / "figures") == 0
    named = capsys.readouterr().out.split()
    assert len(named) == 12 and all(Path(path).exists() for path in named)
    assert ubsmoe(monkeypatch, "report", run, "--out", tmp_path / "new" / "report.html") == 0
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    capsys.readouterr()
    assert ubsmoe(monkeypatch, "watch", run) == 0
    assert f"round {ROUNDS}/{ROUNDS}" in capsys.readouterr().out


def test_the_lab_prints_and_writes_every_floor(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(lab, "STEPS", 20)
    assert ubsmoe(monkeypatch, "lab", "bias-floor", "--seeds", "1", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in (*lab.SIGNALS, "exact", "bound", "coarse"))
    assert len((tmp_path / "bias_floor.csv").read_text().splitlines()) == 1 + 2 * 8 * len(lab.SIGNALS)
    assert (tmp_path / "bias_floor.svg").exists()


@pytest.mark.parametrize("verb", ["figures", "report", "watch"])
def test_a_folder_without_a_run_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, verb: str
) -> None:
    assert ubsmoe(monkeypatch, verb, tmp_path) == 2
    assert "run folder" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ubsmoe(monkeypatch, "report", tmp_path) == 2
    assert "pip install 'ubsmoe[report]'" in capsys.readouterr().err


def test_the_probe_writes_and_prints_cosines_of_every_kept_round(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, tiny_run: dict, write_toml: Any
) -> None:
    run = tmp_path / "run"
    assert ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", run, "--set", "keep_checkpoints=2") == 0
    capsys.readouterr()
    assert ubsmoe(monkeypatch, "probe", "alignment", run, "--out", tmp_path / "probe") == 0
    printed = capsys.readouterr().out
    assert "client_mean" in printed and "another expert" in printed and "alignment.svg" in printed
    with (tmp_path / "probe" / "alignment.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["round"] for row in rows} == {"1", "2"} and {row["tier"] for row in rows} == {"1", "2", "3", "4"}
    assert all(-1 <= float(row["cosine"]) <= 1 for row in rows)
