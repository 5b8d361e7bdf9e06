"""Transformers and PEFT as the plain app uses them: a model from a folder, the adapter on its experts, a training loop."""

import json
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

IGNORED = -100


@cache
def read_job(path: str) -> dict[str, Any]:
    """What whole_run.py wrote."""
    with open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def load(job: dict[str, Any]) -> Any:
    """The base with a fresh adapter."""
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    base.set_experts_implementation("grouped_mm")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules=[], target_parameters=targets)
    return get_peft_model(base, config).eval()


def set_top_k(model: Any, top_k: int) -> None:
    """Experts per token."""
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate.top_k = top_k


def collate(examples: list[Any]) -> dict[str, Tensor]:
    """Pad on the right; the loss is on answers."""
    width = max(len(ids) for ids, _ in examples)
    rows = [(ids + [0] * (width - len(ids)), len(ids), start) for ids, start in examples]
    ids = torch.tensor([row for row, _, _ in rows])
    column = torch.arange(width)
    mask = torch.stack([column < length for _, length, _ in rows])
    answer = torch.stack([column >= start for _, _, start in rows]) & mask
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~answer, IGNORED)}


def train(model: Any, examples: list[Any], settings: dict[str, Any], seed: int) -> float:
    """The last loss."""
    generator = torch.Generator().manual_seed(seed)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings["learning_rate"], weight_decay=settings["weight_decay"])
    order: list[int] = []
    loss = torch.zeros(())
    for _ in range(settings["local_steps"]):
        if not order:
            order = torch.randperm(len(examples), generator=generator).tolist()
        chosen, order = order[: settings["batch_size"]], order[settings["batch_size"] :]
        optimizer.zero_grad()
        loss = model(**collate([examples[i] for i in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings["clip_norm"])
        optimizer.step()
    return float(loss)
