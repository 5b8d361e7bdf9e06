"""The properties that `data/synthetic.py` promises."""

import os
import random
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from ubsmoe.data.synthetic import ASKS, RELATIONS, SyntheticQA, names, options_around
from ubsmoe.data.tasks import TASKS


def test_no_training_question_is_a_test_question():
    world = SyntheticQA(0, 16)
    train = {e.prompt for seed in range(3) for e in world.examples("train", 1500, seed)}
    test = {e.prompt for seed in range(3) for e in world.examples("test", 1500, seed)}
    assert not train & test


def test_every_fact_of_a_test_question_is_taught_in_training():
    world = SyntheticQA(0, 8)

    def asked(split: str) -> set[tuple[str, str, str]]:
        return {(e.task, e.fields["entity"], e.fields["relation"]) for e in world.examples(split, 6000, 0)}

    assert asked("test") <= asked("train")


def test_the_two_families_share_no_name():
    evaluation, pretraining = names("evaluation"), names("pretraining")
    assert not set(evaluation) & set(pretraining)
    assert min(len(evaluation), len(pretraining)) > 500
    assert len(set(evaluation)) == len(evaluation)


def test_the_same_seed_gives_the_same_world_in_another_process():
    code = "from ubsmoe.data.synthetic import SyntheticQA; print(SyntheticQA(3, 9).examples('test', 5, 1))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "123"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert other.strip() == str(SyntheticQA(3, 9).examples("test", 5, 1))


def test_another_seed_gives_other_facts():
    assert SyntheticQA(0, 16).facts != SyntheticQA(1, 16).facts
    assert SyntheticQA(0).examples("train", 40, 0) != SyntheticQA(0).examples("train", 40, 1)


def test_every_value_is_held_by_equally_many_entities():
    world = SyntheticQA(5, 24)
    for relation, values in RELATIONS.items():
        held = Counter(world.facts[relation].values())
        assert set(held) == set(values)
        assert max(held.values()) - min(held.values()) <= 1


def test_the_right_option_stands_everywhere_equally_often():
    places: dict[str, Counter[str]] = defaultdict(Counter)
    for example in SyntheticQA(0, 48).examples("train", 8000, 0):
        places[example.task][example.answer] += 1
    for task, found in places.items():
        share = 1 / len(TASKS[task].labels)
        assert all(abs(found[label] / 1000 - share) < 0.06 for label in TASKS[task].labels)


def test_the_right_option_is_true_in_the_world():
    world = SyntheticQA(2, 12)
    for example in world.examples("train", 200, 0, tasks=("ARC-Easy",)):
        shown = example.prompt.split(f"{example.answer.capitalize()}: ")[1].split()[0]
        assert shown == world.facts[example.fields["relation"]][example.fields["entity"]]


def test_a_question_of_two_hops_is_about_the_friend():
    world = SyntheticQA(2, 12)
    for example in world.examples("train", 100, 0, tasks=("ARC-Challenge",)):
        friend = world.facts["friend"][example.fields["entity"]]
        shown = example.prompt.split(f"{example.answer.capitalize()}: ")[1].split("\n")[0].split(" Answer")[0]
        assert shown == world.facts[example.fields["relation"]][friend]


def test_relations_divide_into_the_groups_their_tasks_show():
    for task, asks in ASKS.items():
        for ask in asks:
            assert len(RELATIONS[ask.relation]) % TASKS[task].num_options == 0
    assert options_around("mood", "brave", 3) == ("happy", "shy", "brave")


def test_sentences_state_every_fact_once_in_an_order_of_the_generator():
    world = SyntheticQA(0, 10)
    first, again, other = (world.sentences(random.Random(seed)) for seed in (0, 0, 1))
    assert len(first) == 10 * (len(RELATIONS) + 1)
    assert first == again != other


def test_partitions_find_task_region_and_entity():
    fields = SyntheticQA(0).examples("train", 64, 0)[0].fields
    assert {"task", "region", "entity", "relation"} <= set(fields)


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="num_entities"):
        SyntheticQA(0, 7)
    with pytest.raises(ValueError, match="split"):
        SyntheticQA(0).examples("dev", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tasks"):
        SyntheticQA(0).examples("train", 1, 0, tasks=("boolqq",))
