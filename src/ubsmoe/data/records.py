"""Records of the formats people already have, read into Examples.

    {"instruction", "input", "output", "answer"}   LLM-Adapters, Alpaca; the run's template goes around the instruction
    {"prompt", "completion"}                       taken as they are: whoever wrote the prompt chose its wording
    {"messages": [{"role", "content"}, ...]}       a chat in the tokenizer's own template; the last message is learnt
    {"prompt": [...], "completion": [{...}]}       the same chat in two, as TRL has it
    {"conversations": [{"from", "value"}, ...]}    the same as ShareGPT has it: human and gpt are user and assistant

A record may name its `task`, its `answer` (the part of the completion that is scored) and the `candidates` that `answer` is one of;
its other plain values become fields that a partition can group by. Which files they come in: `ubsmoe.data.file_formats`.
"""

import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubsmoe.config import ConfigError
from ubsmoe.config.plug_ins import load
from ubsmoe.data.file_formats import MAX_DIGITS, SPLITS, SUFFIXES, LongInteger, read_rows, record_files, stem
from ubsmoe.data.hub import go_offline_without_network
from ubsmoe.data.tasks import TASKS, Example
from ubsmoe.errors import printable, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = {"instruction": "output", "prompt": "completion"}
_CHATS = ("messages", "conversations")
_KNOWN = {"instruction", "input", "output", "prompt", "completion", *_CHATS, "task", "answer", "candidates"}
_EXPECTED = "'instruction' and 'output', 'prompt' and 'completion', 'messages' or 'conversations'"
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ANSWER_FORMAT = re.compile(r"Answer format: ([\w-]+(?:/[\w-]+)+)")

# The three science sets share one answer format; without a task field or a file name they cannot be told apart.
SCIENCE = "ARC-or-openbookqa"


