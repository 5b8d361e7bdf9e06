import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from ubsmoe.config import ConfigError, DataSettings, SyntheticSettings, parse_run
from ubsmoe.data.partition import partition_clients
from ubsmoe.data.sources import by_task, load_examples, load_test
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tasks import Example

Write = Callable[..., Path]


def rows(count: int, task: str = "t") -> list[dict[str, str]]:
    return [{"prompt": f"{task} question {i}", "completion": str(i), "task": task} for i in range(count)]


def test_the_worlds_own_splits_are_used_when_training_on_the_world(tokenizer: Tokenizer) -> None:
    world = SyntheticSettings(seed=3, entities=20, train_examples=30, test_examples=17)
    splits = load_examples(DataSettings(synthetic=world), tokenizer, seed=5)
    assert splits.train == SyntheticQA(3, 20).examples("train", 30, 5)
    assert splits.test == by_task(SyntheticQA(3, 20).examples("test", 17, 5))


def test_a_world_without_a_seed_of_its_own_is_the_runs(tokenizer: Tokenizer) -> None:
    splits = load_examples(DataSettings(synthetic=SyntheticSettings(entities=20, train_examples=30)), tokenizer, seed=5)
    assert splits.train == SyntheticQA(5, 20).examples("train", 30, 5)


@pytest.mark.parametrize("train", ["synthetic", "own"])
def test_a_seed_of_the_data_fixes_questions_and_partition_whatever_the_runs_is(
    write: Write, tokenizer: Tokenizer, train: str
) -> None:
    place = train if train == "synthetic" else str(write("own.jsonl", rows(40)))
    table = {"data": {"train": place, "synthetic": {"train_examples": 40, "test_examples": 9}}, "clients": {"count": 4}}

    def drawn(**seeds: int) -> tuple[Any, ...]:
        run = parse_run({**table, "seed": seeds["seed"], "data": {**table["data"], "seed": seeds.get("data")}})
        splits = load_examples(run.data, tokenizer, run.seed)
        assert load_test(run.data, tokenizer, run.seed) == splits.test
        return splits.test, splits.train, partition_clients(run, splits.train)

    assert drawn(seed=1, data=7) == drawn(seed=2, data=7) == drawn(seed=7)
    assert all(one != other for one, other in zip(drawn(seed=1), drawn(seed=2), strict=True))


@settings(max_examples=30)  # each example is a file
@given(
    prompts=st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda p: len(set(p)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(-3, 3),
)
def test_the_held_out_part_shares_no_prompt_with_training_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, prompts: list[int], fraction: float, seed: int
) -> None:
    path = tmp_path_factory.mktemp("held") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": str(p), "completion": str(i)}) for i, p in enumerate(prompts)))
    splits = load_examples(DataSettings(train=str(path), test_fraction=fraction), tokenizer, seed)
    test = [example for examples in splits.test.values() for example in examples]
    assert splits.train
    assert test
    assert not {e.prompt for e in splits.train} & {e.prompt for e in test}
    assert sorted(int(e.completion) for e in [*splits.train, *test]) == list(range(len(prompts)))


def test_the_held_out_part_has_the_asked_size_and_follows_the_seed(write: Write, tokenizer: Tokenizer) -> None:
    data = DataSettings(train=str(write("a.jsonl", rows(40))), test_fraction=0.25)
    first, again, other = (load_examples(data, tokenizer, seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.test["t"])) == (30, 10)
    assert first == again
    assert first != other


def test_a_test_folder_has_one_task_per_file_in_order_of_names(write: Write, tokenizer: Tokenizer) -> None:
    train = write("train.jsonl", rows(3))
    records = [{"prompt": "p", "completion": "c"}]
    for name in ("winogrande.json", "ARC-Easy.jsonl.gz", "mine.jsonl"):
        folder = write(f"test/{name}", records).parent
    splits = load_examples(DataSettings(train=str(train), test=str(folder)), tokenizer, seed=0)
    assert list(splits.test) == ["ARC-Easy", "mine", "winogrande"]
    assert len(splits.train) == 3


def test_a_test_file_is_grouped_by_the_tasks_of_its_records(write: Write, tokenizer: Tokenizer) -> None:
    test = write("test.jsonl", [*rows(2, "b"), *rows(1, "a"), *rows(1, "b")])
    splits = load_examples(DataSettings(test=str(test)), tokenizer, seed=0)
    assert {task: len(examples) for task, examples in splits.test.items()} == {"b": 3, "a": 1}
    assert len(splits.train) == DataSettings().synthetic.train_examples


def test_training_on_a_folder_joins_its_files(write: Write, tokenizer: Tokenizer) -> None:
    write("d/a.jsonl", rows(3))
    folder = write("d/b.jsonl", rows(4, "u")).parent
    splits = load_examples(DataSettings(train=str(folder), test_fraction=0.2), tokenizer, seed=0)
    assert len(splits.train) + sum(map(len, splits.test.values())) == 7


def test_a_hub_id_gives_its_training_and_its_test_split(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> list[dict[str, str]]:
        return rows(2, f"{name}:{split}")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__="found"))
    splits = load_examples(DataSettings(train="own/set", test="own/other.set"), tokenizer, seed=0)
    assert {example.task for example in splits.train} == {"own/set:train"}
    assert list(splits.test) == ["own/other.set:test"]


@pytest.mark.parametrize("place", ["missing.jsonl", "data/missing.jsonl", "missing", "/no/such", "./own/set", "a/b/c"])
def test_a_missing_path_is_not_taken_for_a_hub_id(tokenizer: Tokenizer, place: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.train: '{place}' does not exist, and .* \(owner/name\)"):
        load_examples(DataSettings(train=place), tokenizer, seed=0)


def test_a_missing_test_path_names_its_setting(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.test: 'tests\.json' does not exist"):
        load_examples(DataSettings(test="tests.json"), tokenizer, seed=0)


def test_a_single_question_cannot_be_split(write: Write, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.train has a single distinct prompt.*set data\.test"):
        load_examples(DataSettings(train=str(write("a.jsonl", rows(1) * 3))), tokenizer, seed=0)


def test_an_impossible_world_names_its_setting(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.synthetic\.entities: .*got 2"):
        load_examples(DataSettings(synthetic=SyntheticSettings(entities=2)), tokenizer, seed=0)


def test_grouping_keeps_every_example_in_its_order() -> None:
    a, b, c = Example("1", "x", "s"), Example("2", "x", "t"), Example("3", "x", "s")
    assert by_task([a, b, c]) == {"s": [a, c], "t": [b]}
