"""The expert kernel for accelerators: each matrix of all experts is one grouped product, whatever the experts' numbers of rows.

    pre = x W1 + s (x A1^T) B1^T,   inner = act(pre) w,   y(x) += inner W2 + s (inner A2^T) B2^T      as in kernel.py

Assignments are sorted by expert; where each expert's rows end is known on the device, so the host waits for nothing and launches
the same few operations for any routing. A token's sum is taken over its rows in the order of experts, forward and backward,
never by atomic additions: the same input gives the same bits. bfloat16 products and sums add up in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad

from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.on_demand import OnDemand
from ubsmoe.model.slices import NarrowedExperts

ROW_BYTES = 16
"""Every row must begin at a multiple of it."""


def can_group(hidden: Float[Tensor, "T h"], base: ExpertWeights) -> bool:
    """Whether the operator takes these experts. It reads matrices side by side: none that are dequantised one by one."""
    whole = [one.whole if isinstance(one, NarrowedExperts) else one for one in (base.up, base.down)]
    if not all(isinstance(one, Tensor) and one.dtype == hidden.dtype for one in whole):
        return False
    sizes = (*base.up.shape[1:], *base.down.shape[1:])
    aligned = all(size * hidden.element_size() % ROW_BYTES == 0 for size in sizes)
    return aligned or hidden.dtype == torch.float64


def run_grouped(
    hidden: Float[Tensor, "T h"],
    token: Int[Tensor, " N"],
    expert: Int[Tensor, " N"],
    gate_weight: Float[Tensor, " N"],
    base: ExpertWeights,
    lora: Lora,
) -> Float[Tensor, "T h"]:
    """At each token, the sum over its assignments of gate weight * E_expert(hidden[token]), as `kernel.run_assignments`."""
    order = torch.argsort(expert, stable=True)
    token, expert = token[order], expert[order]
    weight = gate_weight.index_select(0, order).to(hidden.dtype).unsqueeze(-1)
    ends = torch.searchsorted(expert, torch.arange(len(base.up), device=expert.device), right=True).int()
    rows = _Rows.of(token, len(hidden))
    x: Float[Tensor, "N h"] = _Gathered.apply(hidden, rows)
    pre = _with_lora(x, base.up, lora.up_a, lora.up_b, lora.scale, ends)
    if base.up_bias is not None:
        pre = pre + base.up_bias.detach().index_select(0, expert)
    inner = base.activation(pre) * weight
    out = _with_lora(inner, base.down, lora.down_a, lora.down_b, lora.scale, ends)
    if base.down_bias is not None:
        out = out + weight * base.down_bias.detach().index_select(0, expert)
    y: Float[Tensor, "T h"] = _Summed.apply(out, rows)
    return y


def _with_lora(
    x: Float[Tensor, "N in"],
    weight: Float[Tensor, "M in out"] | OnDemand,
    a: Float[Tensor, "M r in"],
    b: Float[Tensor, "M out r"],
    scale: float,
    ends: Int[Tensor, " M"],
) -> Float[Tensor, "N out"]:
    """x W + s (x A^T) B^T, each row by its own expert; ranks are filled up with zeros."""
    y: Float[Tensor, "N out"]
    if isinstance(weight, NarrowedExperts):
        y = _NarrowedProduct.apply(x, weight, ends)
    else:
        assert isinstance(weight, Tensor)
        y = _Product.apply(x, weight.detach(), ends)
    if not a.shape[1]:
        return y
    more = -a.shape[1] % (ROW_BYTES // 2)  # of bfloat16; no more work than without
    a, b = pad(a.to(x.dtype), (0, 0, 0, more)), pad(b.to(x.dtype), (0, more))
    thin = _Product.apply(x, a.transpose(1, 2), ends)
    return torch.add(y, _Product.apply(thin, b.transpose(1, 2), ends), alpha=scale)


class _Product(torch.autograd.Function):
    """x W by groups of rows. A weight that is not trained needs no input kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "N in"], weight: Float[Tensor, "M in out"], ends: Int[Tensor, " M"]
    ) -> Float[Tensor, "N out"]:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, ends)
        return _grouped(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Float[Tensor, "N out"]) -> tuple[Tensor | None, ...]:
        (x, weight, ends), d_y = ctx.saved_tensors, grads[0].contiguous()
        d_x = _grouped(d_y, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        if x is None:
            return d_x, None, None
        has_rows = ends > torch.cat([ends.new_zeros(1), ends[:-1]])
        # of an expert without rows the operator promises nothing
        d_weight = _grouped(x.t(), d_y, ends).masked_fill_(~has_rows.view(-1, 1, 1), 0)
        return d_x, d_weight, None


class _NarrowedProduct(torch.autograd.Function):
    """x W by groups of rows, for slices of a frozen weight, which are gathered again to go backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "N in"], weight: NarrowedExperts, ends: Int[Tensor, " M"]
    ) -> Float[Tensor, "N out"]:
        ctx.weight, ctx.ends = weight, ends
        return _grouped(x, weight.all_at_once(), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Float[Tensor, "N out"]) -> tuple[Tensor, None, None]:
        return _grouped(grads[0].contiguous(), ctx.weight.all_at_once().transpose(1, 2), ctx.ends), None, None


def _grouped(a: Float[Tensor, "_ _"], b: Float[Tensor, "..."], ends: Int[Tensor, " M"]) -> Float[Tensor, "..."]:
    """`grouped_mm`, and the same in float64, which it does not take: that is for gradient checks alone."""
    if a.dtype != torch.float64:
        return grouped_mm(a, b, offs=ends)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    if b.dim() == 3:
        return torch.cat([part @ one for part, one in zip(a.split(lengths), b, strict=True)])
    return torch.stack([part @ one for part, one in zip(a.split(lengths, 1), b.split(lengths), strict=True)])


@dataclass(frozen=True)
class _Rows:
    """Which token each row belongs to, the rows in order of their tokens, and where in that order each token's begin."""

    token: Int[Tensor, " N"]
    by_token: Int[Tensor, " N"]
    bounds: Int[Tensor, " bounds"]

    @classmethod
    def of(cls, token: Int[Tensor, " N"], num_tokens: int) -> "_Rows":
        by_token = torch.argsort(token, stable=True)
        bounds = torch.searchsorted(token[by_token], torch.arange(num_tokens + 1, device=token.device))
        return cls(token, by_token, bounds)

    def gather(self, per_token: Float[Tensor, "T h"]) -> Float[Tensor, "N h"]:
        return per_token.index_select(0, self.token)

    def add_up(self, rows: Float[Tensor, "N h"]) -> Float[Tensor, "T h"]:
        wide = rows.index_select(0, self.by_token).to(torch.promote_types(rows.dtype, torch.float32))
        # unsafe: without the check of the bounds, for which the host would wait
        return torch.segment_reduce(wide, "sum", offsets=self.bounds, axis=0, unsafe=True).to(rows.dtype)


class _Gathered(torch.autograd.Function):
    """Each row's token."""

    @staticmethod
    def forward(ctx: Any, per_token: Float[Tensor, "T h"], rows: _Rows) -> Float[Tensor, "N h"]:
        ctx.rows = rows
        return rows.gather(per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Float[Tensor, "N h"]) -> tuple[Float[Tensor, "T h"], None]:
        return ctx.rows.add_up(grads[0]), None


class _Summed(torch.autograd.Function):
    """The sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, per_row: Float[Tensor, "N h"], rows: _Rows) -> Float[Tensor, "T h"]:
        ctx.rows = rows
        return rows.add_up(per_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Float[Tensor, "T h"]) -> tuple[Float[Tensor, "N h"], None]:
        return ctx.rows.gather(grads[0]), None
