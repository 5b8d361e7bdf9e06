"""Slow and clear versions of what src/ does fast: experts written out per layout, mixtures by the reference kernel and autograd."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel_reference import run_assignments_slowly

LAYOUTS = ("gated", "gelu", "transposed", "gateless")


@use_experts_implementation(has_gate=False)
class GatelessExperts(nn.Module):
    """Up, activation, down; the layout of NemotronH."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = torch.nn.functional.softplus


def experts_module(layout: str, num_experts: int, hidden: int, width: int, seed: int = 0) -> Any:
    """A transformers experts module in float64, with random frozen weights."""
    config = SimpleNamespace(
        num_experts=num_experts, num_local_experts=num_experts, hidden_size=hidden, intermediate_size=width,
        hidden_act="gelu" if layout == "gelu" else "silu", swiglu_alpha=1.702, swiglu_limit=1.5,
    )  # fmt: skip
    make: Any = {"transposed": GptOssExperts, "gateless": GatelessExperts}.get(layout, OlmoeExperts)
    module = make(config).double()
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.requires_grad_(False).copy_(0.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return module


@dataclass
class Factors:
    """LoRA of one layer: A [M, r, in] and B [M, out, r] of both matrices."""

    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scale: float

    def leaves(self) -> list[Tensor]:
        """The trainable tensors."""
        return [self.up_a, self.up_b, self.down_a, self.down_b]


def one_expert(module: Any, factors: Factors, expert: int, x: Tensor) -> Tensor:
    """E_i(x) of one token [h], with merged weights, written out per layout."""
    up_delta = factors.scale * factors.up_b[expert] @ factors.up_a[expert]
    down_delta = factors.scale * factors.down_b[expert] @ factors.down_a[expert]
    if isinstance(module, GptOssExperts):  # stored input-first, gate and up interleaved, biases, clamps
        pre = x @ (module.gate_up_proj[expert] + up_delta.T) + module.gate_up_proj_bias[expert]
        gate, up = pre[0::2].clamp(max=module.limit), pre[1::2].clamp(-module.limit, module.limit)
        inner = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
        return inner @ (module.down_proj[expert] + down_delta.T) + module.down_proj_bias[expert]
    if isinstance(module, GatelessExperts):
        inner = module.act_fn((module.up_proj[expert] + up_delta) @ x)
    else:
        pre = (module.gate_up_proj[expert] + up_delta) @ x
        gate, up = pre[: len(pre) // 2], pre[len(pre) // 2 :]
        inner = module.act_fn(gate) * up
    return (module.down_proj[expert] + down_delta) @ inner


def weighted_sum(module: Any, factors: Factors, hidden: Tensor, weights: Tensor) -> Tensor:
    """y(x) = sum_i weights[x, i] E_i(x) over all experts, dense: [T, h]."""
    token, expert = torch.ones_like(weights).nonzero(as_tuple=True)
    lora = Lora(*factors.leaves(), scale=factors.scale)
    return run_assignments_slowly(hidden, token, expert, weights[token, expert], ExpertWeights.of(module), lora)


def missing_gradient(module: Any, factors: Factors, hidden: Tensor, missing: Tensor, delta: Tensor) -> list[Tensor]:
    """sum over tokens of missing[x, i] J_i(x)^T delta(x), for the four tensors of the adapter."""
    y = weighted_sum(module, factors, hidden.detach(), missing.detach())
    return list(torch.autograd.grad(y, factors.leaves(), delta))
