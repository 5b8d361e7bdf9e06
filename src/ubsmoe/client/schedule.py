"""Which examples a client trains on in each step of a round, and with how many experts per token."""

import math
from collections.abc import Iterator, Sequence

import torch

from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.data.tokens import Tokens, batches


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
