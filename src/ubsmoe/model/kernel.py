"""The routed expert kernel with LoRA: only the (token, expert) pairs that were chosen are computed, forward and backward.

    pre = x W1 + s (x A1^T) B1^T,   inner = act(pre),   y(x) += w [inner W2 + s (inner A2^T) B2^T]      one pair (x, expert)

Pairs are sorted by expert once. Each expert's rows then go through the whole layer before the next expert's, so that what lies
between two products stays in the cache and no tensor of all pairs is written but `pre`. Backward recomputes act(pre) and the
gathered inputs instead of keeping them, and forms no gradient of a frozen weight. The gate weight w multiplies the narrow side
(inner, not y), and dL/dw = <dL/d(w inner), inner> needs no output either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

Groups = list[tuple[int, int, int]]  # (expert, first row, row after the last)


@dataclass(frozen=True)
class ExpertWeights:
    """A layer's frozen experts in one orientation.

    `up` [M, h, 2f] and `down` [M, f, h] are views; biases or None. `activation` is the family's own; `is_swiglu` says that it is
    the plain silu(gate) * up with gate and up side by side, whose gradient the kernel knows.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    is_swiglu: bool

    @classmethod
    def of(cls, module: nn.Module) -> "ExpertWeights":
        """Read them from a transformers experts module."""
        name = up_name(module)

        def oriented(weight: Any) -> Tensor:
            return weight if module.is_transposed else weight.transpose(1, 2)

        gate = getattr(type(module), "_apply_gate", None)
        return cls(
            up=oriented(getattr(module, name)),
            down=oriented(module.down_proj),
            up_bias=getattr(module, f"{name}_bias") if module.has_bias else None,
            down_bias=module.down_proj_bias if module.has_bias else None,  # type: ignore[arg-type]
            activation=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
            # transformers gives every class without a gate of its own this one default
            is_swiglu=bool(module.has_gate)
            and getattr(gate, "__name__", "") == "_default_apply_gate"
            and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"),
        )


def up_name(module: nn.Module) -> str:
    """The name of the first expert matrix: gate and up fused, or up alone."""
    return "gate_up_proj" if module.has_gate else "up_proj"


