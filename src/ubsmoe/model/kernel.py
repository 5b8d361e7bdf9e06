"""The routed expert kernel with LoRA: only the (token, expert) assignments that were chosen are computed, forward and backward.

    pre = x W1 + s (x A1^T) B1^T,   inner = act(pre),   y(x) += w [inner W2 + s (inner A2^T) B2^T]      one assignment (x, expert)

kernel_reference.py says the same in a loop over experts. Here assignments are sorted by expert once and go through the whole
layer in blocks: a few experts whose rows fit the cache together, or a busy one alone. Only products are done expert by expert;
gathering, activation, gate weights and adding up are done once a block, in scratch memory that the blocks share. No tensor of
all assignments is written but `pre`. Backward recomputes act(pre) and the gathered inputs instead of keeping them, and forms no
gradient of a frozen weight. The gate weight w multiplies the narrow side (inner, not y), and dL/dw = <dL/d(w inner), inner>
needs no output either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.on_demand import InScratch, OnDemand

PerExpert = tuple[Float[Tensor, "_ _"], ...]
"""Views of a fused tensor, one per expert, made in one call."""

BLOCK_ROWS = 256  # of a block of several experts: few calls, and what they write still fits the cache
FEW_ROWS = 8  # up to here W x^T runs up to twice as fast as x W^T where W is stored transposed (docs/log.md)


def run_assignments(
    hidden: Float[Tensor, "T h"],
    token: Int[Tensor, " N"],
    expert: Int[Tensor, " N"],
    gate_weight: Float[Tensor, " N"],
    base: ExpertWeights,
    lora: Lora,
) -> Float[Tensor, "T h"]:
    """At each token, the sum over its assignments of gate weight * E_expert(hidden[token]).

    Args:
        hidden: the layer's input.
        token: the token of each assignment, in any order.
        expert: the expert of each.
        gate_weight: w of each.
        base: the layer's frozen experts.
        lora: their adapter.

    Returns:
        A tensor in the dtype of `hidden`. Gradients reach `hidden`, `gate_weight` and the LoRA factors, never the base.
    """
    if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
        token, expert, gate_weight = _in_buckets(token, expert, gate_weight, len(base.up))
    order = torch.argsort(expert, stable=True)
    factors = (lora.up_a, lora.up_b, lora.down_a, lora.down_b)
    y: Float[Tensor, "T h"] = _RoutedExperts.apply(
        hidden, gate_weight[order], *factors, lora.scale, base, expert[order], token[order]
    )
    return y


def _in_buckets(
    token: Int[Tensor, " N"], expert: Int[Tensor, " N"], gate_weight: Float[Tensor, " N"], num_experts: int
) -> tuple[Int[Tensor, " filled"], Int[Tensor, " filled"], Float[Tensor, " filled"]]:
    """Fill every busy expert up to a multiple of 16 assignments (32 above 64) with ones of weight 0, which change nothing.

    oneDNN compiles a bfloat16 product anew for every number of rows, and fresh batches bring ever new ones.
    """
    count = torch.bincount(expert, minlength=num_experts)
    more = torch.arange(num_experts).repeat_interleave(-count % torch.where(count > 64, 32, 16))
    fill = torch.zeros_like(more), more, gate_weight.new_zeros(len(more))
    return torch.cat([token, fill[0]]), torch.cat([expert, fill[1]]), torch.cat([gate_weight, fill[2]])


class _RoutedExperts(torch.autograd.Function):
    """`run_assignments` on assignments sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "T h"],
        gate_weight: Float[Tensor, " N"],
        up_a: Float[Tensor, "M up_rank h"],
        up_b: Float[Tensor, "M pre up_rank"],
        down_a: Float[Tensor, "M down_rank f"],
        down_b: Float[Tensor, "M h down_rank"],
        scale: float,
        base: ExpertWeights,
        expert: Int[Tensor, " N"],
        token: Int[Tensor, " N"],
    ) -> Float[Tensor, "T h"]:
        up = _Matrices.of(base.up, up_a, up_b, scale, hidden.dtype)
        down = _Matrices.of(base.down, down_a, down_b, scale, hidden.dtype)
        blocks = list(_blocks(torch.bincount(expert, minlength=len(base.up)).tolist()))
        y, weight = torch.zeros_like(hidden), gate_weight.to(hidden.dtype).unsqueeze(-1)
        widths = base.up.shape[2], up_a.shape[1], down_a.shape[1]
        # kept for the backward pass: the pre-activations, and A x^T of both matrices, which are thin
        pre, up_lora_hidden, down_lora_hidden = (hidden.new_empty(len(token), width) for width in widths)
        scratch = _scratch(hidden, blocks, (hidden.shape[1], base.down.shape[1]))
        for block in blocks:
            x, inner = (memory[: block.rows] for memory in scratch)
            block_token, block_expert, block_weight, block_pre = (
                all_[block.at] for all_ in (token, expert, weight, pre)
            )
            torch.index_select(hidden, 0, block_token, out=x)
            up.forward(block, x, block_pre, block.lora_hidden(up_lora_hidden))
            if base.up_bias is not None:
                block_pre.add_(base.up_bias.index_select(0, block_expert))
            # the gate weight goes into the narrow inner rows, so that the wide output is written once
            if base.is_swiglu:
                gate, linear = block_pre.chunk(2, dim=-1)
                torch.ops.aten.silu.out(gate, out=inner).mul_(linear).mul_(block_weight)
            else:
                torch.mul(base.activation(block_pre), block_weight, out=inner)
            out = x  # as wide as the output, and no longer needed
            down.forward(block, inner, out, block.lora_hidden(down_lora_hidden))
            if base.down_bias is not None:
                out.addcmul_(block_weight, base.down_bias.index_select(0, block_expert))
            y.index_add_(0, block_token, out)
        ctx.save_for_backward(hidden, gate_weight, expert, token, pre, up_lora_hidden, down_lora_hidden)
        ctx.base, ctx.up, ctx.down, ctx.blocks, ctx.factor_dtype = base, up, down, blocks, up_a.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Float[Tensor, "T h"]) -> tuple[Tensor | None, ...]:
        hidden, gate_weight, expert, token, pre, up_lora_hidden, down_lora_hidden = ctx.saved_tensors
        base, up, down = ctx.base, ctx.up, ctx.down
        need_hidden, need_weight = list(ctx.needs_input_grad[:2])
        need_lora = any(ctx.needs_input_grad[2:6])
        d_y, weight = grads[0].contiguous(), gate_weight.to(hidden.dtype).unsqueeze(-1)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(gate_weight) if need_weight else None
        # zeros, since experts without an assignment are in no block
        factors = [hidden.new_zeros(len(part), *part[0].shape) for part in (up.a, up.b, down.a, down.b)]
        views = [factor.unbind() for factor in factors]
        d_up, d_down = ((views[0], views[1]), (views[2], views[3])) if need_lora else (None, None)
        h, f = hidden.shape[1], base.down.shape[1]
        scratch = _scratch(hidden, ctx.blocks, (h, h, f, f, f, base.up.shape[2]))
        for block in ctx.blocks:
            d_out, x, act, inner, d_inner, d_pre = (memory[: block.rows] for memory in scratch)
            block_token, block_weight, block_pre = (all_[block.at] for all_ in (token, weight, pre))
            torch.index_select(d_y, 0, block_token, out=d_out)
            torch.index_select(hidden, 0, block_token, out=x)
            activation = _Swiglu(block_pre, act) if base.is_swiglu else _Recorded(base.activation, block_pre, act)
            torch.mul(act, block_weight, out=inner)
            # gives dL/d(w inner), since w was multiplied in before the product
            down.backward(block, d_out, inner, block.lora_hidden(down_lora_hidden), d_inner, d_down)
            if d_weight is not None:
                by_weight = act.mul_(d_inner).sum(-1)
                if base.down_bias is not None:
                    by_weight += (d_out * base.down_bias.index_select(0, expert[block.at])).sum(-1)
                d_weight[block.at] = by_weight
            activation.backward(d_inner.mul_(block_weight), d_pre)
            d_x = None if d_hidden is None else d_out  # the same memory: d_out is no longer needed
            up.backward(block, d_pre, x, block.lora_hidden(up_lora_hidden), d_x, d_up)
            if d_hidden is not None:
                d_hidden.index_add_(0, block_token, d_out)
        if not need_lora:
            return d_hidden, d_weight, *(None,) * 8
        d_up_a, d_up_b, d_down_a, d_down_b = (factor.mul_(up.scale).to(ctx.factor_dtype) for factor in factors)
        d_lora = d_up_a, d_up_b.transpose(1, 2), d_down_a, d_down_b.transpose(1, 2)
        return d_hidden, d_weight, *d_lora, *(None,) * 4


