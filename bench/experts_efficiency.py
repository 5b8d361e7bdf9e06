"""How near the expert kernel comes to bare matrix products of its own shapes; measured beside a client's step by client_step.py."""

import statistics
import time

import torch
from torch.nn.functional import silu

from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel import run_assignments


def efficiency(
    layers: int, experts: int, hidden: int, width: int, rank: int, tokens: int, top_k: int, repeats: int = 5
) -> dict[str, float]:
    """GFLOP/s of the routed experts of all layers, forward and backward with LoRA, and of the frozen matrices' products alone.

    `bare_ms` is how long the latter take. They have the very same shapes, operands and order: x W forward and dy W^T backward
    for each expert's rows.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def swiglu(pre: torch.Tensor) -> torch.Tensor:
        gate, linear = pre.chunk(2, dim=-1)
        return silu(gate) * linear

    stack = []
    for _ in range(layers):
        up, down = normal(experts, 2 * width, hidden).transpose(1, 2), normal(experts, hidden, width).transpose(1, 2)
        shapes = (rank, hidden), (2 * width, rank), (rank, width), (hidden, rank)
        factors = [normal(experts, *shape).requires_grad_() for shape in shapes]
        stack.append((ExpertWeights(up, down, None, None, swiglu, is_swiglu=True), Lora(*factors, scale=2.0)))
    token = torch.arange(tokens).repeat_interleave(top_k)
    whole, bare = [], []
    for _ in range(repeats + 1):
        choice = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=-1)
        expert, weight = choice.indices.reshape(-1), choice.values.reshape(-1).requires_grad_()
        inputs = normal(tokens, hidden).requires_grad_()
        began = time.process_time()
        y = inputs
        for base, lora in stack:
            y = run_assignments(y, token, expert, weight, base, lora)
        y.sum().backward()
        whole.append(time.process_time() - began)
        groups = [normal(int(n), 2 * width) for n in torch.bincount(expert, minlength=experts)]
        began = time.process_time()
        for base, _ in stack:
            for wide, up, down in zip(groups, base.up.unbind(), base.down.unbind(), strict=True):
                narrow = torch.mm(wide, up.t())
                torch.mm(torch.mm(narrow, up)[:, :width], down)
                torch.mm(narrow, down.t())
        bare.append(time.process_time() - began)
    pairs = layers * tokens * top_k
    frozen_flops = 2 * 2 * pairs * 3 * hidden * width  # forward, and the gradient by the inputs
    lora_flops = 3 * 2 * pairs * rank * (2 * hidden + 3 * width)  # forward, and both gradients
    ours_rate = (frozen_flops + lora_flops) / statistics.median(whole[1:]) / 1e9
    bare_rate = frozen_flops / statistics.median(bare[1:]) / 1e9
    return {
        "ours_gflops": ours_rate,
        "bare_gflops": bare_rate,
        "bare_ms": statistics.median(bare[1:]) * 1e3,
        "efficiency": ours_rate / bare_rate,
    }
