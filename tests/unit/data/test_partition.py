import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.config import ConfigError, PartitionSettings, parse_run
from ubsmoe.data.partition import partition, partition_report, tier_of_client
from ubsmoe.data.tasks import Example


def examples(*sizes: int) -> list[Example]:
    """As many examples as said of task a, of task b, and so on, in turn until each runs out."""
    names = [f"{chr(97 + i)}" for i, size in enumerate(sizes) for _ in range(size)]
    order = np.random.default_rng(0).permutation(len(names))
    return [Example(f"{i}", "x", names[i], answer="yes", fields={"task": names[i]}) for i in order]


def settings(kind: str, alpha: float = 0.5, field: str = "task", min_examples: int = 1) -> PartitionSettings:
    return PartitionSettings.model_validate(
        {"kind": kind, "alpha": alpha, "field": field, "min_examples": min_examples}
    )


@given(
    kind=st.sampled_from(["iid", "natural", "dirichlet", "quantity"]),
    sizes=st.lists(st.integers(5, 40), min_size=5, max_size=9),
    num_clients=st.integers(1, 5),
    alpha=st.floats(0.05, 100),
    seed=st.integers(-5, 2**70),
)
def test_every_example_goes_to_exactly_one_client_and_the_seed_decides(
    kind: str, sizes: list[int], num_clients: int, alpha: float, seed: int
) -> None:
    data = examples(*sizes)
    try:
        parts = partition(data, settings(kind, alpha), num_clients, seed)
    except ConfigError as error:  # a skewed draw may leave a client empty, and only a skewed one
        assert kind in ("dirichlet", "quantity")
        assert "would get 0 examples" in str(error)
        return
    assert len(parts) == num_clients
    assert sorted(index for part in parts for index in part) == list(range(len(data)))
    assert all(part == sorted(part) for part in parts)
    assert parts == partition(data, settings(kind, alpha), num_clients, seed)


def test_iid_sizes_are_equal_give_or_take_one() -> None:
    sizes = sorted(len(part) for part in partition(examples(50, 53), settings("iid"), 7, seed=1))
    assert sizes == [14, 14, 15, 15, 15, 15, 15]


def test_natural_gives_each_client_one_value_when_there_are_as_many() -> None:
    data = examples(30, 4, 9)
    parts = partition(data, settings("natural"), 3, seed=0)
    assert sorted(len(part) for part in parts) == [4, 9, 30]
    assert all(len({data[i].task for i in part}) == 1 for part in parts)


def test_natural_deals_whole_groups_to_the_smallest_client() -> None:
    # Worked by hand, largest first: a(10) -> X, b(7) -> Y, c(5) -> Y = 12, d(3) -> X = 13, e(1) -> Y = 13.
    data = examples(10, 7, 5, 3, 1)
    held = [{data[i].task for i in part} for part in partition(data, settings("natural"), 2, seed=0)]
    assert sorted(map(sorted, held)) == [["a", "d"], ["b", "c", "e"]]


def test_natural_does_not_always_give_the_largest_group_to_the_same_client() -> None:
    data = examples(30, 4, 9)
    assert {
        max(range(3), key=lambda client: len(parts[client]))
        for parts in (partition(data, settings("natural"), 3, seed) for seed in range(20))
    } == {0, 1, 2}


def test_dirichlet_grows_more_even_with_alpha() -> None:
    data = examples(400, 300, 500)

    def unevenness(alpha: float) -> float:
        return partition_report(
            data, partition(data, settings("dirichlet", alpha), 4, seed=2), "task"
        ).mean_total_variation

    assert unevenness(0.2) > 2 * unevenness(2.0) > 4 * unevenness(1000.0)
    assert unevenness(1000.0) < 0.05


def test_quantity_skews_the_sizes_but_not_the_content() -> None:
    data = examples(3000, 2000)
    report = partition_report(data, partition(data, settings("quantity", 1.0), 4, seed=3), "task")
    sizes = [client.size for client in report.clients]
    assert max(sizes) > 2 * min(sizes)
    assert report.mean_total_variation < 0.05


def test_answers_can_be_grouped_by_too() -> None:
    assert partition(examples(3), settings("natural", field="answer"), 1, seed=0) == [[0, 1, 2]]


def test_the_report_worked_by_hand() -> None:
    data = [Example("", "x", task) for task in "aaab"]
    report = partition_report(data, [[0, 1], [2, 3], []], "task")
    assert [(c.size, c.counts) for c in report.clients] == [
        (2, {"a": 2, "b": 0}),
        (2, {"a": 1, "b": 1}),
        (0, {"a": 0, "b": 0}),
    ]
    # Global (3/4, 1/4). Client 0: (1, 0) is 1/4 away; client 1: (1/2, 1/2) is 1/4 away; client 2 is empty.
    assert report.mean_total_variation == pytest.approx(0.25)
    assert json.loads(json.dumps(report.to_json()))["clients"][1] == {
        "client": 1,
        "size": 2,
        "counts": {"a": 1, "b": 1},
    }


@given(sizes=st.lists(st.integers(5, 30), min_size=3, max_size=6), seed=st.integers(0, 99))
def test_the_report_counts_every_example_once(sizes: list[int], seed: int) -> None:
    data = examples(*sizes)
    report = partition_report(data, partition(data, settings("iid"), 3, seed), "task")
    totals: Counter[str] = Counter()
    for client in report.clients:
        assert sum(client.counts.values()) == client.size
        totals.update(client.counts)
    assert totals == Counter(example.task for example in data)
    assert 0 <= report.mean_total_variation < 1


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("dirichlet", r"a larger data\.partition\.alpha, fewer clients, or another seed"),
        ("iid", "fewer clients"),
    ],
)
def test_a_client_with_too_few_examples_is_refused(kind: str, remedy: str) -> None:
    message = rf"data\.partition: client \d would get \d+ examples, fewer than min_examples = 90; try {remedy}"
    with pytest.raises(ConfigError, match=message):
        partition(examples(100, 100), settings(kind, 0.1, min_examples=90), 4, seed=0)


def test_more_clients_than_examples_is_refused() -> None:
    for count in (5, 10**12):  # said before anything is drawn for each client
        with pytest.raises(ConfigError, match=rf"clients\.count is {count}, but there are 3 examples .* at most 3"):
            partition(examples(3), settings("iid"), count, seed=0)


def test_fewer_values_than_clients_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"field 'task' has 2 values, too few for 3 clients; lower clients\.count to 2"
    ):
        partition(examples(9, 9), settings("natural"), 3, seed=0)


@pytest.mark.parametrize("kind", ["natural", "dirichlet"])
def test_an_unknown_field_lists_those_there_are(kind: str) -> None:
    data = [*examples(3), Example("q", "x", fields={"task": "a", "region": "north"})]
    message = r"data\.partition\.field: example 1 has no field 'region'; fields of all examples: task"
    with pytest.raises(ConfigError, match=message):
        partition(data, settings(kind, field="region"), 1, seed=0)
    with pytest.raises(ConfigError, match="fields of all examples: none"):
        partition([Example("q", "x")], settings(kind), 1, seed=0)


def test_clients_are_dealt_to_the_tiers_in_turn() -> None:
    settings = parse_run({"clients": {"count": 5}, "tiers": {"budgets": [0.25, 1.0]}})
    expected = {"client-0": 0, "client-1": 1, "client-2": 0, "client-3": 1, "client-4": 0}
    assert tier_of_client(settings) == expected
