"""The routed expert kernel with LoRA: only the (token, expert) pairs that were chosen are computed, forward and backward.

    pre = x W1 + s (x A1^T) B1^T,   inner = act(pre),   y(x) += w [inner W2 + s (inner A2^T) B2^T]      one pair (x, expert)

Pairs are sorted by expert once and go through the whole layer in blocks: a few experts whose rows fit the cache together, or a
busy one alone. Only products are done expert by expert; gathering, activation, gate weights and adding up are done once a block,
in memory that the blocks share. No tensor of all pairs is written but `pre`. Backward recomputes act(pre) and the gathered
inputs instead of keeping them, and forms no gradient of a frozen weight. The gate weight w multiplies the narrow side (inner,
not y), and dL/dw = <dL/d(w inner), inner> needs no output either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ubsmoe.model.expert_weights import ExpertWeights, Lora

Views = tuple[Tensor, ...]  # one per expert, made in one call
BLOCK_ROWS = 256  # of a block of several experts: few calls, and what they write still fits the cache
FEW_ROWS = 8  # up to here W x^T runs up to twice as fast as x W^T where W is stored transposed (docs/log.md)


def run_pairs(
    hidden: Tensor, token: Tensor, expert: Tensor, pair_weight: Tensor, base: ExpertWeights, lora: Lora
) -> Tensor:
    """Sum over pairs of weight * E_expert(hidden[token]), back at each token.

    Args:
        hidden: [T, h].
        token: [P], the tokens of the pairs, in any order.
        expert: [P], the expert each goes through.
        pair_weight: [P].
        base: the layer's frozen experts.
        lora: their adapter.

    Returns:
        [T, h] in the dtype of `hidden`. Gradients reach `hidden`, `pair_weight` and the LoRA factors, never the base.
    """
    if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
        token, expert, pair_weight = _in_buckets(token, expert, pair_weight, len(base.up))
    order = torch.argsort(expert, stable=True)
    factors = (lora.up_a, lora.up_b, lora.down_a, lora.down_b)
    y: Tensor = _RoutedExperts.apply(
        hidden, pair_weight[order], *factors, lora.scale, base, expert[order], token[order]
    )
    return y


def _in_buckets(token: Tensor, expert: Tensor, weight: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill every busy expert up to a multiple of 16 pairs (32 above 64) with pairs of weight 0, which change nothing.

    oneDNN compiles a bfloat16 product anew for every number of rows, and fresh batches bring ever new ones.
    """
    count = torch.bincount(expert, minlength=num_experts)
    more = torch.arange(num_experts).repeat_interleave(-count % torch.where(count > 64, 32, 16))
    fill = torch.zeros_like(more), more, weight.new_zeros(len(more))
    return torch.cat([token, fill[0]]), torch.cat([expert, fill[1]]), torch.cat([weight, fill[2]])