@dataclass(frozen=True)
class Lora:
    """A layer's adapter: A [M, r, in] and B [M, out, r] of both matrices, and the factor alpha / r."""

    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scale: float

    def detached(self) -> "Lora":
        """The same numbers, receiving no gradient."""
        return Lora(self.up_a.detach(), self.up_b.detach(), self.down_a.detach(), self.down_b.detach(), self.scale)


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
    order = torch.argsort(expert, stable=True)
    groups, start = [], 0
    for index, count in enumerate(torch.bincount(expert, minlength=base.up.shape[0]).tolist()):
        if count:
            groups.append((index, start, start + count))
        start += count
    factors = (lora.up_a, lora.up_b, lora.down_a, lora.down_b)
    result: Tensor = _RoutedExperts.apply(hidden, pair_weight[order], *factors, lora.scale, base, token[order], groups)
    return result


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
        token: Tensor,
        groups: Groups,
    ) -> Tensor:
        lora = _kernel_layout(Lora(up_a, up_b, down_a, down_b, scale), hidden.dtype)
        weight = pair_weight.to(hidden.dtype).unsqueeze(-1)
        pairs, rank = token.numel(), up_a.shape[1]
        pre = hidden.new_empty(pairs, base.up.shape[2])
        up_low, down_low = hidden.new_empty(pairs, rank), hidden.new_empty(pairs, down_a.shape[1])
        y = torch.zeros_like(hidden)
        for e, start, stop in groups:
            rows, w, p = token[start:stop], weight[start:stop], pre[start:stop]
            x = hidden.index_select(0, rows)
            _linear(x, base.up[e], base.up_bias, e, lora.up_a[e], lora.up_b[e], scale, p, up_low[start:stop])
            inner = base.activation(p) * w
            out = x  # as wide as the result, and no longer needed
            _linear(inner, base.down[e], None, e, lora.down_a[e], lora.down_b[e], scale, out, down_low[start:stop])
            if base.down_bias is not None:
                out.addcmul_(w, base.down_bias[e])
            y.index_add_(0, rows, out)
        ctx.save_for_backward(hidden, pair_weight, token, pre, up_low, down_low)
        ctx.lora, ctx.base, ctx.groups, ctx.factor_dtype = lora, base, groups, up_a.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, pair_weight, token, pre, up_low, down_low = ctx.saved_tensors
        lora, base, scale = ctx.lora, ctx.base, ctx.lora.scale
        need_hidden, need_weight = list(ctx.needs_input_grad[:2])
        need_lora = any(ctx.needs_input_grad[2:6])
        weight = pair_weight.to(hidden.dtype).unsqueeze(-1)
        grad = grads[0].contiguous()
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(pair_weight) if need_weight else None
        d_up_a, d_up_b = torch.zeros_like(lora.up_a), torch.zeros_like(lora.up_b)
        d_down_a, d_down_b = torch.zeros_like(lora.down_a), torch.zeros_like(lora.down_b)
        for e, start, stop in ctx.groups:
            rows, w = token[start:stop], weight[start:stop]
            g = grad.index_select(0, rows)
            d_low = torch.mm(g, lora.down_b[e].t())
            d_inner = torch.mm(g, base.down[e].t()).addmm_(d_low, lora.down_a[e], alpha=scale)  # by w * inner
            inner, d_pre = _activation_backward(base, pre[start:stop], d_inner, w, d_weight, start, stop)
            if d_weight is not None and base.down_bias is not None:
                d_weight[start:stop] += torch.mv(g, base.down_bias[e])
            if need_lora:
                torch.mm(d_low.mul_(w).t(), inner, out=d_down_a[e])
                torch.mm(down_low[start:stop].t(), g, out=d_down_b[e])
            d_low = torch.mm(d_pre, lora.up_b[e].t())
            if need_lora:
                x = hidden.index_select(0, rows)
                torch.mm(d_low.t(), x, out=d_up_a[e])
                torch.mm(up_low[start:stop].t(), d_pre, out=d_up_b[e])
            if d_hidden is not None:
                d_x = torch.mm(d_pre, base.up[e].t(), out=g).addmm_(d_low, lora.up_a[e], alpha=scale)
                d_hidden.index_add_(0, rows, d_x)
        if not need_lora:
            return d_hidden, d_weight, *(None,) * 8
        factors = (d_up_a, d_up_b.transpose(1, 2), d_down_a, d_down_b.transpose(1, 2))
        return d_hidden, d_weight, *(factor.mul_(scale).to(ctx.factor_dtype) for factor in factors), *(None,) * 4


def _kernel_layout(lora: Lora, dtype: torch.dtype) -> Lora:
    """B as [M, r, out] contiguous: the thin products that meet it run several times faster than with [M, out, r]."""
    up_b, down_b = lora.up_b.to(dtype).transpose(1, 2), lora.down_b.to(dtype).transpose(1, 2)
    return Lora(lora.up_a.to(dtype), up_b.contiguous(), lora.down_a.to(dtype), down_b.contiguous(), lora.scale)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, e: int, a: Tensor, b: Tensor, scale: float, out: Tensor, low: Tensor
) -> None:
    """out = x W + s (x A^T) B^T (+ bias) and low = x A^T, into what the caller holds."""
    torch.mm(x, weight, out=out)
    torch.mm(x, a.t(), out=low)
    out.addmm_(low, b, alpha=scale)
    if bias is not None:
        out.add_(bias[e])


def _activation_backward(
    base: ExpertWeights, pre: Tensor, d_inner: Tensor, w: Tensor, d_weight: Tensor | None, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """act(pre) and the gradient by `pre`; on the way, dL/dw = <dL/d(w inner), inner> into its slice."""
    if base.is_swiglu:
        gate, up = pre.chunk(2, dim=-1)
        silu_gate = silu(gate)
        inner = silu_gate * up
    else:
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            live = base.activation(leaf)
        inner = live.detach()
    if d_weight is not None:
        d_weight[start:stop] = (d_inner * inner).sum(-1)
    d_inner.mul_(w)
    if not base.is_swiglu:
        return inner, torch.autograd.grad(live, leaf, d_inner)[0]
    d_pre = torch.empty_like(pre)
    d_gate, d_up = d_pre.chunk(2, dim=-1)
    torch.mul(d_inner, silu_gate, out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(d_inner.mul_(up), gate))
    return inner, d_pre
