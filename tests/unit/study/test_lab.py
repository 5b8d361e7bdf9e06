"""The lab's problem against gradients by autograd, and SGD against the point where the mean masked gradient is zero."""

import pytest
import torch

from ubsmoe.maths.pseudo_gradient import PseudoGradient
from ubsmoe.study import bounds, lab


@pytest.fixture(scope="module")
def problem() -> lab.Problem:
    return lab.make_problem(seed=3, num_experts=6, width=4, num_tokens=256)


def test_the_optimum_has_no_gradient(problem: lab.Problem) -> None:
    theta = lab.optimum(problem).requires_grad_()
    y = (problem.p * (problem.x @ theta.T)).sum(1)
    loss = (y - problem.t).square().mean() / 2 + problem.ridge / 2 * theta.square().sum()
    assert float(loss.detach()) == pytest.approx(problem.loss(theta.detach()))
    assert float(torch.autograd.grad(loss, theta)[0].norm()) < 1e-10


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_the_bias_is_the_mean_masked_gradient_at_the_optimum(problem: lab.Problem, top_k: int) -> None:
    theta, chosen = lab.optimum(problem), problem.chosen(top_k)
    masked = torch.zeros_like(theta)
    for n in range(len(problem.t)):
        error = sum(problem.p[n, i] * problem.x[n] @ theta[i] for i in range(6)) - problem.t[n]
        for i in range(6):
            if chosen[n, i]:
                masked[i] += problem.p[n, i] * error * problem.x[n] / len(problem.t)
    assert torch.allclose(lab.bias(problem, top_k), masked + problem.ridge * theta, atol=1e-10)


@pytest.mark.parametrize("forward", ["dense", "sparse"])
def test_sgd_stalls_where_the_mean_masked_gradient_vanishes(problem: lab.Problem, forward: lab.Forward) -> None:
    exact = problem.loss(lab.optimum(problem, 1, forward)) - problem.loss(lab.optimum(problem))
    measured = lab.settle(problem, 1, PseudoGradient("off"), forward, seed=0, steps=800)
    assert exact > 0.05 and measured == pytest.approx(exact, rel=0.1)


def test_the_exact_floor_lies_below_the_papers_and_vanishes_at_full_budget(problem: lab.Problem) -> None:
    best = problem.loss(lab.optimum(problem))
    floors = [problem.loss(lab.optimum(problem, k)) - best for k in range(1, 7)]
    for top_k, floor in enumerate(floors, 1):
        squared = float(lab.bias(problem, top_k).square().sum())
        assert floor <= bounds.sgd_floor(squared, lab.monotonicity(problem, top_k)) + 1e-12
    assert floors == sorted(floors, reverse=True) and abs(floors[-1]) < 1e-10


def test_the_oracle_removes_the_floor_of_the_dense_forward(problem: lab.Problem) -> None:
    plain = lab.settle(problem, 1, PseudoGradient("off"), "dense", seed=0, steps=400)
    assert lab.settle(problem, 1, PseudoGradient("oracle", strength=1.0), "dense", seed=0, steps=400) < plain / 10
