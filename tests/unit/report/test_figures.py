"""Series against the events they come from, and the files of every figure."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from drawn_runs import write_run
from ubsmoe.config import parse_run
from ubsmoe.maths import balance
from ubsmoe.plan.tiers import run_costs
from ubsmoe.report.figures import flops_per_tier, write_figures
from ubsmoe.report.series import ENTROPY, GINI, correlation, label_of, mean, over_rounds, read_series
from ubsmoe.storage.runfolder import RunFolderError

MODEL = {"base": "olmoe-1b-7b"}


@pytest.fixture(scope="module")
def costs() -> dict[str, list[dict]]:
    methods = {"rank": "hetlora", "sparsity": "fedavg"}
    return {
        kind: [cost.as_dict() for cost in run_costs(parse_run({"model": MODEL, "method": {"name": name}}))]
        for kind, name in methods.items()
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_is_written_as_picture_and_table(tmp_path, costs) -> None:
    comparison = tmp_path / "compare"
    write_run(comparison / "runs" / "fedavg-seed0", "fedavg", 0, phi=False)
    write_run(comparison / "runs" / "ubsmoe-seed0", "ubsmoe", 0)
    write_run(comparison / "runs" / "ubsmoe-seed1", "ubsmoe", 1)
    runs = read_series([comparison])
    paths = write_figures(runs, costs, tmp_path / "out")
    assert len(paths) == 6 * 3 and all(path.stat().st_size > 100 for path in paths)
    rows = table(tmp_path / "out" / "fig2_entropy.csv")
    own = next(row for row in rows if (row["method"], row["seed"], row["round"]) == ("ubsmoe", "1", "2"))
    assert float(own["entropy"]) == pytest.approx(
        float(balance.normalised_entropy(torch.tensor(runs[2].utilization[1])).mean())
    )
    correlations = {row["measure"]: float(row["value"]) for row in table(tmp_path / "out" / "fig6_phi_correlation.csv")}
    assert correlations == pytest.approx({"Pearson r": -1, "Spearman ρ": -1})  # the fixture's phi is 0.5 - use
    assert len(table(tmp_path / "out" / "fig7_phi_scatter.csv")) == 3 * 4 * 32


def test_equal_runs_give_equal_pictures(tmp_path, costs) -> None:
    runs = read_series([write_run(tmp_path / "run")])
    once, again = (write_figures(runs, costs, tmp_path / name) for name in ("once", "again"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_without_phi_its_figures_are_left_out(tmp_path, costs) -> None:
    paths = write_figures(read_series([write_run(tmp_path / "run", "fedavg", phi=False)]), costs, tmp_path / "out")
    assert {path.name[:4] for path in paths} == {"fig2", "fig3", "fig4", "fig5"}


def test_measured_seconds_are_the_means_of_each_tiers_clients(tmp_path, costs) -> None:
    _, rows = flops_per_tier(read_series([write_run(tmp_path / "run")]), costs)
    seconds = {row["tier"]: row["value"] for row in rows if row["what"] == "client_seconds_per_round"}
    assert seconds == pytest.approx({1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8})


def test_a_run_that_goes_on_is_cut_to_what_all_seeds_have(tmp_path, costs) -> None:
    runs = read_series([write_run(tmp_path / "a", seed=0), write_run(tmp_path / "b", seed=1, finished=False)])
    short = runs[1].__class__(**{**vars(runs[1]), "rounds": [1], "utilization": runs[1].utilization[:1],
                                 "phi": runs[1].phi[:1]})  # fmt: skip
    write_figures([runs[0], short], costs, tmp_path / "out")
    assert {row["round"] for row in table(tmp_path / "out" / "fig2_entropy.csv")} == {"1"}


def test_series_hold_the_events_numbers(tmp_path) -> None:
    (run,) = read_series([write_run(tmp_path / "run")])
    used = torch.tensor(run.utilization)
    assert run.utilization[2].tolist() == run.record.rounds[2]["utilization"]
    assert ENTROPY.of(run) == pytest.approx(balance.normalised_entropy(used).numpy(), abs=1e-12)
    assert GINI.of(run) == pytest.approx(balance.gini(used).numpy(), abs=1e-12)
    assert run.label == label_of(run.record.config["method"]) == "ubsmoe"


def test_correlations_are_scipys_and_undefined_where_one_side_does_not_vary() -> None:
    x, y = np.random.default_rng(0).integers(0, 6, (2, 3, 4, 9)).astype(float)  # ties among them
    for ranks, scipys in ((False, stats.pearsonr), (True, stats.spearmanr)):
        expected = [[scipys(a, b).statistic for a, b in zip(*pair, strict=True)] for pair in zip(x, y, strict=True)]
        assert correlation(x, y, ranks) == pytest.approx(np.array(expected), abs=1e-12)
        assert np.isnan(correlation(x, np.full_like(y, 0.1), ranks)).all()


def test_a_mean_leaves_out_what_is_undefined() -> None:
    values = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    assert mean(values, 1).tolist() == pytest.approx([2.0, np.nan], nan_ok=True)


def test_quantities_go_as_far_as_every_seed_does(tmp_path) -> None:
    runs = read_series([write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")])
    short = replace(runs[1], rounds=[1, 2])
    ((seeds, rounds, values),) = over_rounds([runs[0], short], ENTROPY)
    assert (len(seeds), rounds, values.shape) == (2, [1, 2], (2, 2, 4))
    assert values[1, 1].tolist() == runs[1].record.rounds[1]["entropy"]


def test_a_folder_of_something_else_is_refused(tmp_path) -> None:
    with pytest.raises(RunFolderError, match="neither a run folder nor a comparison's"):
        read_series([tmp_path])
