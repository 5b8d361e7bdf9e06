"""Which examples a client trains on in each step of a round, and with how many experts per token."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.config.plug_ins import load
from ubsmoe.data.tokens import Tokens, batches
from ubsmoe.messages import MOST_STEPS_TOLD


def batch_order(settings: TrainSettings, examples: Sequence[Tokens], generator: torch.Generator) -> Iterator[list[int]]:
    """Positions of the examples in each batch, one batch after another."""
    lengths = [len(one.input_ids) for one in examples] if settings.group_by_length else None
    return batches(len(examples), settings.batch_size, generator, lengths)


def in_pieces(batch: list[int], settings: TrainSettings) -> list[list[int]]:
    """A batch cut into micro-batches; as it is where there are none."""
    size = settings.micro_batch or len(batch)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def steps_per_round(settings: TrainSettings, num_examples: int) -> int:
    """Optimiser steps of one client in one round: `local_steps`, or as many as `local_epochs` passes take."""
    if settings.local_steps:
        return settings.local_steps
    batches_per_pass = math.ceil(num_examples / settings.batch_size)
    return max(1, round(settings.local_epochs * batches_per_pass / settings.gradient_accumulation))


def steps_told(num_steps: int) -> set[int]:
    """The steps, from 0, of which a client says how they went: evenly spaced, the first and the last among them.

    >>> sorted(steps_told(3)), len(steps_told(1000)), max(steps_told(1000))
    ([0, 1, 2], 16, 999)
    """
    count = min(num_steps, MOST_STEPS_TOLD)
    return {i * (num_steps - 1) // max(count - 1, 1) for i in range(count)}


def step_size(settings: TrainSettings, round: int, step: int, num_steps: int) -> float:
    """The factor of the learning rate in a step.

        constant    1
        linear      1 - t
        cosine      (1 + cos pi t) / 2        t = (round - 1 + step / num_steps) / schedule_rounds, at most 1

    A plug-in is `schedule(t) -> factor`. Over it lies the warm-up of each round, (step + 1) / warmup_steps up to 1.

    Source: cosine: SGDR (Loshchilov and Hutter 2017, arXiv 1608.03983), equation 5, without restarts.

    >>> [step_size(TrainSettings(schedule="linear", rounds=2), r, s, 2) for r in (1, 2) for s in (0, 1)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [round(step_size(TrainSettings(schedule="cosine", schedule_rounds=3), r, 0, 2), 2) for r in (1, 2, 3, 4)]
    [1.0, 0.75, 0.25, 0.0]
    """
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    t = min(1.0, (round - 1 + step / num_steps) / (settings.schedule_rounds or settings.rounds))
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    }
    shape = shapes.get(settings.schedule) or load(settings.schedule, "train.schedule")
    return warm * float(shape(t))


def elastic_top_ks(
    tiers: TierSettings, top_k: int, first: int, num_steps: int, generator: torch.Generator
) -> list[int]:
    """K of each local step: `top_k`, but a smaller one in a share of the steps, spread evenly.

    `first` counts the steps of earlier rounds, so that a share below one step a round is kept over several.

    Ours, elastic budgets: a client that also trains at smaller budgets teaches the low tiers, for less compute.
    """
    share = tiers.elastic_share
    low = [int((step + 1) * share + 1e-9) > int(step * share + 1e-9) for step in range(first, first + num_steps)]
    if tiers.elastic_draw == "one":
        return [min(1, top_k) if is_low else top_k for is_low in low]
    draws = torch.randint(min(1, top_k), top_k + 1, (num_steps,), generator=generator).tolist()
    return [draw if is_low else top_k for is_low, draw in zip(low, draws, strict=True)]
