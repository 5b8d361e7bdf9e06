"""The training loop: plain top-K, every parameter, two losses and the routers' penalties."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import OlmoeForCausalLM

from ubsmoe import progress
from ubsmoe.bases.pretrain.architecture import RouterLog
from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.bases.pretrain.text import IGNORED, Stream, real_tokens


def losses(model: OlmoeForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss over the labelled tokens, and over the others that are no padding (0 if there are none)."""
    real, labelled = real_tokens(ids, labels).view_as(ids)[:, 1:], labels[:, 1:] != IGNORED
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    each = cross_entropy(model.lm_head(hidden[real]).float(), ids[:, 1:][real], reduction="none")
    answer = labelled[real]
    return each[answer].mean(), each[~answer].sum() / (~answer).sum().clamp_min(1)


def rate_at(step: int, settings: PretrainSettings) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine down to a fraction of the peak."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
    floor = settings.final_rate_fraction
    return settings.learning_rate * warm * (floor + (1 - floor) * cosine)


def train(model: OlmoeForCausalLM, stream: Stream, settings: PretrainSettings) -> Iterator[dict[str, float]]:
    """Train the model in place; yields a progress record every `report_every` steps and at the end."""
    router = RouterLog(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    sums: dict[str, float] = defaultdict(float)
    tokens, begun, since = 0, time.perf_counter(), 0
    model.train()
    for step in progress.through(range(settings.steps), "pretrains, step"):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        for name, weight in (("questions", settings.question_weight), ("prose", 1.0)):
            ids, labels = getattr(stream, name)()
            with torch.autocast("cpu", torch.bfloat16) if settings.bf16 else contextlib.nullcontext():
                loss, rest = losses(model, ids, labels)
            (weight * loss + rest + router.penalty(settings, real_tokens(ids, labels))).backward()
            sums[name] += float(loss.detach())
            tokens += ids.numel()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        since += 1
        if (step + 1) % settings.report_every == 0 or step + 1 == settings.steps:
            seconds = time.perf_counter() - begun
            means = {f"{name}_loss": round(total / since, 4) for name, total in sums.items()}
            yield {"step": step + 1, "tokens": tokens, "seconds": round(seconds, 1), **means}
            sums.clear()
            since = 0
    router.close()
