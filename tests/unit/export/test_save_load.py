"""Exports against the model they came from: in PEFT, in plain transformers, and through the sidecar. Logits, never key names."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubsmoe.config import ModelSettings
from ubsmoe.errors import UserError
from ubsmoe.export import save_load as exports
from ubsmoe.export.installed import Installed, install, read_installed
from ubsmoe.export.sidecar import Format, Sidecar
from ubsmoe.model.compensation_fit import FormSettings, fit_compensation
from ubsmoe.model.identity import weights_sha256
from ubsmoe.model.load import load_base, shipped_path
from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, RENORMALISES, tiny, words

every_family = pytest.mark.parametrize("family", FAMILIES)
BUDGETS = (1, 2, 3)


def adapted(
    family: str, *, top_k: int | None = None, routed: bool = False, router: bool = False, attention: bool = False
) -> SparseModel:
    """A base with a random adapter in place; `routed`: with phi on K_max + 1 candidates and the mass scale too."""
    sparse = SparseModel(tiny(family), rescale="mass" if routed else "none")
    generator = torch.Generator().manual_seed(5)
    shapes = sparse.fresh_adapter(3, generator, shared_a=False, router=router, attention=attention)
    tensors = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}
    sparse.load_adapter(tensors, alpha=1.5)
    sparse.set_top_k(top_k or sparse.k_max)
    if routed:
        phi = torch.randn(len(sparse.layers), sparse.num_experts, generator=generator)
        sparse.set_phi(3 * phi, sparse.k_max + 1)
    return sparse


def exported(sparse: SparseModel, format: Format, folder: Path) -> Sidecar:
    installed: Installed = read_installed(sparse)
    sparse.clear()
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    origin = exports.Origin(ModelSettings(base="tiny"), weights_sha256(sparse.model), "fedavg", 1)
    return exports.write(sparse, tokenizer, installed, origin, format, folder)


def read_header(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=words()).logits
    return result


def assert_close(theirs: Tensor, ours: Tensor, tolerance: float) -> None:
    assert (theirs - ours).abs().max() <= tolerance * ours.abs().max().clamp_min(1)


# peft looks for the patterns' names among modules and warns, then applies them to the parameter all the same
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
@every_family
@pytest.mark.parametrize("more", [{}, {"router": True}, {"attention": True}], ids=["experts", "router", "attention"])
def test_peft_gives_our_logits_at_every_budget(family: str, more: dict[str, bool], tmp_path: Path) -> None:
    exported(adapted(family, **more), "peft", tmp_path / "out")
    for top_k in (*BUDGETS, tiny(family).config.num_experts_per_tok):
        ours = logits(adapted(family, top_k=top_k, **more).model)
        base = tiny(family, num_experts_per_tok=top_k)
        stock = logits(base)
        theirs = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
        assert_close(theirs, ours, 1e-5)
        assert (theirs - stock).abs().max() > 0.05


@every_family
@pytest.mark.parametrize("top_k", BUDGETS)
def test_a_merged_model_gives_our_logits_and_carries_k_in_its_config(family: str, top_k: int, tmp_path: Path) -> None:
    sparse = adapted(family, top_k=top_k, router=True, attention=True)
    ours = logits(sparse.model)
    exported(sparse, "merged", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert theirs.config.num_experts_per_tok == top_k
    assert_close(logits(theirs), ours, 1e-4)
    assert (logits(theirs) - logits(tiny(family, num_experts_per_tok=top_k))).abs().max() > 0.05


@every_family
@pytest.mark.parametrize("format", ["native", "peft", "merged"])
def test_the_sidecar_carries_phi_scale_and_k(family: str, format: Format, tmp_path: Path) -> None:
    sparse = adapted(family, top_k=2, routed=True)
    ours, plain = logits(sparse.model), logits(adapted(family, top_k=2).model)
    assert (ours - plain).abs().max() > 0.01  # phi and scale matter
    exported(sparse, format, tmp_path / "out")
    sidecar = exports.read(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval() if format == "merged" else tiny(family)
    again = SparseModel(base)
    install(again, exports.read_tensors(tmp_path / "out", sidecar, again), sidecar)
    assert_close(logits(again.model), ours, 1e-5)
    again.set_top_k(again.k_max)
    assert_close(logits(again.model), logits(adapted(family, routed=True).model), 1e-5)
    said = (tmp_path / "out" / "README.md").read_text()
    stock = format != "native"
    assert ("φ: the routers' logits" in said) == stock
    assert ('Output scale ("mass")' in said) == (stock and family not in RENORMALISES)
    assert ("num_experts_per_tok=2" in said) == (format == "peft")


@every_family
@pytest.mark.parametrize("format", ["native", "peft", "merged"])
def test_an_export_carries_its_compensation_at_every_budget(family: str, format: Format, tmp_path: Path) -> None:
    sparse = adapted(family, routed=True, router=True)
    ids = words()
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    slices = 2 if family in ("olmoe", "mixtral") else 1
    compensation = fit_compensation(sparse, text, [1, 2], FormSettings(rank=3, slices=slices)).tensors
    sparse.set_compensation(compensation)
    ours = {}
    for top_k in (sparse.k_max, 2, 1):
        sparse.set_top_k(top_k)
        ours[top_k] = logits(sparse.model)
    exported(sparse, format, tmp_path / "out")
    sidecar = exports.read(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval() if format == "merged" else tiny(family)
    again = SparseModel(base)
    tensors = exports.read_compensation(tmp_path / "out", sidecar)
    install(again, exports.read_tensors(tmp_path / "out", sidecar, again), sidecar, tensors)
    for top_k, expected in ours.items():
        again.set_top_k(top_k)
        assert_close(logits(again.model), expected, 1e-5)
    assert ("Compensation: at K = 1" in (tmp_path / "out" / "README.md").read_text()) == (format != "native")


@pytest.mark.parametrize("base", ["ubsmoe-tiny", "a folder"])
def test_every_printed_snippet_runs_in_the_folder_of_its_export(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if base == "a folder":
        shutil.copytree(str(shipped_path("ubsmoe-tiny")), "base")
        base = "base"  # as a run file beside it names it
    settings = ModelSettings(base=base, dtype="float32")
    for format in ("peft", "merged", "native"):
        sparse, tokenizer = load_base(settings)
        generator = torch.Generator().manual_seed(5)
        shapes = sparse.fresh_adapter(2, generator, shared_a=False)
        adapter = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}
        sparse.load_adapter(adapter, alpha=2.0)
        installed = read_installed(sparse)
        sparse.clear()
        exports.write(
            sparse,
            tokenizer,
            installed,
            exports.Origin(settings, sparse.sha256, "fedavg", 1),
            format,
            tmp_path / format,
        )
        monkeypatch.chdir(tmp_path / format)
        snippets = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
        assert len(snippets) == (1 if format == "native" else 2)
        for snippet in snippets:
            found: dict[str, Any] = {}
            exec(snippet, found)
            assert found["model"] is not None
        assert capsys.readouterr().out.strip()
        monkeypatch.chdir(tmp_path)


def test_an_output_scale_beside_a_compensation_stays_out_of_merged_weights(tmp_path: Path) -> None:
    sparse, ids = adapted("gpt_oss"), words()
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sparse.set_compensation(fit_compensation(sparse, text, [2], FormSettings(rank=3)).tensors)
    sparse.set_output_scale(torch.tensor([1.5, 0.6]))
    sparse.set_top_k(2)
    ours = logits(sparse.model)
    sidecar = exported(sparse, "merged", tmp_path / "out")
    assert sidecar.output_scale == pytest.approx([1.5, 0.6])
    again = SparseModel(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    install(again, {}, sidecar, exports.read_compensation(tmp_path / "out", sidecar))
    assert_close(logits(again.model), ours, 1e-5)


def test_a_router_bias_carries_a_phi_that_moves_all_experts(tmp_path: Path) -> None:
    sparse = adapted("gpt_oss")
    sparse.set_phi(torch.randn(2, 7, generator=torch.Generator().manual_seed(2)))
    ours = logits(sparse.model)
    assert exported(sparse, "merged", tmp_path / "out").phi is None
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), ours, 1e-4)
    assert "nothing is left out" in (tmp_path / "out" / "README.md").read_text()


def test_a_learned_output_scale_is_merged_into_the_weights(tmp_path: Path) -> None:
    sparse = adapted("gpt_oss", top_k=2)
    sparse.set_output_scale(torch.tensor([1.5, 0.6]))
    ours = logits(sparse.model)
    assert exported(sparse, "merged", tmp_path / "out").output_scale is None
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), ours, 1e-4)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_a_peft_adapter_comes_back_as_it_went(family: str, tmp_path: Path) -> None:
    sparse = adapted(family, router=True, attention=True)
    before = read_installed(sparse)
    exported(sparse, "peft", tmp_path / "out")
    adapter, alpha = exports.read_peft(tmp_path / "out", sparse, weights_sha256(sparse.model))
    assert alpha == before.alpha and adapter.keys() == before.adapter.keys()
    assert all(torch.equal(adapter[name], value) for name, value in before.adapter.items())


def break_tensor(folder: Path) -> None:
    tensors = exports.exportfolder.read_export_tensors(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.1.mlp.experts.lora_A.weight")
    exports.exportfolder.write_tensors(folder / "adapter_model.safetensors", tensors)


def drop_expert(folder: Path) -> None:
    """The last of seven experts is missing, everywhere."""
    tensors = exports.exportfolder.read_export_tensors(folder / "adapter_model.safetensors")
    for name, value in tensors.items():
        if "lora_A" in name:
            tensors[name] = value[:-3].clone()
        else:
            tensors[name] = value.view(-1, 3, 7)[:, :, :-1].reshape(len(value), -1).clone()
    exports.exportfolder.write_tensors(folder / "adapter_model.safetensors", tensors)


def narrow_attention(folder: Path) -> None:
    tensors = exports.exportfolder.read_export_tensors(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    exports.exportfolder.write_tensors(
        folder / "adapter_model.safetensors", tensors | {key: tensors[key][:, :2].clone()}
    )


def halve_attention(folder: Path) -> None:
    tensors = exports.exportfolder.read_export_tensors(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    exports.exportfolder.write_tensors(folder / "adapter_model.safetensors", tensors)


def set_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))


def set_dora(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def set_own_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"experts.down_proj": 32}}))


@pytest.mark.parametrize(
    ("damage", "keep_sidecar", "sentence"),
    [
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            True,
            "half an export: adapter_model.safetensors",
        ),
        (break_tensor, True, "damaged: its SHA-256"),
        (break_tensor, False, "lacks base_model.model.model.layers.1.mlp.experts.lora_A.weight"),
        (
            drop_expert,
            False,
            r"factors \(18, 24\) and \(40, 18\); rank 3 with M = 7 .* needs \(21, 24\) and \(40, 21\)",
        ),
        (narrow_attention, False, r"k_proj has factors \(3, 24\) and \(8, 2\); rank 3 .* needs \(3, 24\) and \(8, 3\)"),
        (halve_attention, False, r"lacks .*k_proj.lora_B.weight: expected both factors"),
        (set_rank, False, r"rank 2 with M = 7 .* needs \(14, 24\)"),
        (set_dora, False, "use_dora"),
        (set_own_alpha, False, "alpha_pattern gives 'experts.down_proj' a rank or alpha of its own"),
        (lambda folder: (folder / "adapter_config.json").unlink(), False, "no PEFT adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"half"), False, "cannot be read"),
    ],
)
def test_a_broken_adapter_is_refused_with_the_reason(
    damage: Any, keep_sidecar: bool, sentence: str, tmp_path: Path
) -> None:
    sparse = adapted("olmoe", attention="attention" in getattr(damage, "__name__", ""))
    exported(sparse, "peft", tmp_path / "out")
    damage(tmp_path / "out")
    if not keep_sidecar:
        (tmp_path / "out" / "ubsmoe.json").unlink()
    with pytest.raises(UserError, match=sentence):
        exports.read_peft(tmp_path / "out", sparse, weights_sha256(sparse.model))


@pytest.mark.parametrize(
    ("other", "sentence"), [(("olmoe", 1), "another base: its weights' SHA-256"), (("mixtral", 0), "adapter for olmoe")]
)
def test_an_adapter_for_another_base_is_refused(other: tuple[str, int], sentence: str, tmp_path: Path) -> None:
    exported(adapted("olmoe"), "peft", tmp_path / "out")
    base = SparseModel(tiny(*other))
    with pytest.raises(UserError, match=sentence):
        exports.read_peft(tmp_path / "out", base, weights_sha256(base.model))


def test_an_adapter_of_another_family_is_refused_without_a_sidecar_too(tmp_path: Path) -> None:
    exported(adapted("olmoe"), "peft", tmp_path / "out")
    (tmp_path / "out" / "ubsmoe.json").unlink()
    base = SparseModel(tiny("olmoe", num_experts=6))
    with pytest.raises(UserError, match="with M = 6 on this base"):
        exports.read_peft(tmp_path / "out", base, "")


@pytest.mark.parametrize("format", ["native", "peft", "merged"])
def test_an_export_can_be_read_by_whoever_may_read_its_folder(format: Format, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        exported(adapted("olmoe"), format, tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


@every_family
def test_merging_writes_a_file_per_layer_and_leaves_the_model_as_it_was(family: str, tmp_path: Path) -> None:
    sparse = adapted(family, router=True, attention=True)
    before, config = weights_sha256(sparse.model), sparse.model.config.to_dict()
    exported(sparse, "merged", tmp_path / "out")
    assert weights_sha256(sparse.model) == before and sparse.model.config.to_dict() == config
    files = [read_header(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    layers = [{name.split(".layers.")[1].split(".")[0] for name in names if ".layers." in name} for names in files]
    assert [len(one) for one in layers] == [0] + [1] * sparse.model.config.num_hidden_layers
    stock = tmp_path / "stock"
    sparse.model.save_pretrained(stock)
    theirs = {name for file in stock.glob("*.safetensors") for name in read_header(file)}
    assert sorted(name for names in files for name in names) == sorted(theirs)


@pytest.mark.parametrize("format", ["native", "peft", "merged"])
def test_a_failing_disk_leaves_nothing_behind(format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ubsmoe.storage.disk.atomic_write", full)
    with pytest.raises(UserError, match="No space left"):
        exported(adapted("olmoe"), format, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    sparse = adapted("olmoe")
    with pytest.raises(UserError, match="exists already"):
        exported(sparse, "merged", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert weights_sha256(sparse.model) == weights_sha256(tiny("olmoe"))  # nothing was merged either


def test_a_copy_that_lacks_its_sidecar_is_no_export(tmp_path: Path) -> None:
    exported(adapted("olmoe"), "native", tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", ignore=shutil.ignore_patterns("ubsmoe.json"))
    with pytest.raises(UserError, match="not a whole export"):
        exports.read(tmp_path / "copy")


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("adapter.safetensors", "half an export: adapter.safetensors is missing"),
        ("README.md", "half an export: README.md is missing"),
        ("ubsmoe.json", "not a whole export: ubsmoe.json cannot be used"),
    ],
)
def test_half_an_export_is_no_export(lost: str, sentence: str, tmp_path: Path) -> None:
    exported(adapted("olmoe"), "native", tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    with pytest.raises(UserError, match=sentence):
        exports.read(tmp_path / "out")
