import csv
import gzip
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from documents import ROOT, blocks
from ubsmoe.config import ConfigError
from ubsmoe.data.records import SCIENCE, read_file, read_folder, read_hub
from ubsmoe.data.tasks import TASKS
from ubsmoe.errors import UserError

Write = Callable[..., Path]
QUESTION = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "it is true", "answer": "true"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_array_and_json_lines_give_the_same_examples(write: Write, tokenizer: Tokenizer, name: str) -> None:
    rows = [QUESTION, {**QUESTION, "answer": "false"}]
    array = read_file(write(name, json.dumps(rows, indent=4)), tokenizer)
    lines = read_file(write(name.replace("json", "jsonl"), rows), tokenizer)
    assert array == lines
    assert [example.answer for example in array] == ["true", "false"]


@settings(max_examples=30)  # each example is a file
@given(task=st.sampled_from(sorted(TASKS)), data=st.data())
def test_a_worded_example_survives_the_way_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, task: str, data: st.DataObject
) -> None:
    form = TASKS[task]
    question = data.draw(st.text(min_size=1).filter(str.isprintable))
    options = [f"choice {i}" for i in range(form.num_options)] if form.option else []
    example = form.example(question, options, 0)
    record = {"instruction": example.prompt, "output": example.completion, "answer": example.answer, "task": task}
    path = tmp_path_factory.mktemp("trip") / "trip.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    (back,) = read_file(path, tokenizer)
    assert (back.prompt, back.completion, back.candidates) == (example.prompt, example.completion, example.candidates)
    assert (back.answer, back.fields) == (example.answer, {"task": task})


def test_an_instruction_gets_the_template_later_and_a_prompt_is_taken_as_it_is(
    write: Write, tokenizer: Tokenizer
) -> None:
    path = write("mine.jsonl", [QUESTION, {"prompt": "Q: 1+1?\nA:", "completion": " 2", "author": "Ada", "page": 7}])
    asked, raw = read_file(path, tokenizer)
    assert not asked.templated
    assert raw.templated
    assert (raw.prompt, raw.completion, raw.answer, raw.candidates) == ("Q: 1+1?\nA:", " 2", "", ())
    assert raw.fields == {"task": "mine", "author": "Ada", "page": "7"}


def test_a_chat_is_worded_by_the_tokenizers_template_up_to_the_last_message(write: Write, tokenizer: Tokenizer) -> None:
    (example,) = read_file(write("chat.jsonl", [{"messages": CHAT}]), tokenizer)
    assert example.prompt == "<system>Be brief.</s>\n<user>Hi</s>\n<assistant>"
    assert example.completion == "Yo"
    assert example.templated


SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"conversations": SHAREGPT},
        {"conversations": CHAT},
        {"messages": SHAREGPT},
    ],
)
def test_a_chat_is_the_same_in_every_form(write: Write, tokenizer: Tokenizer, record: Any) -> None:
    rows = [{"messages": CHAT, "page": 1}, {**record, "page": 1}]
    plain, other = read_file(write("chat.jsonl", rows), tokenizer)
    assert replace(other, where=plain.where) == plain


def test_the_forms_of_the_page_are_read(write: Write, tokenizer: Tokenizer) -> None:
    files = {block.title: block.text for block in blocks(ROOT / "docs/records.md") if block.title}
    raw, asked = read_file(write("text.jsonl", files["text.jsonl"]), tokenizer)
    assert (raw.completion, raw.templated, asked.completion, asked.templated) == (" no", True, "no", False)
    first, *same = read_file(write("chat.jsonl", files["chat.jsonl"]), tokenizer)
    assert [replace(one, where=first.where) for one in same] == [first] * 2 and first.completion == "no"


def test_messages_and_prompts_win_over_stray_fields_of_other_formats(write: Write, tokenizer: Tokenizer) -> None:
    rows = [{"messages": CHAT, "instruction": "x"}, {"prompt": "p", "completion": "c", "output": "o"}]
    chat, raw = read_file(write("a.jsonl", rows), tokenizer)
    assert (chat.completion, chat.templated) == ("Yo", True)
    assert (raw.completion, raw.templated) == ("c", True)


