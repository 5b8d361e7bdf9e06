"""What the kernel computes, slow and readable: a loop over experts, gradients by autograd. The tests hold kernel.py to it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ubsmoe.model.expert_weights import ExpertWeights, Lora


def run_assignments_slowly(
    hidden: Float[Tensor, "T h"],
    token: Int[Tensor, " N"],
    expert: Int[Tensor, " N"],
    gate_weight: Float[Tensor, " N"],
    base: ExpertWeights,
    lora: Lora,
) -> Float[Tensor, "T h"]:
    """At each token, the sum over its (token, expert) assignments of gate weight * E_expert(hidden[token])."""
    y = torch.zeros_like(hidden)
    for i in range(len(base.up)):
        own = (expert == i).nonzero().flatten()
        x = hidden[token[own]]
        pre = x @ base.up[i] + lora.scale * (x @ lora.up_a[i].T) @ lora.up_b[i].T
        if base.up_bias is not None:
            pre = pre + base.up_bias[i]
        inner = base.activation(pre)
        out = inner @ base.down[i] + lora.scale * (inner @ lora.down_a[i].T) @ lora.down_b[i].T
        if base.down_bias is not None:
            out = out + base.down_bias[i]
        y = y.index_add(0, token[own], gate_weight[own, None] * out)
    return y
