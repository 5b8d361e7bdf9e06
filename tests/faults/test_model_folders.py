"""C1-C5, C7, C12 of the faults found by trial: whatever a model folder holds ends in a result or in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import ubsmoe
from ubsmoe.bases.upcycle import load_dense
from ubsmoe.config import ModelSettings, RunSettings, parse_run
from ubsmoe.errors import UserError
from ubsmoe.model.load import load_base, load_skeleton, load_tokenizer, prepare_base, shipped_path
from ubsmoe.model.presets import model_shape
from ubsmoe.plan.tiers import check_base
from ubsmoe.server.answers import read
from ubsmoe.server.evaluate import evaluate
from ubsmoe.server.federation import build_federation

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(random_base: Path, tmp_path: Path) -> Path:
    """A copy of a sound base, to be spoilt."""
    shutil.copytree(random_base, tmp_path / "base")
    return tmp_path / "base"


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, index: str | None = None) -> None:
    """One shard and an index that names a second one."""
    names = sorted(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(index or json.dumps({"weight_map": places}))


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def as_pickle(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / WEIGHTS)


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def poisoned(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors, "down_proj")][0, 0] = float("nan")


def only_gguf(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")


def unmappable(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/sys/kernel/notes")  # which the system reads but does not map


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (
        lambda p: change_tensors(p, lambda t: t.pop(first(t, "layers.1.input_layernorm"))),
        r"missing tensors model\.layers\.1\.input_layernorm\.weight, which would be drawn at random",
    ),
    "experts are missing": (
        lambda p: change_tensors(p, lambda t: [t.pop(n) for n in list(t) if "layers.1." in n and "experts" in n]),
        r"missing tensors .*layers\.1\.mlp\.experts",
    ),
    "a tensor too many": (
        lambda p: change_tensors(p, lambda t: t.update(stray=torch.ones(2))), r"unexpected tensors .*stray"
    ),
    "weights are NaN": (lambda p: change_tensors(p, poisoned), r"1 values in .*down_proj.* that are NaN"),
    "weights are integers": (
        lambda p: change_tensors(p, lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()})), "as I8"
    ),
    "weights are truncated": (cut, "no whole safetensors file: it is truncated or damaged"),
    "weights are empty": (lambda p: (p / WEIGHTS).write_bytes(b""), "no whole safetensors file"),
    "weights are a Git LFS pointer": (
        lambda p: (p / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "Git LFS pointer",
    ),
    "weights are a pickle by another name": (as_pickle, "under another name"),
    "weights are pickled": (without_weights, r"pytorch_model\.bin, a pickle, which is never read"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), r"lacks model\.safetensors"),
    "a shard is absent": (shard, r"lacks model-00002-of-00002\.safetensors"),
    "the index is no JSON": (lambda p: shard(p, "{"), r"index\.json cannot be used"),
    "the index leaves the folder": (lambda p: shard(p, '{"weight_map": {"a": "../x"}}'), "a file of this folder"),
    "config.json is no JSON": (lambda p: (p / "config.json").write_text("{"), "model.base"),
    "config.json is a list": (lambda p: (p / "config.json").write_text("[]"), "model.base"),
    "no config.json": (lambda p: (p / "config.json").unlink(), "model.base"),
    "the vocabulary is smaller": (
        lambda p: change(p / "config.json", vocab_size=7), r"has the size \(4096, 24\), expected \(7, 24\)"
    ),
    "the vocabulary is larger": (lambda p: change(p / "config.json", vocab_size=99999), r"expected \(99999, 24\)"),
    "a GGUF file alone": (only_gguf, r"tiny-Q4_K_M\.gguf is a GGUF file, whose weights are packed; name the checkpoint"),
    "a file system without mmap": (unmappable, "cannot be mapped .*os error 19.*; put it, or HF_HOME, on a file system that supp"),
    "an unknown rope type": (
        lambda p: change(p / "config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "'spiral'"
    ),
    "attention from the hub": (
        lambda p: change(p / "config.json", _attn_implementation="somebody/kernel"), "'somebody/kernel', and no code that"
    ),
    "experts from the hub": (
        lambda p: change(p / "config.json", experts_implementation="sonicmoe"), "experts_implementation 'sonicmoe', and no"
    ),
    "a billion layers": (lambda p: change(p / "config.json", num_hidden_layers=10**9), "has 1000000000 layers of 6 experts"),
    "no expert per token": (lambda p: change(p / "config.json", num_experts_per_tok=0), "runs 0 of 6 experts by its config.json"),
    "more experts per token than there are": (lambda p: change(p / "config.json", num_experts_per_tok=7), "runs 7 of 6 experts"),
    "an adapter that names another base": (
        lambda p: (p / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}'), "an adapter; name its base"
    ),
    "a length of text": (
        lambda p: change(p / "tokenizer_config.json", model_max_length="x"), "model_max_length .* is 'x'; expected a number"
    ),
    "a trillion experts": (lambda p: change(p / "config.json", num_experts=2**40), "layers of 1099511627776 experts"),
    "an unknown activation": (lambda p: change(p / "config.json", hidden_act="smelu"), "smelu"),
    "a size is text": (lambda p: change(p / "config.json", hidden_size="wide"), "model.base"),
    "heads do not divide": (lambda p: change(p / "config.json", num_attention_heads=0), "model.base"),
    "no tokenizer": (lambda p: [f.unlink() for f in p.glob("*token*")], "has no tokenizer files"),
    "tokenizer.json is no JSON": (lambda p: (p / "tokenizer.json").write_text("{"), "model.base"),
    "tokenizer_config.json is no JSON": (lambda p: (p / "tokenizer_config.json").write_text("{"), "model.base"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_spoilt_folder_is_refused_in_one_sentence(name: str, folder: Path) -> None:
    spoil, said = FAULTS[name]
    spoil(folder)
    with pytest.raises(UserError, match=said) as refusal:
        load_base(ModelSettings(base=str(folder)))
    assert "\n" not in str(refusal.value)


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "version": "gemm"},
    {"quant_method": "fp8", "weight_block_size": [64, 64]},
    {"quant_method": "fp8", "activation_scheme": "static"},
    {"quant_method": "mxfp4"},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "a method of tomorrow"},
    {"bits": 4},
]


@pytest.mark.parametrize("config", QUANTISED, ids=str)
def test_a_checkpoint_that_others_quantised_is_named_whoever_asks(config: dict[str, Any], folder: Path) -> None:
    change(folder / "config.json", quantization_config=config)
    settings, kind = ModelSettings(base=str(folder)), config.get("quant_method", "of unknown kind")
    said = rf'holds quantised weights \({kind}\), .*use the checkpoint it was made from with model\.experts = "nf4"'
    for ask in (load_base, load_skeleton, prepare_base, lambda one: check_base(RunSettings(model=one))):
        with pytest.raises(UserError, match=said) as refusal:
            ask(settings)
        assert "\n" not in str(refusal.value)


def trap(folder: Path, mark: Path) -> None:
    """Code in every place where transformers looks for a model's own."""
    code = f"open({str(mark)!r}, 'w').write('ran')\n"
    for module in ("configuration", "modeling", "tokenization", "processing"):
        (folder / f"{module}_trap.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    autos = {
        "AutoConfig": "configuration_trap.C", "AutoModel": "modeling_trap.M", "AutoModelForCausalLM": "modeling_trap.M",
        "AutoTokenizer": ["tokenization_trap.T", "tokenization_trap.T"], "AutoProcessor": "processing_trap.P",
    }  # fmt: skip
    change(folder / "config.json", model_type="trap", auto_map=autos)
    change(folder / "tokenizer_config.json", auto_map=autos, tokenizer_class="TrapTokenizer")


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_never_run_and_never_asked_about(
    known: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    mark = tmp_path / "mark"
    trap(folder, mark)
    if known:
        change(folder / "config.json", model_type="olmoe")
    settings = ModelSettings(base=str(folder))
    works = (
        lambda: load_base(settings), lambda: load_skeleton(settings), lambda: load_tokenizer(settings),
        lambda: model_shape(folder), lambda: load_dense(str(folder)),
    )  # fmt: skip
    for work in works:
        try:
            work()
        except UserError as refusal:
            assert "\n" not in str(refusal)
    assert not mark.exists()


def test_no_call_of_transformers_leaves_out_the_refusal_of_code() -> None:
    source = Path(ubsmoe.__file__).parent
    calls = ("AutoConfig.from_pretrained(", "AutoModelForCausalLM.from_pretrained(", "AutoTokenizer.from_pretrained(",
             "AutoModelForCausalLM.from_config(", "AutoProcessor.from_pretrained(", "HFLM(")  # fmt: skip
    for path in source.rglob("*.py"):
        text = path.read_text()
        for call in calls if path.name != "card.py" else ():
            for part in text.split(call)[1:]:
                until = part[: part.index("\n\n")] if "\n\n" in part else part
                assert "**READ" in until or "**LOAD" in until or "trust_remote_code=False" in until, f"{path}: {call}"


def test_a_dense_checkpoint_that_lacks_tensors_is_not_upcycled(tmp_path: Path) -> None:
    sizes = dict(vocab_size=4096, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny")).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(first(tensors, "down_proj")))
    with pytest.raises(UserError, match=r"missing tensors .*down_proj"):
        load_dense(str(tmp_path))


# C1: hybrid mixtures

HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_next": dict(num_experts=8, layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=24),
    "qwen3_5_moe_text": dict(
        num_experts=8, layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=24
    ),
    "jamba": dict(
        num_experts=8, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False,
        expert_layer_period=1, expert_layer_offset=0,
    ),
    "granitemoehybrid": dict(
        num_local_experts=8, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, shared_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
    ),
    "minimax": dict(num_local_experts=8, layer_types=["linear_attention", "full_attention"]),
    "nemotron_h": dict(
        n_routed_experts=8, layers_block_type=["linear_attention", "moe", "full_attention", "moe"], mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=8, n_groups=1, moe_shared_expert_intermediate_size=24, n_group=1, topk_group=1,
    ),
}  # fmt: skip
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)