def read_file(path: Path, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Read one file of records.

    A record without a task takes it from the file's name when that is one of the eight (ARC-Easy.json.gz), else from
    its answer format, else the file's name is the task.

    Args:
        path: see `ubsmoe.data.file_formats`.
        tokenizer: only its chat template is used, and only for records with messages.

    Raises:
        ConfigError: naming the file and the line or record, the field at fault and what is expected.
    """
    return _examples(read_rows(path), str(path), stem(path.name), tokenizer)


def read_folder(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Read every record file of a folder, in the order of their names. Raises ConfigError as `read_file` does."""
    paths = record_files(folder)
    if not paths:
        raise ConfigError(f"{folder} holds no record files; expected names ending in {', '.join(SUFFIXES)}")

    def name(path: Path) -> str:
        whole = stem(path.name)  # a shard of a split is named after the data set, which is the folder
        return folder.name if whole in SPLITS and f"{whole}-" in path.name else whole

    return [one for path in paths for one in _examples(read_rows(path), str(path), name(path), tokenizer)]


def read_hub(name: str, split: str, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Read a split of a Hugging Face data set whose rows have one of this module's formats.

    Raises:
        UserError: if the optional library is missing, the hub does not give the data set, or a row does not fit.
    """
    rows = load_hub(name, split)
    where = f"hub data set {name} ({split})"
    return _examples(((f"{where} record {n}", row) for n, row in enumerate(rows, 1)), where, stem(name), tokenizer)


def read_plug_in(name: str, use: str, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """The records that a plug-in gives: `records() -> Iterable[dict]`, in one of this module's formats."""
    rows = load(name, f"data.{use}")()
    if not isinstance(rows, Iterable):
        raise ConfigError(f"data.{use}: {name} gave {type(rows).__name__}; expected records, one dict after another")
    numbered = ((f"{name} record {number}", row) for number, row in enumerate(rows, 1))
    return _examples(numbered, name, name.rpartition(":")[2], tokenizer)


def load_hub(name: str, split: str, config: str | None = None, revision: str | None = None) -> Iterable[dict[str, Any]]:
    """The raw rows of a hub data set. Raises UserError if the library is missing or the hub does not give them."""
    require("datasets", "datasets")
    go_offline_without_network()  # before the import, which takes note of it
    datasets = import_module("datasets")
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, config, split=split, revision=revision)
    # The library raises many unrelated types (network, missing name, missing split); all mean the same to the user.
    except Exception as error:
        raise ConfigError(f"cannot load {name} (split {split}) from the Hugging Face hub: {error}") from error
    return rows


def _examples(
    rows: Iterable[tuple[str, Any]], source: str, name: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[Example]:
    examples = [_example(record, where, name, tokenizer) for where, record in rows]
    if not examples:
        raise ConfigError(f"{source} holds no records; expected {_EXPECTED} in each")
    return examples


def _example(record: Any, where: str, name: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
    """One record, whichever its format."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: expected an object with {_EXPECTED}, got {type(record).__name__}")
    chat = _chat_of(record, where)
    prompt, completion = _worded(*chat, where, tokenizer) if chat else _pair(record, where)
    candidates = _listed(record, where) or _candidates(prompt)
    task = _task(_text(record, "task", where, optional=True) or _infer_task(name, candidates), where)
    answer = _answer(record, completion, candidates, where)
    if not answer:
        candidates = ()  # nothing says which one is right, so the completion is free text
    fields = {key: _plain(value, key, where) for key, value in record.items() if key not in _KNOWN and _is_plain(value)}
    templated = chat is not None or "instruction" not in record
    return Example(prompt, completion, task, answer, candidates, {**fields, "task": task}, templated, where)


def _pair(record: dict[str, Any], where: str) -> tuple[str, str]:
    """Prompt and completion of the two formats that spell them out."""
    present = [asks for asks in _KINDS if asks in record] or [asks for asks in _KINDS if _KINDS[asks] in record]
    if not present:
        raise ConfigError(f"{where}: expected fields {_EXPECTED}; it has {_some(record)}")
    asks = present[0]
    prompt, completion = _text(record, asks, where), _text(record, _KINDS[asks], where)
    # Empty in the commonsense data; in others it is the text that the instruction is about.
    context = _text(record, "input", where, optional=True) if asks == "instruction" else ""
    return (f"{prompt}\n\n{context}" if context else prompt), completion


def _some(record: dict[str, Any]) -> str:
    """The names of a record's first fields, as they can be shown."""
    names = [printable(str(name), 40) for name in record]
    return ", ".join(names[:10]) + f" and {len(names) - 10} more" * (len(names) > 10) or "none"


def _text(record: dict[str, Any], key: str, where: str, optional: bool = False) -> str:
    """A field that is text; an `optional` one may be missing or empty."""
    value = record.get(key)
    if optional and value in (None, ""):
        return ""
    if value is None:
        raise ConfigError(f"{where}: missing field {key!r}; expected text")
    if not isinstance(value, str) or isinstance(value, LongInteger):
        kind = "int" if isinstance(value, LongInteger) else type(value).__name__
        raise ConfigError(f"{where}: field {key!r} must be text, got {kind}")
    if not value:
        raise ConfigError(f"{where}: field {key!r} is empty; expected text")
    return _plain(value, key, where)


def _plain(value: str | int | float, key: str, where: str) -> str:
    """A plain value as text that can be tokenised and written again."""
    if isinstance(value, LongInteger):
        raise ConfigError(f"{where}: field {key!r} is an integer of {len(value)} digits; expected at most {MAX_DIGITS}")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in f"{key}{text}"):
        raise ConfigError(f"{where}: field {key!r} holds half of a surrogate pair; expected Unicode text")
    return text


def _chat_of(record: dict[str, Any], where: str) -> tuple[str, list[dict[str, str]]] | None:
    """The field that holds a record's chat and its messages as {role, content}; None if the record is no chat."""
    if field := next((name for name in _CHATS if name in record), None):
        return field, _messages(record[field], field, where)
    halves = [record.get(name) for name in ("prompt", "completion")]
    if not any(isinstance(half, list) for half in halves):
        return None
    if not all(isinstance(half, list) for half in halves) or len(halves[1]) != 1:  # type: ignore[arg-type]
        kinds = " and ".join(
            f"a list of {len(half)}" if isinstance(half, list) else type(half).__name__ for half in halves
        )
        raise ConfigError(
            f"{where}: fields 'prompt' and 'completion' must both be text, or both lists of {{role, content}}, the second with the "
            f"assistant's answer alone; got {kinds}"
        )
    return "completion", _messages([*halves[0], *halves[1]], "completion", where)  # type: ignore[misc]


def _messages(turns: Any, field: str, where: str) -> list[dict[str, str]]:
    """The messages of a chat as {role, content}, which may be written {from, value}."""
    known = isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, dict) for turn in turns)
    role, content = ("from", "value") if known and "from" in turns[0] else ("role", "content")
    numbered = [(f"{where} message {number}", turn) for number, turn in enumerate(turns if known else [], 1)]
    said = [{"role": _text(turn, role, at), "content": _text(turn, content, at)} for at, turn in numbered]
    if role == "from":
        said = [turn | {"role": _SHAREGPT.get(turn["role"], turn["role"])} for turn in said]
    if not said or said[-1]["role"] != "assistant":
        raise ConfigError(
            f"{where}: field {field!r} must be a list of {{role, content}} or {{from, value}} that ends with the assistant's answer"
        )
    return said


