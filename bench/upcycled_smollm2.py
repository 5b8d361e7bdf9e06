"""SmolLM2-135M as a mixture of experts: what is left of it at each K, before and after a short federated run.

    python bench/upcycled_smollm2.py records data/commonsense data/texts       # the same questions, answered in words
    ubsmoe upcycle SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2-moe --experts 8 --top-k 4 --slices 4 --shared 0.5 \
        --warm-up data/texts/train.jsonl --warm-up-steps 10
    ubsmoe run runs/smollm2.toml --out out/smollm2-ubsmoe
    ubsmoe run runs/smollm2.toml --out out/smollm2-fedavg --set method.name=fedavg
    python bench/upcycled_smollm2.py score MODEL --data data/texts [--top-k 1] [--items 500] [--tasks piqa ARC-Easy]

MODEL is a dense folder or .gguf file (no --top-k), an upcycled folder, or a run folder (then the tier with that K is scored, with
all that belongs to it). An answer's text is scored as the continuation of the question, by its summed log-probability
("accuracy") and by the same over its number of characters ("normalised"), which is how these two sets are usually reported for
small models; our other run files rank labels instead. The first `items` questions of each test, weights and activations in
bfloat16. Every task is one line in the results; a task that has its line is left out, so an interrupted series goes on.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

from ubsmoe import FederatedMoE
from ubsmoe.data.records import read_file
from ubsmoe.data.tasks import TASKS, Example
from ubsmoe.data.tokens import Tokens, collate_prompts, pad_id
from ubsmoe.evaluate import Question, candidate_logs
from ubsmoe.model.upcycle import load_dense

RESULTS = Path(__file__).parent / "results" / "upcycled_smollm2.jsonl"
TESTS = ("piqa", "ARC-Easy")


def in_words(example: Example) -> dict[str, Any]:
    """A record whose answer is the option's text, taken out of LLM-Adapters' wording."""
    body = example.prompt.removeprefix(TASKS[example.task].instruction).rsplit("Answer format:", 1)[0].strip()
    texts, marks = [], [f" {label.capitalize()}: " for label in example.candidates if TASKS[example.task].option]
    for mark in reversed(marks):
        body, _, text = body.replace("\n\n", " ").rpartition(mark)
        texts.insert(0, text.strip())
    texts = texts or list(example.candidates)
    answer = texts[example.candidates.index(example.answer)]
    prompt = f"Question: {body.strip()}\nAnswer:"
    return {
        "prompt": prompt, "completion": f" {answer}", "answer": answer, "candidates": texts, "task": example.task,
    }  # fmt: skip


def write_records(data: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for name, target in (
        ("commonsense_15k.jsonl.gz", "train"), *((f"test/{task}.json.gz", task) for task in TESTS),
    ):  # fmt: skip
        records = map(in_words, read_file(data / name, AutoTokenizer))
        (out / f"{target}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def questions(examples: list[Example], tokenizer: Any) -> list[Question]:
    """Prompts and candidates without an end of text, those with like candidates beside each other."""
    made = []
    for example in examples:
        prompt = tokenizer(example.prompt).input_ids
        answers = [tuple(tokenizer(f" {text}", add_special_tokens=False).input_ids) for text in example.candidates]
        gold = example.candidates.index(example.answer)
        made.append(Question(example, Tokens((*prompt, *answers[gold]), len(prompt)), answers, gold))
    return sorted(made, key=lambda one: max(map(len, one.candidates)))


@torch.no_grad()
def score(model: Any, tokenizer: Any, examples: list[Example], batch_size: int = 16) -> dict[str, float]:
    asked, plain, normalised = questions(examples, tokenizer), 0, 0
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        inputs = collate_prompts([one.tokens for one in batch], pad_id(tokenizer))
        for one, logs in zip(batch, candidate_logs(model, inputs, batch), strict=True):
            lengths = torch.tensor([len(text) for text in one.example.candidates])
            plain += int(logs.argmax()) == one.gold
            normalised += int((logs / lengths).argmax()) == one.gold
    return {"items": len(examples), "accuracy": plain / len(examples), "normalised": normalised / len(examples)}


def load(place: str, top_k: int | None) -> tuple[Any, Any]:
    if top_k is None:
        dense, tokenizer = load_dense(place)
        return SimpleNamespace(model=dense.to(torch.bfloat16)), tokenizer
    tier = top_k if (Path(place) / "summary.json").is_file() else None  # runs/smollm2.toml: tier 1 has K = 1, and so on
    model = FederatedMoE.from_pretrained(place, tier=tier)
    if tier is None:
        model.set_budget(top_k / model.k_max)
    assert model.top_k == top_k, f"this tier runs K = {model.top_k}"
    model.model.to(torch.bfloat16)
    return model, model.tokenizer


def pieces(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks that have no line yet, each with what its line begins with."""
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for task in given.tasks:
        about = {"model": Path(given.model).name, "top_k": given.top_k, "task": task, "items": given.items}
        if not any(about.items() <= line.items() for line in done):
            yield task, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    records = verbs.add_parser("records")
    records.add_argument("data", type=Path, help="what `ubsmoe data commonsense` wrote")
    records.add_argument("out", type=Path)
    scoring = verbs.add_parser("score")
    scoring.add_argument("model")
    scoring.add_argument("--data", type=Path, required=True)
    scoring.add_argument("--top-k", type=int)
    scoring.add_argument("--items", type=int, default=500)
    scoring.add_argument("--tasks", nargs="+", default=TESTS)
    given = parser.parse_args()
    if given.verb == "records":
        return write_records(given.data, given.out)
    torch.set_num_threads(1)
    todo = list(pieces(given))
    if not todo:
        return print("nothing left to score")
    model, tokenizer = load(given.model, given.top_k)
    for task, about in todo:
        started, busy = time.perf_counter(), time.process_time()
        found = score(model, tokenizer, read_file(given.data / f"{task}.jsonl", AutoTokenizer)[: given.items])
        record = {
            **about,
            **found,
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - busy, 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(record), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
