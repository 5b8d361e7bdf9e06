"""The verbs that show runs, as a user meets them."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from drawn_runs import ROUNDS, write_run
from e2e.test_cli import ubsmoe
from ubsmoe.storage.runfolder import read_run
from ubsmoe.study import lab


def test_figures_are_named_and_hold_the_runs_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", "fedavg", phi=False)
    assert ubsmoe(monkeypatch, "study", "figures", run, "--out", tmp_path / "figures") == 0
    kinds = ("fig2_entropy", "fig3_flops", "fig4_gini", "fig5_layer_entropy")
    wanted = {str(tmp_path / "figures" / f"{kind}{suffix}") for kind in kinds for suffix in (".svg", ".png", ".csv")}
    assert set(capsys.readouterr().out.split()) == wanted
    with (tmp_path / "figures" / "fig5_layer_entropy.csv").open(encoding="utf-8") as file:
        drawn = [float(row["entropy"]) for row in csv.DictReader(file)]
    assert drawn == pytest.approx(read_run(run).rounds[-1]["entropy"])


def test_a_report_shows_the_last_scores_and_the_noted_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    run, out = write_run(tmp_path / "run", "fedavg"), tmp_path / "new" / "report.html"
    costs = [{"tier": 0, "budget": 0.25, "top_k": 2, "rank": 8, "train_flops_per_token": 5_000_000, "relative_to_top": 0.4,
              "upload_bytes": 1, "download_bytes": 1, "peak_memory_bytes": 7_000_000, "forward_flops_per_token": 1}]  # fmt: skip
    (run / "costs.json").write_text(json.dumps(costs))
    assert ubsmoe(monkeypatch, "report", run, "--out", out) == 0
    page = out.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{out}\n"
    assert page.startswith("<!doctype html>") and page.count('<td data-value="5.0">5.00</td>') == 1
    assert re.findall('<strong class="accuracy">(.*?)</strong>', page) == ["70.0", "75.0", "80.0", "85.0"]
    assert ubsmoe(monkeypatch, "report", run, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert ubsmoe(monkeypatch, "report", run, "--out", out, "--overwrite") == 0


def test_watching_prints_every_event_of_a_run_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", "fedavg", phi=False)
    assert ubsmoe(monkeypatch, "report", run, "--watch") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if " loss " in line and "entropy" in line] == [
        f"round {number}/{ROUNDS}" for number in range(1, ROUNDS + 1)
    ]
    assert sum(line.startswith("before  tier") for line in lines) == 4
    assert ubsmoe(monkeypatch, "report", run, run, "--watch") == 2
    assert "--watch follows one run, got 2 folders" in capsys.readouterr().err


def test_the_lab_prints_and_writes_every_floor(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(lab, "STEPS", 20)
    assert ubsmoe(monkeypatch, "study", "bias-floor", "--seeds", "1", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    with (tmp_path / "bias_floor.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 8 * len(lab.SIGNALS) and (tmp_path / "bias_floor.svg").exists()
    for name in lab.SIGNALS:
        own = [row for row in rows if row["signal"] == name and row["forward"] == "dense"]
        measured = " | ".join(f"{float(row['measured']):.4f}" for row in sorted(own, key=lambda row: int(row["top_k"])))
        assert f"| {name} | {measured} |" in printed


@pytest.mark.parametrize("verb", ["study figures", "report", "report --watch"])
def test_a_folder_without_a_run_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, verb: str
) -> None:
    assert ubsmoe(monkeypatch, *verb.split(), tmp_path) == 2
    assert "run folder" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("ubsmoe.errors.find_spec", lambda name: None)
    assert ubsmoe(monkeypatch, "study", "figures", tmp_path) == 2
    assert 'this needs matplotlib: pip install "ubsmoe[report]"' in capsys.readouterr().err


def test_the_probe_writes_and_prints_cosines_of_every_kept_round(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, tiny_run: dict, write_toml: Any
) -> None:
    run = tmp_path / "run"
    assert ubsmoe(monkeypatch, "run", write_toml(tiny_run), "--out", run, "--set", "keep_checkpoints=2") == 0
    capsys.readouterr()
    assert ubsmoe(monkeypatch, "study", "alignment", run, "--out", tmp_path / "probe") == 0
    printed = capsys.readouterr().out
    assert "client_mean" in printed and "another expert" in printed and "alignment.svg" in printed
    with (tmp_path / "probe" / "alignment.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["round"] for row in rows} == {"1", "2"} and {row["tier"] for row in rows} == {"1", "2", "3", "4"}
    # a pseudo-gradient that only rescales has the direction of what it rescales; another expert's has nothing to do with it
    cosines = {row["signal"]: [] for row in rows}
    for row in rows:
        if row["experts"] == "some":
            cosines[row["signal"]].append(float(row["cosine"]))
    exact, foreign = cosines["sampled 0.5"], cosines["another expert"]
    assert sum(exact) / len(exact) > 0.5 > abs(sum(foreign) / len(foreign))