@pytest.mark.parametrize("family", HYBRID)
def test_hybrid_mixtures_are_scored_as_by_full_forward_passes(family: str, tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=4096, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts_per_tok=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3, **LINEAR, **HYBRID[family],
    )  # fmt: skip
    if family != "nemotron_h":
        sizes["num_hidden_layers"] = 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(shipped_path("ubsmoe-tiny")).save_pretrained(tmp_path)
    table = {
        "model": {"base": str(tmp_path)}, "clients": {"count": 2}, "data": {"synthetic": {"train_examples": 8, "test_examples": 8}},
        "evaluate": {"max_new_tokens": 2},
    }  # fmt: skip
    federation = build_federation(parse_run(table))
    model, questions = federation.model, [q for group in federation.questions.values() for q in group]
    model.set_top_k(2)
    for question, spelt in zip(questions, read(model, questions).candidates, strict=True):
        prompt = question.tokens.input_ids[: question.tokens.prompt_length]
        for candidate, (found, _) in zip(question.candidates, spelt, strict=True):
            with torch.no_grad():
                stock = model.model(input_ids=torch.tensor([[*prompt, *candidate]]), use_cache=False).logits[0]
            each = stock[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(candidate).unsqueeze(1))
            assert found == pytest.approx(float(each.sum()), rel=1e-4)
    scores = evaluate(model, federation.tokenizer, federation.questions, federation.settings.evaluate)
    assert scores["macro"].examples == len(questions)


# C7: greedy is greedy


def test_a_base_that_says_how_to_generate_scores_as_one_that_says_nothing(
    folder: Path, tiny_run: dict[str, Any]
) -> None:
    def scores() -> Any:
        federation = build_federation(parse_run(tiny_run | {"model": {"base": str(folder)}}))
        stock = federation.model.model.generation_config
        found = evaluate(federation.model, federation.tokenizer, federation.questions, federation.settings.evaluate)
        assert federation.model.model.generation_config is stock  # an export keeps it
        return found

    (folder / "generation_config.json").unlink(missing_ok=True)
    plain = scores()
    GenerationConfig(
        no_repeat_ngram_size=1, num_beams=3, stop_strings=["a"], repetition_penalty=9.0, do_sample=True, temperature=3.0,
        suppress_tokens=[5, 6], min_new_tokens=6, forced_eos_token_id=7, cache_implementation="static", top_k=2,
    ).save_pretrained(folder)  # fmt: skip
    assert scores() == plain
