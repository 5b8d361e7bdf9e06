"""The data card of a run: what was read, how it became tokens, and what is left of it for training and for testing."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ubsmoe.config import DataSettings
from ubsmoe.data.file_formats import record_files
from ubsmoe.data.sources import Splits
from ubsmoe.data.tokens import Tokens


def data_card(settings: DataSettings, splits: Splits, tokens: Sequence[Tokens]) -> dict[str, Any]:
    """Facts about a run's data, as plain dicts.

    Args:
        settings: the run's [data].
        splits: what it led to.
        tokens: the training examples as the model sees them, in order.

    Returns:
        `train` and `test`: source, SHA-256 of each file, examples per task; of the training examples also their tokens, how
        many are `at_max_length` (most of these lost the left end of their prompt) and how many `repeat` an earlier prompt.
        `validation`: how many examples were held out of train to stop by. `asked_in_both`: test prompts that are also trained
        on. `too_long`: examples that `data.too_long = "drop"` left out.
    """
    asked = [example.prompt for example in splits.train]
    tested = {example.prompt for group in splits.test.values() for example in group}
    lengths = [len(one.input_ids) for one in tokens]
    return {
        "template": settings.template,
        "train": {
            "source": settings.train,
            "sha256": _hashes(settings.train),
            "tasks": dict(Counter(example.task for example in splits.train)),
            "tokens": {"sum": sum(lengths), "mean": round(fmean(lengths), 1), "longest": max(lengths)},
            "answer_tokens": sum(len(one.input_ids) - one.prompt_length for one in tokens),
            "at_max_length": lengths.count(settings.max_length),
            "repeat": len(asked) - len(set(asked)),
        },
        "test": {
            "source": settings.test
            or ("synthetic" if settings.train == "synthetic" else "held out of train, by prompt"),
            "sha256": _hashes(settings.test),
            "tasks": {task: len(group) for task, group in splits.test.items()},
        },
        **({"validation": {"examples": len(splits.validation)}} if settings.validation_fraction else {}),
        "asked_in_both": len(tested & set(asked)),
        "too_long": splits.too_long,
    }


def _hashes(place: str | None) -> dict[str, str]:
    """SHA-256 by name of the file, or of the files in the folder; empty for the synthetic questions and for the hub."""
    path = Path(place or "")
    if not place or not path.exists():
        return {}
    files = record_files(path) if path.is_dir() else [path]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
