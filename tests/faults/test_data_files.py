"""C6, C9-C12 of the faults found by trial: whatever a data file or run file holds ends in examples or in one sentence."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ubsmoe.config import ConfigError, load_run, parse_run
from ubsmoe.data import file_formats
from ubsmoe.data.card import data_card
from ubsmoe.data.records import read_file, read_folder
from ubsmoe.data.sources import load_examples, load_test, load_training
from ubsmoe.data.tokens import tokenize
from ubsmoe.errors import UserError
from ubsmoe.finished.federated_moe import FederatedMoE
from ubsmoe.model.load import load_tokenizer
from ubsmoe.plan.forecast import forecast
from ubsmoe.server.federation import build_federation

GOOD = '{"instruction": "Say no", "output": "no"}\n'
HALF = "\\ud83d"
DIGITS = "9" * 5000


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> Any:
    return load_tokenizer(parse_run({"model": {"base": str(random_base)}}).model)


RECORDS: dict[str, tuple[str, str]] = {
    "half a surrogate in input": (f'{{"instruction": "Sum", "input": "cut {HALF}", "output": "f"}}', "'input' holds half"),
    "half a surrogate in output": (f'{{"instruction": "Sum", "output": "cut {HALF}"}}', "'output' holds half"),
    "half a surrogate in prompt": (f'{{"prompt": "{HALF}", "completion": "f"}}', "'prompt' holds half"),
    "half a surrogate in task": (f'{{"prompt": "a", "completion": "f", "task": "{HALF}"}}', "'task' holds half"),
    "half a surrogate in answer": (f'{{"prompt": "a", "completion": "f", "answer": "{HALF}"}}', "'answer' holds half"),
    "half a surrogate in a candidate": (
        f'{{"prompt": "a", "completion": "f", "candidates": ["f", "{HALF}"], "answer": "f"}}', "'candidates' holds half"
    ),
    "half a surrogate in a field of one's own": (f'{{"prompt": "a", "completion": "f", "site": "{HALF}"}}', "'site' holds half"),
    "half a surrogate in a name": (f'{{"prompt": "a", "completion": "f", "{HALF}": 1}}', "holds half"),
    "half a surrogate in a message": (
        f'{{"messages": [{{"role": "user", "content": "{HALF}"}}, {{"role": "assistant", "content": "a"}}]}}',
        "message 1: field 'content' holds half",
    ),
    "5000 digits in a field nobody uses": (f'{{"prompt": "a", "completion": "f", "id": {DIGITS}}}', "'id' .* 5000 digits"),
    "5000 digits as an answer": (f'{{"prompt": "a", "completion": "f", "answer": {DIGITS}}}', "'answer' .* 5000 digits"),
    "5000 digits as text": (f'{{"prompt": "a", "completion": {DIGITS}}}', "'completion' must be text, got int"),
    "a list in input": ('{"instruction": "a", "input": ["b", "c"], "output": "d"}', "'input' must be text, got list"),
    "a number in input": ('{"instruction": "a", "input": 7, "output": "d"}', "'input' must be text, got int"),
    "an object in output": ('{"instruction": "a", "output": {"text": "d"}}', "'output' must be text, got dict"),
    "a list as task": ('{"instruction": "a", "output": "d", "task": ["t"]}', "'task' must be text, got list"),
    "a list as answer": ('{"instruction": "a", "output": "d", "answer": ["t"]}', "'answer' must be text, got list"),
    "one field twice": ('{"instruction": "a", "output": "b", "output": "c"}', "'output' comes twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_field_is_refused_with_file_line_and_field(name: str, tmp_path: Path, tokenizer: Any) -> None:
    record, said = RECORDS[name]
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n{record}\n{GOOD}")
    tokenizer = replace_template(tokenizer)
    with pytest.raises(ConfigError, match=rf"mine\.jsonl line 3.*{said}"):
        read_file(path, tokenizer)
    if "messages" not in record:
        path = tmp_path / "mine.json"
        path.write_text(f"[{GOOD}, {record}]")
        with pytest.raises(ConfigError, match=rf"mine\.json.*{said}"):
            read_file(path, tokenizer)


def replace_template(tokenizer: Any) -> Any:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def test_a_field_name_acts_on_no_terminal_and_fills_none(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"\x1b[2J": 1, **{f"f{i}": 1 for i in range(999)}}))
    with pytest.raises(ConfigError, match=r"it has \\x1b\[2J, f0, .*f8 and 990 more$"):
        read_file(tmp_path / "mine.jsonl", None)  # type: ignore[arg-type]


# Files that are made to fill the memory, or never end


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv.gz"])
def test_a_packed_file_that_holds_far_more_than_text_can_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(zlib.compress(bytes(101 << 20), 9, 31))
    with pytest.raises(ConfigError, match="hold more than 100 times as many bytes"):
        read_file(path, None)  # type: ignore[arg-type]


def test_parquet_that_declares_far_more_rows_than_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(file_formats, "LEAST", 1)
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 400_000, pyarrow.int8()), pyarrow.array(["same"]))
    parquet.write_table(pyarrow.table({"prompt": same, "completion": same}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(ConfigError, match="hold more than 100 times as many rows"):
        read_file(tmp_path / "a.parquet", None)  # type: ignore[arg-type]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.jsonl")
    with pytest.raises(ConfigError, match="no plain file"):
        read_file(tmp_path / "mine.jsonl", None)  # type: ignore[arg-type]


def test_a_header_of_many_columns_is_looked_at_once(tmp_path: Path) -> None:
    path = csv(tmp_path, ",".join(f"c{i}" for i in range(40_000)) + ",c7\n")
    with pytest.raises(ConfigError, match="there are several columns 'c7'"):
        read_file(path, None)  # type: ignore[arg-type]


# C9: CSV


def csv(tmp_path: Path, text: str) -> Path:
    (tmp_path / "mine.csv").write_text(text)
    return tmp_path / "mine.csv"


def test_a_cell_of_any_length_is_read(tmp_path: Path, tokenizer: Any) -> None:
    article = "word " * 60_000
    (example,) = read_file(csv(tmp_path, f'prompt,completion\n"{article}",yes\n'), tokenizer)
    assert (example.prompt, example.completion) == (article, "yes")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion,prompt\na,b,c\n", r"line 1: there are several columns 'prompt'"),
        ("prompt;completion\na;b\n", r"line 1: columns are separated by ';'; expected commas"),
        ("prompt\tcompletion\na\tb\n", r"line 1: columns are separated by '\\t'"),
        ("prompt|completion\na|b\n", r"line 1: columns are separated by '|'"),
    ],
)
def test_a_header_that_says_something_else_is_refused(text: str, said: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        read_file(csv(tmp_path, text), tokenizer)


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [pyarrow.array([one]) for one in ("a", "b", "c")]
    parquet.write_table(pyarrow.table(cells, names=["prompt", "completion", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet.*'prompt'"):
        read_file(tmp_path / "a.parquet", tokenizer)


# C10: folders


def test_hidden_files_and_notes_are_no_records(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "mine.jsonl").write_text(GOOD)
    (tmp_path / "._mine.jsonl").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / ".hidden.json").write_text("{")
    for name in ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"):
        (tmp_path / name).write_text('{"description": ""}')
    (tmp_path / "folder.json").mkdir()
    (example,) = read_folder(tmp_path, tokenizer)
    assert (example.task, example.where) == ("mine", f"{tmp_path / 'mine.jsonl'} line 1")
    settings = parse_run({"data": {"train": str(tmp_path), "test": str(tmp_path)}}).data
    card = data_card(settings, load_examples(settings, tokenizer, 0), tokenize([example], tokenizer, settings, "train"))
    assert list(card["train"]["sha256"]) == ["mine.jsonl"]


def shards(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.jsonl").write_text(GOOD)
    return folder


@pytest.mark.parametrize(("split", "task"), [("train", "lamps"), ("ARC-Easy", "ARC-Easy"), ("mine", "mine")])
def test_shards_are_one_data_set(split: str, task: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = shards(tmp_path / "lamps", f"{split}-00000-of-00002", f"{split}-00001-of-00002")
    assert [example.task for example in read_folder(folder, tokenizer)] == [task, task]


def test_a_shard_that_is_missing_or_of_another_split_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="lacks shard 00001 of 00003 of train"):
        read_folder(shards(tmp_path / "a", "train-00000-of-00003", "train-00002-of-00003"), tokenizer)
    with pytest.raises(ConfigError, match="shards of test and train"):
        read_folder(shards(tmp_path / "b", "train-00000-of-00001", "test-00000-of-00001"), tokenizer)


def test_shards_of_two_data_sets_in_one_folder_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    """Left behind by an upload that was repeated: both would count."""
    names = ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")
    with pytest.raises(ConfigError, match="holds shards of 00001 and 00002 of train; remove those of the older"):
        read_folder(shards(tmp_path / "a", *names), tokenizer)


def test_a_link_to_nothing_is_no_file_less_and_one_to_a_folder_is_read(tmp_path: Path, tokenizer: Any) -> None:
    folder = shards(tmp_path / "real", "mine")
    (tmp_path / "linked").symlink_to(folder)
    assert len(read_folder(tmp_path / "linked", tokenizer)) == 1
    (folder / "more.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match=r"more\.jsonl is a link to a file that is not there"):
        read_folder(folder, tokenizer)


@pytest.mark.parametrize("task", ["macro", "a\x1b[2Jb", "two\nlines"])
def test_a_task_that_would_hide_the_mean_or_act_on_a_terminal_is_refused(
    task: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "task": task}))
    with pytest.raises(ConfigError, match=r"a\.jsonl line 1: the task is called '.*'; expected printable"):
        read_file(tmp_path / "a.jsonl", tokenizer)


def test_a_candidate_that_is_listed_twice_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": "a", "completion": "b", "answer": "b", "candidates": ["b", "c", "b"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="line 1: field 'candidates' has a text twice"):
        read_file(tmp_path / "a.jsonl", tokenizer)


# C11: answers longer than data.max_length


@pytest.fixture
def long_answers(tmp_path: Path) -> dict[str, Any]:
    """Twelve records and an empty line; the answer of line 4 is over-long in the training file, and one of the test file."""
    records = [{"instruction": f"Say {i}", "output": "yes"} for i in range(12)]
    records[2]["output"] = "no " * 300
    lines = [json.dumps(record) for record in records]
    (tmp_path / "train.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[1:4]))
    return {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl"), "max_length": 64}


def test_an_over_long_answer_is_refused_with_file_and_line(long_answers: dict[str, Any], tokenizer: Any) -> None:
    settings = parse_run({"data": long_answers}).data
    with pytest.raises(ConfigError, match=r'train\.jsonl line 4 .* data\.too_long = "drop"'):
        tokenize(load_training(settings, tokenizer, 0), tokenizer, settings, "train")


def test_over_long_answers_can_be_dropped_and_are_counted(
    long_answers: dict[str, Any], tokenizer: Any, tiny_run: dict[str, Any]
) -> None:
    table = tiny_run | {"data": long_answers | {"too_long": "drop"}, "evaluate": {"max_new_tokens": 1}}
    federation = build_federation(parse_run(table))
    assert federation.data_card is not None
    assert federation.data_card["too_long"] == {"train": 1, "test": 1}
    assert sum(map(len, federation.examples.values())) == 11
    assert sum(map(len, federation.questions.values())) == 2
    data = parse_run(table).data
    assert load_training(data, tokenizer, 0) == load_examples(data, tokenizer, 0).train
    assert load_test(data, tokenizer, 0) == load_examples(data, tokenizer, 0).test


def test_dropping_changes_nothing_where_everything_fits(long_answers: dict[str, Any], tokenizer: Any) -> None:
    kept, all_of_them = (
        parse_run({"data": long_answers | {"max_length": 2000, "too_long": how}}).data for how in ("drop", "refuse")
    )
    assert load_training(kept, tokenizer, 0) == load_training(all_of_them, tokenizer, 0)
    with pytest.raises(ConfigError, match=r"every example of data\.train"):
        load_training(parse_run({"data": long_answers | {"max_length": 2, "too_long": "drop"}}).data, tokenizer, 0)


# C12: run files and prompts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"x = {'[' * 9000}", "not valid TOML: its tables or lists lie too deep"),
        (f"[{'a.' * 4000}a]", "not valid TOML|a: unknown setting|unknown setting 'a'"),
        (f"{'a.' * 20_000}a = 1", "a line of 40005 characters; expected at most 10000"),
        (f"[train]\nrounds = {DIGITS}", "not valid TOML: Exceeds the limit"),
    ],
)
def test_a_run_file_that_is_made_to_stop_its_reader_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_run(tmp_path / "run.toml")


def test_a_byte_order_mark_before_a_run_file_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 5\n")
    assert load_run(tmp_path / "run.toml").seed == 5


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "the prompt is empty"), ("cut \ud83d", "not UTF-8"), ("\udcff", "not UTF-8")]
)
def test_a_prompt_without_text_is_refused(prompt: str, said: str, random_base: Path) -> None:
    with pytest.raises(UserError, match=said):
        FederatedMoE.from_pretrained(random_base).generate(prompt)


@pytest.mark.parametrize("work", [build_federation, lambda settings: forecast(settings, 40, 1e9)], ids=["run", "plan"])
def test_texts_longer_than_the_model_has_positions_are_refused(
    work: Callable[[Any], Any], tiny_run: dict[str, Any], random_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(random_base, tmp_path / "olmoe")
    settings = parse_run(tiny_run | {"model": {"base": str(tmp_path / "olmoe")}})
    settings = replace_length(settings, 513)
    with pytest.raises(ConfigError, match=r"data\.max_length is 513, but .* has 512 positions; lower it to 512"):
        work(settings)


def replace_length(settings: Any, length: int) -> Any:
    return settings.model_copy(update={"data": settings.data.model_copy(update={"max_length": length})})
