"""lm-evaluation-harness on a run: its numbers are our evaluator's on the same items, and the tier's adapter is in them."""

import json
import random
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from e2e.test_cli import ubsmoe as command
from ubsmoe.config import with_overrides
from ubsmoe.data.prompts import plain
from ubsmoe.data.records import read_file
from ubsmoe.finished.run import export_run

WriteToml = Callable[..., Path]
WORDS = ["river", "stone", "cloud", "paper", "glass", "wheat", "iron", "salt", "amber", "cedar"]
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, tiny_run: dict, write_toml: WriteToml, tmp_path: Path) -> Path:
    """A run tested on 40 questions, and the same questions as a task of the harness' in tmp_path / "tasks"."""
    draw = random.Random(0)
    records = []
    for i in range(40):
        options = [" ".join(words) for words in draw.sample(list(permutations(WORDS, 2)), 3)]
        record = {"instruction": f"Number {i}?", "output": f"it is {options[i % 3]}", "answer": options[i % 3]}
        records.append(record | {"candidates": options, "task": "colours"})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {
        "method.name": "fedavg",
        "data.test": str(tmp_path / "test.jsonl"),
        "train.learning_rate": 0.05,
        "adapter.alpha": 300.0,
    }
    settings = with_overrides(tiny_run, {**changes, "train.rounds": 1})
    assert command(monkeypatch, "run", write_toml(settings), "--out", tmp_path / "run") == 0

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(file=tmp_path / "items.json"))
    return tmp_path / "run"


def write_items(path: Path, tokenizer: Any) -> None:
    """What our evaluator ranks, end of text included, as the harness reads it."""
    end = tokenizer.eos_token
    items = [
        {
            "prompt": plain(example.prompt), "gold": example.candidates.index(example.answer),
            "choices": [f"it is {text}{end}" for text in example.candidates],
        }
        for example in read_file(path / "test.jsonl", tokenizer)
    ]  # fmt: skip
    (path / "items.json").write_text(json.dumps(items))


def test_the_harness_and_our_evaluator_agree_at_every_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, finished: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = json.loads((finished / "config.json").read_text())["model"]["base"]
    tokenizer = AutoTokenizer.from_pretrained(place)
    write_items(tmp_path, tokenizer)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    summary = json.loads((finished / "summary.json").read_text())
    before, after = ([row["colours"]["mc_accuracy"] for row in summary[when]] for when in ("before", "after"))
    capsys.readouterr()
    asked = ("eval", finished, "--harness", "colours", "--include", tmp_path / "tasks", "--json")
    assert command(monkeypatch, *asked) == 0
    tiers = json.loads(capsys.readouterr().out)["tiers"]
    assert [row["top_k"] for row in tiers] == [1, 2, 3, 4]
    assert [row["scores"]["colours"]["acc,none"] for row in tiers] == pytest.approx(after)

    def stock(place: Path | str) -> float:
        loaded = TaskManager(include_path=str(tmp_path / "tasks")).load(["colours"])
        model = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(place), tokenizer=tokenizer)
        found = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0)["results"]["colours"]
        return float(found["acc,none"])

    export_run(finished, tmp_path / "merged", "merged", tier=4)
    assert stock(tmp_path / "merged") == pytest.approx(after[3])  # the adapter is in the harness' numbers
    assert stock(place) == pytest.approx(before[3]) != pytest.approx(after[3])
    assert len({*before, *after}) > 3

    assert command(monkeypatch, "eval", finished, "--harness", "colors", "--include", tmp_path / "tasks") == 2
    assert "the harness knows no task 'colors'" in capsys.readouterr().err
    (tmp_path / "items.json").unlink()
    assert command(monkeypatch, *asked) == 2
    assert "--harness: cannot load colours" in capsys.readouterr().err


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command(monkeypatch, "eval", tmp_path, "--harness", "piqa") == 2
    assert 'this needs lm_eval: pip install "ubsmoe[harness]"' in capsys.readouterr().err
    assert command(monkeypatch, "eval", tmp_path, "--harness", "piqa", "--set", "evaluate.mc_accuracy=true") == 2
    assert "--harness replaces it" in capsys.readouterr().err
