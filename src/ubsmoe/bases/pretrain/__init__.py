"""Pretraining of the small base that ships with the library: a sparse mixture of experts trained on books and synthetic QA.

What it learns is a skill, not the facts it will be asked: to gather a name and a relation, recall the fact and answer
in the formats of Commonsense-15K. Its text comes from a `pretraining` synthetic QA data set, whose names never occur in an
`evaluation` one (see `data/synthetic.py`). Two streams are mixed in every step: questions with their answers, the loss on the
answer alone; and prose, books and sentences that state the data set's facts, packed end to end.

Training is plain top-K with a load-balancing and a z-loss per layer, so the base is a stock mixture of experts: it
was never trained with fewer active experts.
"""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ubsmoe.bases.pretrain.architecture import block_experts, build_model
from ubsmoe.bases.pretrain.measuring import measure
from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.bases.pretrain.settings import load_pretrain as load_pretrain
from ubsmoe.bases.pretrain.text import Stream, read_corpus, train_tokenizer
from ubsmoe.bases.pretrain.training import train
from ubsmoe.config import ConfigError
from ubsmoe.data.synthetic import SyntheticQA


def pretrain(settings: PretrainSettings, corpus_dir: Path | None, out_dir: Path) -> dict[str, Any]:
    """Make a base from nothing: tokenizer, weights and a record of the training, in a folder `AutoModel` can load.

    The folder is replaced as a whole at every report, so a run that is stopped leaves its latest base, and at the end.

    Args:
        settings: what to train and for how long.
        corpus_dir: a folder of .txt or .txt.gz files; may be None where book_share is 0.
        out_dir: where the base goes; its `pretraining.json` holds the settings, the progress and the measurements.

    Returns:
        The same record as `pretraining.json`.

    Raises:
        ConfigError: for a corpus that is missing or empty, or an `out_dir` that holds something else.
    """
    if corpus_dir is None and settings.book_share > 0:
        raise ConfigError(
            f"book_share is {settings.book_share:g}, but there are no books; give --corpus, or set it to 0"
        )
    out_dir = Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "pretraining.json").exists():
        raise ConfigError(
            f"--out: {out_dir} holds something that pretraining did not make; expected a new or empty folder"
        )
    books = read_corpus(corpus_dir) if corpus_dir else []
    synthetic = SyntheticQA(settings.seed, settings.num_entities, "pretraining")
    tokenizer = train_tokenizer(books, settings.vocab_size, random.Random(settings.seed))
    model = build_model(settings, len(tokenizer))
    ALL_EXPERTS_FUNCTIONS.register("ubsmoe_blocks", block_experts)
    model.set_experts_implementation("ubsmoe_blocks")
    result: dict[str, Any] = {"settings": settings.model_dump(), "progress": []}
    for record in train(model, Stream(settings, books, tokenizer, synthetic), settings):
        result["progress"].append(record)
        print(json.dumps(record), flush=True)
        save(model, tokenizer, result, Path(out_dir))
    model.to(torch.bfloat16).float()  # measure what is stored, not what was trained
    result |= measure(model, tokenizer, books, synthetic, settings)
    save(model, tokenizer, result, Path(out_dir))
    return result


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], out_dir: Path) -> None:
    """Write the base in bfloat16 beside its place, then move it there; other files of the folder are kept."""
    draft = out_dir.with_name(out_dir.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    if out_dir.exists():
        shutil.copytree(out_dir, draft)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (draft / "model.safetensors").chmod(0o644)
    shutil.rmtree(out_dir, ignore_errors=True)
    draft.rename(out_dir)
