"""`ubsmoe check`: an adapter that got lost on its way to the base is found, and the sentence says where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from e2e.test_cli import ubsmoe as command
from ubsmoe.config import ModelSettings, with_overrides
from ubsmoe.errors import UserError
from ubsmoe.export import save_load as exports
from ubsmoe.export.check import check
from ubsmoe.export.effect import nonzero_rows, untouched
from ubsmoe.export.installed import read_installed
from ubsmoe.export.merged import survival
from ubsmoe.model.load import load_base
from ubsmoe.model.surgery import SparseModel
from ubsmoe.storage.disk import file_sha256

PEFT, NATIVE, MERGED = "adapter_model.safetensors", "adapter.safetensors", "model-00001-of-00003.safetensors"
Change = Callable[[dict[str, Tensor]], Any]


def drawn(sparse: SparseModel, size: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = sparse.fresh_adapter(3, generator, shared_a=False)
    return {name: size * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}


def write(base: Path, folder: Path, format: Any, change: Change = dict.copy, dtype: Any = "float32") -> Path:
    """An export of a random adapter on the base, changed before."""
    settings = ModelSettings(base=str(base), dtype=dtype)
    sparse, tokenizer = load_base(settings)
    adapter = drawn(sparse)
    change(adapter)
    sparse.load_adapter(adapter, 1.5)
    installed = read_installed(sparse)
    sparse.clear()
    exports.write(sparse, tokenizer, installed, exports.Origin(settings, sparse.sha256, "fedavg", 1), format, folder)
    return folder


def rewrite(file: Path, change: Change, header: dict[str, str] | None = None) -> None:
    """Change the tensors of a file of an export behind its back, hash included."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        said = dict(opened.metadata())
    change(tensors)
    save_file(tensors, file, said | (header or {}))
    sidecar = file.with_name("ubsmoe.json")
    facts = json.loads(sidecar.read_text())
    facts["files"][file.name] = file_sha256(file)
    sidecar.write_text(json.dumps(facts))


