"""The server as one writes it: Flower's FedAvg, and an evaluation of every tier with transformers."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from common import IGNORED, load, read_job, set_top_k
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoTokenizer

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run."""
    job = read_job(str(context.run_config["job"]))
    model, clients = load(job), len(job["clients"])
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    if job["evaluate"]["before"]:
        evaluate(model, tokenizer, job)
    first = get_peft_model_state_dict(model)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    rounds = job["train"]["rounds"]
    result = strategy.start(grid, ArrayRecord(first), num_rounds=rounds)
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    moved = 2 * rounds * clients * sum(tensor.nbytes for tensor in first.values())
    facts = {"tiers": evaluate(model, tokenizer, job), "bytes": moved}
    Path(str(context.run_config["result"])).write_text(json.dumps(facts))


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, job: dict[str, Any]) -> list[dict[str, float]]:
    """Per tier the means over tasks: loss of the right answer, accuracy of the generated and of the likeliest one."""
    tasks = sorted({question["task"] for question in job["questions"]})
    tiers = []
    for top_k in job["tiers"]:
        set_top_k(model, top_k)
        each = [_task(model, tokenizer, [q for q in job["questions"] if q["task"] == task], job) for task in tasks]
        tiers.append({name: sum(one[name] for one in each) / len(each) for name in each[0]})
    return tiers


def _task(model: Any, tokenizer: Any, questions: list[Any], job: dict[str, Any]) -> dict[str, float]:
    loss, tokens, right, ranked, size = 0.0, 0, 0, 0, job["evaluate"]["batch_size"]
    for begin in range(0, len(questions), size):
        batch = questions[begin : begin + size]
        rows = [(q["prompt"], candidate) for q in batch for candidate in q["candidates"]]
        logs = iter(_logs(model, rows))
        texts = _texts(model, tokenizer, [q["prompt"] for q in batch], job["evaluate"]["max_new_tokens"])
        for question, text in zip(batch, texts, strict=True):
            own = [next(logs) for _ in question["candidates"]]
            loss -= own[question["gold"]]
            tokens += len(question["candidates"][question["gold"]])
            ranked += own.index(max(own)) == question["gold"]
            said = re.search(r"(answer|solution|ending|option)[1-5]|true|false", text)
            right += said is not None and said.group(0) == question["answer"]
    return {"loss": loss / tokens, "accuracy": right / len(questions), "mc_accuracy": ranked / len(questions)}


def _logs(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """Log-probability of each answer after its prompt, every text read as a whole."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    real = torch.tensor([[n < len(p) + len(a) for n in range(width)] for p, a in rows])
    logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return [float(-row.sum()) for row in losses]


def _texts(model: Any, tokenizer: Any, prompts: list[list[int]], most: int) -> list[str]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most)
    return list(tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))