@dataclass(frozen=True)
class _Block:
    """Experts, how many rows each has, and where these lie among all assignments."""

    experts: list[int]
    counts: list[int]
    at: slice

    @property
    def rows(self) -> int:
        return int(self.at.stop - self.at.start)

    def lora_hidden(self, kept: Float[Tensor, "N r"]) -> Float[Tensor, "r n"]:
        """The block's part of the memory for products of rank r, laid out as [r, n]: thin products are faster so."""
        return kept[self.at].view(-1, self.rows)


def _blocks(counts: list[int]) -> Iterator[_Block]:
    """The experts in order, without those that have no assignment, in blocks of up to BLOCK_ROWS rows or of one expert."""
    experts: list[int] = []
    start = rows = 0
    for expert, count in enumerate([*counts, 0]):
        if experts and (rows + count > BLOCK_ROWS or expert == len(counts)):
            yield _Block(experts, [counts[e] for e in experts], slice(start, start + rows))
            experts, start, rows = [], start + rows, 0
        if count:
            experts.append(expert)
            rows += count


def _scratch(
    like: Float[Tensor, "T h"], blocks: list[_Block], widths: tuple[int, ...]
) -> list[Float[Tensor, "rows _"]]:
    """Memory for one block's intermediate results, used by all in turn so that it stays in the cache."""
    most = max((block.rows for block in blocks), default=0)
    return [like.new_empty(most, width) for width in widths]


