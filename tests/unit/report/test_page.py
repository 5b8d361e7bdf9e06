"""The report's text: self-contained, complete, safe against what settings may hold. What a browser makes of it: tests/e2e."""

import json
import re
from dataclasses import replace

import pytest

from drawn_runs import write_run
from ubsmoe.config import parse_run
from ubsmoe.errors import UserError
from ubsmoe.plan.tiers import run_costs
from ubsmoe.report import charts
from ubsmoe.report.headline import headline
from ubsmoe.report.page import report_html, write_report
from ubsmoe.report.series import alone, read_series
from ubsmoe.report.steps import steps_within_rounds
from ubsmoe.report.tables import accuracy_interval, answer_table, settings_table, short_commit


def build(runs) -> str:
    return report_html(runs, [[c.as_dict() for c in run_costs(parse_run(one.record.config))] for one in runs])


def data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)[1])


def test_the_page_is_one_file_below_two_megabytes_with_every_chart(tmp_path) -> None:
    page = build(read_series([write_run(tmp_path / "run")]))
    assert len(page.encode()) < 2e6 and not re.search(r"\{\{|\{%", page[: page.index("<script>")])
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?!data:)', page)
    wanted = {"loss", "accuracy", *(f"cost-{unit}" for unit in charts.COSTS), "entropy", "gini", "phi", "partition-1"}
    wanted |= {f"steps-{tier}" for tier in (1, 2, 3, 4)}
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


def test_steps_lie_within_their_round_and_are_means_over_a_tiers_clients(tmp_path) -> None:
    (run,) = read_series([write_run(tmp_path / "run")])
    second = {
        **run.record.clients[1],
        "client": "client-9",
        "steps": {**run.record.clients[1]["steps"], "loss": [4, 3]},
    }
    run.record.events.insert(run.record.events.index(run.record.clients[1]), second)
    chart = next(one for one in steps_within_rounds([run]) if one.id == "steps-2")
    loss, norm = chart.data
    assert loss["x"] == norm["x"] == pytest.approx([0.5, 1, 1.5, 2, 2.5, 3], abs=1e-4)
    assert loss["y"] == pytest.approx([3, 2, 1, 0.5, 2 / 3, 1 / 3], abs=1e-4)
    assert norm["y"] == [3, 2, 3, 2, 3, 2] and norm["yaxis"] == "y2"
    assert "learning rate 0.01 to 0.01" not in chart.caption and "learning rate 0.01 to " in chart.caption


def test_steps_are_not_drawn_for_several_runs_nor_without_any(tmp_path) -> None:
    runs = read_series([write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)])
    assert not list(steps_within_rounds(runs))
    for event in runs[0].record.clients:
        event.pop("steps")
    assert not list(steps_within_rounds(runs[:1]))


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


def compared(tmp_path, scores: dict[str, list[float]]):
    """Three seeds of each method that end with these accuracies in tier 1."""
    return read_series(
        [
            write_run(tmp_path / f"{name}-{seed}", name, seed, after=one)
            for name, ends in scores.items()
            for seed, one in enumerate(ends)
        ]
    )


def test_the_first_screen_says_what_a_run_came_to_and_what_it_cost(tmp_path) -> None:
    (run,) = read_series([write_run(tmp_path / "run")])
    first = headline([run], [[c.as_dict() for c in run_costs(parse_run(run.record.config))]])
    assert first.sentence == "ubsmoe: accuracy 27.5 → 77.5 % in 3 rounds, mean over tiers"
    tuned = headline(alone([replace(run, label="ubsmoe(compensation.form=map;pg.mode=self_ipw)")]), [[]])
    assert tuned.sentence == first.sentence  # alone it needs no settings to be told apart
    assert "before training. 50 questions in 1 task, chance 25.0%. Intervals: 95 %, over questions." in first.remarks[1]
    events = [one for one in run.record.events if one["event"] != "evaluated" or one["round"]]
    unmeasured = headline([replace(run, record=replace(run.record, events=events))], [[]])
    assert unmeasured.remarks[1].startswith("50 questions in 1 task")
    assert first.remarks[0] == "ubsmoe-tiny on synthetic data: 4 clients in 4 tiers, 3 rounds."
    assert first.remarks[2] == "3 of 15 updates did not count: 3 late or away, all of client-4."
    run.record.config["simulation"] = {"dropout": 0.1}
    assert "virtual clock" in headline([run], [[]]).remarks[3] and len(first.remarks) == 3
    ((method, cells),) = first.rows
    assert method == "ubsmoe" and (cells[3].before, cells[3].after) == ("35.0", "85.0")
    low, high = map(float, cells[3].interval.split("–"))
    assert low < 85 < high
    assert first.costs[0] == ("K", ("2", "4", "6", "8")) and first.costs[1][1][3] == "100%"
    assert first.costs[2] == ("client s a round", ("0.2", "0.4", "0.6", "0.8"))
    assert first.differences is None


