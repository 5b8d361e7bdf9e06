"""Comparisons: reading --methods, refusing other work, the tables."""

import copy
import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.config import ConfigError, parse_run, with_overrides
from ubsmoe.errors import UserError
from ubsmoe.report.comparison import comparison_markdown, interval
from ubsmoe.storage.runfolder import RunRecord
from ubsmoe.study.compare import Variant, check_same_work, compare, parse_variants, to_csv


def test_variants_are_names_with_optional_settings() -> None:
    assert parse_variants('fedavg , ubsmoe(pg_mode=oracle; pg_scope=["router", "hidden"]),ubsmoe') == [
        Variant("fedavg", "fedavg", {}),
        Variant(
            'ubsmoe(pg_mode=oracle;pg_scope=["router","hidden"])',
            "ubsmoe",
            {"pg_mode": "oracle", "pg_scope": ["router", "hidden"]},
        ),
        Variant("ubsmoe", "ubsmoe", {}),
    ]


def test_a_variant_may_change_how_it_trains_but_not_how_much(tiny_run: dict[str, Any]) -> None:
    text = "fedavg\nubsmoe(pg_mode=off; tiers.elastic_share=0.5)  # ours\n\n# a line of its own\nfedavg(train.optimizer=sgd)"
    plain, elastic, sgd = parse_variants(text)
    assert (elastic.settings, elastic.changes) == ({"pg_mode": "off"}, {"tiers.elastic_share": 0.5})
    cell = elastic.settings_in(parse_run(tiny_run), 7)
    assert (cell.tiers.elastic_share, cell.seed, cell.label) == (0.5, 7, "ubsmoe(pg_mode=off;tiers.elastic_share=0.5)")
    assert sgd.settings_in(parse_run(tiny_run), 0).train.optimizer == "sgd"
    assert plain.settings_in(parse_run(tiny_run), 0).label is None
    labelled = parse_run(with_overrides(tiny_run, {"label": "mine"}))
    assert plain.settings_in(labelled, 0).label is None  # else every method would have the one name
    for key in ("train.rounds", "tiers.budgets", "data.train", "clients.count", "model.base", "evaluate.max_examples"):
        with pytest.raises(ConfigError, match=f"changes {key}, so it would not do the work of the others"):
            parse_variants(f"fedavg, fedavg({key}=3)")


def test_what_a_variant_changes_may_differ_and_nothing_else() -> None:
    first = {"method": {"name": "fedavg"}, "seed": 0, "train": {"rounds": 3, "optimizer": "adamw"}}
    sgd = with_overrides(first, {"train.optimizer": "sgd"})
    check_same_work([record("a", first), record("b", sgd)], {"train.optimizer"})
    with pytest.raises(ConfigError, match=r"train.rounds is 3 in one and 9"):
        check_same_work(
            [record("a", first), record("c", with_overrides(sgd, {"train.rounds": 9}))], {"train.optimizer"}
        )


@pytest.mark.parametrize(
    "text", ["", " ", "fedavg,fedavg", "fedavg, fed avg", "ubsmoe(a=1", "fedavg; ubsmoe", "a(b)(c)"]
)
def test_what_is_no_list_of_methods_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--methods"):
        parse_variants(text)