def test_a_record_may_list_its_candidates_in_words(write: Write, tokenizer: Tokenizer) -> None:
    record = {"prompt": "Q: Sky?\nA:", "completion": " is blue", "answer": "blue", "candidates": ["red", "blue"]}
    (example,) = read_file(write("mine.jsonl", [record]), tokenizer)
    assert (example.candidates, example.answer, example.completion) == (("red", "blue"), "blue", " is blue")
    assert "candidates" not in example.fields
    (example,) = read_file(write("other.jsonl", [record | {"answer": None}]), tokenizer)
    assert example.answer == "blue"  # what the completion ends with
    for wrong in ("blue", ["blue"], ["blue", 1], ["", "blue"]):
        with pytest.raises(ConfigError, match="line 1: field 'candidates' must be a list of two or more texts"):
            read_file(write("bad.jsonl", [record | {"candidates": wrong}]), tokenizer)
    with pytest.raises(ConfigError, match="field 'answer' is 'green', expected one of red, blue"):
        read_file(write("bad.jsonl", [record | {"answer": "green"}]), tokenizer)


def test_a_filled_input_follows_the_instruction(write: Write, tokenizer: Tokenizer) -> None:
    (example,) = read_file(write("a.jsonl", [{"instruction": "Sum up.", "input": "Long.", "output": "S"}]), tokenizer)
    assert example.prompt == "Sum up.\n\nLong."


@pytest.mark.parametrize(
    ("name", "record", "task"),
    [
        ("ARC-Easy.json.gz", QUESTION, "ARC-Easy"),
        ("any.jsonl", QUESTION, "boolq"),
        ("any.jsonl", {**QUESTION, "task": "mine"}, "mine"),
        ("any.jsonl", {"instruction": "Answer format: answer1/answer2/answer3", "output": "x"}, "social_i_qa"),
        ("any.jsonl", {"instruction": "Answer format: answer1/answer2/answer3/answer4", "output": "x"}, SCIENCE),
        ("notes.json", {"instruction": "Say x", "output": "x"}, "notes"),
    ],
)
def test_the_task_comes_from_the_record_then_the_file_name_then_the_answer_format(
    write: Write, tokenizer: Tokenizer, name: str, record: dict[str, str], task: str
) -> None:
    (example,) = read_file(write(name, [record]), tokenizer)
    assert example.task == example.fields["task"] == task


def test_the_last_answer_format_of_a_prompt_with_worked_examples_counts(write: Write, tokenizer: Tokenizer) -> None:
    prompt = "Answer format: true/false\ntrue\n\nOption2: Eve Answer format: option1/option2<end>"
    (example,) = read_file(write("a.jsonl", [{"prompt": prompt, "completion": "option1"}]), tokenizer)
    assert example.candidates == ("option1", "option2")


@pytest.mark.parametrize(
    ("output", "answer", "labels"),
    [
        ("it is false", "false", "true/false"),
        ("I do not know", "", "true/false"),
        ("it is incorrect", "incorrect", "correct/incorrect"),
        ("it is not-true", "not-true", "true/not-true"),
        ("it is untrue", "", "true/false"),
        ("it is a11", "a11", "a1/a11"),
    ],
)
def test_a_missing_answer_is_read_from_the_end_of_the_completion(
    write: Write, tokenizer: Tokenizer, output: str, answer: str, labels: str
) -> None:
    record = {"instruction": f"Is it?\n\nAnswer format: {labels}", "output": output}
    (example,) = read_file(write("a.jsonl", [record]), tokenizer)
    assert (example.answer, example.candidates) == (answer, tuple(labels.split("/")) if answer else ())


def test_line_separators_inside_a_string_do_not_cut_a_record(write: Write, tokenizer: Tokenizer) -> None:
    path = write("a.jsonl", '\ufeff{"prompt": "a\u2028b", "completion": "c"}\r\n\n')
    assert read_file(path, tokenizer)[0].prompt == "a\u2028b"


