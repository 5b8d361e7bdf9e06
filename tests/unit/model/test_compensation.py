"""Laws of compensation, of every family: K_max is untouched, a fit that can be exact is, counts are of what runs, nothing stays."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from ubsmoe.costs.compensation import Skipped
from ubsmoe.costs.memory import peak_memory_bytes
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.model.compensation import PREFIX, Compensation, LayerCompensation, compensation_tensors, layer_compensations
from ubsmoe.model.compensation_fit import Form, FormSettings, fit_compensation
from ubsmoe.model.expert_weights import ExpertWeights, up_name
from ubsmoe.model.presets import shape_from_config
from ubsmoe.model.slices import Slices
from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, HIDDEN, WIDTH, tiny, words

FORMS: tuple[Form, ...] = ("map", "stand_ins", "elementwise", "constant", "none")
IDS = words()
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def adapted(family: str, seed: int = 0) -> SparseModel:
    """With an adapter whose B is not zero, so that the fit has to see it."""
    sparse = SparseModel(tiny(family, seed))
    adapter = sparse.fresh_adapter(3, torch.Generator().manual_seed(5), shared_a=True)
    draw = torch.Generator().manual_seed(6)
    sparse.load_adapter({name: 0.2 * torch.randn(value.shape, generator=draw) for name, value in adapter.items()}, 6.0)
    return sparse


def logits(sparse: SparseModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return sparse.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_at_k_max_nothing_changes_to_the_bit(family: str) -> None:
    sparse = adapted(family)
    before = logits(sparse)
    for form in FORMS:
        fitted = fit_compensation(sparse, TEXT, [1, 2], FormSettings(form=form, rank=5))
        sparse.set_compensation(fitted.tensors)
        sparse.set_top_k(sparse.k_max)
        assert torch.equal(logits(sparse), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_fit_can_be_exact_a_small_budget_answers_as_k_max(family: str) -> None:
    """15 tokens and 24 + M features: the regression meets every token, so K = 1 must give K_max's answer on them."""
    sparse = adapted(family)
    whole = logits(sparse)
    sparse.set_top_k(1)
    off = (logits(sparse) - whole).abs().max()
    fitted = fit_compensation(sparse, TEXT, [1], FormSettings(rank=64, ridge=1e-9))
    sparse.set_compensation(fitted.tensors)
    sparse.set_top_k(1)
    assert min(fitted.explained[1]) > 0.999
    assert (logits(sparse) - whole).abs().max() < 0.02 * off


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_expert_a_map_answers_alone_and_reads_none(family: str) -> None:
    """The experts' weights are garbage after the fit: a budget below one expert must not notice."""
    sparse = adapted(family)
    whole = logits(sparse)
    fitted = fit_compensation(sparse, TEXT, [0], FormSettings(rank=64, ridge=1e-9))
    sparse.set_compensation(fitted.tensors)
    sparse.set_top_k(0)
    assert min(fitted.explained[0]) > 0.999 and sparse.num_run == 0
    answer = logits(sparse)
    assert (answer - whole).abs().mean() < 0.05 * whole.std()
    with torch.no_grad():
        for layer in sparse.layers:
            for weight in layer.experts.parameters():
                weight.fill_(torch.nan)
    assert torch.equal(logits(sparse), answer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_no_form_explains_less_than_nothing_and_clearing_leaves_no_trace(family: str, form: Form) -> None:
    sparse = SparseModel(tiny(family))
    stock = logits(sparse)
    adapter = sparse.fresh_adapter(3, torch.Generator().manual_seed(5), shared_a=True)
    sparse.load_adapter(adapter, 6.0)
    fitted = fit_compensation(sparse, TEXT, [1, 2], FormSettings(form=form, rank=4))
    assert all(
        share > (-1e-6 if form in ("map", "none") else -1.0) for own in fitted.explained.values() for share in own
    )
    sparse.clear()
    assert torch.equal(logits(sparse), stock)
    assert not any(layer.routing.compensation for layer in sparse.layers)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_counts_are_of_the_experts_that_run(family: str) -> None:
    sparse = adapted(family)
    fitted = fit_compensation(sparse, TEXT, [1, 2], FormSettings(rank=4, slices=2 if family == "olmoe" else 1))
    sparse.set_compensation(fitted.tensors)
    for top_k in range(1, sparse.k_max + 1):
        sparse.set_top_k(top_k)
        with sparse.counting():
            logits(sparse)
        assert (sparse.expert_tokens().sum(1) == IDS.numel() * sparse.num_run).all()


def test_channels_that_send_nothing_can_be_left_out() -> None:
    """If half of every expert's channels are dead, two experts in slices of the other half are two whole ones."""
    model = tiny("olmoe")
    dead = {}
    for index, layer in enumerate(model.model.layers):
        draw = torch.Generator().manual_seed(index)
        for expert in range(7):
            gone = torch.randperm(WIDTH, generator=draw)[: WIDTH // 2]
            with torch.no_grad():
                layer.mlp.experts.down_proj[expert][:, gone] = 0
            dead[index, expert] = set(gone.tolist())
    sparse = SparseModel(model)
    sparse.load_adapter(sparse.fresh_adapter(3, torch.Generator().manual_seed(5), shared_a=True), 6.0)
    fitted = fit_compensation(sparse, TEXT, [1, 2], FormSettings(form="none", slices=2))
    for layer in sparse.layers:
        channels = fitted.tensors[f"{PREFIX}{layer.index}.channels"]
        assert all(set(row.tolist()).isdisjoint(dead[layer.index, e]) for e, row in enumerate(channels))
    sparse.set_compensation({})
    sparse.set_top_k(2)
    two_whole = logits(sparse)
    sparse.set_compensation(fitted.tensors)
    sparse.set_top_k(1)
    assert sparse.num_run == 2
    torch.testing.assert_close(logits(sparse), two_whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "rescale", "learns"), [("mixtral", "mass", False), ("mixtral", "k_max", True), ("olmoe", "mass", True)]
)
def test_a_router_that_renormalises_learns_at_one_expert_only_with_the_weights_of_k_max(
    family: str, rescale: str, learns: bool
) -> None:
    sparse = SparseModel(tiny(family), rescale)  # type: ignore[arg-type]
    adapter = sparse.fresh_adapter(3, torch.Generator().manual_seed(5), shared_a=True, router=True)
    sparse.load_adapter(adapter, 6.0)
    sparse.set_top_k(1)
    cross_entropy(sparse.model(input_ids=IDS, use_cache=False).logits.flatten(0, 1), IDS.flatten()).backward()
    moved = [float(sparse.adapter[f"layers.{i}.router"].grad.abs().max()) for i in range(2)]
    assert all(size > 1e-5 for size in moved) if learns else all(size < 1e-6 for size in moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_sent_and_held_takes_the_bytes_that_are_planned(dtype: torch.dtype) -> None:
    sparse, skipped = adapted("olmoe"), Skipped("map", 2, 2, 4)
    shape, sparse.model = shape_from_config(sparse.model.config), sparse.model.to(dtype)
    fitted = fit_compensation(sparse, TEXT, [1, 2], FormSettings(form="map", rank=2, slices=2)).tensors
    sent = {name: value for name, value in fitted.items() if name.split(".")[2] in ("1", "channels")}
    assert skipped.k_max == sparse.k_max and skipped.sent_bytes(shape) == sum(value.nbytes for value in sent.values())
    sparse.set_compensation(sent)
    sparse.set_top_k(1)
    logits(sparse)
    placed = (
        0 if dtype == torch.float32 else sum(2 * value.numel() for value in sent.values() if value.is_floating_point())
    )
    slices = [
        Slices.of(ExpertWeights.of(layer.experts), layer.routing.compensation.channels)  # type: ignore[union-attr, arg-type]
        for layer in sparse.layers
    ]
    made = sum(one.columns.nbytes for one in slices) + slices[0].weights.up[0].nbytes
    assert skipped.held_bytes(shape, 1, dtype.itemsize) == skipped.sent_bytes(shape) + placed + made
    assert skipped.held_bytes(shape, 4, dtype.itemsize) == 0
    least = replace(skipped, elastic=2).held_bytes(shape, 4, dtype.itemsize)  # a client at K_max has all of it then
    assert least == skipped.held_bytes(shape, 1, dtype.itemsize) + skipped.numbers(shape) * (4 + (placed and 2))
    work = Workload(3, Batch.full(2, 9), dtype_bytes=dtype.itemsize)
    without, with_it = (peak_memory_bytes(shape, 1, replace(work, skipped=one)) for one in (None, skipped))
    assert with_it.total - without.total == with_it.compensation == skipped.held_bytes(shape, 1, dtype.itemsize)


def test_gradients_reach_what_lies_below_through_the_map() -> None:
    """With every expert's own path cut, the adapter of the lower layer still learns: through C of the upper one."""
    sparse = adapted("olmoe")
    fitted = fit_compensation(sparse, TEXT, [1], FormSettings(rank=8))
    sparse.set_compensation(fitted.tensors)
    sparse.set_top_k(1)
    out = sparse.model(input_ids=IDS, use_cache=False).logits.sum()
    below = torch.autograd.grad(out, sparse.adapter["layers.0.down.B"], retain_graph=True)[0]
    assert below.abs().max() > 0


def test_tensors_are_read_back_as_they_were_written() -> None:
    generator = torch.Generator().manual_seed(0)
    own = LayerCompensation(
        {2: Compensation(b=torch.randn(7, HIDDEN, generator=generator))}, torch.zeros(7, 5).long(), 4
    )
    named = compensation_tensors([None, own])
    assert sorted(named) == ["compensation.1.2.b", "compensation.1.channels"]
    nothing, again = layer_compensations(named, [WIDTH, WIDTH])
    assert not nothing.by_top_k and again.slices == 4 and torch.equal(again.by_top_k[2].b, own.by_top_k[2].b)  # type: ignore[arg-type]


def test_a_budget_without_a_map_of_its_own_takes_the_next_larger_ones() -> None:
    maps = {k: Compensation() for k in (2, 4)}
    own = LayerCompensation(maps)
    assert own.at(1) is maps[2] and own.at(3) is maps[4] and own.at(5) is None


def test_the_first_matrix_of_every_family_can_be_sliced_or_says_why_not() -> None:
    for family in FAMILIES:
        sparse = adapted(family)
        assert getattr(sparse.layers[0].experts, up_name(sparse.layers[0].experts)) is not None
        fitted = fit_compensation(sparse, TEXT, [1], FormSettings(rank=4, slices=2))
        sparse.set_compensation(fitted.tensors)
        sparse.set_top_k(1)
        assert torch.isfinite(logits(sparse)).all()
