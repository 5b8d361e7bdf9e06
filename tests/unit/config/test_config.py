import re
from pathlib import Path

import pytest

from ubsmoe.config import ConfigError, RunSettings, load_run, parse_run, parse_table, to_json, with_overrides


def test_defaults_are_a_valid_run() -> None:
    assert parse_run({}) == RunSettings()


def test_settings_survive_a_round_trip_through_json() -> None:
    settings = parse_run({"method": {"name": "ubsmoe", "pg": False}, "tiers": {"budgets": [0.125, 1]}})
    assert RunSettings.model_validate_json(to_json(settings)) == settings


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"train": {"rond": 1}}, "unknown setting 'train.rond'; did you mean 'rounds'?"),
        ({"trian": {}}, "unknown setting 'trian'; did you mean 'train'?"),
        ({"data": {"synthetic": {"entites": 3}}}, "unknown setting 'data.synthetic.entites'; did you mean 'entities'?"),
        ({"tiers": {"budgets": [0.0]}}, "tiers.budgets.0: Input should be greater than 0 (got 0.0)"),
        ({"tiers": {"budgets": [1.5]}}, "tiers.budgets.0: Input should be less than or equal to 1 (got 1.5)"),
        ({"tiers": {"rescale": "ratio"}}, "tiers.rescale: Input should be 'none', 'mass' or 'k_max' (got 'ratio')"),
        ({"train": {"rounds": "many"}}, "train.rounds: Input should be a valid integer"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate: Input should be a finite number (got inf)"),
        ({"tiers": {"budgets": [float("nan")]}}, "tiers.budgets.0: Input should be"),
        ({"adapter": {"rank": 10**8}}, "adapter.rank: Input should be less than or equal to 4096 (got 100000000)"),
        (
            {"data": {"partition": {"alpha": 1e308}}},
            "alpha: Input should be less than or equal to 1000000 (got 1e+308)",
        ),
        ({"clients": {"count": 2, "per_round": 3}}, "clients.per_round is 3 but there are only 2 clients"),
    ],
)
def test_a_fault_is_named_with_what_came_and_what_is_expected(table: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + re.escape(sentence)):
        parse_run(table)


def test_a_missing_run_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_run(tmp_path / "none.toml")


def test_a_folder_in_place_of_a_run_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read run file .*: Is a directory"):
        load_run(tmp_path)


def test_broken_toml_is_refused_with_its_place(tmp_path) -> None:
    (tmp_path / "run.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML: .*line 1"):
        load_run(tmp_path / "run.toml")


def test_paths_are_taken_beside_the_run_file(tmp_path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "run.toml").write_text('[data]\ntrain = "mine.jsonl"\n')
    assert load_run(tmp_path / "run.toml").data.train == str(tmp_path / "mine.jsonl")


def test_paths_are_kept_whole_so_that_a_run_folder_is_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.toml").write_text('[data]\ntrain = "beside.jsonl"\ntest = "here.jsonl"\n')
    for name in ("runs/beside.jsonl", "here.jsonl", "runs/here", "synthetic"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    settings = load_run("runs/run.toml")
    assert settings.data.train == str(tmp_path / "runs" / "beside.jsonl")
    assert settings.data.test == str(tmp_path / "here.jsonl")
    assert load_run("runs/run.toml", {"data.train": "synthetic"}).data.train == "synthetic"  # no file's name
    assert load_run("runs/run.toml", {"data.train": "nowhere.jsonl"}).data.train == "nowhere.jsonl"


def test_overrides_replace_one_setting_and_leave_the_table_alone() -> None:
    table = {"train": {"rounds": 5}}
    assert with_overrides(table, {"train.rounds": 2, "seed": 3}) == {"train": {"rounds": 2}, "seed": 3}
    assert table == {"train": {"rounds": 5}}


@pytest.mark.parametrize("given", [5, "mine:score", {"a": 1}])
def test_what_is_no_list_of_plug_ins_is_refused_as_it_was_given(given: object) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.metrics: .*valid tuple \(got {re.escape(repr(given))}\)"):
        parse_table({"evaluate": {"metrics": given}}, {}, Path())


def test_an_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is not a section"):
        with_overrides({"seed": 1}, {"seed.x": 2})


def test_a_bad_entry_of_a_list_is_one_fault() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_run({"tiers": {"budgets": [1.5]}})
    assert str(refused.value) == "tiers.budgets.0: Input should be less than or equal to 1 (got 1.5)"
