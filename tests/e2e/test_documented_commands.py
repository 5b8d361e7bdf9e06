"""README, CONTRIBUTING and docs/, typed along: commands and Python run as printed, or are marked with the reason why not.

A page's commands run in order, in this process, in a folder of the page's own. It holds runs/ and, under the names that the
page uses, what a reader brings along: STAND_INS. What would take minutes runs smaller: SMALLER. Nothing else is changed.
"""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from documents import PAGES, ROOT, SHELL, Block, add_method, blocks, commands, inline_commands
from e2e.test_cli import ubsmoe as run_command
from ubsmoe.cli import app
from ubsmoe.config import parse_run, read_toml
from ubsmoe.study import lab

Place = Callable[[Path, Any], None]

STAND_INS: dict[str, Place] = {  # name on the page: what puts something small there, unless a command before it has
    "RUN.toml": lambda path, have: shutil.copy(have("run file"), path),
    "DIR": lambda path, have: shutil.copytree(have("finished run"), path),
    "out/olmoe": lambda path, have: shutil.copytree(have("finished run"), path),  # of the same class, random weights
    "DENSE": lambda path, have: shutil.copytree(have("dense model"), path),
    "TeleQnA.txt": lambda path, have: path.write_text(TELEQNA),
}
TELEQNA = """{"question 0": {"question": "What?", "option 1": "this", "option 2": "that", "answer": "option 2: that",
    "category": "Lexicon"}}"""

SMALLER = {  # what the page says: what runs instead
    "DIR...": "DIR",  # one folder where several may stand
    "--workers 2": "--workers 1",  # two processes: tests/unit/engines/test_processes.py
    "--seeds 3 --jobs 2": "--seeds 1 --set train.rounds=1",  # 12 runs; processes: tests/unit/study/test_compare.py
}

WHAT_TO_DO = """
Every command in README.md, CONTRIBUTING.md and docs/ is run as printed. Make this one run in an empty folder with runs/ in it,
or add what it needs to STAND_INS or SMALLER in tests/e2e/test_documented_commands.py; or, if it cannot run in a test, put a line
above its block that says why:  <!-- not run: needs the hub -->
or, for one command of the block:  <!-- not run `make quickstart`: takes two minutes -->"""


