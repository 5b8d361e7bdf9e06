"""What a dense model knows, and what of it is left after upcycling, at each K: answer texts ranked by likelihood.

    python bench/upcycled_smollm2.py MODEL --data data/commonsense/test [--top-k 1] [--items 500] [--tasks piqa ARC-Easy]

MODEL is a dense folder or .gguf file, an upcycled folder, or a run folder. Each option's text is scored as the continuation of the
question, by its summed log-probability ("accuracy") and by the same over its number of characters ("normalised"), which is how
these two sets are usually reported for small models; our run files rank labels instead. The first `items` questions of each test,
weights and activations in bfloat16.
"""

import argparse
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

from ubsmoe import FederatedMoE
from ubsmoe.data.records import read_file
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import Tokens, collate_prompts, pad_id
from ubsmoe.evaluate import Question, candidate_logs
from ubsmoe.model.upcycle import load_dense

RESULTS = Path(__file__).parent / "results" / "upcycled_smollm2.jsonl"


def options(example: Example) -> tuple[str, list[str]]:
    """Question and option texts, taken out of LLM-Adapters' wording."""
    body = example.prompt.split("question:", 1)[1].rsplit("Answer format:", 1)[0].strip()
    marks = "|".join(label.capitalize() for label in example.candidates)
    question, *texts = re.split(rf"\s*(?:{marks}): ", body)
    return question.strip(), [text.strip() for text in texts]


def question(example: Example, tokenizer: Any) -> Question:
    """The question as a prompt, each option's text as a completion of it."""
    asked, texts = options(example)
    prompt = tokenizer(f"Question: {asked}\nAnswer:").input_ids
    answers = [tuple(tokenizer(f" {text}", add_special_tokens=False).input_ids) for text in texts]
    gold = example.candidates.index(example.answer)
    return Question(example, Tokens((*prompt, *answers[gold]), len(prompt)), answers, gold)


@torch.no_grad()
def measure(model: Any, tokenizer: Any, examples: list[Example], batch_size: int = 16) -> dict[str, float]:
    questions = sorted((question(e, tokenizer) for e in examples), key=lambda one: one.tokens.prompt_length)
    plain = normalised = 0
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        inputs = collate_prompts([one.tokens for one in batch], pad_id(tokenizer))
        for one, logs in zip(batch, candidate_logs(model, inputs, batch), strict=True):
            lengths = torch.tensor([len(text) for text in options(one.example)[1]])
            plain += int(logs.argmax()) == one.gold
            normalised += int((logs / lengths).argmax()) == one.gold
    return {"items": len(examples), "accuracy": plain / len(examples), "normalised": normalised / len(examples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=["piqa", "ARC-Easy"])
    given = parser.parse_args()
    model: Any
    if given.top_k is None:
        dense, tokenizer = load_dense(given.model)
        model = SimpleNamespace(model=dense.to(torch.bfloat16))
    else:
        model = FederatedMoE.from_pretrained(given.model)
        model.set_budget(given.top_k / model.k_max)
        model.model.to(torch.bfloat16)
        tokenizer = model.tokenizer
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
