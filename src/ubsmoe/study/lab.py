"""A mixture of experts small enough to know everything about: where does SGD stall when experts learn from their own tokens only?

    y(x) = sum_i p_i(x) Theta_i . x        loss F(Theta) = 1/2 mean (y - t)^2 + mu/2 |Theta|^2

p is a fixed softmax router, so F is a strongly convex quadratic with a known optimum Theta*. Top-K masks the gradient:
expert i learns from the tokens that chose it. The targets come from another router's mixture, so an error remains at the
optimum and the masked part of its gradient does not vanish: SGD then settles elsewhere, and F there less F* is the floor.

`dense` takes the error of the full mixture, as the paper's analysis does; `sparse` takes the error of the K experts alone, which
is what a client can compute. Every pseudo-gradient is the library's own.

Source: the corollary is the paper's (UB-SMoE, arXiv 2605.16690); the problem is ours.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from scipy.stats import pearsonr
from torch import Tensor

from ubsmoe import progress
from ubsmoe.maths.pseudo_gradient import PseudoGradient, parameter_signal, routing_mass
from ubsmoe.seeds import generator_for
from ubsmoe.study import bounds

Forward = Literal["dense", "sparse"]

SIGNALS = {
    "off": PseudoGradient("off"),
    "client_mean": PseudoGradient("client_mean", strength=1.0),
    "self_ipw": PseudoGradient("self_ipw", strength=1.0),
    "sampled": PseudoGradient("sampled", strength=1.0, fraction=0.1),
    "oracle": PseudoGradient("oracle", strength=1.0),
}
BATCH, STEPS = 256, 1000


@dataclass(frozen=True)
class Problem:
    """Tokens x, gate weights p, targets t, and the ridge mu that makes the loss strongly convex."""

    x: Float[Tensor, "N d"]
    p: Float[Tensor, "N M"]
    t: Float[Tensor, " N"]
    ridge: float

    @property
    def num_experts(self) -> int:
        """M."""
        return self.p.shape[1]

    def chosen(self, top_k: int) -> Bool[Tensor, "N M"]:
        """Which experts each token uses."""
        return torch.zeros_like(self.p, dtype=torch.bool).scatter_(1, self.p.topk(top_k, dim=1).indices, True)

    def features(self) -> Float[Tensor, "N M d"]:
        """p_i(x) x: what Theta_i is multiplied by."""
        return self.p[:, :, None] * self.x[:, None, :]

    def loss(self, theta: Float[Tensor, "M d"]) -> float:
        """F."""
        error = torch.einsum("nmd,md->n", self.features(), theta) - self.t
        return float(error.square().mean() / 2 + self.ridge * theta.square().sum() / 2)


@dataclass(frozen=True)
class Floor:
    """One row of the result: the measured floor, with what is known without running SGD beside it.

    `exact` is the loss above the optimum at the point where the mean masked gradient is zero (without a pseudo-gradient),
    `bound` the paper's 2 ||B||^2 / mu', `coarse` the same with ||B||^2 replaced by its bound G^2 (M - K).
    """

    seed: int
    forward: Forward
    top_k: int
    signal: str
    measured: float
    exact: float
    squared_bias: float
    bound: float
    coarse: float


def make_problem(
    seed: int, num_experts: int = 8, width: int = 5, num_tokens: int = 1024, ridge: float = 0.5
) -> Problem:
    """Draw tokens, a router, and targets that no mixture under this router can meet."""
    draw = generator_for(seed, "lab")

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    x = normal(num_tokens, width)
    # mild routers: of a sharp one the best two experts hold nearly all weight, and little is left to miss
    p, other = ((x @ normal(width, num_experts) / width**0.5).softmax(1) for _ in range(2))
    return Problem(x, p, torch.einsum("nm,nd,md->n", other, x, 3 * normal(num_experts, width)), ridge)


def optimum(problem: Problem, top_k: int | None = None, forward: Forward = "dense") -> Float[Tensor, "M d"]:
    """Where the mean gradient is zero: Theta* without a budget, else the point at which masked SGD settles."""
    field, constant = _field(problem, problem.num_experts if top_k is None else top_k, forward)
    return torch.linalg.solve(field, constant).view(problem.num_experts, -1)


def bias(problem: Problem, top_k: int) -> Float[Tensor, "M d"]:
    """B(Theta*), the bias of top-K, from its definition."""
    chosen, theta = problem.chosen(top_k), optimum(problem)
    error = torch.einsum("nmd,md->n", problem.features(), theta) - problem.t
    gradients = problem.features() * error[:, None, None]
    missed = (~chosen).double().sum(0).clamp_min(1)
    return bounds.sparse_bias(chosen.double().mean(0), (gradients * ~chosen[:, :, None]).sum(0) / missed[:, None])


def settle(
    problem: Problem, top_k: int, signal: PseudoGradient, forward: Forward, seed: int, steps: int | None = None
) -> float:
    """Run SGD with a step that falls to zero; the loss of its last tenth's mean, above the optimum."""
    theta, tail, steps = optimum(problem), [], steps or STEPS
    draw, chosen = generator_for(seed, top_k, signal.mode), problem.chosen(top_k)
    largest = float(torch.linalg.matrix_norm(_field(problem, problem.num_experts, "dense")[0], 2))
    for step in range(steps):
        rows = torch.randint(len(problem.t), (BATCH,), generator=draw)
        gradient = _client_gradient(problem, rows, chosen[rows], theta, signal, forward, draw)
        theta = theta - (1 - step / steps) / (2 * largest) * (gradient + problem.ridge * theta)
        if step >= 0.9 * steps:
            tail.append(theta)
    return problem.loss(torch.stack(tail).mean(0)) - problem.loss(optimum(problem))


