"""What a terminal shows: plain lines when there is none, whole figures when it is narrow."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drawn_runs import write_run
from ubsmoe.messages import Profile, Task
from ubsmoe.report.console import RunConsole, cost_table, result_table, show, task_table, watch

MACRO = {
    "examples": 40,
    "accuracy": 0.25,
    "unparsed": 0.1,
    "mc_accuracy": 0.5,
    "loss": 1.25,
    "chance": 0.25,
    "majority": 0.3,
}
TIER = {"tier": 0, "budget": 0.25, "top_k": 2, "rank": 8}
COST = {
    **TIER, "forward_flops_per_token": 4_000_000, "train_flops_per_token": 12_345_678, "relative_to_top": 0.55,
    "upload_bytes": 1_500_000, "download_bytes": 2_500_000, "peak_memory_bytes": 1_200_000_000,
}  # fmt: skip


def shown(renderable: Any, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(renderable)
    return text.getvalue()


def cells(text: str) -> list[str]:
    """The cells of the only tier's row."""
    (row,) = [line for line in text.splitlines() if re.match(r" +1 +0\.25 ", line)]
    return re.split(r" {2,}", row.strip())


def summary(**after: Any) -> dict[str, Any]:
    before = {"boolq": MACRO, "macro": MACRO}
    return {"method": "fedavg", "tiers": [TIER], "before": [before], "after": [{**before, "macro": {**MACRO, **after}}]}


def test_events_are_plain_lines_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    with RunConsole(Console(file=text, width=40)) as console:
        console.plan(rounds=3, clients=2)
        console.on_event("evaluated", 0, {"tier": 1, "top_k": 4, "scores": {"macro": {**MACRO, "mc_accuracy": None}}})
        console.on_step(Task(1, Profile("client-0", 0, 0.25, 2, 8), {}), 1, 4, 2.0)
        console.on_event("client", 1, {})
        console.on_event("round", 1, {"loss": 1.5, "entropy": [0.9, 0.7], "dead_experts": 3, "seconds": 2.0})
        console.on_event("resumed", 1, {"round": 1})
    assert text.getvalue().splitlines() == [
        "before  tier 2 (K=4)  accuracy 25.0%  unparsed 10.0%  MC accuracy –  loss 1.2500",
        "round 1/3  loss 1.5000  expert entropy 0.800  dead experts 3  2.0 s",
        "resumed after round 1",
    ]


def test_the_result_shows_before_and_after_beside_the_cost() -> None:
    text = shown(result_table(summary(accuracy=0.75, mc_accuracy=None), [COST]))
    assert "fedavg: per tier, 1 task, 40 questions, before → after" in " ".join(text.split())
    assert cells(text) == ["1", "0.25", "2", "8", "12.35", "55%", "25.0 → 75.0", "10.0 → 10.0", "–"]
    assert "chance 25.0%, majority 30.0%" in " ".join(text.split())


def test_the_result_shows_the_metrics_of_plug_ins_too() -> None:
    text = shown(result_table(summary(metrics={"rouge[1]": 0.12345, "words": 7.5}), [COST]), 120)
    assert "rouge[1]" in text and cells(text)[-2:] == ["0.123", "7.500"]


def test_a_base_whose_costs_nobody_can_count_has_a_result_all_the_same() -> None:
    text = shown(result_table(summary(accuracy=0.75), None))
    assert cells(text) == ["1", "0.25", "2", "8", "–", "–", "25.0 → 75.0", "10.0 → 10.0", "50.0 → 50.0"]


def test_without_an_evaluation_before_training_the_result_shows_what_is_there_after_it() -> None:
    text = shown(result_table({**summary(accuracy=0.75, mc_accuracy=None), "before": None}, [COST]))
    assert cells(text) == ["1", "0.25", "2", "8", "12.35", "55%", "75.0", "10.0", "–"]


def test_free_text_has_no_chance_to_speak_of() -> None:
    assert "chance" not in shown(result_table(summary(chance=None, majority=None), [COST]))


@pytest.mark.parametrize("width", [20, 72, 80, 200])
def test_no_figure_and_no_name_is_cut_off_whatever_the_width(width: int) -> None:
    results, labels = [{"ARC-Challenge": {**MACRO, "accuracy": 1.0}}] * 4, [f"tier {i} K={2 * i}" for i in (1, 2, 3, 4)]
    for table in (result_table(summary(), [COST]), cost_table("olmoe", [COST]), task_table(results, labels)):
        text = io.StringIO()
        show(Console(file=text, width=width), table)
        assert "…" not in text.getvalue()
    assert "ARC-Challenge" in text.getvalue() and text.getvalue().count("100.0 (10.0)") == 4


def test_the_table_of_tasks_fits_eighty_columns() -> None:
    text = shown(task_table([{"ARC-Challenge": MACRO}] * 4, [f"tier {i} K={2 * i}" for i in (1, 2, 3, 4)]), 80)
    assert "ARC-Challenge" in text and "…" not in text


def test_tasks_are_rows_and_tiers_columns() -> None:
    text = shown(task_table([{"boolq": MACRO}, {"boolq": {**MACRO, "accuracy": 1.0}}], ["tier 1 K=2", "tier 2 K=4"]))
    (line,) = [line for line in text.splitlines() if "boolq" in line]
    assert line.split() == ["boolq", "25.0", "(10.0)", "100.0", "(10.0)", "25.0%", "30.0%"]


def test_watching_goes_on_until_the_run_ends_and_shows_every_event_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    console = Console(record=True, width=200, file=io.StringIO())
    looks = []

    def pause() -> None:
        looks.append(None)
        if len(looks) == 2:
            (folder / "summary.json").write_text('{"seconds": 1.0}')

    watch(folder, RunConsole(console), pause)
    lines = console.export_text().splitlines()
    assert len(looks) == 2 and sum(line.startswith("round 2/3") for line in lines) == 1
