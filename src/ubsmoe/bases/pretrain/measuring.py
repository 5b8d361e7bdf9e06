"""What a finished base can do, at full and at fewer active experts."""

from collections import defaultdict
from typing import Any

import torch
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from ubsmoe.bases.pretrain.architecture import RouterLog
from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.bases.pretrain.text import END, HELD_OUT, IGNORED, collate, encode, real_tokens
from ubsmoe.bases.pretrain.training import losses
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tasks import Example
from ubsmoe.maths.balance import normalised_entropy

MEASURED = 640  # questions behind every accuracy


@torch.no_grad()
def accuracy(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> dict[str, float]:
    """Per task, the share of questions whose whole completion greedy decoding would write, and their "mean".

    One pass with the right completion in place suffices: decoding writes it exactly if every token of it is the
    likeliest.
    """
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(examples), 64):
        batch = examples[start : start + 64]
        ids, labels = collate([encode(tokenizer, e.prompt, e.completion) for e in batch])
        guess, wanted = model(input_ids=ids).logits[:, :-1].argmax(-1), labels[:, 1:]
        for example, ok in zip(batch, ((guess == wanted) | (wanted == IGNORED)).all(-1).tolist(), strict=True):
            right[example.task].append(float(ok))
    by_task = {task: sum(values) / len(values) for task, values in sorted(right.items())}
    return {task: round(value, 4) for task, value in {**by_task, "mean": sum(by_task.values()) / len(by_task)}.items()}


@torch.no_grad()
def held_out_loss(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, books: list[str], length: int
) -> float | None:
    """Mean loss on the ends of the books, which training never reads; None without a book of that length."""
    tails = [tokenizer(book[-HELD_OUT:].replace(END, "\n")).input_ids[:length] for book in books]
    ids = torch.tensor([tail for tail in tails if len(tail) == length])
    return round(float(losses(model, ids, ids)[0]), 4) if len(ids) else None


def utilization_entropy(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> list[float]:
    """Per layer, how evenly the experts are used on these questions: entropy over its maximum."""
    ids, labels = collate([encode(tokenizer, e.prompt, e.completion) for e in examples])
    real, router = real_tokens(ids, labels), RouterLog(model)
    with torch.no_grad():
        model(input_ids=ids)
    router.close()
    counts = [torch.bincount(index[real].reshape(-1), minlength=logits.shape[-1]) for logits, index in router.layers]
    return [round(float(normalised_entropy(count)), 4) for count in counts]


def measure(
    model: OlmoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    books: list[str],
    synthetic: SyntheticQA,
    settings: PretrainSettings,
) -> dict[str, Any]:
    """What the finished base can do, at full and at fewer active experts."""
    known = synthetic.examples("test", MEASURED, seed=1)
    unknown = SyntheticQA(0).examples("test", MEASURED, seed=1)
    gates = [layer.mlp.gate for layer in model.model.layers]
    model.eval()
    results: dict[str, Any] = {
        "pretraining_world": accuracy(model, tokenizer, known),
        "evaluation_world": accuracy(model, tokenizer, unknown),
        "normalised_entropy_per_layer": utilization_entropy(model, tokenizer, known[:128]),
        "by_top_k": {},
    }
    for top_k in sorted({settings.top_k, *(k for k in (6, 4, 2, 1) if k < settings.top_k)}, reverse=True):
        for gate in gates:
            gate.top_k = top_k
        results["by_top_k"][str(top_k)] = {
            "book_loss": held_out_loss(model, tokenizer, books, 256),
            "pretraining_world": accuracy(model, tokenizer, known)["mean"],
        }
    for gate in gates:
        gate.top_k = settings.top_k
    return results
