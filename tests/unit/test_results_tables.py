"""docs/results.md is short and says what its CSV file says; docs/tables.md has every table that the build makes."""

import importlib.util
import re
from types import ModuleType

import pytest

from documents import ROOT


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_conclusions_with_one_table_and_the_table_is_the_csvs(made: ModuleType) -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert table in made.tables()["confirmation"]
    assert len(page.split()) <= 1500


def test_the_appendix_includes_every_table(made: ModuleType) -> None:
    page = (ROOT / "docs/tables.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\{include\} generated/tables/(\w+)\.md", page)) == made.tables().keys()


def test_a_missing_number_is_none_and_a_column_that_a_file_lacks_too(made: ModuleType) -> None:
    row = made.read_csv("tiers")[0]
    assert (row["method"], row["seed"], row["tier"], row["accuracy"]) == ("fedavg", 0, 1, 0.225)
    assert row["client_seconds"] is None and row["entropy"] is None


def test_one_method_against_another_by_hand(made: ModuleType) -> None:
    """Points .1 and .3 over two seeds: mean .2, half-width 12.706 · .1; the other's mean is .4, so half of it."""
    scores = {"ours": ((0.5, 1.0), (0.7, 1.0)), "theirs": ((0.4, 1.0), (0.4, 2.0))}
    rows = [
        {"method": method, "seed": seed, "tier": 2, "accuracy": accuracy, "loss": loss}
        for method, seeds in scores.items()
        for seed, (accuracy, loss) in enumerate(seeds)
    ]
    assert list(made.against_others(rows, "ours", tier=2)) == [
        "| ours (60.0 %) against | % | points | relative, % | loss |",
        "|---|---|---|---|---|",
        "| theirs | 40.0 | +20.0 ± 127.1 | +50.0 ± 317.7 | -0.500 ± 6.353 |",
    ]


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("fedavg", ("fedavg", "1e-2")),
        ("fedavg(train.learning_rate=3e-2)", ("fedavg", "3e-2")),
        ("ubsmoe(dmr=false;train.learning_rate=3e-3)", ("ubsmoe(dmr=false)", "3e-3")),
    ],
)
def test_a_label_is_taken_apart_into_variant_and_learning_rate(made: ModuleType, label: str, parts: object) -> None:
    assert made._without_rate(label) == parts
