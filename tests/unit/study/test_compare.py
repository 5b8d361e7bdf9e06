"""Comparisons: reading --methods and --variants, refusing other work, the tables."""

import copy
import csv
import io
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.config import ConfigError, parse_run, with_overrides
from ubsmoe.errors import UserError
from ubsmoe.report.comparison import accuracy_markdown, comparison_markdown, interval
from ubsmoe.report.series import read_series
from ubsmoe.storage.record import RunRecord
from ubsmoe.study.compare import check_same_work, compare, to_csv
from ubsmoe.study.grid import grid
from ubsmoe.study.variants import Variant, choose_variants


def variants_of(tmp_path: Path, text: str) -> list[Variant]:
    (tmp_path / "variants.toml").write_text(text)
    return choose_variants(None, tmp_path / "variants.toml")


def test_methods_are_plain_names() -> None:
    assert choose_variants("fedavg , ubsmoe,flame", None) == [
        Variant(name, {"name": name}) for name in ("fedavg", "ubsmoe", "flame")
    ]


@pytest.mark.parametrize(
    "text", ["fedavg,mine:small", "[[variants]]\nmethod = 'fedavg'\n[[variants]]\nmethod = 'mine:small'"]
)
def test_a_method_of_ones_own_lies_beside_the_run_file(text: str, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def small(shape): ...\n")
    (tmp_path / "variants.toml").write_text(text)
    given = (text, None) if text[0] != "[" else (None, tmp_path / "variants.toml")
    variants = choose_variants(*given, tmp_path)
    assert [one.label for one in variants] == ["fedavg", "small"]
    cell = variants[1].settings_in(parse_run(tiny_run), 0)
    assert cell.method.name == f"{tmp_path / 'mine.py'}:small" and cell.label is None


def test_a_file_of_variants_has_methods_with_settings_changes_and_labels(tmp_path: Path) -> None:
    text = """
    [[variants]]
    method = {name = "ubsmoe", dmr = false, pg = {mode = "oracle", scope = ["router", "hidden"]}}
    train.learning_rate = 1e-3
    [[variants]]
    label = "mine"
    method = {name = "fedavg"}
    """
    first, second = variants_of(tmp_path, text)
    assert first.label == 'ubsmoe(dmr=false;pg.mode=oracle;pg.scope=["router","hidden"];train.learning_rate=0.001)'
    assert first.method["pg"] == {"mode": "oracle", "scope": ["router", "hidden"]}
    assert first.changes == {"train.learning_rate": 1e-3}
    assert second == Variant("mine", {"name": "fedavg"})


def test_a_variant_may_change_how_it_trains_but_not_how_much(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    elastic = Variant("e", {"name": "smoe_llb", "coefficient": 0.1}, {"tiers.elastic_share": 0.5})
    cell = elastic.settings_in(parse_run(tiny_run), 7)
    assert (cell.tiers.elastic_share, cell.seed, cell.label) == (0.5, 7, "e")
    assert (cell.method.name, cell.method.settings) == ("smoe_llb", {"coefficient": 0.1})
    (plain,) = choose_variants("fedavg", None)
    labelled = parse_run(with_overrides(tiny_run, {"label": "mine"}))
    assert plain.settings_in(labelled, 0).label is None  # else every method would have the one name
    for key in ("train.rounds", "tiers.budgets", "data.train", "clients.count", "model.base", "evaluate.max_examples"):
        with pytest.raises(ConfigError, match=f"variant 1 changes {key}, so it would not do the work of the others"):
            variants_of(tmp_path, f'[[variants]]\nmethod = {{name = "fedavg"}}\n{key} = 3')


@pytest.mark.parametrize("name", ["screening", "learning_rates", "confirmation", "tiers"])
def test_the_studys_variants_are_the_rows_that_were_measured(name: str) -> None:
    root = Path(__file__).parents[3]
    with (root / "docs" / "data" / f"{name}.csv").open(encoding="utf-8") as file:
        measured = {row["method"] for row in csv.DictReader(file)}
    labels = {variant.label for variant in choose_variants(None, root / "runs" / "study" / f"{name}_variants.toml")}
    assert labels == measured - {"ubsmoe(pg_mode=server)"}  # a mode that is gone


def test_what_a_variant_changes_may_differ_and_nothing_else() -> None:
    first = {"method": {"name": "fedavg"}, "seed": 0, "train": {"rounds": 3, "optimizer": "adamw"}}
    sgd = with_overrides(first, {"train.optimizer": "sgd"})
    check_same_work([record("a", first), record("b", sgd)], {"train.optimizer"})
    with pytest.raises(ConfigError, match=r"train.rounds is 3 in one and 9"):
        check_same_work(
            [record("a", first), record("c", with_overrides(sgd, {"train.rounds": 9}))], {"train.optimizer"}
        )


def test_a_grid_is_every_combination_of_its_values() -> None:
    assert grid([]) == {"": {}}
    points = grid(["model.base=tiny, a/b", "train.learning_rate=1e-3,0.5", "data.seed=7"])
    assert list(points)[1] == "model.base=tiny;train.learning_rate=0.5;data.seed=7" and len(points) == 4
    assert list(points.values())[2] == {"model.base": "a/b", "train.learning_rate": 1e-3, "data.seed": 7}
    assert next(iter(grid(["tiers.budgets=[0.5, 1],[1]"]).values())) == {"tiers.budgets": [0.5, 1]}


@pytest.mark.parametrize(
    ("axis", "sentence"),
    [
        ("model.base", "expected a setting and different values"),
        ("=a", "expected a setting"),
        ("model.base=", "expected a setting"),
        ("model.base=a,,b", "expected a setting"),
        ("model.base=a,a", "different values"),
        ("method.name=fedavg,ubsmoe", "varies it by --methods or --variants"),
        ("seed=1,2", "varies it by --seeds"),
    ],
)
def test_what_is_no_axis_is_refused(axis: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        grid([axis])
    with pytest.raises(ConfigError, match="named twice"):
        grid(["model.base=a", "model.base=b"])


@pytest.mark.parametrize("text", ["", " ", "fedavg, fed avg", "fedavg; ubsmoe", "methods.txt", "ubsmoe(pg_mode=off)"])
def test_what_is_no_list_of_names_is_refused_with_the_toml_for_settings(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--methods takes names (.|\n)*method = {name = \"ubsmoe\", pg = false}"):
        choose_variants(text, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"expected \[\[variants\]\]"),
        ("variants = 3", r"expected \[\[variants\]\]"),
        ("[[variants]]\nmethod = 3", "variant 1: expected method = "),
        ("[[variants]]\nmethod = {name = 'fedavg'}\n[[variants]]\nlabel = 'x'", "variant 2: expected method = "),
        ("[[variants]]\nmethod = {name = 'fedavg'}\n" * 2, "different variants, got fedavg, fedavg"),
        ("[[variants]", "not valid TOML"),
    ],
)
def test_what_is_no_file_of_variants_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        variants_of(tmp_path, text)


def test_methods_and_variants_exclude_each_other(tmp_path: Path) -> None:
    for methods, file in ((None, None), ("fedavg", tmp_path / "x.toml")):
        with pytest.raises(ConfigError, match="give either --methods"):
            choose_variants(methods, file)


def test_a_misspelt_method_or_setting_fails_before_anything_runs(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    for method in ({"name": "ubsmoo"}, {"name": "smoe_llb", "coeficient": 1}, {"name": "smoe_llb", "coefficient": "x"}):
        with pytest.raises(UserError, match="method"):
            compare({"": parse_run(tiny_run)}, [Variant("x", method)], [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_run_of_a_grid_draws_its_curves_and_runs_on_two_bases_are_told_apart(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    out, fedavg = tmp_path / "out", choose_variants("fedavg", None)
    settings = parse_run(with_overrides(tiny_run, {"train.rounds": 1, "train.local_steps": 1}))
    twin = shutil.copytree(settings.model.base, tmp_path / "twin")
    on_twin = settings.model_copy(update={"model": settings.model.model_copy(update={"base": str(twin)})})
    points = {"base=one": settings, "base=two": on_twin}
    with pytest.raises(UserError, match="--track 'paper': expected one of tensorboard"):
        compare(points, fedavg, [0], out, track=["paper"])
    with pytest.raises(UserError, match="two runs of the comparison would have the folder"):
        compare({"a b": settings, "a_b": on_twin}, fedavg, [0], out)
    assert not out.exists()
    rows = compare(points, fedavg, [0], out, track=["tensorboard"])
    assert {row["point"] for row in rows} == points.keys()
    assert len(list(out.glob("base=*/runs/fedavg-seed0/tensorboard/events.*"))) == 2
    names = [f"fedavg, {Path(settings.model.base).name}", "fedavg, twin"]
    assert [run.label for run in read_series(out / point for point in points)] == names
    assert [run.label for run in read_series([out / "base=two"])] == ["fedavg"]
    with pytest.raises(UserError, match="holds a grid; name one of its points"):
        read_series([out])
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UserError, match="learning_rate"):
        compare({"base=one": other}, choose_variants("fedavg,ubsmoe", None), [0], out)
    assert not list(out.glob("*/runs/ubsmoe*"))  # refused before anything runs


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
    assert "the same for all seeds" in comparison_markdown(rows, "a", fixed=True)
    text = comparison_markdown(rows, reference="a")
    assert "over 2 seeds" in text and "Chance: 50.0 %" in text
    assert "| before training, K = 2 | 10.0 ± 0.0 |" in text and "| before training, K = 2 | 2.0000 ± 0.0000 |" in text
    assert "| a | 30.0 ± 127.1 |" in text and "| a | 25.0 ± 0.0 |" in text
    assert "| b | +20.0 ± 127.1 |" in text and "| a | +" not in text
    assert "| b | 2, 8 / 2.00 / 3.00, 4.00 / – |" in text
    assert "| a | 0.750 ± 0.000 | 0.500 ± 0.000 | 0.5 ± 6.4 |" in text  # dead: 0 and 1, each once, not once a tier


def test_each_point_of_a_grid_has_tables_of_its_own() -> None:
    """At q, b is 20 points above a; pooled with p, where it is 10 points below, it would be 5 points above."""
    scores = {"p": {"a": 0.3, "b": 0.2}, "q": {"a": 0.5, "b": 0.7}}
    rows = [row(method, 0, 1, value, point=point) for point, own in scores.items() for method, value in own.items()]
    text = comparison_markdown(rows, reference="a")
    first, second = text.split("## q\n")
    assert first.startswith("## p\n") and "| b | -10.0 |" in first and "| b | +20.0 |" in second
    assert accuracy_markdown(rows, "a").count("## ") == 2 + 2  # a heading for a point, one for its table


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
    accuracy = text[text.index("Generation accuracy") : text.index("MC accuracy")]
    assert "Chance: – %" in text and accuracy.count("| b | – |") == 2
    no_seed_in_common = comparison_markdown([row("a", 0, 1, 0.2), row("b", 1, 1, 0.3)], reference="a")
    assert "| b | 30.0 |" in no_seed_in_common and "nan" not in no_seed_in_common


def test_one_seed_has_a_mean_and_no_interval() -> None:
    mean, half = interval([2.5])
    assert mean == 2.5 and math.isnan(half)


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="'c' is not among the methods: a"):
        comparison_markdown([row("a", 0, 1, 0.5)], reference="c")


def test_csv_comes_back_as_it_was() -> None:
    rows = [{"method": 'ubsmoe(a="x,y")', "seed": 1, "loss": None}]
    assert list(csv.DictReader(io.StringIO(to_csv(rows)))) == [{"method": 'ubsmoe(a="x,y")', "seed": "1", "loss": ""}]
    # a plug-in may measure some tasks only
    other = list(csv.DictReader(io.StringIO(to_csv([{"task": "a"}, {"task": "b", "metric.f1": 0.5}]))))
    assert other == [{"task": "a", "metric.f1": ""}, {"task": "b", "metric.f1": "0.5"}]


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from ubsmoe.study.compare import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_run_goes_on_when_its_comparison_is_ended(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    with subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE, text=True) as comparison:
        assert comparison.stdout is not None
        worker = int(comparison.stdout.readline())
        comparison.send_signal(how)
    until = time.monotonic() + 20
    while runs(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(worker)


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie that its new parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
