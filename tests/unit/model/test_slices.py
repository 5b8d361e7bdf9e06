"""Slices are the kernel on narrowed copies, bit for bit, whatever the layout and however the whole experts are stored."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from ubsmoe.model.expert_weights import ExpertWeights, Lora, matrix_names
from ubsmoe.model.kernel import run_assignments
from ubsmoe.model.kernel_grouped import can_group, run_grouped
from ubsmoe.model.on_demand import OnDemand
from ubsmoe.model.quantised import quantise_in_place
from ubsmoe.model.slices import NarrowedExperts, Slices

EXPERTS, HIDDEN, WIDTH, RANK = 4, 16, 24, 3
TOKEN, EXPERT = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([3, 1, 0, 3, 1, 0])  # expert 2 gets nothing


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def channels() -> Tensor:
    """A third of each expert's, another third for each."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(WIDTH, generator=generator)[: WIDTH // 3].sort().values for _ in range(EXPERTS)])


def copied(narrowed: ExpertWeights) -> ExpertWeights:
    """The same matrices, all in memory."""
    up, down = (torch.stack([part[i].clone() for i in range(EXPERTS)]) for part in (narrowed.up, narrowed.down))
    return replace(narrowed, up=up, down=down)


def outcome(kernel: Callable[..., Tensor], base: ExpertWeights, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    (_, h, pre), (_, f, _) = base.up.shape, base.down.shape
    shapes: list[tuple[int, ...]] = [
        (3, h),
        (6,),
        *((EXPERTS, *s) for s in ((RANK, h), (pre, RANK), (RANK, f), (h, RANK))),
    ]
    leaves = [normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]
    y = kernel(leaves[0], TOKEN, EXPERT, leaves[1], base, Lora(*leaves[2:], scale=0.7))
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("format", [None, "int8", "nf4"])
@pytest.mark.parametrize("layout", oracles.LAYOUTS)
def test_a_slice_is_read_from_the_whole_as_if_it_had_been_copied(layout: str, format: Any) -> None:
    module = oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH)
    whole = ExpertWeights.of(module)
    if format:
        quantise_in_place(module, matrix_names(module), format)
        whole = ExpertWeights.of(module)
    kept = channels()
    narrowed = Slices.of(whole, kept).weights
    assert isinstance(narrowed.up, OnDemand) and isinstance(narrowed.down, OnDemand)
    columns = Slices.of(whole, kept).columns
    for i in range(EXPERTS):
        assert torch.equal(narrowed.up[i], whole.up[i][:, columns[i]])
        assert torch.equal(narrowed.down[i], whole.down[i][kept[i]])
    assert (tuple(narrowed.up.shape[1:]), tuple(narrowed.down.shape[1:])) == (
        narrowed.up[0].shape,
        narrowed.down[0].shape,
    )
    found, want = (outcome(run_assignments, base, torch.float64) for base in (narrowed, copied(narrowed)))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", oracles.LAYOUTS)
def test_an_accelerators_kernel_gathers_all_slices_of_a_layer_at_once(layout: str) -> None:
    module = oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH).bfloat16()
    narrowed = Slices.of(ExpertWeights.of(module), channels()).weights
    assert isinstance(narrowed.up, NarrowedExperts)
    for i in range(EXPERTS):
        assert torch.equal(narrowed.up.all_at_once()[i], narrowed.up[i])
    assert can_group(torch.zeros(1, HIDDEN, dtype=torch.bfloat16), narrowed)
    found, want = (outcome(run_grouped, base, torch.bfloat16) for base in (narrowed, copied(narrowed)))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    quantise_in_place(module, matrix_names(module), "int8")
    assert not can_group(
        torch.zeros(1, HIDDEN, dtype=torch.bfloat16), Slices.of(ExpertWeights.of(module), channels()).weights
    )
