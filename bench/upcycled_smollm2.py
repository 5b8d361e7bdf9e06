"""What a dense model knows, and what of it is left after upcycling, at each K: answer texts ranked by likelihood.

    python bench/upcycled_smollm2.py MODEL --data data/commonsense/test [--top-k 1] [--items 500] [--tasks piqa ARC-Easy]

MODEL is a dense folder or .gguf file, an upcycled folder, or a run folder. Each option's text is scored as the continuation of the
question, by its summed log-probability ("accuracy") and by the same over its number of characters ("normalised"), which is how
these two sets are usually reported for small models; our run files rank labels instead. The first `items` questions of each test.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ubsmoe import FederatedMoE
from ubsmoe.data.records import read_file
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import pad_id
from ubsmoe.model.upcycle import load_dense

RESULTS = Path(__file__).parent / "results" / "upcycled_smollm2.jsonl"


def options(example: Example) -> tuple[str, list[str]]:
    """Question and option texts, taken out of LLM-Adapters' wording."""
    body = example.prompt.split("question:", 1)[1].rsplit("Answer format:", 1)[0].strip()
    marks = "|".join(label.capitalize() for label in example.candidates)
    question, *texts = re.split(rf"\s*(?:{marks}): ", body)
    return question.strip(), [text.strip() for text in texts]


@torch.no_grad()
def scores(model: Any, tokenizer: Any, question: str, texts: list[str]) -> list[float]:
    """Summed log-probability of each text after the question."""
    prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
    answers = [tokenizer(f" {text}", add_special_tokens=False).input_ids for text in texts]
    width = len(prompt) + max(map(len, answers))
    rows = [[*prompt, *answer] for answer in answers]
    ids = torch.tensor([row + [pad_id(tokenizer)] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    keep = width - len(prompt) + 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    logs = logits.float().log_softmax(-1).gather(-1, ids[:, len(prompt) :, None]).squeeze(-1)
    return [float(row[: len(answer)].sum()) for row, answer in zip(logs, answers, strict=True)]


def measure(model: Any, tokenizer: Any, examples: list[Example]) -> dict[str, float]:
    plain = normalised = 0
    for example in examples:
        question, texts = options(example)
        gold, logs = example.candidates.index(example.answer), scores(model, tokenizer, question, texts)
        plain += max(range(len(texts)), key=logs.__getitem__) == gold
        per_character = [value / len(text) for value, text in zip(logs, texts, strict=True)]
        normalised += max(range(len(texts)), key=per_character.__getitem__) == gold
    return {"items": len(examples), "accuracy": plain / len(examples), "normalised": normalised / len(examples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=["piqa", "ARC-Easy"])
    given = parser.parse_args()
    if given.top_k is None:
        model, tokenizer = load_dense(given.model)
    else:
        moe = FederatedMoE.from_pretrained(given.model)
        moe.set_budget(given.top_k / moe.k_max)
        model, tokenizer = moe.model, moe.tokenizer
    for task in given.tasks:
        started = time.perf_counter()
        examples = read_file(given.data / f"{task}.json.gz", AutoTokenizer)[: given.items]
        found = measure(model, tokenizer, examples)
        record = {"model": Path(given.model).name, "top_k": given.top_k, "task": task, **found}
        record["seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps(record), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