@pytest.fixture(scope="session")
def have(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What stand-ins are copies of, made once: a run file, a run of it, a dense model."""
    place, made = tmp_path_factory.mktemp("documented"), set()

    def make(what: str) -> Path:
        path = place / what
        if what not in made:
            MAKERS[what](path, random_base)
            made.add(what)
        return path

    def finished(path: Path, base: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            assert run_command(patch, "run", make("run file"), "--out", path) == 0

    MAKERS = {"run file": _write_run_file, "finished run": finished, "dense model": _save_dense}
    return make


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_runs(
    page: Path, have: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "STEPS", 20)  # SGD steps of `ubsmoe lab bias-floor`
    names: dict[str, Any] = {"__name__": "page"}  # blocks of a page follow one another, as cells of a notebook do
    for block in blocks(page):
        if block.language in SHELL:
            for command in commands(block):
                if block.unrun(shlex.join(command)):
                    _check_spelling(block, command)
                else:
                    _run(block, command, have, monkeypatch, capsys)
        elif block.is_method:
            add_method(block, tmp_path / "methods", monkeypatch)
        elif block.language == "python" and not block.unrun():
            exec(compile(block.text, block.place, "exec"), names)
            _check_output(block, capsys.readouterr().out)
        elif block.language == "toml" and not block.unrun():
            (tmp_path / "page.toml").write_text(block.text)
            parse_run(read_toml(tmp_path / "page.toml"))
        else:
            unlabelled = re.search(r"^\$? ?(ubsmoe|make|pip|python) .*", block.text, re.MULTILINE)
            assert block.language or not unlabelled, f"{block.place}: label the block that holds {unlabelled} as ```sh"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_and_options_named_in_prose_exist(page: Path) -> None:
    for command in inline_commands(page):
        try:
            _parse(command)
        except click.MissingParameter:
            pass  # prose may name a verb alone
        except (click.ClickException, LookupError) as error:
            pytest.fail(f"{page.relative_to(ROOT)} names `{shlex.join(command)}`: {error!r}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_marks_are_about_something(page: Path) -> None:
    for block in blocks(page):
        lines = [shlex.join(command) for command in commands(block)] if block.language in SHELL else []
        for start, reason in block.marks:
            assert len(reason) > 10, f"{block.place}: say why, not {reason!r}"
            assert not start or any(line.startswith(start) for line in lines), (
                f"{block.place}: nothing begins {start!r}"
            )


def test_the_shortest_example_has_ten_lines() -> None:
    (example,) = (block for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len(example.text.splitlines()) <= 10


def _run(block: Block, command: list[str], have: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Run a command that is ours; whatever else a page says must be marked."""
    line = shlex.join(command)
    assert command[0] == "ubsmoe", (
        f"{block.place}: `{line}` is not marked, and this test runs ubsmoe alone.{WHAT_TO_DO}"
    )
    for said, instead in SMALLER.items():
        line = line.replace(said, instead)
    words = shlex.split(line)[1:]
    for before, word in zip(["", *words], words, strict=False):
        if word in STAND_INS and before != "--out" and not Path(word).exists():
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            STAND_INS[word](Path(word), have)
    capsys.readouterr()
    code = run_command(monkeypatch, *words)
    printed = capsys.readouterr()
    assert code == 0, f"{block.place}: `{line}` ended with {code}: {printed.err or printed.out}{WHAT_TO_DO}"


def _check_spelling(block: Block, command: list[str]) -> None:
    """What is not run must at least be a verb with options that exist, or a target of the Makefile."""
    try:
        _parse(command)
    except (click.ClickException, LookupError) as error:
        pytest.fail(f"{block.place}: `{shlex.join(command)}`: {error!r}")
    if command[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(command[1:]) <= set(targets), f"{block.place}: no target {command[1:]}; there are {targets}"


def _parse(command: list[str]) -> None:
    """Take a command of ours apart without running it. Raises what click does, and LookupError for an unknown verb."""
    if command[0] != "ubsmoe":
        return
    verb, words = typer.main.get_command(app), command[1:]
    while isinstance(verb, click.Group) and words:
        verb = verb.commands[words.pop(0)]
    if not isinstance(verb, click.Group):
        verb.make_context(command[0], words)


def _check_output(block: Block, printed: str) -> None:
    """`print(...)  # 8` printed 8, in the order of the lines."""
    lines: Iterator[str] = iter(printed.splitlines())
    for said in re.findall(r"^ *print\(.*\)  # (.+)$", block.text, re.MULTILINE):
        assert said in lines, f"{block.place}: {said!r} is not what was printed:\n{printed}"


def _write_run_file(path: Path, base: Path) -> None:
    path.write_text(
        f"""
        threads = 1
        model.base = "{base}"
        adapter = {{rank = 3, alpha = 6}}
        tiers.ranks = [1, 2, 3, 4]
        clients.count = 4
        data.synthetic = {{train_examples = 40, test_examples = 2, entities = 8}}
        train = {{rounds = 2, local_steps = 2, batch_size = 4}}
        evaluate = {{max_new_tokens = 2}}
        """
    )


def _save_dense(path: Path, base: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    sizes: dict[str, int] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_repository_named_in_prose_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])(?:src/ubsmoe|tests|bench|docs|deploy|\.ci)/[\w./-]*\w", text))
    gone = [name for name in named if not (ROOT / name).exists() and not MADE_BY_READER.search(name)]
    assert not gone, gone


MADE_BY_READER = re.compile(r"src/ubsmoe/methods/(fedprox|fedavgm|fedper)\.py")
"""What a page tells its reader to write, or a command writes."""