ROWS = [
    {"prompt": 'Say "a, b"\nnow:', "completion": " b", "answer": "b", "candidates": ["a", "b"], "page": "7"},
    {"messages": CHAT, "task": "chat"},
]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_a_table_gives_the_examples_of_json_lines(write: Write, tokenizer: Tokenizer, suffix: str) -> None:
    names = sorted({name for row in ROWS for name in row})
    text = StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows([{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in ROWS])
    lines = read_file(write("mine.jsonl", ROWS), tokenizer)
    assert read_file(write(f"mine.{suffix}", text.getvalue()), tokenizer) == lines


def test_parquet_gives_the_examples_of_json_lines(write: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    lines = read_file(write("mine.jsonl", ROWS), tokenizer)
    parquet.write_table(
        pyarrow.Table.from_pylist([{"page": None, **row} for row in ROWS[:1]]), tmp_path / "mine.parquet"
    )
    parquet.write_table(
        pyarrow.Table.from_pylist([{"page": None, **row} for row in ROWS[1:]]), tmp_path / "chat.parquet"
    )
    assert read_file(tmp_path / "mine.parquet", tokenizer) == lines[:1]
    assert read_file(tmp_path / "chat.parquet", tokenizer) == lines[1:]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"bad\.parquet cannot be read as Parquet"):
        read_file(tmp_path / "bad.parquet", tokenizer)


def test_parquet_without_its_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'this needs pyarrow: pip install "ubsmoe\[datasets\]"'):
        read_file(tmp_path / "a.parquet", tokenizer)


def test_a_folder_is_read_in_the_order_of_names(write: Write, tokenizer: Tokenizer) -> None:
    write("set/b.jsonl.gz", [QUESTION | {"task": "two"}])
    write("set/notes.txt", "not records")
    folder = write("set/a.json", [QUESTION | {"task": "one"}]).parent
    assert [example.task for example in read_folder(folder, tokenizer)] == ["one", "two"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "x"}, "line 2: missing field 'output'; expected text"),
        ({"output": "x"}, "line 2: missing field 'instruction'; expected text"),
        ({"prompt": "x"}, "line 2: missing field 'completion'; expected text"),
        ({"prompt": 3, "completion": "y"}, "line 2: field 'prompt' must be text, got int"),
        (
            {"prompt": CHAT[:2], "completion": "y"},
            "line 2: fields 'prompt' and 'completion' .* got a list of 2 and str",
        ),
        (
            {"prompt": "x", "completion": CHAT[2:]},
            "line 2: fields 'prompt' and 'completion' .* got str and a list of 1",
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            "line 2: .* the assistant's answer alone; got a list of 1 and a list of 2",
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:2]},
            "line 2: field 'completion' must be a list of .* assistant's answer",
        ),
        ({"prompt": ["x"], "completion": CHAT[2:]}, "line 2: field 'completion' must be a list of {role, content}"),
        ({"prompt": CHAT[:2]}, "line 2: fields 'prompt' and 'completion' .* got a list of 2 and NoneType"),
        ({"conversations": SHAREGPT[:2]}, "line 2: field 'conversations' must be a list of .* assistant's answer"),
        ({"conversations": [SHAREGPT[1], CHAT[2]]}, "line 2 message 2: missing field 'from'; expected text"),
        (
            {"conversations": [{"from": "human", "value": 3}, SHAREGPT[2]]},
            "line 2 message 1: field 'value' must be text",
        ),
        ({"prompt": "", "completion": "y"}, "line 2: field 'prompt' is empty; expected text"),
        ({"prompt": "\ud800", "completion": "y"}, "line 2: field 'prompt' holds half of a surrogate pair"),
        ({"text": "x", "id": 3}, "line 2: expected fields 'instruction' and 'output', .* it has text, id"),
        ({}, "line 2: expected fields .* it has none"),
        ([1], "line 2: expected an object with 'instruction' and 'output', .* got list"),
        (QUESTION | {"answer": "maybe"}, "line 2: field 'answer' is 'maybe', expected one of true, false"),
        ({"messages": "hello"}, "line 2: field 'messages' must be a list of .* ends with the assistant's answer"),
        ({"messages": CHAT[:2]}, "line 2: field 'messages' must be a list of .* ends with the assistant's answer"),
        ({"messages": [{"role": "user"}, CHAT[2]]}, "line 2 message 1: missing field 'content'"),
        (
            {"messages": [{"role": "tool", "content": "x"}, CHAT[2]]},
            "line 2: the tokenizer's chat template refuses 'messages': unknown role",
        ),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(
    write: Write, tokenizer: Tokenizer, record: Any, message: str
) -> None:
    path = write("bad.jsonl", [QUESTION, record])
    with pytest.raises(ConfigError, match=re.escape(str(path)) + " " + message):
        read_file(path, tokenizer)