def test_methods_are_compared_seed_by_seed_and_what_is_not_told_apart_is_said(tmp_path) -> None:
    # every tier's difference is (0.08, 0.10, 0.12): mean 10, half-width 4.303 * 2 / sqrt(3) = 4.97 points
    runs = compared(tmp_path, {"fedavg": [0.5, 0.6, 0.4], "ubsmoe": [0.58, 0.7, 0.52]})
    first = headline(runs, [[] for _ in runs])
    assert first.sentence == "ubsmoe 67.5 % accuracy, fedavg 57.5 %: +10.0 (+5.0 to +15.0) points, 95 % over 3 seeds"
    assert first.differences.rows[0][1][0] == "+10.0 (+5.0 to +15.0)"
    alike = compared(tmp_path / "b", {"fedavg": [0.5, 0.6], "ubsmoe": [0.6, 0.51]})
    assert headline(alike, [[] for _ in alike]).sentence.endswith("95 % over 2 seeds: not told apart")
    one = compared(tmp_path / "c", {"fedavg": [0.5], "ubsmoe": [0.6]})
    assert headline(one, [[] for _ in one]).sentence.endswith(
        "+10.0 points with one seed, which cannot tell methods apart"
    )


def test_methods_that_pay_alike_share_a_row(tmp_path) -> None:
    runs = compared(tmp_path, {"fedavg": [0.5], "flora": [0.5], "ubsmoe": [0.6]})
    costs = [[c.as_dict() for c in run_costs(parse_run(run.record.config))] for run in runs]
    rows = [unit for unit, _ in headline(runs, costs).costs]
    assert rows[:2] == ["K: fedavg; ubsmoe", "K: flora"] and rows[-1] == "client MB a round"


def test_a_run_that_was_never_evaluated_has_a_headline_too(tmp_path) -> None:
    (run,) = read_series([write_run(tmp_path / "run", finished=False)])
    run.record.events[:] = [event for event in run.record.events if event["event"] != "evaluated"]
    first = headline([run], [[]])
    assert "3 rounds, training loss 1.000 → 0.333; accuracy was not measured" in first.sentence
    assert "ubsmoe, seed 0 has not finished: round 3 of 3." in first.remarks


def test_lines_are_means_over_seeds_with_their_intervals(tmp_path) -> None:
    chart = charts.accuracy_over_rounds(compared(tmp_path, {"fedavg": [0.5, 0.6, 0.4], "ubsmoe": [0.5, 0.6, 0.7]}))
    assert [line["name"] for line in chart.data] == ["fedavg", "ubsmoe"]
    assert chart.data[0]["y"] == pytest.approx([27.5, 57.5])
    assert chart.data[0]["error_y"]["array"] == pytest.approx([0, 4.3027 * 10 / 3**0.5], abs=1e-3)


def test_lines_go_forward_where_seeds_were_evaluated_after_different_rounds(tmp_path) -> None:
    runs = compared(tmp_path, {"fedavg": [0.5, 0.6]})
    events = runs[1].record.events
    events += [{**event, "round": 2} for event in events if event["event"] == "evaluated" and event["round"] == 3]
    (line,) = charts.accuracy_over_rounds(runs).data
    assert line["x"] == [0, 2, 3] and line["y"][1] == pytest.approx(67.5)


def test_a_chart_with_one_place_on_its_axis_is_left_out(tmp_path) -> None:
    line = {"type": "scatter", "x": [2, 2]}
    assert not charts.informs(charts.Chart("a", "", "", [line], {}))
    assert charts.informs(charts.Chart("a", "", "", [line, {**line, "x": [1, 2]}], {}))


def test_answers_stand_side_by_side_and_settings_that_differ_are_listed(tmp_path) -> None:
    runs = read_series([write_run(tmp_path / "a", "fedavg"), write_run(tmp_path / "b", "ubsmoe", 1)])
    assert answer_table(runs).rows[0] == ["fedavg", "task", "Is <it>?", "yes", "✗ no", "✓ yes"]
    page = build(runs)
    assert "Is &lt;it&gt;?" in page and "Is <it>?" not in page
    assert ["method.name", '"fedavg"', '"ubsmoe"'] in settings_table(runs).rows


def test_a_report_is_not_overwritten_unless_asked(tmp_path) -> None:
    runs, out = read_series([write_run(tmp_path / "run")]), tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already; choose another --out, or --overwrite it"):
        write_report(runs, [[]], out)
    assert out.read_text() == "mine"
    write_report(runs, [[]], out, overwrite=True)
    assert "accuracy 27.5" in out.read_text()


def test_a_commit_is_cut_but_keeps_its_mark() -> None:
    assert short_commit("0123456789abcdef+") == "0123456789ab+" and short_commit("–") == "–"