class _RoutedExperts(torch.autograd.Function):
    """`run_pairs` on pairs sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        pair_weight: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        scale: float,
        base: ExpertWeights,
        expert: Tensor,
        token: Tensor,
    ) -> Tensor:
        up = _Matrices.of(base.up, up_a, up_b, scale, hidden.dtype)
        down = _Matrices.of(base.down, down_a, down_b, scale, hidden.dtype)
        blocks = list(_blocks(torch.bincount(expert, minlength=len(base.up)).tolist()))
        y, weight = torch.zeros_like(hidden), pair_weight.to(hidden.dtype).unsqueeze(-1)
        widths = base.up.shape[2], up_a.shape[1], down_a.shape[1]
        pre, up_low, down_low = (hidden.new_empty(len(token), width) for width in widths)
        room = _room(hidden, blocks, (hidden.shape[1], base.down.shape[1]))
        for block in blocks:
            x, inner = (part[: block.rows] for part in room)
            t, e, w, p = (part[block.at] for part in (token, expert, weight, pre))
            torch.index_select(hidden, 0, t, out=x)
            up.forward(block, x, p, block.low(up_low))
            if base.up_bias is not None:
                p.add_(base.up_bias.index_select(0, e))
            if base.is_swiglu:
                gate, linear = p.chunk(2, dim=-1)
                torch.ops.aten.silu.out(gate, out=inner).mul_(linear).mul_(w)
            else:
                torch.mul(base.activation(p), w, out=inner)
            down.forward(block, inner, x, block.low(down_low))  # x is as wide as the result, and no longer needed
            if base.down_bias is not None:
                x.addcmul_(w, base.down_bias.index_select(0, e))
            y.index_add_(0, t, x)
        ctx.save_for_backward(hidden, pair_weight, expert, token, pre, up_low, down_low)
        ctx.base, ctx.up, ctx.down, ctx.blocks, ctx.factor_dtype = base, up, down, blocks, up_a.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, pair_weight, expert, token, pre, up_low, down_low = ctx.saved_tensors
        base, up, down = ctx.base, ctx.up, ctx.down
        need_hidden, need_weight = list(ctx.needs_input_grad[:2])
        need_lora = any(ctx.needs_input_grad[2:6])
        grad, weight = grads[0].contiguous(), pair_weight.to(hidden.dtype).unsqueeze(-1)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(pair_weight) if need_weight else None
        factors = [hidden.new_zeros(len(part), *part[0].shape) for part in (up.a, up.b, down.a, down.b)]
        views = [factor.unbind() for factor in factors]
        d_up, d_down = ((views[0], views[1]), (views[2], views[3])) if need_lora else (None, None)
        h, f = hidden.shape[1], base.down.shape[1]
        room = _room(hidden, ctx.blocks, (h, h, f, f, f, base.up.shape[2]))
        for block in ctx.blocks:
            g, x, act, inner, d_inner, d_pre = (part[: block.rows] for part in room)
            t, w, p = (part[block.at] for part in (token, weight, pre))
            torch.index_select(grad, 0, t, out=g)
            torch.index_select(hidden, 0, t, out=x)
            activation = _Swiglu(p, act) if base.is_swiglu else _Recorded(base.activation, p, act)
            torch.mul(act, w, out=inner)
            down.backward(block, g, inner, block.low(down_low), d_inner, d_down)  # by w * act(pre)
            if d_weight is not None:
                dw = act.mul_(d_inner).sum(-1)
                if base.down_bias is not None:
                    dw += (g * base.down_bias.index_select(0, expert[block.at])).sum(-1)
                d_weight[block.at] = dw
            activation.backward(d_inner.mul_(w), d_pre)
            up.backward(block, d_pre, x, block.low(up_low), None if d_hidden is None else g, d_up)
            if d_hidden is not None:
                d_hidden.index_add_(0, t, g)
        if not need_lora:
            return d_hidden, d_weight, *(None,) * 8
        d_up_a, d_up_b, d_down_a, d_down_b = (factor.mul_(up.scale).to(ctx.factor_dtype) for factor in factors)
        d_lora = d_up_a, d_up_b.transpose(1, 2), d_down_a, d_down_b.transpose(1, 2)
        return d_hidden, d_weight, *d_lora, *(None,) * 4


@dataclass(frozen=True)
class _Block:
    """Experts, how many rows each has, and where these lie among all pairs."""

    experts: list[int]
    counts: list[int]
    at: slice

    @property
    def rows(self) -> int:
        return int(self.at.stop - self.at.start)

    def low(self, kept: Tensor) -> Tensor:
        """The block's part of a tensor [P, r] that holds the products of rank r, as [r, n]: thin products are faster so."""
        return kept[self.at].view(-1, self.rows)


def _blocks(counts: list[int]) -> Iterator[_Block]:
    """The experts in order, without those that have no pair, in blocks of up to BLOCK_ROWS rows or of one expert."""
    experts: list[int] = []
    start = rows = 0
    for expert, count in enumerate([*counts, 0]):
        if experts and (rows + count > BLOCK_ROWS or expert == len(counts)):
            yield _Block(experts, [counts[e] for e in experts], slice(start, start + rows))
            experts, start, rows = [], start + rows, 0
        if count:
            experts.append(expert)
            rows += count


