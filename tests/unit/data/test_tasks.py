import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from ubsmoe.data.commonsense_raw import ORIGINS, word
from ubsmoe.data.records import read_folder
from ubsmoe.data.tasks import TASKS, extract_answer

# Questions and majority-class accuracy in percent, from the tables of the LLM-Adapters protocol.
TEST_SETS = {
    "boolq": (3270, 62.2),
    "piqa": (1838, 50.5),
    "social_i_qa": (1954, 33.6),
    "hellaswag": (10042, 25.0),
    "winogrande": (1267, 50.4),
    "ARC-Easy": (2376, 26.6),
    "ARC-Challenge": (1172, 26.5),
    "openbookqa": (500, 27.6),
}


def test_every_real_training_record_is_worded_byte_for_byte(commonsense_data: Path) -> None:
    with gzip.open(commonsense_data / "commonsense_15k.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    for task, origin in ORIGINS.items():
        with gzip.open(commonsense_data / "train" / f"{origin.raw}.train.jsonl.gz", "rt", encoding="utf-8") as lines:
            ours = {(e.prompt, e.completion, e.answer) for e in (word(task, json.loads(line)) for line in lines)}
        theirs = {(r["instruction"], r["output"], r["answer"]) for r in records if r["task"] == task}
        assert theirs, task
        assert theirs <= ours, task


def test_real_test_sets_have_the_published_sizes_and_majorities(commonsense_data: Path, tokenizer: Tokenizer) -> None:
    by_task: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    for example in read_folder(commonsense_data / "test", tokenizer):
        by_task[example.task][example.answer] += 1
        assert extract_answer(example.task, example.completion) == example.answer
        assert example.answer in example.candidates
    for task, answers in by_task.items():
        count, majority = TEST_SETS[task]
        assert sum(answers.values()) == count
        # The source says "~25%" for HellaSwag and gives one decimal for the others.
        within = 0.01 if task == "hellaswag" else 6e-4
        assert max(answers.values()) / count == pytest.approx(majority / 100, abs=within)


@given(task=st.sampled_from(sorted(TASKS)), data=st.data())
def test_the_answer_of_every_worded_example_is_extracted_from_its_completion(task: str, data: st.DataObject) -> None:
    form = TASKS[task]
    gold = data.draw(st.integers(0, form.num_options - 1))
    options = [f"choice {i}" for i in range(form.num_options)] if form.option else []
    example = form.example("Why?", options, gold)
    assert extract_answer(task, example.completion) == example.answer == example.candidates[gold]
    assert example.fields["task"] == task
    assert not example.templated


def test_a_question_with_options_worked_by_hand() -> None:
    example = TASKS["piqa"].example("Open a jar", ("twist", "shout"), 1, region="north")
    assert example.prompt == (
        "Please choose the correct solution to the question: Open a jar\n\n"
        "Solution1: twist\n\nSolution2: shout\n\nAnswer format: solution1/solution2"
    )
    assert example.completion == "the correct answer is solution2"
    assert example.fields == {"task": "piqa", "region": "north"}


def test_a_true_or_false_question_worked_by_hand() -> None:
    example = TASKS["boolq"].example("is ice cold?", (), 0)
    assert example.prompt == (
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false"
    )
    assert (example.answer, example.candidates) == ("true", ("true", "false"))


def test_labels_follow_the_number_of_options_given() -> None:
    assert TASKS["ARC-Easy"].example("?", ("a", "b", "c", "d", "e"), 4).answer == "answer5"
    assert TASKS["ARC-Easy"].example("?", ("a", "b", "c"), 0).candidates == ("answer1", "answer2", "answer3")


def test_capitalised_options_and_free_text_are_unparsed() -> None:
    assert extract_answer("ARC-Easy", "Answer1") is None
    assert extract_answer("boolq", "") is None


def test_the_first_of_several_answers_counts() -> None:
    assert extract_answer("boolq", "falsehood, not true") == "false"
