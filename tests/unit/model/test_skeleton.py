"""A base on the meta device knows every name, shape and dtype that the real one does, and holds no weights."""

from importlib import resources

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.model.load import load_base, load_skeleton
from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, tiny

Form = dict[str, tuple[torch.Size, torch.dtype]]


def form(tensors: dict[str, Tensor]) -> Form:
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


def forms(sparse: SparseModel) -> list[Form]:
    """Of everything that a server may ask a model for, with every setting on; then of a model taken clear again."""
    draw, layers, experts = torch.Generator().manual_seed(0), len(sparse.layers), sparse.num_experts
    fresh = sparse.fresh_adapter(4, draw, shared_a=True, router=True, attention=True)
    sparse.load_adapter(fresh, 8.0, frozen={"layers.0.up.A"})
    sparse.set_top_k(1)
    sparse.set_phi(torch.zeros(layers, experts), sparse.k_max)
    sparse.set_output_scale(torch.ones(layers))
    if sparse.layers[0].convention.by_score:
        sparse.set_selection_bias(torch.zeros(layers, experts))
    sparse.set_trainable_experts([lambda scores, chosen, real: scores[0] > 0] * layers)
    found = [form(fresh), form(sparse.adapter), form({"counts": sparse.expert_tokens()})]
    sparse.clear()
    return [*found, form(sparse.adapter)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skeleton_of_the_shipped_base_has_the_forms_of_the_real_one(dtype: str) -> None:
    settings = ModelSettings(dtype=dtype)
    skeleton, (real, _) = load_skeleton(settings, "mass", k_max=4), load_base(settings, "mass", k_max=4)
    assert skeleton.device.type == "meta" and real.device.type == "cpu"
    assert all(tensor.is_meta for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers()))
    assert form(skeleton.model.state_dict()) == form(real.model.state_dict())
    assert forms(skeleton) == forms(real)
    assert [layer.convention for layer in skeleton.layers] == [layer.convention for layer in real.layers]
    assert skeleton.k_max == real.k_max == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_known_without_its_weights(family: str) -> None:
    real = SparseModel(tiny(family))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real.model.config)
    skeleton = SparseModel(model)
    assert [layer.convention for layer in skeleton.layers] == [layer.convention for layer in real.layers]
    assert forms(skeleton) == forms(real)


def test_a_fresh_adapter_is_drawn_alike_with_and_without_weights() -> None:
    settings = ModelSettings()
    one, other = (
        sparse.fresh_adapter(4, torch.Generator().manual_seed(3), shared_a=True)
        for sparse in (load_skeleton(settings), load_base(settings)[0])
    )
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_model_too_large_for_this_machine_is_known_too(tmp_path) -> None:
    preset = resources.files("ubsmoe") / "assets" / "configs" / "olmoe-1b-7b.json"
    (tmp_path / "config.json").write_text(preset.read_text(encoding="utf-8"), encoding="utf-8")
    skeleton = load_skeleton(ModelSettings(base=str(tmp_path)))
    skeleton.load_adapter(skeleton.fresh_adapter(1, torch.Generator(), shared_a=True), alpha=1.0)
    assert (len(skeleton.layers), skeleton.num_experts, skeleton.k_max) == (16, 64, 8)
    assert skeleton.adapter["layers.15.down.B"].shape == (64, 2048, 1) and skeleton.adapter["layers.15.down.B"].is_meta


def test_what_cannot_be_loaded_is_refused_as_with_weights(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"model\.base: cannot load"):
        load_skeleton(ModelSettings(base=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"tiers\.k_max is 99"):
        load_skeleton(ModelSettings(), k_max=99)