def zero(*parts: str, expert: int | None = None) -> Change:
    """Zero every tensor in whose name all parts stand, or one expert of it, first dimension."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if all(part in name for part in parts):
                value[... if expert is None else expert] = 0

    return change


def test_untouched_experts_and_nonzero_rows_by_hand() -> None:
    a, b = torch.ones(3, 2, 4), torch.zeros(3, 5, 2)
    b[0, 3, 1] = 1
    b[2, 0, 0] = 1
    a[2, 0] = 0  # its only column of B meets a row of zeros
    adapter = {"layers.1.up.A": a, "layers.1.up.B": b, "layers.0.router": torch.ones(3, 4)}
    assert untouched(adapter) == {"layers.1.up": [1, 2]}
    assert nonzero_rows(adapter) == {"up.A": 5 / 6, "up.B": 2 / 15, "router": 1.0}


@pytest.mark.parametrize("format", ["native", "peft", "merged"])
def test_a_sound_export_passes_and_names_what_training_left_alone(
    format: Any, random_base: Path, tmp_path: Path
) -> None:
    folder = write(random_base, tmp_path / "out", format, zero("layers.1.up.B", expert=4))
    found = check(folder, str(random_base))
    assert found.failures == []
    assert json.loads((folder / "ubsmoe.json").read_text())["untouched"] == {"layers.1.up": [4]}
    if format == "merged":
        assert "changed: 23 of 24 matrices (experts x projections x layers)" in found.facts
    else:
        assert "untouched: layers.1.up, expert 4" in found.facts
        assert f"rows that are not zero: up.B {11 / 12:.1%}" in found.facts
    if format == "peft":
        with safe_open(folder / PEFT, "pt") as opened:
            assert opened.metadata()["lora_B"] == "rank-major [out, r M]"


@pytest.mark.parametrize(
    ("format", "file", "change", "sentence"),
    [
        ("peft", PEFT, zero("lora_B"), "adds nothing to any expert: B A is zero everywhere"),
        ("native", NATIVE, zero(".A"), "adds nothing to any expert: B A is zero everywhere"),
        ("native", NATIVE, zero("0.down.B"), "layers.0.down adds nothing to experts 0, 1, 2, 3, 4, 5"),
        ("native", NATIVE, zero("1.up.B", expert=2), "layers.1.up adds nothing to expert 2, and the export does not name"),
        ("native", NATIVE, lambda t: t["layers.0.up.B"][3].fill_(float("nan")), "layers.0.up.B holds 120 values that are NaN"),
        ("peft", PEFT, lambda t: t.pop(next(iter(t))), "the adapter lacks"),
        ("peft", PEFT, lambda t: t.update(more=torch.ones(2)), "the adapter also changes more"),
    ],
)  # fmt: skip
def test_what_was_lost_in_a_file_is_found(
    format: Any, file: str, change: Change, sentence: str, random_base: Path, tmp_path: Path
) -> None:
    folder = write(random_base, tmp_path / "out", format)
    rewrite(folder / file, change)
    assert sentence in " ".join(check(folder, str(random_base)).failures)


def test_without_a_sidecar_a_whole_matrix_must_not_be_zero_but_an_expert_may(random_base: Path, tmp_path: Path) -> None:
    folder = write(random_base, tmp_path / "out", "peft", zero("layers.0.up.B", expert=1))
    (folder / "ubsmoe.json").unlink()
    found = check(folder, str(random_base))
    assert found.failures == [] and "untouched: layers.0.up, expert 1" in found.facts
    tensors = load_file(folder / PEFT)
    zero("layers.1.", "base_layer.lora_A")(tensors)
    save_file(tensors, folder / PEFT)
    assert check(folder, str(random_base)).failures == [
        "layers.1.up adds nothing to any expert: B A is zero; train it, or save it again"
    ]


def test_another_order_of_packing_is_refused_where_it_is_stated(random_base: Path, tmp_path: Path) -> None:
    folder = write(random_base, tmp_path / "out", "peft")
    rewrite(folder / PEFT, dict.copy, {"lora_B": "expert-major [M out, r]"})
    (failure,) = check(folder, str(random_base)).failures
    assert "states that lora_B is 'expert-major [M out, r]'; PEFT reads" in failure


def test_another_base_a_run_and_weights_that_were_never_merged_are_named(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = write(random_base, tmp_path / "out", "native")
    assert command(monkeypatch, "check", folder, "ubsmoe-tiny") == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert command(monkeypatch, "check", folder, random_base) == 0
    assert f"{folder}: sound" in capsys.readouterr().out
    merged = write(random_base, tmp_path / "merged", "merged")
    held = {name for file in merged.glob("model-*.safetensors") for name in load_file(file)}
    base = load_file(random_base / "model.safetensors")
    for file in merged.glob("model-*.safetensors"):
        rewrite(file, lambda tensors: tensors.update({name: base[name] for name in tensors.keys() & base.keys()}))
    assert held <= base.keys() | {"lm_head.weight"}
    failures = check(merged, str(random_base)).failures
    assert "layers.0.up: experts 0, 1, 2, 3, 4, 5 as in the base" in failures[0]
    assert "nothing was merged" in failures[-1]


def test_a_change_below_the_rounding_of_bfloat16_is_not_merged(random_base: Path, tmp_path: Path) -> None:
    settings = ModelSettings(base=str(random_base), dtype="bfloat16")
    sparse, _ = load_base(settings)
    shares = []
    for size in (1.0, 1e-1, 1e-2, 1e-3):
        sparse.load_adapter(drawn(sparse, size), 1.5)
        shares.append(survival(sparse, read_installed(sparse)).share)
        sparse.clear()
    assert shares[0] > 0.999 and shares == sorted(shares, reverse=True) and shares[-1] < 0.05

    def small(adapter: dict[str, Tensor]) -> None:
        for value in adapter.values():
            value.mul_(3e-3)

    with pytest.raises(UserError, match="merging into bfloat16 weights would keep"):
        write(random_base, tmp_path / "merged", "merged", small, "bfloat16")
    assert not (tmp_path / "merged").exists()
    native = write(random_base, tmp_path / "native", "native", small, "bfloat16")
    assert "merging into bfloat16" in " ".join(check(native, str(random_base)).failures)


def test_a_change_too_small_for_logits_is_named_and_nothing_else_is_said_of_them(
    random_base: Path, tmp_path: Path
) -> None:
    def tiny(adapter: dict[str, Tensor]) -> None:
        for value in adapter.values():
            value.mul_(1e-12)

    found = check(write(random_base, tmp_path / "native", "native", tiny), str(random_base))
    assert found.failures[0].startswith("logits with the adapter in place are those of the base")
    assert not [fact for fact in found.facts if fact.startswith("logits")]


@pytest.mark.parametrize("format", ["native", "peft", "merged"])
def test_an_adapter_without_effect_is_not_exported(format: Any, random_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adds nothing to any expert"):
        write(random_base, tmp_path / "out", format, zero(".B"))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_effect_is_not_imported(
    random_base: Path, tiny_run: dict, write_toml: Callable[..., Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = write(random_base, tmp_path / "out", "peft")
    rewrite(folder / PEFT, zero("lora_B"))
    run_file = write_toml(with_overrides(tiny_run, {"adapter.start": str(folder), "adapter.alpha": 1.5}))
    assert command(monkeypatch, "run", run_file, "--out", tmp_path / "run") == 2
    assert f"{folder}: the adapter adds nothing to any expert" in capsys.readouterr().err
