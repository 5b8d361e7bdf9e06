"""The table of a paper: what is bold, what is starred, and what LaTeX needs escaped."""

import math
from typing import Any

import pytest
from scipy import stats

from ubsmoe.report.comparison import own_metrics
from ubsmoe.report.paper import paired_p, paper_table

SCORES = {"a_b": {1: [0.5, 0.6, 0.7], 2: [0.1, 0.2, 0.4]}, "c": {1: [0.6, 0.7, 0.81], 2: [0.1, 0.3, 0.2]}}


def rows(scores: dict[str, dict[int, list[Any]]]) -> list[Any]:
    return [
        {"method": method, "tier": tier, "seed": seed, "task": task, "accuracy": value, "loss": value}
        for method, tiers in scores.items()
        for tier, values in tiers.items()
        for seed, value in enumerate(values)
        for task in ("macro", "other")
    ]


@pytest.mark.parametrize("tier", [1, 2])
def test_the_p_value_is_that_of_scipy(tier: int) -> None:
    own, other = SCORES["c"][tier], SCORES["a_b"][tier]
    assert paired_p(own, other) == pytest.approx(float(stats.ttest_rel(own, other).pvalue))
    assert math.isnan(paired_p([1.0], [2.0])) and math.isnan(paired_p(own, own)) and paired_p([1.0, 2], [0, 1]) == 0.0


def test_the_best_is_bold_and_the_significant_starred() -> None:
    text = paper_table(rows(SCORES), "a_b", "markdown")
    assert text.splitlines()[2:4] == [
        "| a_b | 60.0 ± 24.8 | **23.3** ± 37.9 |",
        "| c | **70.3** ± 26.1 * | 20.0 ± 24.8 |",
    ]
    assert "* p < 0.05 against a_b" in text
    assert "**60.0**" not in text and "| a_b | **0.6000**" in paper_table(rows(SCORES), "c", "markdown", "loss")


def test_nothing_is_bold_where_all_are_equal() -> None:
    text = paper_table(rows({name: {1: [0.0, 0.0], 2: [0.1 * len(name)] * 2} for name in ("a", "bb")}), "a", "markdown")
    assert text.splitlines()[2:4] == ["| a | 0.0 ± 0.0 | 10.0 ± 0.0 |", "| bb | 0.0 ± 0.0 | **20.0** ± 0.0 * |"]


def test_latex_escapes_names_and_a_dash_stands_for_what_was_not_measured() -> None:
    text = paper_table(rows({**SCORES, "50%": {1: [None] * 3, 2: [0.1, 0.2, 0.3]}}), "c", "latex")
    assert r"a\_b & -- & \textbf{23.3} $\pm$ 37.9 \\" in text and r"50\% & -- &" in text
    assert r"a\textasciicircum{}b" in paper_table(rows({"a^b": SCORES["c"]}), "a^b", "latex")
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\end{tabular}") == 1
    with pytest.raises(ValueError, match="no method 'd' among"):
        paper_table(rows(SCORES), "d", "latex")


def test_the_points_of_a_grid_stand_in_one_table_each_with_its_own_best() -> None:
    """At p method c is best; at q, which has one tier less, a_b is."""
    at_p = [row | {"point": "base=p"} for row in rows(SCORES)]
    at_q = [row | {"point": "base=q_1"} for row in rows({"a_b": {1: [0.9] * 3}, "c": {1: [0.2, 0.3, 0.4]}})]
    text = paper_table(at_p + at_q, "a_b", "latex").splitlines()
    place = text.index(r"\multicolumn{3}{l}{\emph{base=q\_1}} \\")
    assert text[place - 1] == r"\midrule" and text[place + 1].startswith(r"a\_b & \textbf{90.0} $\pm$ 0.0 & --")
    assert text[place - 2].startswith(r"c & \textbf{70.3}")
    markdown = paper_table(at_p + at_q, "a_b", "markdown").splitlines()
    assert markdown[5:7] == ["| *base=q_1* |  |  |", "| a_b | **90.0** ± 0.0 | – |"]


def test_a_metric_that_a_task_lacks_has_a_table_all_the_same() -> None:
    own = [row | {"metric.f1": 0.25} if row["task"] == "macro" else row for row in reversed(rows(SCORES))]
    assert [metric.name for metric in own_metrics(own)] == ["metric.f1"]
    assert "0.250 ± 0.000" in paper_table(own, "c", "markdown", "metric.f1")
