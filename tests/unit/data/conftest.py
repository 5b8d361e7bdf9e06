"""A tokenizer small enough to train in the blink of an eye, and the way to real data where a machine has them."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# A busy machine is slow, not wrong.
settings.register_profile("data", deadline=None)
settings.load_profile("data")

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level_bpe() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the correct answer is answer1 answer2 true false\n\n### Response:\n"] * 3, trainer)
    return bpe


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end and a pad token, a chat template, and no beginning-of-text token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(), eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same, but it puts <s> in front of every text by itself, and has neither pad token nor chat template."""
    bpe = byte_level_bpe()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write records as JSON lines, or as they are when given text; gzipped when the name says so."""

    def write_file(name: str, records: Any) -> Path:
        text = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write_file


@pytest.fixture(scope="session")
def commonsense_data() -> Path:
    """The real commonsense data beside the project, or wherever UBSMOE_DATA points."""
    beside = Path(__file__).parents[4] / "shared" / "data"
    folder = Path(os.environ.get("UBSMOE_DATA", beside)) / "commonsense"
    if not folder.is_dir():
        pytest.skip("no real commonsense data: set UBSMOE_DATA to the folder that holds commonsense/")
    return folder
