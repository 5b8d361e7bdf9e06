"""SmolLM2-135M as a mixture of experts: what is left of it at each K, before and after a short federated run.

    python bench/upcycled_smollm2.py records data/commonsense data/texts       # the same questions, answered in words
    ubsmoe base upcycle SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2-moe --experts 8 --top-k 4 --slices 4 --shared 0.5 \
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ubsmoe import FederatedMoE
from ubsmoe.bases.upcycle import load_dense
from ubsmoe.data.records import read_file
from ubsmoe.data.tasks import TASKS, Example

RESULTS = Path(__file__).parent / "results" / "upcycled_smollm2.jsonl"
TESTS = ("piqa", "ARC-Easy")
ROW = 256  # tokens of one forward pass


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
        # one question of the training set has the same text for two of its options
        clear = [
            json.dumps(record) + "\n"
            for record in records
            if len(set(record["candidates"])) == len(record["candidates"])
        ]
        (out / f"{target}.jsonl").write_text("".join(clear))


@dataclass(frozen=True)
class Asked:
    """A question's tokens: its prompt, then every candidate, each of which follows the prompt and does not see the others."""

    prompt: list[int]
    candidates: list[list[int]]
    characters: list[int]
    gold: int

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.candidates))


def asked(example: Example, tokenizer: Any) -> Asked:
    """Prompts and candidates without an end of text."""
    texts = example.candidates
    candidates = [tokenizer(f" {text}", add_special_tokens=False).input_ids for text in texts]
    prompt = tokenizer(example.prompt).input_ids
    return Asked(prompt, candidates, [len(text) for text in texts], texts.index(example.answer))


def rows(questions: list[Asked]) -> Iterator[list[Asked]]:
    """As many questions in one row as fit into ROW tokens; one that is longer has a row of its own."""
    row: list[Asked] = []
    for one in questions:
        if row and sum(map(len, row)) + len(one) > ROW:
            yield row
            row = []
        row.append(one)
    yield row


@torch.no_grad()
def log_probabilities(model: Any, row: list[Asked]) -> list[list[float]]:
    """Of every candidate of every question in a row, with one forward pass and no padding between them."""
    ids, positions, question, branch, parents, targets = ([] for _ in range(6))
    for number, one in enumerate(row):
        last = len(ids) + len(one.prompt) - 1
        for way, part in enumerate([one.prompt, *one.candidates]):
            start = len(ids)
            if way:
                parents += [last, *range(start, start + len(part) - 1)]
                targets += part
            ids += part
            positions += range(way and len(one.prompt), (way and len(one.prompt)) + len(part))
            question += [number] * len(part)
            branch += [way] * len(part)
    fill = max(ROW - len(ids), 0)  # one size for all: a bfloat16 product is compiled for its number of rows
    which, way = torch.tensor(question + [-1] * fill), torch.tensor(branch + [0] * fill)
    seen = (which[:, None] == which) & ((way == 0) | (way[:, None] == way)).tril()
    hidden = model.model(
        input_ids=torch.tensor([ids + [0] * fill]), position_ids=torch.tensor([positions + [0] * fill]),
        attention_mask=seen[None, None], use_cache=False,
    ).last_hidden_state[0, parents]  # fmt: skip
    logs = model.get_output_embeddings()(hidden).float().log_softmax(-1)
    parts = logs[range(len(targets)), targets].split([len(part) for one in row for part in one.candidates])
    sums = iter([float(part.sum()) for part in parts])
    return [[next(sums) for _ in one.candidates] for one in row]


def score(model: Any, questions: list[Asked]) -> dict[str, float]:
    plain = normalised = 0
    for row in rows(questions):
        for one, logs in zip(row, log_probabilities(model, row), strict=True):
            per_character = [log / length for log, length in zip(logs, one.characters, strict=True)]
            plain += logs.index(max(logs)) == one.gold
            normalised += per_character.index(max(per_character)) == one.gold
    return {"items": len(questions), "accuracy": plain / len(questions), "normalised": normalised / len(questions)}


def load(place: str, top_k: int | None) -> tuple[Any, Any]:
    if top_k is None:
        dense, tokenizer = load_dense(place)
        return dense.to(torch.bfloat16), tokenizer
    tier = top_k if (Path(place) / "summary.json").is_file() else None  # runs/smollm2.toml: tier 1 has K = 1, and so on
    model = FederatedMoE.from_pretrained(place, tier=tier)
    if tier is None:
        model.set_budget(top_k / model.k_max)
    assert model.top_k == top_k, f"this tier runs K = {model.top_k}"
    return model.model.to(torch.bfloat16), model.tokenizer


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
        examples = read_file(given.data / f"{task}.jsonl", AutoTokenizer)[: given.items]
        found = score(model, [asked(example, tokenizer) for example in examples])
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