def _room(like: Tensor, blocks: list[_Block], widths: tuple[int, ...]) -> list[Tensor]:
    """Memory for one block's intermediate results, used by all in turn so that it stays in the cache."""
    most = max((block.rows for block in blocks), default=0)
    return [like.new_empty(most, width) for width in widths]


@dataclass(frozen=True)
class _Matrices:
    """One matrix of every expert with its LoRA factors, y = x W + s (x A^T) B: W [M, in, out], A [M, r, in], B [M, r, out].

    B is laid out afresh: the thin products that meet it run several times faster than with [M, out, r].
    """

    weights: Views
    a: Views
    b: Views
    scale: float

    @classmethod
    def of(cls, weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> "_Matrices":
        b = b.to(dtype).transpose(1, 2).contiguous()
        return cls(weight.unbind(), a.to(dtype).unbind(), b.unbind(), scale)

    def forward(self, block: _Block, x: Tensor, y: Tensor, low: Tensor) -> None:
        """Fill y [n, out] and low [r, n] = A x^T, each row by its own expert."""
        parts = x.split(block.counts), y.split(block.counts), low.split(block.counts, dim=1)
        for e, x_e, y_e, low_e in zip(block.experts, *parts, strict=True):
            _product(x_e, self.weights[e], y_e)
            torch.mm(self.a[e], x_e.t(), out=low_e)
            y_e.addmm_(low_e.t(), self.b[e], alpha=self.scale)

    def backward(
        self, block: _Block, d_y: Tensor, x: Tensor, low: Tensor, d_x: Tensor | None, d_lora: tuple[Views, Views] | None
    ) -> None:
        """Fill d_x [n, in] and the block's experts in the gradients of A and B, which lack the factor s."""
        parts = (part.split(block.counts) for part in (d_y, x, d_y if d_x is None else d_x))
        for e, d_y_e, x_e, d_x_e, low_e in zip(block.experts, *parts, low.split(block.counts, dim=1), strict=True):
            d_low = torch.mm(self.b[e], d_y_e.t())
            if d_lora is not None:
                torch.mm(d_low, x_e, out=d_lora[0][e])
                torch.mm(low_e, d_y_e, out=d_lora[1][e])
            if d_x is not None:
                _product(d_y_e, self.weights[e].t(), d_x_e)
                d_x_e.addmm_(d_low.t(), self.a[e], alpha=self.scale)


def _product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x W."""
    if len(x) <= FEW_ROWS and weight.stride(0) == 1:
        out.copy_(torch.mm(weight.t(), x.t()).t())
    else:
        torch.mm(x, weight, out=out)


class _Swiglu:
    """act(pre) = silu(gate) * linear, and its gradient without autograd."""

    def __init__(self, pre: Tensor, act: Tensor) -> None:
        self.gate, self.linear = pre.chunk(2, dim=-1)
        self.silu = silu(self.gate)
        torch.mul(self.silu, self.linear, out=act)

    def backward(self, d_act: Tensor, d_pre: Tensor) -> None:
        """Fill d_pre; d_act is used up."""
        d_gate, d_linear = d_pre.chunk(2, dim=-1)
        torch.mul(d_act, self.silu, out=d_linear)
        torch.ops.aten.silu_backward.grad_input(d_act.mul_(self.linear), self.gate, grad_input=d_gate)


class _Recorded:
    """Any other activation, by autograd."""

    def __init__(self, activation: Callable[[Tensor], Tensor], pre: Tensor, act: Tensor) -> None:
        with torch.enable_grad():
            self.leaf = pre.detach().requires_grad_()
            self.live = activation(self.leaf)
        act.copy_(self.live.detach())

    def backward(self, d_act: Tensor, d_pre: Tensor) -> None:
        d_pre.copy_(torch.autograd.grad(self.live, self.leaf, d_act)[0])
