"""Pretraining in miniature: the loop, what it writes, and the fast experts against the stock ones."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ubsmoe.bases.pretrain import architecture, load_pretrain, measuring, pretrain, text, training
from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.config import ConfigError

MINI = PretrainSettings(
    vocab_size=600, hidden_size=16, expert_width=12, num_layers=2, num_heads=2, num_experts=6, top_k=2, steps=4,
    questions_per_step=3, prose_per_step=1, prose_tokens=32, num_entities=8, report_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "book.txt").write_text("The old house stood by the sea and nobody went there. " * 200, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "MEASURED", 16)
        pretrain(MINI, corpus, out)
    return out


def test_the_folder_loads_as_a_causal_language_model(base: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.config.num_experts_per_tok == 2
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer("plain text").input_ids[0] != 0  # no beginning-of-text token


def test_the_record_holds_settings_progress_and_measurements(base: Path):
    record = json.loads((base / "pretraining.json").read_text())
    assert PretrainSettings(**record["settings"]) == MINI
    assert [entry["step"] for entry in record["progress"]] == [2, 4]
    assert set(record["by_top_k"]) == {"2", "1"}
    assert len(record["normalised_entropy_per_layer"]) == 2


def test_no_draft_is_left_behind(base: Path):
    assert [path.name for path in base.parent.iterdir()] == ["mini"]


def test_digits_are_tokens_of_their_own(base: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.tokenize("Answer2: x answer2")[-1] == "2"
    assert "2" in tokenizer.tokenize("Answer2: x")


def test_block_experts_agree_with_the_stock_ones_value_and_gradient():
    model = architecture.build_model(MINI, 50)
    ids = torch.arange(40).view(2, 20)
    outcomes = []
    ALL_EXPERTS_FUNCTIONS.register("ubsmoe_blocks", architecture.block_experts)
    for implementation in ("eager", "ubsmoe_blocks"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = training.losses(model, ids, ids)[0]
        loss.backward()
        outcomes.append((loss.detach(), model.model.layers[0].mlp.experts.gate_up_proj.grad.clone()))
    for stock, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


def test_building_a_model_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second = (architecture.build_model(MINI, 50).lm_head.weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


def test_padding_counts_neither_as_label_nor_as_token():
    ids, labels = text.collate([([5, 6], [7, 0]), ([5], [0])])
    assert labels.tolist() == [[-100, -100, 7, 0], [-100, 0, -100, -100]]
    assert text.real_tokens(ids, labels).tolist() == [True, True, True, True, True, True, False, False]


def test_the_rate_warms_up_and_falls_to_its_floor():
    settings = MINI.model_copy(update={"steps": 100, "warmup_steps": 10, "learning_rate": 1.0})
    assert training.rate_at(0, settings) == pytest.approx(0.1, rel=1e-3)
    assert training.rate_at(99, settings) == pytest.approx(0.1, rel=1e-2)
    assert max(training.rate_at(step, settings) for step in range(100)) == pytest.approx(1.0, rel=0.05)


def test_a_misspelt_setting_is_refused_by_name(tmp_path: Path):
    (tmp_path / "run.toml").write_text("step = 3\n")
    with pytest.raises(ConfigError, match="unknown setting 'step'; did you mean 'steps'"):
        load_pretrain(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("text", "sentence"), [("num_experts = 4", "top_k is 8"), ("num_heads = 3", "multiple of num_heads = 3")]
)
def test_sizes_that_contradict_each_other_are_refused(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_pretrain(tmp_path / "run.toml")


def test_a_corpus_without_text_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--corpus"):
        text.read_corpus(tmp_path)


def test_a_world_alone_needs_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"book_share is 0.5, but there are no books; give --corpus"):
        pretrain(MINI, None, tmp_path / "base")
    monkeypatch.setattr(measuring, "MEASURED", 16)
    record = pretrain(MINI.model_copy(update={"book_share": 0.0}), None, tmp_path / "base")
    assert [entry["book_loss"] for entry in record["by_top_k"].values()] == [None, None]
    assert json.loads((tmp_path / "base" / "pretraining.json").read_text()) == record


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that pretraining did not make"):
        pretrain(MINI, tmp_path, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
