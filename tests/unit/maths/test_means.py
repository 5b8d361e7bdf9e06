"""Streaming weighted means."""

import pytest
import torch

from ubsmoe.maths.means import WeightedMean

EXPERTS, RANK, WIDTH = 3, 2, 5


def test_the_mean_is_weighted_per_tensor_and_per_expert():
    # by hand: expert 0 is (1*2 + 3*6)/4 = 5, expert 1 only the first client's 4, the bias (1*10 + 1*20)/2
    mean = WeightedMean()
    first = {"A": torch.tensor([[2.0], [4.0]]), "bias": torch.tensor(10.0)}
    second = {"A": torch.tensor([[6.0], [9.0]]), "bias": torch.tensor(20.0)}
    mean.add(first, {"A": torch.tensor([1.0, 5.0]), "bias": 1.0})
    mean.add(second, {"A": torch.tensor([3.0, 0.0]), "bias": 1.0})
    result = mean.result({"A": torch.zeros(2, 1), "bias": torch.tensor(0.0)})
    assert result["A"].tolist() == [[5.0], [4.0]] and result["bias"].item() == 15.0


def test_what_nobody_weighs_in_on_is_the_fallback_bit_for_bit():
    fallback = {"A": torch.tensor([[0.1, -0.0], [float("nan"), 1e-45]]), "B": torch.tensor([7.0, -0.0])}
    mean = WeightedMean()
    mean.add({"A": torch.ones(2, 2)}, weight=torch.zeros(2))
    result = mean.result(fallback)
    assert all(result[name].view(torch.int32).equal(fallback[name].view(torch.int32)) for name in fallback)
    assert result["B"].data_ptr() != fallback["B"].data_ptr()


def test_an_expert_with_no_weight_may_hold_anything():
    mean = WeightedMean()
    mean.add({"A": torch.tensor([[float("nan")], [2.0]])}, weight=torch.tensor([0.0, 1.0]))
    mean.add({"A": torch.tensor([[3.0], [float("inf")]])}, weight=torch.tensor([1.0, 0.0]))
    assert mean.result({"A": torch.zeros(2, 1)})["A"].tolist() == [[3.0], [2.0]]


def test_the_result_has_the_fallbacks_dtype_and_sums_are_float64():
    mean, tiny = WeightedMean(), 2.0**-20
    for value in (1.0, tiny, -1.0):
        mean.add({"x": torch.tensor([value], dtype=torch.bfloat16)}, weight=1.0)
    result = mean.result({"x": torch.zeros(1, dtype=torch.bfloat16)})["x"]
    assert result.dtype == torch.bfloat16
    assert result.item() == torch.tensor(tiny / 3, dtype=torch.bfloat16).item()


def test_clients_tensors_are_neither_kept_nor_changed():
    tensor, mean = torch.ones(EXPERTS, RANK, WIDTH, requires_grad=True), WeightedMean()
    mean.add({"A": tensor}, weight=2.0)
    with torch.no_grad():
        tensor.fill_(9.0)
    result = mean.result({"A": torch.zeros_like(tensor)})["A"]
    assert result.eq(1.0).all() and not result.requires_grad


def test_memory_does_not_grow_with_the_number_of_clients():
    mean = WeightedMean()

    def held() -> int:
        return sum(t.untyped_storage().nbytes() for part in vars(mean).values() for t in part.values())

    for client in range(20):
        mean.add({"A": torch.full((EXPERTS, RANK, WIDTH), float(client))}, weight=1.0)
        if client == 0:
            first = held()
    assert held() == first == 8 * (EXPERTS * RANK * WIDTH + EXPERTS)


@pytest.mark.parametrize(
    ("tensor", "weight", "words"),
    [
        (torch.ones(2, 5), 1.0, r"got \[2, 5\].*\[3, 5\]"),
        (torch.ones(1, 5), 1.0, "earlier"),
        (torch.ones(3, 5), -1.0, "negative"),
        (torch.ones(3, 5), float("nan"), "finite"),
        (torch.ones(3, 5), torch.ones(5), "one per expert"),
        (torch.ones(3, 5), {"B": 1.0}, "no weight"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_counted(tensor, weight, words):
    mean = WeightedMean()
    mean.add({"A": torch.full((3, 5), 2.0)}, weight=1.0)
    with pytest.raises(ValueError, match=words):
        mean.add({"new": torch.ones(3), "A": tensor}, weight if isinstance(weight, dict) else {"new": 1.0, "A": weight})
    assert mean.result({"A": torch.zeros(3, 5)})["A"].eq(2.0).all()


def test_a_result_of_other_names_or_shapes_is_refused():
    mean = WeightedMean()
    mean.add({"A": torch.ones(3, 5)}, weight=1.0)
    with pytest.raises(ValueError, match="'A'"):
        mean.result({"B": torch.ones(3, 5)})
    with pytest.raises(ValueError, match=r"averaged \[3, 5\], expected \[3, 1\]"):
        mean.result({"A": torch.ones(3, 1)})
