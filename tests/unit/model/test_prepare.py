"""A prepared base is the same base: its hash, its function, a run on it; and what a cache that is not right does."""

import errno
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from ubsmoe.bases.identity import base_sha256
from ubsmoe.config import ModelSettings, parse_run, to_json
from ubsmoe.engines.local import LocalEngine
from ubsmoe.errors import UserError
from ubsmoe.finished.federated_moe import FederatedMoE
from ubsmoe.finished.run import export_run
from ubsmoe.model import opened, prepare
from ubsmoe.model.checkpoint import INDEX
from ubsmoe.model.identity import weights_sha256
from ubsmoe.model.load import load_base, load_skeleton, prepare_base, shipped_path
from ubsmoe.model.opened import open_model
from ubsmoe.model.presets import quieten
from ubsmoe.model.quantised import format_of
from ubsmoe.model.surgery import SparseModel
from ubsmoe.server.federation import build_federation
from ubsmoe.server.run import run
from ubsmoe.storage import bases, disk
from ubsmoe.storage.runfolder import RunFolder
from unit.model.families import FAMILIES, tiny, words


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of its own, and no base too small for it."""
    quieten()
    monkeypatch.setattr(prepare, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(opened, "DIRECT_BYTES", 0)
    return tmp_path / "home" / "ubsmoe"


@pytest.fixture(scope="module")
def even_base(tmp_path_factory):
    """A random OLMoE whose tensors are multiples of 64 bytes, as real ones are."""
    folder = tmp_path_factory.mktemp("even-base")
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    torch.manual_seed(0)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=6)
    config = OlmoeConfig(vocab_size=len(tokenizer), num_experts_per_tok=4, max_position_embeddings=512, **sizes, **ids)
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared_folders(cache):
    return sorted(path.name for path in (cache / "bases").iterdir()) if (cache / "bases").exists() else []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_base_has_the_same_hash_and_the_same_function(family, dtype, cache, tmp_path):
    tiny(family).save_pretrained(tmp_path / "base")
    config, ids = AutoConfig.from_pretrained(tmp_path / "base"), words()
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype)).eval()
    direct.set_experts_implementation("eager")
    settings = ModelSettings(base=str(tmp_path / "base"), dtype=dtype)
    mapped, sha256 = open_model(tmp_path / "base", config, settings)
    mapped.set_experts_implementation("eager")
    assert sha256 == weights_sha256(direct) == weights_sha256(mapped)
    torch.testing.assert_close(mapped.eval()(ids).logits, direct(ids).logits)
    for format in ("int8", "nf4"):
        changed = settings.model_copy(update={"experts": format})
        stored, again = open_model(tmp_path / "base", config, changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opened, "DIRECT_BYTES", 1 << 30)
            in_memory, _ = open_model(tmp_path / "base", config, changed)
        logits = [SparseModel(model.eval()).model(ids).logits for model in (stored, in_memory)]
        assert again == sha256
        torch.testing.assert_close(*logits)


def run_hash(base, folder, experts=None):
    table = {
        "model": {"base": str(base), "experts": experts},
        "clients": {"count": 2},
        "tiers": {"budgets": [0.5, 1.0]},
        "data": {"synthetic": {"train_examples": 16, "test_examples": 4, "entities": 8}},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 2},
        "evaluate": {"before": False, "max_examples": 1, "max_new_tokens": 2},
    }
    settings = parse_run(table)
    federation = build_federation(settings)
    engine = LocalEngine(federation.trainer, federation.examples, federation.clients)
    with RunFolder.open_or_create(folder, to_json(settings)) as place:
        return run(federation, place, engine, lambda *event: None)["adapter_sha256"], federation.base_sha256


def test_a_run_on_a_prepared_base_gives_the_same_adapter(even_base, cache, monkeypatch, tmp_path):
    mapped, whole, quantised, taken = (tmp_path / name for name in ("mapped", "whole", "quantised", "taken"))
    want = run_hash(even_base, mapped)
    prepare_base(ModelSettings(base=str(even_base), experts="nf4"), tmp_path / "elsewhere")
    nf4 = run_hash(even_base, quantised, "nf4")
    assert nf4 == run_hash(tmp_path / "elsewhere", taken)  # a prepared folder is a base too
    monkeypatch.setattr(opened, "DIRECT_BYTES", 1 << 30)
    assert run_hash(even_base, whole) == want
    assert nf4[0] != want[0] and nf4[1] == want[1]  # another function, the same base


def test_an_export_is_merged_into_the_plain_base(even_base, cache, tmp_path):
    run_hash(even_base, tmp_path / "run", "int8")
    for format in ("merged", "peft"):
        assert export_run(tmp_path / "run", tmp_path / format, format).experts == "int8"
        assert "trained on experts in int8" in (tmp_path / format / "README.md").read_text()
    ids, peft = torch.arange(8).view(1, 8), FederatedMoE.from_pretrained(tmp_path / "peft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    difference = (merged(ids).logits - peft.model(ids).logits).abs().max()
    assert 0 < difference < 0.05 * merged(ids).logits.abs().max()  # plain experts against eight bits
    assert "model.layers.1.mlp.experts.5.down_proj.weight" in (tmp_path / "merged" / INDEX).read_text()


def test_a_run_on_a_prepared_base_is_merged_into_the_plain_one_if_that_is_named(even_base, cache, tmp_path):
    prepare_base(ModelSettings(base=str(even_base), experts="nf4"), tmp_path / "taken")
    run_hash(tmp_path / "taken", tmp_path / "run")
    with pytest.raises(
        UserError, match=r"whole weights, and .*taken is in memory with quantised experts; use .* --base"
    ):
        export_run(tmp_path / "run", tmp_path / "merged", "merged")
    with pytest.raises(UserError, match="was trained on another base"):
        export_run(tmp_path / "run", tmp_path / "merged", "merged", base="ubsmoe-tiny")
    assert not (tmp_path / "merged").exists()
    sidecar = export_run(tmp_path / "run", tmp_path / "merged", "merged", base=str(even_base))
    assert (sidecar.experts, sidecar.base) == ("nf4", str(even_base))
    assert export_run(tmp_path / "run", tmp_path / "native", "native").experts == "nf4"


def test_a_base_is_prepared_once_and_its_hash_is_known_after(even_base, cache, caplog):
    settings = ModelSettings(base=str(even_base))
    load_base(settings)
    assert "preparing the base once" in caplog.text and len(prepared_folders(cache)) == 1
    caplog.clear()
    sparse, _ = load_base(settings)
    assert not caplog.text and prepared_folders(cache) == [f"{sparse.sha256[:16]}-float32"]


def test_a_base_that_needs_no_conversion_is_mapped_where_it_lies(even_base, cache, tmp_path):
    prepare_base(ModelSettings(base=str(even_base)), tmp_path / "fused")
    sparse, _ = load_base(ModelSettings(base=str(tmp_path / "fused")))
    assert sparse.sha256 == base_sha256(ModelSettings(base=str(even_base)))
    assert prepared_folders(cache) == [f"{sparse.sha256[:16]}-float32"]  # of the other one alone


def test_weights_that_changed_under_the_same_size_and_time_are_found_on_demand(even_base, cache, tmp_path):
    for experts in (None, "nf4"):
        folder = prepare_base(ModelSettings(base=str(even_base), experts=experts), tmp_path / f"base-{experts}")
        settings = ModelSettings(base=str(folder))
        known, file = base_sha256(settings), folder / bases.WEIGHTS
        assert base_sha256(settings, check=True) == known
        times = file.stat()
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert base_sha256(settings) == known
        with pytest.raises(UserError, match="have changed under the same size and time"):
            base_sha256(settings, check=True)
    os.utime(file)  # a file with another time is read again without being asked
    with pytest.raises(UserError, match="is damaged: its weights are not those that were prepared"):
        base_sha256(settings)


def die_at_the_third_piece(settings):
    append, seen = bases.WeightsFile.append, []

    def dying(self, name, data):
        seen.append(name)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, name, data)

    bases.WeightsFile.append = dying  # type: ignore[method-assign]
    prepare_base(settings)


@pytest.mark.parametrize("experts", [None, "nf4"])
def test_a_killed_preparation_leaves_nothing_that_is_taken_for_a_base(experts, even_base, cache):
    settings = ModelSettings(base=str(even_base), experts=experts)
    child = multiprocessing.get_context("fork").Process(target=die_at_the_third_piece, args=(settings,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert all(name.startswith(".") and name.endswith(".draft") for name in prepared_folders(cache))
    folder = prepare_base(settings)
    assert prepared_folders(cache) == [folder.name] and base_sha256(settings, check=True)


def cut_short(folder):
    with open(folder / bases.WEIGHTS, "r+b") as file:
        file.truncate(file.seek(0, 2) - 7)


def without_facts(folder):
    (folder / bases.FACTS).unlink()


def of_another_base(folder):
    facts = json.loads((folder / bases.FACTS).read_bytes())
    (folder / bases.FACTS).write_text(json.dumps(facts | {"sha256": "0" * 64}))


@pytest.mark.parametrize("damage", [cut_short, without_facts, of_another_base])
def test_a_cache_that_is_half_written_or_of_another_base_is_made_anew(damage, even_base, cache):
    settings = ModelSettings(base=str(even_base), experts="int8")
    folder = prepare_base(settings)
    before = (folder / bases.WEIGHTS).read_bytes()
    damage(folder)
    sparse, _ = load_base(settings)
    assert (folder / bases.WEIGHTS).read_bytes() == before
    assert sparse.sha256 == (bases.read_facts(folder) or {})["sha256"]


def no_space(monkeypatch, cache):
    def write(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "write", write)


def too_small(monkeypatch, cache):
    usage = bases.shutil.disk_usage(cache.parents[1])
    monkeypatch.setattr(bases.shutil, "disk_usage", lambda path: usage._replace(free=1000))


def not_writable(monkeypatch, cache):
    cache.parent.write_text("a file where the cache would be")


@pytest.mark.parametrize("fault", [no_space, too_small, not_writable])
def test_where_nothing_can_be_prepared_a_base_is_loaded_whole_and_that_is_said(
    fault, even_base, cache, monkeypatch, caplog
):
    fault(monkeypatch, cache)
    sparse, _ = load_base(ModelSettings(base=str(even_base)))
    assert "cannot prepare a base in" in caplog.text and "HF_HOME" in caplog.text
    assert " 0.0 GB" not in caplog.text.split("cannot prepare")[1].split("Until then")[0]
    assert "whole base is in memory" in caplog.text and sparse.sha256
    with pytest.raises(UserError, match=r"cannot prepare a base in .*HF_HOME"):
        load_base(ModelSettings(base=str(even_base), experts="nf4"))  # its 16 bits may not fit
    monkeypatch.undo()
    assert cache.parent.is_file() or not prepared_folders(cache)


@pytest.mark.parametrize("most", [4096, 500_000])
def test_a_write_that_the_system_itself_refuses_leaves_nothing(most, even_base, cache, tmp_path):
    settings, limits = ModelSettings(base=str(even_base), experts="nf4"), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        for out in (None, tmp_path / "out"):
            with pytest.raises(UserError, match=r"cannot prepare a base in .*File too large.*HF_HOME \(or --out\)"):
                prepare_base(settings, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not prepared_folders(cache) and not (tmp_path / "out").exists()
    assert base_sha256(ModelSettings(base=str(prepare_base(settings))), check=True)


def test_a_cache_that_cannot_be_written_any_more_serves_what_it_holds(even_base, cache, monkeypatch, caplog):
    settings = ModelSettings(base=str(even_base), experts="nf4")
    folder = prepare_base(settings)
    caplog.clear()

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("make_folder", "atomic_write", "Lock"):
        monkeypatch.setattr(disk, name, refuse)
    assert load_base(settings)[0].sha256 == load_base(ModelSettings(base=str(folder)))[0].sha256
    assert not caplog.text
    with pytest.raises(UserError, match=r"cannot prepare a base in .*Read-only file system.* that can be written"):
        load_base(ModelSettings(base=str(even_base), experts="int8"))


def test_a_file_system_without_mmap_is_named(even_base, cache, monkeypatch, tmp_path):
    folder = prepare_base(ModelSettings(base=str(even_base), experts="nf4"), tmp_path / "base")

    def refuse(*args, **kwargs):
        raise RuntimeError("unable to mmap 4096 bytes from file <model.safetensors>: No such device (19)")

    monkeypatch.setattr(prepare, "safe_open", refuse)
    with pytest.raises(UserError, match=r"cannot be mapped .* on a file system that supports mmap"):
        load_base(ModelSettings(base=str(folder)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": "int8"}, 'model.experts is "int8", but .* was prepared as "nf4"; leave model.experts out'),
        ({"dtype": "bfloat16"}, 'model.dtype is "bfloat16", but .* was prepared in float32; leave model.dtype out'),
    ],
)
def test_a_prepared_base_is_used_as_it_was_prepared(changes, said, even_base, cache, tmp_path):
    folder = prepare_base(ModelSettings(base=str(even_base), experts="nf4"), tmp_path / "base")
    with pytest.raises(UserError, match=said):
        load_base(ModelSettings(base=str(folder), **changes))
    with pytest.raises(UserError, match="is a prepared base already"):
        prepare_base(ModelSettings(base=str(folder)))


def test_stock_software_refuses_quantised_experts_and_so_do_we_those_of_others(even_base, cache, tmp_path):
    folder = prepare_base(ModelSettings(base=str(even_base), experts="nf4"), tmp_path / "base")
    with pytest.raises(RuntimeError):  # shapes that do not fit
        AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'quantised weights \(bitsandbytes\).* model.experts = "nf4"'):
        load_base(ModelSettings(base=str(folder)))


def in_float8(plain, folder, without=""):
    """The linear maps but routers in float8, a scale to each block of 128 x 128, as some are published; and what it stands for."""
    config, tensors, known = json.loads((plain / "config.json").read_text()), load_file(plain / "model.safetensors"), {}
    for name, value in tensors.items():
        if value.dim() == 2 and ("mlp.experts" in name or "self_attn" in name):
            packed = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
            scales = torch.empty(-(-value.shape[0] // 128), -(-value.shape[1] // 128))
            for i, j in itertools.product(*map(range, scales.shape)):
                at = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                scales[i, j] = value[at].abs().max() / 448
                packed[at] = (value[at] / scales[i, j]).to(torch.float8_e4m3fn)
                value[at] = packed[at].float() * scales[i, j]
            known |= {name: packed, f"{name}_scale_inv": scales}
    known.pop(without, None)
    for name, of, changes in (("plain", tensors, {}), ("float8", tensors | known, FLOAT8)):
        shutil.copytree(plain, folder / name)
        save_file(of, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    return folder / "plain", folder / "float8"


FLOAT8 = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
}


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """Of matrices that are more than one block of 128 x 128, and no whole number of them."""
    folder = tmp_path_factory.mktemp("wide-base")
    tokenizer = AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny"))
    torch.manual_seed(0)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    sizes = dict(hidden_size=160, intermediate_size=136, num_hidden_layers=1, num_attention_heads=2, num_experts=3)
    OlmoeForCausalLM(OlmoeConfig(vocab_size=len(tokenizer), num_experts_per_tok=2, **sizes, **ids)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_in_float8_is_read_as_the_plain_one_that_it_stands_for(wide_base, cache, monkeypatch, tmp_path):
    plain, float8 = in_float8(wide_base, tmp_path)
    monkeypatch.setattr(opened, "DIRECT_BYTES", 1 << 30)  # though it is small, transformers could not load it here
    want, _ = load_base(ModelSettings(base=str(plain)))
    found, _ = load_base(ModelSettings(base=str(float8)))
    assert found.sha256 == want.sha256
    assert torch.equal(found.model(words()).logits, want.model(words()).logits)
    assert format_of(load_base(ModelSettings(base=str(float8), experts="int8"))[0].layers[0].experts) == "int8"
    assert load_skeleton(ModelSettings(base=str(float8))).num_experts == 3
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    _, broken = in_float8(wide_base, tmp_path / "broken", without=f"{name}_scale_inv")
    with pytest.raises(UserError, match=rf"{name} is in float8, and there are no scales"):
        load_base(ModelSettings(base=str(broken)))
    (tmp_path / "full").write_text("a file where the cache would be")
    monkeypatch.setattr(prepare, "HF_HOME", str(tmp_path / "full"))
    with pytest.raises(UserError, match="cannot prepare a base in"):
        load_base(ModelSettings(base=str(float8)))


def test_a_checkpoint_without_one_of_its_tensors_is_not_prepared(even_base, cache, tmp_path):
    tensors = load_file(even_base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in even_base.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing tensors .*model.layers.1.mlp.experts.gate_up_proj"):
        prepare_base(ModelSettings(base=str(broken)))
    assert not prepared_folders(cache)


def test_the_shipped_base_is_loaded_whole_and_leaves_no_trace(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "HF_HOME", str(tmp_path / "home"))
    load_base(ModelSettings(experts="nf4"))
    assert not Path(tmp_path / "home").exists()