def bias_floor(seeds: Sequence[int], forwards: Sequence[Forward] = ("dense", "sparse")) -> Iterator[Floor]:
    """Every seed, forward, budget and signal, one row at a time."""
    for seed in seeds:
        problem = make_problem(seed)
        best, experts = problem.loss(optimum(problem)), problem.num_experts
        for top_k in progress.through(range(1, experts + 1), f"seed {seed}, K"):
            squared, strong = float(bias(problem, top_k).square().sum()), monotonicity(problem, top_k)
            coarse = bounds.budget_bias_bound(experts, top_k, gradient_bound(problem))
            for forward in forwards:
                exact = problem.loss(optimum(problem, top_k, forward)) - best
                for name, signal in SIGNALS.items():
                    yield Floor(
                        seed,
                        forward,
                        top_k,
                        name,
                        settle(problem, top_k, signal, forward, seed),
                        exact,
                        squared,
                        bounds.sgd_floor(squared, strong),
                        bounds.sgd_floor(coarse, strong),
                    )


def floor_rows(floors: Sequence[Floor]) -> list[dict[str, Any]]:
    """Ready for CSV."""
    return [asdict(floor) for floor in floors]


def floor_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Floors by budget and signal, mean over seeds, and what those of top-K alone follow in M - K."""
    lines = []
    for forward in dict.fromkeys(row["forward"] for row in rows):
        own = [row for row in rows if row["forward"] == forward]
        budgets = list(dict.fromkeys(row["top_k"] for row in own))
        table = {name: [_mean(own, k, name, "measured") for k in budgets] for name in SIGNALS}
        known = {key: [_mean(own, k, "off", key) for k in budgets] for key in ("exact", "bound", "coarse")}
        lines += [f"floor, error of the {forward} mixture", "", "| | " + " | ".join(f"K = {k}" for k in budgets) + " |"]
        lines += ["|---" * (len(budgets) + 1) + "|"]
        for name, values in (table | known).items():
            lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
        missing, floors = [max(budgets) - k for k in budgets], torch.tensor(table["off"]).double()
        line, exponential = (pearsonr(missing, y).statistic ** 2 for y in (floors, floors.log()))
        fits = f"R^2 of a straight line {line:.3f}, of an exponential {exponential:.3f}"
        lines += ["", f"top-K alone against M - K: {fits}", ""]
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, Any]], top_k: int, signal: str, key: str) -> float:
    return statistics.fmean(row[key] for row in rows if row["top_k"] == top_k and row["signal"] == signal)


def _client_gradient(
    problem: Problem,
    rows: Tensor,
    chosen: Tensor,
    theta: Tensor,
    signal: PseudoGradient,
    forward: Forward,
    draw: torch.Generator,
) -> Float[Tensor, "M d"]:
    """What a client of this budget adds up in one step: its experts' gradient and the pseudo-gradient."""
    features = problem.p[rows][:, :, None] * problem.x[rows][:, None, :]
    seen = features * chosen[:, :, None] if forward == "sparse" else features
    pairs = features * (torch.einsum("nmd,md->n", seen, theta) - problem.t[rows])[:, None, None] / len(rows)
    own = (pairs * chosen[:, :, None]).sum(0)
    if signal.mode == "off":
        return own
    if signal.is_exact:
        kept = torch.rand(chosen.shape, generator=draw) < signal.pair_fraction
        return own + (pairs * (~chosen & kept)[:, :, None]).sum(0) / signal.pair_fraction
    rho = signal.rho(int(chosen[0].sum()), problem.num_experts)
    return own + parameter_signal(signal, own, routing_mass(problem.p[rows], chosen, rho=rho))


def _field(problem: Problem, top_k: int, forward: Forward) -> tuple[Tensor, Tensor]:
    """The mean masked gradient is affine in Theta: its matrix, ridge included, and its constant."""
    masked = problem.features() * problem.chosen(top_k)[:, :, None]
    seen = masked if forward == "sparse" else problem.features()
    flat = masked.flatten(1)
    matrix = flat.T @ seen.flatten(1) / len(problem.t)
    return matrix + problem.ridge * torch.eye(len(matrix), dtype=matrix.dtype), flat.T @ problem.t / len(problem.t)


def monotonicity(problem: Problem, top_k: int) -> float:
    """mu': the least eigenvalue of the symmetric part of the masked field."""
    matrix = _field(problem, top_k, "dense")[0]
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])


def gradient_bound(problem: Problem) -> float:
    """G: the largest ||E[grad_i | i not in A]|| at the optimum, over experts and budgets."""
    largest = 0.0
    for top_k in range(1, problem.num_experts):
        missed = 1 - problem.chosen(top_k).double().mean(0)
        largest = max(largest, float((bias(problem, top_k).norm(dim=1) / missed.clamp_min(1e-12)).max()))
    return largest