def test_a_bad_record_of_an_array_is_named_by_its_number(write: Write, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"bad\.json record 2: missing field 'output'"):
        read_file(write("bad.json", json.dumps([QUESTION, {"instruction": "x"}])), tokenizer)


def test_a_chat_needs_a_tokenizer_with_a_chat_template(write: Write, bos_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"line 1: the tokenizer of model\.base has no chat template"):
        read_file(write("chat.jsonl", [{"messages": CHAT}]), bos_tokenizer)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.jsonl", "{}\n", r"line 1: expected fields"),
        (
            "bad.jsonl",
            '{"prompt": 1,\n',
            r"bad\.jsonl line 1: not JSON .* expected one JSON object per line, or a JSON array",
        ),
        ("bad.jsonl", '{"prompt": ' * 100_000, r"bad\.jsonl line 1: not JSON"),
        ("bad.json", '[{"prompt": 1}', r"bad\.json: not JSON"),
        ("bad.jsonl", "\n \n", r"bad\.jsonl holds no records; expected"),
        ("bad.json", "[]", r"bad\.json holds no records; expected"),
        ("bad.csv", "prompt,completion\n", r"bad\.csv holds no records; expected"),
        ("bad.csv", "prompt,completion\na,b\na\n", r"bad\.csv line 3: expected 2 cells, as the header has"),
        ("bad.csv", "prompt,completion\na,b,c\n", r"line 2: expected 2 cells"),
        ("bad.csv", 'prompt,completion\n"a" x,b\n', r"bad\.csv line 2: not CSV"),
        ("bad.csv", "prompt,completion\na,\n", r"line 2: missing field 'completion'"),
        ("bad.csv", "prompt,completion,candidates\na,b,b or c\n", r"'candidates': not JSON .* a list written as JSON"),
    ],
)
def test_a_bad_file_is_named(write: Write, tokenizer: Tokenizer, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_file(write(name, text), tokenizer)


@pytest.mark.parametrize(("name", "words"), [("bad.json.gz", "UTF-8 text in gzip"), ("bad.json", "UTF-8 text: ")])
def test_bytes_that_are_not_text_are_refused(tmp_path: Path, tokenizer: Tokenizer, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} cannot be read as {words}"):
        read_file(tmp_path / name, tokenizer)


def test_a_damaged_gzip_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = bytearray(gzip.compress(json.dumps([QUESTION] * 9).encode()))
    for place in range(10, len(data), 7):
        (tmp_path / "bad.json.gz").write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with pytest.raises(ConfigError, match=r"bad\.json\.gz"):
            read_file(tmp_path / "bad.json.gz", tokenizer)


def test_a_folder_without_record_files_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"holds no record files; expected names ending in \.json, \.jsonl"):
        read_folder(tmp_path, tokenizer)


def test_a_hub_data_set_without_the_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'this needs datasets: pip install "ubsmoe\[datasets\]"'):
        read_hub("own/set", "train", tokenizer)


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, __spec__="found"))


def test_hub_rows_are_read_like_file_records(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    fake_hub(monkeypatch, lambda name, config, split, revision: [QUESTION, {"instruction": "x", "output": split}])
    examples = read_hub("own/set", "train", tokenizer)
    assert [example.task for example in examples] == ["boolq", "set"]
    assert examples[1].completion == "train"


def test_a_hub_failure_and_a_bad_hub_row_name_the_data_set(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    fake_hub(monkeypatch, lambda *_, **__: [QUESTION, {"text": "x"}])
    with pytest.raises(ConfigError, match=r"hub data set own/set \(test\) record 2: expected fields"):
        read_hub("own/set", "test", tokenizer)

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    fake_hub(monkeypatch, unreachable)
    with pytest.raises(ConfigError, match=r"cannot load own/set \(split test\) from the Hugging Face hub: no route"):
        read_hub("own/set", "test", tokenizer)
