"""The command line as a whole: its verbs and their help, what has another name now, and what answers without a model."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from drawn_runs import write_run
from e2e.test_cli import ubsmoe
from ubsmoe import __version__
from ubsmoe.cli.app import RENAMED_VERBS, app
from ubsmoe.config import parse_run

COSTS = """[{"tier": 0, "budget": 0.25, "top_k": 2, "rank": 8, "train_flops_per_token": 5, "forward_flops_per_token": 1,
    "relative_to_top": 0.4, "upload_bytes": 1, "download_bytes": 1, "peak_memory_bytes": 7}]"""


def verbs(verb: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, verb
    if isinstance(verb, click.Group):
        for word, inner in verb.commands.items():
            yield from verbs(inner, f"{name} {word}")


EVERY = dict(verbs(typer.main.get_command(app), "ubsmoe"))


def test_the_first_level_is_short() -> None:
    first = {name.split()[1] for name in EVERY if name.count(" ") == 1}
    assert {"run", "compare", "eval", "plan", "export", "generate", "serve", "methods", "report", "new"} <= first
    assert {name for name in first if isinstance(EVERY[f"ubsmoe {name}"], click.Group)} == {
        *("data", "base", "study", "flower")
    }


@pytest.mark.parametrize("name", EVERY)
def test_help_fits_eighty_columns_and_no_sentence_is_cut(name: str) -> None:
    verb = EVERY[name]
    context = click.Context(verb, info_name=name, terminal_width=80, max_content_width=80)
    text = verb.get_help(context)
    assert max(map(len, text.splitlines())) <= 80
    assert not [line for line in text.partition("Commands:")[2].splitlines() if line.endswith("...")]


@pytest.mark.parametrize("old", [old for old in RENAMED_VERBS if f"ubsmoe {old}" not in EVERY])
def test_an_old_verb_is_refused_with_its_new_name(old: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ubsmoe(monkeypatch, old, "anything", "--seeds", "3") == 2
    assert capsys.readouterr().err == f"ubsmoe: ubsmoe {old} is now ubsmoe {RENAMED_VERBS[old]}\n"
    words = RENAMED_VERBS[old].partition("--")[0].split()
    assert " ".join(["ubsmoe", *words]) in EVERY


def test_a_verb_that_never_was_is_refused_as_click_does(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ubsmoe(monkeypatch, "runn") == 2
    assert "No such command 'runn'" in capsys.readouterr().err


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ubsmoe(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"ubsmoe {__version__}\n"


def test_a_new_run_file_has_every_key_at_its_default_and_never_replaces_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    assert ubsmoe(monkeypatch, "new", file) == 0
    text = file.read_text(encoding="utf-8")
    assert parse_run(tomllib.loads(text)) == parse_run({})
    keys = {line.removeprefix("# ").partition(" =")[0] for line in text.splitlines() if " =" in line}
    assert {"seed", "rank", "noise_multiplier", "flops_per_second", "per_round", "entities"} <= keys
    file.write_text("seed = 3\n")
    assert ubsmoe(monkeypatch, "new", file) == 2
    assert "exists already" in capsys.readouterr().err and file.read_text() == "seed = 3\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    (write_run(folder / "run") / "costs.json").write_text(COSTS)
    write_run(folder / "unfinished", finished=False)
    (folder / "taken").mkdir()
    (folder / "taken" / "a").write_text("mine")
    (folder / "good.toml").write_text("seed = 1\n")
    (folder / "bad.toml").write_text("[train]\nrond = 3\n")
    (folder / "old.toml").write_text("[evaluate]\nlikelihood = true\n")
    return folder


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--version", 0),
        ("--help", 0),
        ("new fresh.toml", 0),
        ("report run --out page.html", 0),
        ("report run --watch", 0),
        ("report nowhere", 2),
        ("run bad.toml", 2),
        ("run good.toml --set method.name=ubsmoo", 2),
        ("run good.toml --set method.pg.mod=off", 2),
        ("methods", 0),
        ("plan --model olmoe-1b-7b", 0),
        ("plan old.toml", 2),
        ("compare bad.toml --methods fedavg", 2),
        ("watch run", 2),
        ("export unfinished out", 2),
        ("export run taken", 2),
        ("eval unfinished", 2),
        ("generate unfinished hello", 2),
        ("run good.toml --from unfinished", 2),
    ],
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(words: str, code: int, place: Path) -> None:
    program = (
        "import sys\nfrom ubsmoe import cli\ntry: cli.main()\nexcept SystemExit as stop: code = stop.code or 0\n"
        "else: code = 0\n"
        "print('heavy:', *sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()], cwd=place, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, "heavy:"), done.stderr
