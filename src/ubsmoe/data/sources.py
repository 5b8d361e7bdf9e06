"""Where a run's examples come from: the synthetic questions, a file, a folder or the Hugging Face hub."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ubsmoe.config import ConfigError, DataSettings, SyntheticSettings
from ubsmoe.config.plug_ins import plug_in
from ubsmoe.data.file_formats import SUFFIXES
from ubsmoe.data.records import read_file, read_folder, read_hub, read_plug_in
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import fitting
from ubsmoe.seeds import seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Splits:
    """Examples to train on, and examples to test on by task; no prompt held out for testing is trained on.

    `validation` is what `data.validation_fraction` takes from the former: nobody trains on it, and its prompts are no test's.
    `too_long` counts what `data.too_long = "drop"` left out, by the setting that names its source.
    """

    train: list[Example]
    test: dict[str, list[Example]]
    too_long: dict[str, int] = field(default_factory=dict)
    validation: list[Example] = field(default_factory=list)


def load_examples(settings: DataSettings, tokenizer: "PreTrainedTokenizerBase | None", seed: int) -> Splits:
    """The run's training and test examples.

    Without `data.test`, the synthetic data set has its own test questions, and any other source holds out `data.test_fraction` of
    its distinct prompts. A hub id gives its split "train" as `data.train` and its split "test" as `data.test`.

    Args:
        settings: the run's [data].
        tokenizer: its chat template words records that hold messages; None where there are none.
        seed: the run's seed; draws the synthetic questions and the held-out part.

    Raises:
        ConfigError: naming the setting or the record at fault.
    """
    left_out, seed = dict[str, int](), settings.drawn_with(seed)
    train = _fitting(_all_training(settings, tokenizer, seed), settings, tokenizer, "train", left_out)
    if settings.test is not None or settings.train == "synthetic":
        test = _fitting(_all_test(settings, tokenizer, seed), settings, tokenizer, "test", left_out)
    else:
        train, test = _hold_out(train, settings.test_fraction, seed_for(seed, "held-out"))
    validation: list[Example] = []
    if settings.validation_fraction:
        asked = {example.prompt for example in test}
        train, validation = _hold_out(train, settings.validation_fraction, seed_for(seed, "validation"))
        validation = [example for example in validation if example.prompt not in asked]
    return Splits(train, by_task(test), left_out, validation)


def load_training(settings: DataSettings, tokenizer: "PreTrainedTokenizerBase | None", seed: int) -> list[Example]:
    """All that data.train names, nothing held out. Arguments and errors as for `load_examples`."""
    return _fitting(_all_training(settings, tokenizer, settings.drawn_with(seed)), settings, tokenizer, "train", {})


def load_test(
    settings: DataSettings, tokenizer: "PreTrainedTokenizerBase | None", seed: int
) -> dict[str, list[Example]]:
    """The test examples alone: a server that has data.test needs no training data. As for `load_examples`."""
    if settings.test is not None or settings.train == "synthetic":
        questions = _all_test(settings, tokenizer, settings.drawn_with(seed))
        return by_task(_fitting(questions, settings, tokenizer, "test", {}))
    return load_examples(settings, tokenizer, seed).test


def _all_training(settings: DataSettings, tokenizer: "PreTrainedTokenizerBase | None", seed: int) -> list[Example]:
    if settings.train == "synthetic":
        return _synthetic(settings.synthetic, seed).examples("train", settings.synthetic.train_examples, seed)
    return _read(settings.train, "train", tokenizer)


def _all_test(settings: DataSettings, tokenizer: "PreTrainedTokenizerBase | None", seed: int) -> list[Example]:
    if settings.test is not None:
        return _read(settings.test, "test", tokenizer)
    return _synthetic(settings.synthetic, seed).examples("test", settings.synthetic.test_examples, seed)


def _fitting(
    examples: list[Example],
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase | None",
    use: str,
    left_out: dict[str, int],
) -> list[Example]:
    """With `data.too_long = "drop"` the examples that fit; `left_out` gets how many do not."""
    if settings.too_long == "refuse":
        return examples  # tokenising refuses, with the place
    kept = fitting(examples, tokenizer, settings)
    left_out[use] = len(examples) - len(kept)
    if not kept:
        raise ConfigError(
            f"data.max_length is {settings.max_length}, and the answer of every example of data.{use} is longer; raise it"
        )
    return kept


def by_task(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Group examples by task, tasks in order of first appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.task, []).append(example)
    return groups


def _synthetic(settings: SyntheticSettings, seed: int) -> SyntheticQA:
    try:
        return SyntheticQA(seed if settings.seed is None else settings.seed, settings.entities)
    except ValueError as error:
        raise ConfigError(f"data.synthetic.entities: {error}") from None


def _read(place: str, use: str, tokenizer: "PreTrainedTokenizerBase | None") -> list[Example]:
    """Read the file, folder or hub data set that data.train or data.test names."""
    if plug_in(place):
        return read_plug_in(place, use, tokenizer)
    path = Path(place)
    if path.is_dir():
        return read_folder(path, tokenizer)
    if path.exists():
        return read_file(path, tokenizer)
    # A misspelt file name must not turn into a question to the hub.
    if not _HUB_ID.fullmatch(place) or place.endswith(SUFFIXES):
        raise ConfigError(
            f"data.{use}: {place!r} does not exist, and it does not look like a Hugging Face data set id (owner/name)"
        )
    return read_hub(place, use, tokenizer)


def _hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split off a seeded share of the distinct prompts: a question asked twice stays on one side. Raises ConfigError for one."""
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    if len(prompts) < 2:
        raise ConfigError(
            "data.train has a single distinct prompt, so none can be held out; set data.test, and no data.validation_fraction"
        )
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held_out = set(random.Random(seed).sample(prompts, count))
    train = [example for example in examples if example.prompt not in held_out]
    return train, [example for example in examples if example.prompt in held_out]
