"""A run that was stopped goes on with the base, tokenizer, template and data that it began with, or says which is another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ubsmoe.config import parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine
from ubsmoe.server.federation import build_federation
from ubsmoe.server.origin import origin
from ubsmoe.server.run import run
from ubsmoe.storage.runfolder import RunFolder, RunFolderError


def rows(word: str) -> str:
    asked = [(f"Is {i} {word}?", str(i % 2 == 0)) for i in range(24)]
    records = [{"instruction": i, "input": "", "output": f"the correct answer is {a}", "answer": a} for i, a in asked]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def settings(tiny_run: dict[str, Any], tmp_path: Path) -> Any:
    shutil.copytree(tiny_run["model"]["base"], tmp_path / "base")
    (tmp_path / "train.jsonl").write_text(rows("even"))
    (tmp_path / "test.jsonl").write_text(rows("equal"))
    own = {
        "model.base": str(tmp_path / "base"),
        "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "train.local_steps": 1,
        "evaluate.max_examples": 1,
        "evaluate.before": False,
        "evaluate.mc_accuracy": False,
        "evaluate.max_new_tokens": 1,
    }
    return parse_run(with_overrides(tiny_run, own))


def carry_out(settings: Any, folder: Path, stop: bool = False) -> None:
    federation = build_federation(settings)

    def report(event: str, number: int, fields: dict[str, Any]) -> None:
        if stop and (event, number) == ("round", 2):
            raise KeyboardInterrupt

    with RunFolder.open_or_create(folder, to_json(settings)) as opened:
        run(federation, opened, LocalEngine(federation.trainer, federation.examples, federation.clients), report)


def edit_weights(folder: Path) -> None:
    tensors = load_file(folder / "base/model.safetensors")
    save_file(
        {name: value + 1e-3 for name, value in tensors.items()}, folder / "base/model.safetensors", {"format": "pt"}
    )


def edit_tokenizer(folder: Path) -> None:
    file = folder / "base/tokenizer.json"
    table = json.loads(file.read_text())
    table["model"]["merges"] = table["model"]["merges"][:-1]
    file.write_text(json.dumps(table))


def edit_template(folder: Path) -> None:
    file = folder / "base/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "{{ messages }}"}))


EDITS: dict[str, Callable[[Path], object]] = {
    "base": edit_weights,
    "tokenizer": edit_tokenizer,
    "template": edit_template,
    "data.train": lambda folder: (folder / "train.jsonl").write_text(rows("odd")),
    "data.test": lambda folder: (folder / "test.jsonl").write_text(rows("odd")),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_was_edited_between_stop_and_resume_is_refused_by_its_name(
    name: str, settings: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        carry_out(settings, tmp_path / "run", stop=True)
    EDITS[name](tmp_path)
    with pytest.raises(RunFolderError, match=rf"whose {name} changed since its checkpoint of round 1"):
        carry_out(settings, tmp_path / "run")


def test_what_a_run_is_made_of_does_not_change_by_use(settings: Any, tmp_path: Path) -> None:
    federation = build_federation(settings)
    before = origin(federation)
    federation.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert origin(federation) == before == origin(build_federation(settings))
    assert len(set(before.values())) == len(before)
