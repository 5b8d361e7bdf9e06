"""How fast this machine multiplies matrices as large as one expert's share of a batch."""

import statistics
import time

import torch

from ubsmoe import progress
from ubsmoe.config import RunSettings
from ubsmoe.costs.shape import ModelShape
from ubsmoe.model.presets import dtype_of

BLOCKS, BLOCK_SECONDS = 25, 0.02


def measured_speed(shape: ModelShape, settings: RunSettings) -> tuple[float, float, str]:
    """FLOPs per second, by how much of it the middle block was slower, and in words what was measured.

    The fastest of many short blocks counts: whatever else runs on a machine only makes blocks slower, so that two
    measurements agree (bench/plan.py --speed).
    """
    device, whose = _device_here(settings.model.device)
    tokens = settings.train.batch_size * settings.data.max_length
    rows = max(1, tokens * shape.k_max // shape.num_experts)
    dtype = getattr(torch, dtype_of(settings.model))
    x = torch.ones(rows, shape.hidden, device=device, dtype=dtype)
    weight = torch.ones(shape.hidden, shape.up_matrices * shape.expert_width, device=device, dtype=dtype)
    progress.at("measures the speed of this machine")
    _block(x, weight)  # the first one sets the library up
    seconds = sorted(_block(x, weight) for _ in range(BLOCKS))
    return 2 * rows * weight.numel() / seconds[0], 1 - seconds[0] / statistics.median(seconds), whose


def _block(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds per product, over as many as fill a block."""
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < BLOCK_SECONDS or not done:
        torch.mm(x, weight)
        if weight.is_cuda:
            torch.cuda.synchronize()
        done += 1
    return passed / done


def _device_here(name: str) -> tuple[str, str]:
    """The run's device if this machine has it, else its CPU; and in words."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        return "cpu", f"measured on this machine's CPU, since model.device {name!r} is not here"
    return name, "measured on this machine"
