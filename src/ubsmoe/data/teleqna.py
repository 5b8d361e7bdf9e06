"""TeleQnA: ten thousand multiple-choice questions on telecommunications; their five categories are a natural axis for clients.

A question's task is its category, so that scores come out per category and `data.partition.field = "category"` splits by it. Of
questions asked twice the first is kept. The archive is encrypted so that crawlers do not read it, with the password that its
public page prints; keep what is written here out of crawlers' reach too.

Source: TeleQnA (Maatouk et al. 2023, arXiv 2310.15051), github.com/netop-team/TeleQnA, MIT licence.
"""

import gzip
import json
from collections import Counter
from importlib import import_module
from pathlib import Path

from ubsmoe.config import ConfigError
from ubsmoe.errors import UserError, require

PASSWORD = b"teleqnadataset"


def build_teleqna(source: Path, out: Path) -> dict[str, int]:
    """Write the questions as records that `data.train` reads.

    Args:
        source: TeleQnA.zip, or the TeleQnA.txt inside it.
        out: the .jsonl.gz file to write.

    Returns:
        Questions per category.

    Raises:
        UserError: if the source cannot be read or is laid out otherwise, or `out` exists.
    """
    if not out.name.endswith(".jsonl.gz") or out.exists():
        raise ConfigError(f"--out must be a new file ending in .jsonl.gz, got {out}")
    text = _text(source)
    try:
        records: dict[str, dict[str, str]] = {}
        for name, row in json.loads(text).items():
            records.setdefault(row["question"], _record(row, name))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"{source} is not laid out as TeleQnA: {error!r}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.draft")
    # without a time stamp inside, equal sources give equal files
    draft.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in records.values()).encode(), mtime=0))
    draft.replace(out)
    return dict(Counter(record["category"] for record in records.values()))


def _text(source: Path) -> bytes:
    try:
        if source.suffix != ".zip":
            return source.read_bytes()
        require("pyzipper", "teleqna", "give the TeleQnA.txt that you unpacked yourself")
        with import_module("pyzipper").AESZipFile(source) as zipped:
            content: bytes = zipped.read("TeleQnA.txt", pwd=PASSWORD)
            return content
    except UserError:
        raise
    except Exception as error:  # the library has error classes of its own, and all mean the same to the user
        raise ConfigError(f"{source} cannot be read as TeleQnA's archive: {error}") from None


def _record(row: dict[str, str], name: str) -> dict[str, str]:
    """One question in the wording of the commonsense tasks."""
    options = [row[f"option {number}"] for number in range(1, 6) if f"option {number}" in row]
    labels = [f"option{number}" for number in range(1, len(options) + 1)]
    answer = row["answer"].partition(":")[0].replace(" ", "")
    if answer not in labels:
        raise ValueError(f"{name} has the answer {row['answer']!r} but {len(options)} options")
    listed = "\n\n".join(f"{label.capitalize()}: {text}" for label, text in zip(labels, options, strict=True))
    asked = f"Please choose the correct answer to the question: {row['question']}\n\n{listed}"
    return {
        "instruction": f"{asked}\n\nAnswer format: {'/'.join(labels)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
        "task": row["category"],
        "category": row["category"],
    }
