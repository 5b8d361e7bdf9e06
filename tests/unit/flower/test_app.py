"""The folder of a Flower app: whole or absent, as Flower wants it, and the same run on the other side."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_fab_config, validate_config

from ubsmoe.config import ConfigError, load_run, to_json
from ubsmoe.engines.flower.app import plug_ins_of, read_app, write_app
from ubsmoe.storage.exportfolder import ExportError


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's, in reading .gitignore
def test_flower_takes_the_folder_and_reads_back_the_run(
    tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}))
    run_file = write_toml(tiny_run | {"data": {"train": "data.jsonl", "test": "data.jsonl"}})
    changes = {"train.rounds": 7, "tiers.budgets": [0.5, 1.0], "method.name": "fedavg"}
    app = tmp_path / "my-app"
    settings = write_app(run_file, app, changes, track=["wandb", "mlflow"])
    assert settings.train.rounds == 7 and settings.tiers.budgets == (0.5, 1.0)
    assert (app / "run.toml").read_text() == run_file.read_text()

    (app / "out").mkdir()
    (app / "out" / "events.jsonl").write_text("{}\n")
    (app / ".flwr").mkdir()
    (app / ".flwr" / "config.toml").write_text("")
    config = get_fab_config(build_fab_from_disk(app))
    good, errors, warnings = validate_config(config, check_module=True, project_dir=app)
    assert good and not errors and not warnings
    import io
    import zipfile

    names = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))).namelist())
    assert {"run.toml", "server.py", "client.py", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("out", ".flwr"))]

    from flwr.common.config import flatten_dict

    flat = flatten_dict(config["tool"]["flwr"]["app"]["config"])
    assert flat["out"] == str(app / "out") and flat["track"] == "wandb,mlflow"
    assert to_json(read_app(app / "run.toml", flat)) == to_json(load_run(run_file, changes))


@pytest.mark.parametrize("name", ["two words", "9lives", "x" * 33, "under_score"])
def test_a_name_that_flower_would_refuse_is_refused_here(
    name: str, tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot be a Flower app's name"):
        write_app(write_toml(tiny_run), tmp_path / name, {})
    assert not (tmp_path / name).exists()


def test_what_is_there_is_not_written_over(
    tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    run_file, app = write_toml(tiny_run), tmp_path / "app"
    write_app(run_file, app, {})
    before = (app / "pyproject.toml").read_bytes()
    with pytest.raises(ExportError, match="exists already"):
        write_app(run_file, app, {"train.rounds": 99})
    assert (app / "pyproject.toml").read_bytes() == before
    with pytest.raises(ConfigError, match="virtual clock"):
        write_app(write_toml(tiny_run | {"simulation": {}}), tmp_path / "other", {})
    assert not (tmp_path / "other").exists()


def test_the_extra_and_the_app_ask_for_the_same_flower() -> None:
    from ubsmoe.engines.flower.app import PYPROJECT

    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f'"{extras["flower"][0]}"' in PYPROJECT


def test_nodes_on_this_machine_run_the_plug_ins_that_an_app_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "run.toml").write_text('[method]\nname = "mine:method"')
    changes = {"evaluate.metrics": ["mine:length"], "train.schedule": "elsewhere:falling"}
    write_app(tmp_path / "run.toml", tmp_path / "app", changes)
    named = [f"{tmp_path}/mine.py:method", "elsewhere:falling", f"{tmp_path}/mine.py:length"]
    assert plug_ins_of(tmp_path / "app") == ",".join(named)
    assert plug_ins_of(tmp_path / "other") == ""  # no app of ours