@dataclass(frozen=True)
class _Matrices:
    """One matrix of every expert with its LoRA factors, y = x W + s (x A^T) B: W [in, out], A [r, in], B [r, out] of each expert.

    B is laid out afresh: the thin products that meet it run several times faster than with [out, r].
    """

    weights: PerExpert | InScratch
    a: PerExpert
    b: PerExpert
    scale: float

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "M in out"] | OnDemand,
        a: Float[Tensor, "M r in"],
        b: Float[Tensor, "M out r"],
        scale: float,
        dtype: torch.dtype,
    ) -> "_Matrices":
        b = b.to(dtype).transpose(1, 2).contiguous()
        return cls(weight.unbind(), a.to(dtype).unbind(), b.unbind(), scale)

    def forward(
        self, block: _Block, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"], lora_hidden: Float[Tensor, "r n"]
    ) -> None:
        """Fill `y` and `lora_hidden` = A x^T, each row by its own expert."""
        parts = x.split(block.counts), y.split(block.counts), lora_hidden.split(block.counts, dim=1)
        for expert, x_e, y_e, lora_hidden_e in zip(block.experts, *parts, strict=True):
            _product(x_e, self.weights[expert], y_e)
            torch.mm(self.a[expert], x_e.t(), out=lora_hidden_e)
            y_e.addmm_(lora_hidden_e.t(), self.b[expert], alpha=self.scale)

    def backward(
        self,
        block: _Block,
        d_y: Float[Tensor, "n out"],
        x: Float[Tensor, "n in"],
        lora_hidden: Float[Tensor, "r n"],
        d_x: Float[Tensor, "n in"] | None,
        d_lora: tuple[PerExpert, PerExpert] | None,
    ) -> None:
        """Fill `d_x` and the block's experts in the gradients of A and B, which lack the factor s."""
        parts = (part.split(block.counts) for part in (d_y, x, d_y if d_x is None else d_x))
        thin = lora_hidden.split(block.counts, dim=1)
        for expert, d_y_e, x_e, d_x_e, lora_hidden_e in zip(block.experts, *parts, thin, strict=True):
            d_lora_hidden = torch.mm(self.b[expert], d_y_e.t())
            if d_lora is not None:
                torch.mm(d_lora_hidden, x_e, out=d_lora[0][expert])
                torch.mm(lora_hidden_e, d_y_e, out=d_lora[1][expert])
            if d_x is not None:
                _product(d_y_e, self.weights[expert].t(), d_x_e)
                d_x_e.addmm_(d_lora_hidden.t(), self.a[expert], alpha=self.scale)


def _product(x: Float[Tensor, "n in"], weight: Float[Tensor, "in out"], out: Float[Tensor, "n out"]) -> None:
    """out = x W."""
    if len(x) <= FEW_ROWS and weight.stride(0) == 1:
        out.copy_(torch.mm(weight.t(), x.t()).t())
    else:
        torch.mm(x, weight, out=out)


class _Swiglu:
    """act(pre) = silu(gate) * linear, and its gradient without autograd."""

    def __init__(self, pre: Float[Tensor, "n pre"], act: Float[Tensor, "n f"]) -> None:
        self.gate, self.linear = pre.chunk(2, dim=-1)
        self.silu = silu(self.gate)
        torch.mul(self.silu, self.linear, out=act)

    def backward(self, d_act: Float[Tensor, "n f"], d_pre: Float[Tensor, "n pre"]) -> None:
        """Fill d_pre; d_act is used up."""
        d_gate, d_linear = d_pre.chunk(2, dim=-1)
        torch.mul(d_act, self.silu, out=d_linear)
        torch.ops.aten.silu_backward.grad_input(d_act.mul_(self.linear), self.gate, grad_input=d_gate)


class _Recorded:
    """Any other activation, by autograd."""

    def __init__(
        self,
        activation: Callable[[Float[Tensor, "n pre"]], Float[Tensor, "n f"]],
        pre: Float[Tensor, "n pre"],
        act: Float[Tensor, "n f"],
    ) -> None:
        with torch.enable_grad():
            self.leaf = pre.detach().requires_grad_()
            self.live = activation(self.leaf)
        act.copy_(self.live.detach())

    def backward(self, d_act: Float[Tensor, "n f"], d_pre: Float[Tensor, "n pre"]) -> None:
        d_pre.copy_(torch.autograd.grad(self.live, self.leaf, d_act)[0])
