"""What test_experts.py, where both kernels run in float64, cannot show: torch's operator, its launches, and who waits for whom."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from ubsmoe.model.expert_weights import ExpertWeights, Lora, matrix_names
from ubsmoe.model.kernel_choice import GROUPED_ON
from ubsmoe.model.kernel_grouped import _Rows, can_group, run_grouped
from ubsmoe.model.kernel_reference import run_assignments_slowly
from ubsmoe.model.quantised import quantise_in_place

EXPERTS, TOKENS, HIDDEN, WIDTH, RANK = 5, 7, 16, 8, 3
TOKEN, EXPERT = (
    [0, 0, 1, 1, 2, 2, 4, 4, 6, 6, 6],
    [3, 1, 0, 3, 1, 0, 3, 1, 0, 1, 3],
)  # experts 2 and 4, tokens 3 and 5 get nothing


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(module: Any, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, gate weights, A and B of both matrices."""
    (_, h, pre), (_, f, _) = ExpertWeights.of(module).up.shape, ExpertWeights.of(module).down.shape
    shapes = [(TOKENS, h), (len(TOKEN),), *((EXPERTS, *s) for s in ((RANK, h), (pre, RANK), (RANK, f), (h, RANK)))]
    return [normal(*shape, seed=n, dtype=dtype).requires_grad_() for n, shape in enumerate(shapes)]


def run(kernel: Any, module: Any, leaves: list[Tensor]) -> Tensor:
    hidden, weight, *factors = leaves
    token, expert = torch.tensor(TOKEN, device=hidden.device), torch.tensor(EXPERT, device=hidden.device)
    y: Tensor = kernel(hidden, token, expert, weight, ExpertWeights.of(module), Lora(*factors, scale=0.7))
    return y


@pytest.mark.parametrize("layout", oracles.LAYOUTS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_torchs_grouped_product_gives_the_references_output_and_gradients(
    layout: str, dtype: torch.dtype, error: float
) -> None:
    exact = oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH)
    module = oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH).to(dtype)
    leaves = inputs(module, dtype)
    assert can_group(leaves[0], ExpertWeights.of(module))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for name, weight in module.named_parameters():
        exact.get_parameter(name).copy_(weight)
    delta = normal(TOKENS, HIDDEN, seed=9, dtype=dtype)
    ours, want = run(run_grouped, module, leaves), run(run_assignments_slowly, exact, wide)
    found = [ours, *torch.autograd.grad(ours, leaves, delta)]
    right = [want, *torch.autograd.grad(want, wide, delta.double())]
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= error * other.norm()
    for grad in found[3:]:
        assert not grad[2].any() and not grad[4].any()


class Launches(TorchDispatchMode):
    """Counts what is launched: torch's operators but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_pass_over_a_layer_is_few_launches_and_the_host_waits_for_none() -> None:
    """On tensors without values, which refuse whatever asks the device for a number; at OLMoE's number of experts."""
    module = oracles.experts_module("gated", 64, HIDDEN, WIDTH).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), Launches() as launches:
        hidden = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        token, expert = torch.empty(20, dtype=torch.int64), torch.empty(20, dtype=torch.int64)
        shapes = (RANK, HIDDEN), (2 * WIDTH, RANK), (RANK, WIDTH), (HIDDEN, RANK)
        factors = [torch.empty(64, *shape, requires_grad=True) for shape in shapes]
        weight = torch.empty(20, requires_grad=True)
        base = ExpertWeights.of(module)
        run_grouped(hidden, token, expert, weight, base, Lora(*factors, scale=2.0)).sum().backward()
    assert 50 < launches.count <= 200


def test_sums_are_taken_in_the_order_of_rows() -> None:
    token = torch.tensor([2, 0, 2, 2, 0])
    rows = normal(5, 3, seed=0, dtype=torch.float32)
    sums = _Rows.of(token, 4).add_up(rows)
    zero = torch.zeros(3)
    assert torch.equal(sums, torch.stack([rows[1] + rows[4], zero, rows[0] + rows[2] + rows[3], zero]))


def test_accelerators_take_groups_but_for_quantised_and_unaligned_experts() -> None:
    assert "cuda" in GROUPED_ON and "cpu" not in GROUPED_ON
    hidden = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    fits = oracles.experts_module("gated", EXPERTS, HIDDEN, WIDTH).bfloat16()
    assert can_group(hidden, ExpertWeights.of(fits))
    odd = oracles.experts_module("gated", EXPERTS, HIDDEN, WIDTH + 1).bfloat16()
    assert not can_group(hidden, ExpertWeights.of(odd))
    quantise_in_place(fits, matrix_names(fits), "int8")
    assert not can_group(hidden, ExpertWeights.of(fits))