def test_a_misspelt_method_or_setting_fails_before_anything_runs(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    for text in ("fedavg, ubsmoo", "fedavg, ubsmoe(pg_mod=off)", "fedavg, ubsmoe(pg_mode=sideways)"):
        with pytest.raises(UserError, match="method"):
            compare(parse_run(tiny_run), parse_variants(text), [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_run_of_the_grid_draws_its_curves(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = parse_run(with_overrides(tiny_run, {"train.rounds": 1, "train.local_steps": 1}))
    with pytest.raises(UserError, match="--track 'paper': expected one of tensorboard"):
        compare(settings, parse_variants("fedavg"), [0], tmp_path / "out", track=["paper"])
    assert not (tmp_path / "out").exists()
    compare(settings, parse_variants("fedavg"), [0, 1], tmp_path / "out", track=["tensorboard"])
    assert len(list((tmp_path / "out" / "runs").glob("fedavg-seed*/tensorboard/events.*"))) == 2


def record(name: str, config: dict[str, Any], base: str = "x") -> RunRecord:
    return RunRecord(Path(name), config, {}, [], {"base_sha256": base})


def test_runs_of_other_work_are_not_compared() -> None:
    first = {"method": {"name": "fedavg"}, "seed": 0, "train": {"rounds": 3}}
    other_method = copy.deepcopy(first) | {"method": {"name": "ubsmoe"}, "seed": 1}
    check_same_work([record("a", first), record("b", other_method)])
    with pytest.raises(ConfigError, match=r"a and c are not the same work: train.rounds is 3 in one and 9"):
        check_same_work([record("a", first), record("c", with_overrides(first, {"train.rounds": 9}))])
    with pytest.raises(ConfigError, match="different bases"):
        check_same_work([record("a", first), record("b", first, base="y")])


def row(method: str, seed: int, tier: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    scores = {"accuracy": accuracy, "mc_accuracy": None, "unparsed": 0.25, "loss": 0.125}
    before = {"accuracy_before": 0.1, "mc_accuracy_before": None, "unparsed_before": 0.5, "loss_before": 2.0}
    costs = {"train_flops_per_token": 2e6, "upload_bytes": 3e6, "download_bytes": 4e6, "client_seconds": None}
    place = {"method": method, "seed": seed, "tier": tier, "task": "macro", "top_k": 2, "rank": 8, "chance": 0.5}
    balance = {"entropy": 0.75, "gini": 0.5, "dead_experts": seed}
    return {**place, **scores, **before, **costs, **balance, **more}


def test_the_table_shows_means_and_differences_paired_by_seed() -> None:
    """Worked by hand. Differences b - a: +10 and +30 points, mean 20, half-width t(0.975, 1) * 10 = 127.06."""
    rows = [row("a", 0, 1, 0.2), row("a", 1, 1, 0.4), row("b", 0, 1, 0.3), row("b", 1, 1, 0.7)]
    text = comparison_markdown(rows, reference="a")
    assert "over 2 seeds" in text and "Chance: 50.0 %" in text
    assert "| before training, K = 2 | 10.0 ± 0.0 |" in text and "| before training, K = 2 | 2.0000 ± 0.0000 |" in text
    assert "| a | 30.0 ± 127.1 |" in text and "| a | 25.0 ± 0.0 |" in text
    assert "| b | +20.0 ± 127.1 |" in text and "| a | +" not in text
    assert "| b | 2, 8 / 2.00 / 3.00, 4.00 / – |" in text
    assert "| a | 0.750 ± 0.000 | 0.500 ± 0.000 | 0.5 ± 6.4 |" in text  # dead: 0 and 1, each once, not once a tier


def test_a_row_before_training_for_each_k_that_methods_run() -> None:
    rows = [row("a", 0, 1, 0.2), row("b", 0, 1, 0.3), row("c", 0, 1, 0.3, top_k=8, accuracy_before=0.6)]
    text = comparison_markdown(rows, reference="a")
    assert (
        "| before training, K = 2 | 10.0 |\n| before training, K = 8 | 60.0 |\n| a |" in text and "over 1 seed;" in text
    )


def test_no_row_before_training_where_nothing_was_evaluated_then() -> None:
    unknown = {f"{metric}_before": None for metric in ("accuracy", "mc_accuracy", "unparsed", "loss")}
    text = comparison_markdown([row("a", 0, 1, 0.2, **unknown), row("b", 0, 1, 0.3, **unknown)], reference="a")
    assert "before training" not in text and "| b | +10.0 |" in text


def test_what_was_not_measured_is_a_dash() -> None:
    text = comparison_markdown([row(method, 0, 1, None, chance=None) for method in "ab"], reference="a")
    accuracy = text[text.index("Generation accuracy") : text.index("Likelihood")]
    assert "Chance: – %" in text and accuracy.count("| b | – |") == 2


def test_one_seed_has_a_mean_and_no_interval() -> None:
    mean, half = interval([2.5])
    assert mean == 2.5 and math.isnan(half)


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="'c' is not among the methods: a"):
        comparison_markdown([row("a", 0, 1, 0.5)], reference="c")


def test_csv_comes_back_as_it_was() -> None:
    rows = [{"method": 'ubsmoe(a="x,y")', "seed": 1, "loss": None}]
    assert list(csv.DictReader(io.StringIO(to_csv(rows)))) == [{"method": 'ubsmoe(a="x,y")', "seed": "1", "loss": ""}]