def _worded(
    field: str, turns: list[dict[str, str]], where: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str]:
    """The chat up to its last message as the tokenizer's template words it, and that last message."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}: the tokenizer of model.base has no chat template; use an instruct model, or 'prompt' and 'completion' "
            "as text"
        )
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    # Templates are programs of the model's author and refuse, for example, a system message in words of their own.
    except Exception as error:
        raise ConfigError(f"{where}: the tokenizer's chat template refuses {field!r}: {error}") from error
    return str(prompt), turns[-1]["content"]


def _listed(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The candidates that a record lists itself."""
    listed = record.get("candidates")
    if listed is None:
        return ()
    if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(one, str) and one for one in listed):
        raise ConfigError(f"{where}: field 'candidates' must be a list of two or more texts, got {listed!r}")
    if len({*listed}) < len(listed):
        raise ConfigError(f"{where}: field 'candidates' has a text twice, in {listed!r}; expected different ones")
    return tuple(_plain(one, "candidates", where) for one in listed)


def _candidates(prompt: str) -> tuple[str, ...]:
    """The labels that "Answer format: a/b" offers."""
    # The last one: those before belong to worked examples inside the prompt.
    found = _ANSWER_FORMAT.findall(prompt)
    return tuple(found[-1].split("/")) if found else ()


def _answer(record: dict[str, Any], completion: str, candidates: tuple[str, ...], where: str) -> str:
    """The record's label; without one, the candidate that its completion ends with."""
    if record.get("answer") is None:
        # the longest, as a whole word: "not-true" ends with "true" as well, and "incorrect" with "correct"
        ends = [label for label in candidates if re.search(rf"(?<!\w){re.escape(label)}$", completion)]
        return max(ends, key=len, default="")
    if not _is_plain(record["answer"]):
        raise ConfigError(f"{where}: field 'answer' must be text, got {type(record['answer']).__name__}")
    answer = _plain(record["answer"], "answer", where)
    if candidates and answer not in candidates:
        raise ConfigError(f"{where}: field 'answer' is {answer!r}, expected one of {', '.join(candidates)}")
    return answer


def _task(name: str, where: str) -> str:
    """A task's name, which tables and terminals show."""
    if name == "macro" or not name.isprintable():
        raise ConfigError(
            f"{where}: the task is called {name!r}; expected printable characters, and not 'macro', the mean over tasks"
        )
    return name


def _infer_task(name: str, candidates: tuple[str, ...]) -> str:
    if name in TASKS:
        return name
    if candidates and set(candidates) <= set(TASKS["ARC-Easy"].pattern.split("|")) and len(candidates) > 3:
        return SCIENCE
    return next((task.name for task in TASKS.values() if task.labels == candidates), name)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
