"""Quantised experts are the kernel on their dequantised matrices, bit for bit, whatever the layout."""

import pytest
import torch

import oracles
from ubsmoe.config import ModelSettings
from ubsmoe.errors import UserError
from ubsmoe.export.installed import read_installed
from ubsmoe.export.save_load import Origin, write
from ubsmoe.model.conventions import find_blocks
from ubsmoe.model.expert_weights import ExpertWeights, Lora, matrix_names
from ubsmoe.model.kernel import run_assignments
from ubsmoe.model.kernel_reference import run_assignments_slowly
from ubsmoe.model.quantised import packed_sizes, quantise_in_place, quantised, quantised_matrix
from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, tiny, words
from unit.model.small_layer import HIDDEN, WIDTH, normal, random_factors

EXPERTS = 4
every_format = pytest.mark.parametrize("format", ["int8", "nf4"])


def dequantise_for_good(module, format):
    """Give a module the matrices that its quantised twin computes with."""
    for name in matrix_names(module):
        matrices = quantised_matrix(module, name)
        rows = [matrices[i] if module.is_transposed else matrices[i].t() for i in range(len(matrices))]
        yield name, torch.stack(rows)


@every_format
@pytest.mark.parametrize("layout", oracles.LAYOUTS)
def test_the_kernel_on_quantised_experts_is_the_kernel_on_what_they_stand_for(layout, format):
    module, plain = (oracles.experts_module(layout, EXPERTS, HIDDEN, WIDTH) for _ in range(2))
    quantise_in_place(module, matrix_names(module), format)
    for name, matrices in dequantise_for_good(module, format):
        assert (getattr(plain, name) - matrices).abs().max() > 1e-4
        getattr(plain, name).copy_(matrices)
    assert ExpertWeights.of(module).up.shape == tuple(ExpertWeights.of(plain).up.shape)
    assert ExpertWeights.of(module).down.shape == tuple(ExpertWeights.of(plain).down.shape)
    token, expert = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([3, 1, 0, 3, 1, 0])
    factors = random_factors(module)
    inputs = [normal(3, HIDDEN, seed=7).requires_grad_(), normal(6, seed=8).requires_grad_(), *factors.leaves()]

    def run(kernel, experts):
        y = kernel(inputs[0], token, expert, inputs[1], ExpertWeights.of(experts), Lora(*factors.leaves(), scale=0.7))
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    ours, want, slow = run(run_assignments, module), run(run_assignments, plain), run(run_assignments_slowly, module)
    assert all(torch.equal(one, other) for one, other in zip(ours, want, strict=True))
    for one, other in zip(ours, slow, strict=True):
        torch.testing.assert_close(one, other)


@every_format
def test_an_expert_is_quantised_by_itself(format):
    module, other = (oracles.experts_module("gated", EXPERTS, HIDDEN, WIDTH) for _ in range(2))
    other.gate_up_proj[2] *= 100
    for one in (module, other):
        quantise_in_place(one, matrix_names(one), format)
    mine, theirs = (quantised_matrix(one, "gate_up_proj") for one in (module, other))
    assert [torch.equal(mine[i], theirs[i]) for i in range(EXPERTS)] == [True, True, False, True]


@every_format
@pytest.mark.parametrize("shape", [(64, 128), (20, 24), (7, 9)])
def test_sizes_are_known_before_anything_is_quantised(shape, format):
    packed, scales = quantised(torch.randn(shape), format)
    assert packed_sizes(shape, format) == (len(packed), len(scales))


@every_format
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_trains_on_quantised_experts(family, format):
    plain, ids = tiny(family), words()
    plain.set_experts_implementation("eager")
    stock = plain(ids).logits.detach()
    model, rounded = tiny(family), tiny(family)
    for (_, experts), (_, twin) in zip(find_blocks(model), find_blocks(rounded), strict=True):
        quantise_in_place(experts, matrix_names(experts), format)
        for name, matrices in dequantise_for_good(experts, format):
            getattr(twin, name).data.copy_(matrices)
    rounded.set_experts_implementation("eager")
    sparse, twin = SparseModel(model), SparseModel(rounded)
    torch.testing.assert_close(sparse.model(ids).logits, twin.model(ids).logits)  # without an adapter too
    assert 0 < (sparse.model(ids).logits - stock).abs().max() < stock.abs().max()
    grads = []
    for one in (sparse, twin):
        one.load_adapter(one.fresh_adapter(2, torch.Generator().manual_seed(0), shared_a=False), 4.0)
        one.model(ids).logits.square().mean().backward()
        grads.append([value.grad for value in one.adapter.values()])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)
    sparse.clear()
    torch.testing.assert_close(sparse.model(ids).logits, sparse.model(ids).logits)


def test_quantised_weights_are_no_place_to_merge_into(tmp_path):
    model = tiny("olmoe")
    for _, experts in find_blocks(model):
        quantise_in_place(experts, matrix_names(experts), "nf4")
    sparse = SparseModel(model)
    fresh = sparse.fresh_adapter(2, torch.Generator().manual_seed(0), shared_a=True)
    sparse.load_adapter({name: value + 0.01 for name, value in fresh.items()}, 4.0)  # an adapter of zeros is no export
    installed, origin = read_installed(sparse), Origin(ModelSettings(base="tiny", experts="nf4"), "0" * 64, "fedavg")
    with pytest.raises(UserError, match="with quantised experts; use `ubsmoe export RUN --format merged`"):
        write(sparse, None, installed, origin, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write(sparse, None, installed, origin, "peft", tmp_path / "out").experts == "nf4"
    assert "trained on experts in nf4" in (tmp_path / "out" / "README.md").read_text()
