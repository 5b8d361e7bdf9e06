"""Upcycling against the dense model it starts from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ubsmoe.bases.upcycle import load_dense, upcycle, upcycle_checkpoint
from ubsmoe.bases.warm_up import mean_activations, warm_up
from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.errors import UserError
from ubsmoe.maths.balance import normalised_entropy
from ubsmoe.model.load import load_base, shipped_path
from ubsmoe.model.surgery import SparseModel

WIDTH = 20


def dense(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=31, hidden_size=24, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=10, tie_word_embeddings=True, initializer_range=0.3, rope_theta=5000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.1 * torch.randn(weight.shape))
    return model


IDS = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
def test_without_drop_the_function_is_preserved_at_every_k(tied: bool) -> None:
    source = dense(tie_word_embeddings=tied)
    want = source(IDS).logits
    sparse = SparseModel(upcycle(source, num_experts=5, top_k=4, drop=0.0, seed=0))
    for top_k in (1, 2, 3, 4):
        sparse.set_top_k(top_k)
        assert (sparse.model(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_slices_keep_the_function_at_whole_copies_and_only_there(shared: float) -> None:
    source = dense(intermediate_size=64)
    want = source(IDS).logits
    model = upcycle(source, num_experts=12, top_k=8, drop=0.0, seed=0, slices=4, shared=shared)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (12, 24, 8 if shared else 16)
    sparse = SparseModel(model)
    for layer in sparse.layers:  # the rows of a copy apart by what breaks ties alone
        rows = layer.router.weight.view(3, 4, 24)
        assert 0 < (rows - rows.mean(1, keepdim=True)).abs().max() < 0.05 * rows.abs().max()
        layer.router.weight.copy_(rows[:, :1].expand(3, 4, 24).reshape(12, 24))
    for top_k, kept in ((8, True), (4, True), (7, False), (3, False), (1, False)):
        sparse.set_top_k(top_k)
        apart = (sparse.model(IDS).logits - want).abs().max() / want.abs().max()
        assert apart <= 1e-5 if kept else apart > 1e-2


def test_every_inner_dimension_is_in_the_shared_expert_or_once_in_every_copy() -> None:
    source = dense(intermediate_size=40)
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[[3, 11]] *= 50
    block = upcycle(source, num_experts=8, top_k=4, drop=0.0, seed=0, slices=4, shared=0.2).model.layers[1].mlp
    names = {tuple(row.tolist()): i for i, row in enumerate(source.model.layers[1].mlp.gate_proj.weight)}
    shared = [names[tuple(row.tolist())] for row in block.shared_expert.gate_proj.weight]
    assert len(shared) == 8 and {3, 11} <= set(shared)
    experts = [[names[tuple(row.tolist())] for row in expert[:8]] for expert in block.experts.gate_up_proj]
    for copy in (experts[:4], experts[4:]):
        assert sorted(shared + [i for expert in copy for i in expert]) == list(range(40))
    assert experts[:4] != experts[4:]


def test_what_acts_most_is_shared_whatever_its_own_weights_are() -> None:
    source = dense(intermediate_size=40)
    ids = torch.cat([IDS, torch.zeros(3, 2, dtype=torch.int64)], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.cat([torch.ones_like(IDS), torch.zeros(3, 2)], dim=1).long()}
    want: list[torch.Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: want.append(args[0].abs().mean((0, 1))))
        for layer in source.model.layers
    ]
    with torch.no_grad():
        source(IDS)
    for hook in hooks:
        hook.remove()
    found = mean_activations(source, [batch, batch])  # padding does not count
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, want, strict=True))

    found[1][[5, 17]] = 1e3
    how: dict[str, Any] = dict(num_experts=8, top_k=4, drop=0.0, seed=0, slices=4, shared=0.2)
    shared = upcycle(source, **how, activations=found).model.layers[1].mlp.shared_expert.gate_proj.weight
    rows = source.model.layers[1].mlp.gate_proj.weight
    assert all((shared == rows[i]).all(1).any() for i in (5, 17))


def test_drop_draws_the_asked_share_of_each_expert_anew_in_all_three_matrices() -> None:
    source = dense()
    model = upcycle(source, num_experts=3, top_k=2, drop=0.3, seed=0)
    experts, mlp = model.model.layers[1].mlp.experts, source.model.layers[1].mlp
    changed = []
    for expert in range(3):
        gate, up = experts.gate_up_proj[expert].split(WIDTH)
        parts = [
            (gate != mlp.gate_proj.weight).all(1),
            (up != mlp.up_proj.weight).all(1),
            (experts.down_proj[expert] != mlp.down_proj.weight).all(0),
        ]
        assert torch.equal(parts[0], parts[1]) and torch.equal(parts[1], parts[2])
        assert int(parts[0].sum()) == 6  # 0.3 of 20
        assert torch.equal(gate[~parts[0]], mlp.gate_proj.weight[~parts[0]])
        changed.append(parts[0])
    assert not torch.equal(changed[0], changed[1])
    assert not torch.allclose(model(IDS).logits, source(IDS).logits, atol=1e-3)


def test_what_is_drawn_anew_has_the_size_of_what_it_replaces() -> None:
    source = dense(intermediate_size=2000)
    gate = source.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        gate.add_(0.7)
    drawn = upcycle(source, num_experts=2, top_k=1, drop=0.9, seed=0).model.layers[0].mlp.experts.gate_up_proj[0, :2000]
    assert drawn.mean().item() == pytest.approx(gate.mean().item(), abs=0.01)
    assert drawn.std().item() == pytest.approx(gate.std().item(), abs=0.01)


def test_warm_up_evens_out_the_use_of_experts_and_touches_routers_alone() -> None:
    sparse = SparseModel(upcycle(dense(), num_experts=5, top_k=2, drop=0.0, seed=0))
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

    def use() -> float:
        with sparse.counting(), torch.no_grad():
            sparse.model(**batch)
        return float(normalised_entropy(sparse.expert_tokens()).mean())

    before = {name: value.clone() for name, value in sparse.model.state_dict().items()}
    uneven = use()
    losses = warm_up(sparse, [batch] * 30, learning_rate=0.05)
    assert losses[-1] < losses[0] and use() > uneven
    for name, value in sparse.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith("mlp.gate.weight"), name
    assert not any(parameter.requires_grad for parameter in sparse.model.parameters())


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"attention_bias": True}, {}, "attention_bias, which a mixture"),
        ({"mlp_bias": True}, {}, "mlp_bias"),
        ({}, {"top_k": 6}, "--top-k in 1..experts, got 5 and 6"),
        ({}, {"drop": 1.0}, "--drop"),
        ({}, {"shared": -0.1}, "--drop and --shared are shares"),
        ({}, {"slices": 2}, "--slices must divide --experts and --top-k"),
        (
            {"intermediate_size": 22},
            {"num_experts": 8, "slices": 4},
            "cut the 22 inner dimensions",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_refused(changes: Any, arguments: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        upcycle(dense(**changes), **({"num_experts": 5, "top_k": 4, "drop": 0.0, "seed": 0} | arguments))


def test_the_folder_is_a_base_and_a_sparse_model_is_no_dense_one(tmp_path: Path, random_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    dense(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    records = tmp_path / "records.jsonl"
    records.write_text('{"prompt": "a b", "completion": "c"}\n' * 9)
    out = tmp_path / "sparse"
    how: dict[str, Any] = {"num_experts": 4, "top_k": 3, "drop": 0.0, "warm_up_data": records, "warm_up_steps": 2}
    losses = upcycle_checkpoint(str(tmp_path / "dense"), out, **how, seed=0)
    assert len(losses) == 2
    sparse, _ = load_base(ModelSettings(base=str(out)))
    assert (sparse.num_experts, sparse.k_max, sparse.model.config.model_type) == (4, 3, "mixtral")
    with pytest.raises(UserError, match="exists already"):
        upcycle_checkpoint(str(tmp_path / "dense"), out, **how, seed=0)
    with pytest.raises(UserError, match=r"Llama-shaped dense model .* got olmoe"):
        upcycle_checkpoint(str(random_base), tmp_path / "other", **how, seed=0)
    assert not (tmp_path / "other").exists()


def test_a_gguf_file_is_read_or_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dense model is read from is not what a sparse one may be: a .gguf file is no reason to refuse it."""
    path = tmp_path / "dense.gguf"
    with pytest.raises(ConfigError, match=r"cannot load a dense model from .*dense\.gguf: no such file$"):
        load_dense(str(path))
    path.write_bytes(b"GGUF")
    monkeypatch.setattr("ubsmoe.bases.upcycle.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the gguf package: pip install 'ubsmoe\[gguf\]'$"):
        load_dense(str(path))
    monkeypatch.setattr("ubsmoe.bases.upcycle.find_spec", lambda name: True)
    with pytest.raises(ConfigError) as refused:
        load_dense(str(path))
    assert "the checkpoint it was made from" not in str(refused.value)
