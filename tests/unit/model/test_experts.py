"""Both routed expert kernels against their slow reference, and that against experts written out per layout, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel import _in_buckets
from ubsmoe.model.kernel_choice import run_assignments
from ubsmoe.model.kernel_reference import run_assignments_slowly
from unit.model.small_layer import HIDDEN, WIDTH, normal, random_factors

pytestmark = pytest.mark.usefixtures("each_kernel")
every_layout = pytest.mark.parametrize("layout", oracles.LAYOUTS)
EXPERTS = 4
ASSIGNMENTS = {  # tokens and their experts, over 4 experts
    "two experts each": ([0, 0, 1, 1, 2, 2], [3, 1, 0, 3, 1, 0]),  # expert 2 gets nothing
    "one token": ([0, 0], [2, 1]),
    "every expert": ([0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 3, 2, 1, 0]),
    "one expert does it all": ([0, 1, 2], [3, 3, 3]),
    "a token without an assignment": ([2, 2], [0, 1]),
    "the same assignment twice": ([1, 1], [2, 2]),
    "no assignment at all": ([], []),
}
every_case = pytest.mark.parametrize("case", ASSIGNMENTS)


class Problem:
    """Inputs of one call, by the kernel, by the reference, and by one expert at a time."""

    def __init__(self, layout: str, case: str) -> None:
        token, expert = ASSIGNMENTS[case]
        self.token, self.expert = torch.tensor(token, dtype=torch.int64), torch.tensor(expert, dtype=torch.int64)
        self.module = oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH)
        self.factors = random_factors(self.module)
        self.hidden = normal(3, HIDDEN, seed=7).requires_grad_()
        self.weight = normal(len(token), seed=8).requires_grad_()

    @property
    def inputs(self) -> list[Tensor]:
        return [self.hidden, self.weight, *self.factors.leaves()]

    def ours(self, hidden: Tensor, weight: Tensor, *factors: Tensor, run: Any = run_assignments) -> Tensor:
        lora = Lora(*factors, scale=self.factors.scale)
        return run(hidden, self.token, self.expert, weight, ExpertWeights.of(self.module), lora)

    def theirs(self) -> Tensor:
        return self.ours(*self.inputs, run=run_assignments_slowly)

    def one_by_one(self) -> Tensor:
        y = torch.zeros(3, HIDDEN, dtype=torch.float64)
        for n, (t, i) in enumerate(zip(self.token.tolist(), self.expert.tolist(), strict=True)):
            one = self.weight[n] * oracles.one_expert(self.module, self.factors, i, self.hidden[t])
            y = y + torch.nn.functional.one_hot(torch.tensor(t), 3)[:, None] * one
        return y


@every_layout
def test_the_reference_is_each_layouts_experts_written_out(layout: str) -> None:
    problem = Problem(layout, "two experts each")
    torch.testing.assert_close(problem.theirs(), problem.one_by_one(), rtol=1e-12, atol=1e-12)


@every_layout
@every_case
def test_outputs_and_all_gradients_equal_the_references(layout: str, case: str) -> None:
    problem, delta = Problem(layout, case), normal(3, HIDDEN, seed=9)
    ours = problem.ours(*problem.inputs)
    grads = torch.autograd.grad(ours, problem.inputs, delta)
    if case == "no assignment at all":
        assert not ours.any() and not any(grad.any() for grad in grads)
        return
    theirs = problem.theirs()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours_grad, their_grad in zip(grads, torch.autograd.grad(theirs, problem.inputs, delta), strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-11, atol=1e-12)


@every_layout
@pytest.mark.parametrize("case", ["two experts each", "one token", "every expert"])
def test_gradcheck_passes_in_float64(layout: str, case: str) -> None:
    problem = Problem(layout, case)
    assert torch.autograd.gradcheck(problem.ours, problem.inputs, fast_mode=case != "one token")


@every_layout
def test_experts_without_an_assignment_get_exact_zeros(layout: str) -> None:
    problem = Problem(layout, "two experts each")
    grads = torch.autograd.grad(problem.ours(*problem.inputs).sum(), problem.inputs)
    for grad in grads[2:]:
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        assert all(grad[i].any() for i in (0, 1, 3))


@every_layout
def test_any_subset_of_inputs_can_be_trained_alone(layout: str) -> None:
    problem, delta = Problem(layout, "two experts each"), normal(3, HIDDEN, seed=9)
    full = torch.autograd.grad(problem.ours(*problem.inputs), problem.inputs, delta)
    for wanted in ([0], [1], [3], [4], [3, 5], [0, 1], [2, 3, 4, 5]):
        inputs = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(problem.inputs)]
        problem.ours(*inputs).backward(delta)
        for n, x in enumerate(inputs):
            assert (x.grad is None) == (n not in wanted)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, full[n])


def test_frozen_weights_never_get_a_gradient_and_inputs_are_not_written() -> None:
    problem = Problem("transposed", "every expert")
    for weight in problem.module.parameters():
        weight.requires_grad_()
    before = [x.detach().clone() for x in [*problem.inputs, *problem.module.parameters()]]
    problem.ours(*problem.inputs).square().sum().backward()
    assert all(weight.grad is None for weight in problem.module.parameters())
    for x, old in zip([*problem.inputs, *problem.module.parameters()], before, strict=True):
        assert torch.equal(x, old)


def test_the_order_of_assignments_does_not_matter() -> None:
    problem = Problem("gated", "every expert")
    first = problem.ours(*problem.inputs)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    problem.token, problem.expert = problem.token[order], problem.expert[order]
    torch.testing.assert_close(problem.ours(problem.hidden, problem.weight[order], *problem.factors.leaves()), first)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_a_half_precision_base_keeps_its_dtype_and_the_adapter_its_own(weight_dtype: torch.dtype) -> None:
    problem = Problem("transposed", "two experts each")
    exact = torch.autograd.grad(problem.ours(*problem.inputs).sum(), problem.inputs)
    problem.module.to(torch.bfloat16)
    dtypes = [torch.bfloat16, weight_dtype, *[torch.float32] * 4]
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(problem.inputs, dtypes, strict=True)]
    y = problem.ours(*inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for x, want in zip(inputs, exact, strict=True):
        assert x.grad is not None and x.grad.dtype == x.dtype
        assert (x.grad.double() - want).norm() <= 0.05 * want.norm()


def test_bfloat16_groups_are_filled_up_with_assignments_that_change_nothing() -> None:
    expert = torch.tensor([2] * 70 + [0] * 3)
    weight = torch.full((73,), 0.5).requires_grad_()
    token, filled, weights = _in_buckets(torch.arange(73), expert, weight, 4)
    assert torch.bincount(filled, minlength=4).tolist() == [16, 0, 96, 0]
    assert torch.equal(token[:73], torch.arange(73)) and torch.equal(filled[:73], expert)
    assert torch.equal(weights[:73], weight) and not weights[73:].any()


def test_one_assignment_worked_by_hand() -> None:
    # one token, expert 1 of 2; h = 1, f = 1, rank 1, gate and up side by side, silu(1) = 0.7311
    module = oracles.experts_module("gated", 2, 1, 1)
    module.gate_up_proj.copy_(torch.tensor([[[9.0], [9.0]], [[0.5], [2.0]]]))
    module.down_proj.copy_(torch.tensor([[[9.0]], [[3.0]]]))

    def both(one: float) -> Any:
        return torch.tensor([9.0, one]).double().view(2, 1, 1)

    up_b = torch.tensor([[[9.0], [9.0]], [[0.5], [0.0]]]).double()
    lora = Lora(up_a=both(0.5), up_b=up_b, down_a=both(0.0), down_b=both(1.0), scale=2.0)
    hidden, weight = torch.tensor([[1.0]]).double(), torch.tensor([0.25]).double()
    y = run_assignments(hidden, torch.tensor([0]), torch.tensor([1]), weight, ExpertWeights.of(module), lora)
    # gate = 0.5 + 2 * 0.5 * 0.5 = 1, up = 2, inner = silu(1) * 2 = 1.4621, down 3: 0.25 * 3 * 1.4621
    assert y.item() == pytest.approx(0.25 * 3 * 2 * 0.7310585786)
