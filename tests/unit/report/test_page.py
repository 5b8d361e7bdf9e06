"""The report's text: self-contained, complete, safe against what settings may hold. What a browser makes of it: tests/e2e."""

import json
import re

import pytest

from drawn_runs import write_run
from ubsmoe.config import parse_run
from ubsmoe.plan.tiers import run_costs
from ubsmoe.report import charts
from ubsmoe.report.page import report_html
from ubsmoe.report.series import read_series
from ubsmoe.report.tables import accuracy_interval, short_commit


def build(runs) -> str:
    return report_html(runs, [[c.as_dict() for c in run_costs(parse_run(one.record.config))] for one in runs])


def data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)[1])


def test_the_page_is_one_file_below_six_megabytes_with_every_chart(tmp_path) -> None:
    page = build(read_series([write_run(tmp_path / "run")]))
    assert len(page.encode()) < 6e6 and not re.search(r"\{\{|\{%", page[: page.index("<script>")])
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?!data:)', page)
    wanted = {"loss", "accuracy", *(f"cost-{unit}" for unit in charts.COSTS), "entropy", "gini", "phi", "partition-1"}
    assert {chart["id"] for chart in data(page)["charts"]} == wanted
    assert all(f'id="{name}" role="img"' in page for name in wanted)
    assert "&lt;other&gt;" not in page[page.index('id="charts"') :] and "<other>" not in page


def test_each_different_split_has_a_chart_that_says_whose_it_is(tmp_path) -> None:
    one, alike, other = (
        write_run(tmp_path / name, name, seed) for name, seed in (("fedavg", 0), ("flora", 0), ("ubsmoe", 1))
    )
    first, second = charts.partitions(read_series([one, alike, other]))
    assert (first.id, first.title) == ("partition-1", "Who holds what in 2 runs with seed 0")
    assert (second.id, second.title) == ("partition-2", "Who holds what in ubsmoe, seed 1")
    assert first.data[0]["y"] == [30] * 4 and second.data[0]["y"] == [31] * 4
    (alone,) = charts.partitions(read_series([other]))
    assert alone.title == "Who holds what"


def test_heat_maps_hold_every_rounds_shares(tmp_path) -> None:
    runs = read_series([write_run(tmp_path / "a"), write_run(tmp_path / "b", "fedavg", 1, phi=False)])
    first, second = data(build(runs))["experts"]
    assert first["rounds"] == [1, 2, 3] and len(first["use"][2]) == 4
    assert all(sum(layer) == pytest.approx(1, abs=2e-3) for layer in first["use"][2])
    assert first["phi"] and second["phi"] is None


def test_a_long_run_is_thinned_but_keeps_its_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(charts, "MOST_HEAT_CELLS", 2 * 2 * 4 * 32)
    (run,) = read_series([write_run(tmp_path / "run")])
    assert charts.heat_maps([run])[0]["rounds"] == [1, 3]


def test_intervals_are_students_over_seeds_and_wilsons_over_questions() -> None:
    assert accuracy_interval([0.5, 0.7], 10) == pytest.approx(
        (0.6, 0.0, 1.0)
    )  # t of one degree: 12.7 x 0.1, cut to [0, 1]
    mean, low, high = accuracy_interval([0.2], 50)  # centre (10 + z^2/2) / (50 + z^2), z = 1.96
    assert mean == 0.2 and (low + high) / 2 == pytest.approx((10 + 1.9208) / 53.8415, abs=1e-4)


def test_an_unfinished_run_is_told_as_one(tmp_path) -> None:
    assert "not finished" in build(read_series([write_run(tmp_path / "run", finished=False)]))


def test_drops_budgets_and_real_bytes_are_told(tmp_path) -> None:
    page = build(read_series([write_run(tmp_path / "run")]))
    assert page.count("answered &lt; too late") == 3 and "answered < too late" not in page
    never = re.search(r"<tr><td>client-4</td>.*?</tr>", page)[0]
    assert '<td data-value="0">0 of 3</td><td data-value="3.0">3</td>' in never
    points = next(chart for chart in data(page)["charts"] if chart["id"] == "cost-MB")["data"][0]
    assert points["x"] == pytest.approx([0.11, 0.13, 0.15, 0.17])  # 90 kB down and 10 kB per expert up


def test_a_commit_is_cut_but_keeps_its_mark() -> None:
    assert short_commit("0123456789abcdef+") == "0123456789ab+" and short_commit("–") == "–"
