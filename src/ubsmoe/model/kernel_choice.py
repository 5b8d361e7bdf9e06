"""Which kernel runs the experts: blocks that fit a CPU's cache, or grouped products on an accelerator."""

from jaxtyping import Float, Int
from torch import Tensor

from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel import run_assignments as run_in_blocks
from ubsmoe.model.kernel_grouped import can_group, run_grouped

GROUPED_ON = {"cuda"}
"""Kinds of devices on which a product costs less than its launch."""


def run_assignments(
    hidden: Float[Tensor, "T h"],
    token: Int[Tensor, " N"],
    expert: Int[Tensor, " N"],
    gate_weight: Float[Tensor, " N"],
    base: ExpertWeights,
    lora: Lora,
) -> Float[Tensor, "T h"]:
    """At each token, the sum over its assignments of gate weight * E_expert(hidden[token]).

    Arguments are `kernel.run_assignments`'s.
    Quantised experts, and matrices whose rows do not fill 16 bytes, take the blocks everywhere.
    """
    grouped = hidden.device.type in GROUPED_ON and len(token) > 0 and can_group(hidden, base)
    return (run_grouped if grouped else run_in_blocks)(hidden, token, expert, gate_weight, base, lora)
