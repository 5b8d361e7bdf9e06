"""C4 of the faults found by trial: a router's matrix is found wherever it lies, and an export is tried out first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ubsmoe.errors import UserError
from ubsmoe.export import against_stock, peft
from ubsmoe.export import save_load as exports
from ubsmoe.model.surgery import SparseModel
from unit.export.test_save_load import assert_close, exported, logits
from unit.model.families import WIDTH, tiny

SIZES: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": dict(intermediate_size=WIDTH, num_experts=7, moe_topk=4, head_dim=8),
    "afmoe": dict(
        intermediate_size=36, moe_intermediate_size=WIDTH, num_experts=7, num_experts_per_tok=4, num_dense_layers=1, head_dim=8,
    ),
    "minimax_m2": dict(intermediate_size=WIDTH, num_local_experts=7, num_experts_per_tok=4, head_dim=8),
    "hy_v3": dict(intermediate_size=36, moe_intermediate_size=WIDTH, num_experts=7, num_experts_per_tok=4, head_dim=8),
    "aria_text": dict(intermediate_size=WIDTH, moe_num_experts=7, moe_topk=4, head_dim=8),
    "jamba": dict(
        intermediate_size=WIDTH, num_experts=7, num_experts_per_tok=4, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4,
        expert_layer_period=1, expert_layer_offset=0, use_mamba_kernels=False,
    ),
}  # fmt: skip


def adapted(family: str) -> SparseModel:
    sparse, generator = SparseModel(tiny(family, **SIZES[family])), torch.Generator().manual_seed(5)
    fresh = sparse.fresh_adapter(3, generator, shared_a=False, router=True)
    sparse.load_adapter(
        {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}, alpha=1.5
    )
    return sparse


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("family", SIZES)
def test_a_trained_router_arrives_in_peft_in_a_merged_model_and_back(family: str, tmp_path: Path) -> None:
    ours = logits(adapted(family).model)
    exported(adapted(family), "peft", tmp_path / "peft")
    base = tiny(family, **SIZES[family])
    sparse = SparseModel(tiny(family, **SIZES[family]))
    back, alpha = exports.from_peft(sparse, *exports._peft_files(tmp_path / "peft"))
    sparse.load_adapter(back, alpha)
    assert_close(logits(sparse.model), ours, 1e-5)
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "peft")), ours, 1e-4)
    exported(adapted(family), "merged", tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), ours, 1e-4)


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_an_export_that_stock_software_reads_otherwise_is_not_published(
    format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft, "_router_path", lambda layer, paths: paths[layer.router])  # as before: beside `wg`
    monkeypatch.setattr(
        peft, "_router_names", lambda layers, paths: [f"{paths[layer.router]}.weight" for layer in layers]
    )
    stock = against_stock.logits
    sparse = adapted("hunyuan_v1_moe")
    if format == "merged":
        factors = iter([1, 1.1, 1])
        monkeypatch.setattr(against_stock, "logits", lambda model: stock(model) * next(factors))
    with pytest.raises(UserError, match=r"PEFT has no place|transformers computes other logits"):
        exported(sparse, format, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())
